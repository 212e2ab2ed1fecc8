"""Many runs on the same footing: plain baselines, and the report that shows them."""

from tunewise.study.baselines import measure_baseline
from tunewise.study.report import run_report, write_report

__all__ = ["measure_baseline", "run_report", "write_report"]

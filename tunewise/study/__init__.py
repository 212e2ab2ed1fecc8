"""Many runs on the same footing: plain baselines, and the report that shows them."""

from tunewise.study.baselines import majority, tfidf
from tunewise.study.report import run_report, write_report

__all__ = ["majority", "run_report", "tfidf", "write_report"]

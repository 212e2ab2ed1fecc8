"""The package as it is installed: public names, import time, pins, files that must travel with it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from fnmatch import fnmatch
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

import tunewise

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
LOCK = [line for line in (ROOT / "requirements.lock").read_text().splitlines() if not line.startswith("#")]
HEAVY = ("torch", "transformers", "pandas", "sklearn", "altair", "datasets", "numpy", "pydantic")


def python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    return done.stdout.strip()


def fastest(code: str) -> float:
    """The best of five, since a busy machine only ever makes it slower."""
    timed = f"import time; start = time.perf_counter()\n{code}\nprint(time.perf_counter() - start)"
    return min(float(python(timed).splitlines()[-1]) for _ in range(5))


@pytest.mark.parametrize("module", ["tunewise", "tunewise.cli", "tunewise.assets", "tunewise.core.errors"])
def test_nothing_heavy_is_imported(module: str) -> None:
    assert python(f"import sys, {module}; print([m for m in {HEAVY} if m in sys.modules])") == "[]"


def test_import_and_help_are_quick() -> None:
    assert fastest("import tunewise") < 0.2
    assert fastest("from tunewise.cli import run; run(['--help'])") < 0.5


def test_public_names_are_there() -> None:
    for name in tunewise.__all__:
        assert getattr(tunewise, name) is not None
    assert set(tunewise.__all__) <= set(dir(tunewise))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        tunewise.nothing  # noqa: B018


def test_functions_win_over_modules_of_their_name() -> None:
    code = "import tunewise.tune, tunewise as tw; from tunewise.tune import tune; print(tw.tune is tune)"
    assert python(code) == "True"


def test_methods_are_attributes() -> None:
    assert tunewise.methods.lora(rank=3).name == "lora(rank=3)"
    assert "lora" in dir(tunewise.methods) and "lora" in list(tunewise.methods)
    with pytest.raises(AttributeError, match='did you mean "lora"'):
        tunewise.methods.lorra  # noqa: B018


def test_version_is_said_once_and_the_same() -> None:
    assert tunewise.__version__ == PROJECT["project"]["version"]


def test_lock_is_exact_and_names_no_host() -> None:
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+==[A-Za-z0-9.]+", line) for line in LOCK)
    names = [canonicalize_name(line.split("==")[0]) for line in LOCK]
    assert names == sorted(set(names), key=names.index)
    assert "torchvision" not in names


def test_lock_meets_every_floor() -> None:
    pinned = {canonicalize_name(line.split("==")[0]): Version(line.split("==")[1]) for line in LOCK}
    extras = PROJECT["project"]["optional-dependencies"]
    wanted = [
        *PROJECT["project"]["dependencies"],
        *(r for e in ("peft", "assets", "test", "dev") for r in extras[e]),
    ]
    for text in wanted:
        requirement = Requirement(text)
        if requirement.name == "tunewise":
            continue
        assert pinned[canonicalize_name(requirement.name)] in requirement.specifier, text
        assert all(s.operator == ">=" for s in requirement.specifier), f"{text}: floors, no caps"


def test_every_data_file_of_the_package_is_declared() -> None:
    declared = PROJECT["tool"]["setuptools"]["package-data"]
    missing = []
    for path in (ROOT / "tunewise").rglob("*"):
        if path.is_dir() or "__pycache__" in path.parts or path.suffix in (".py", ".pyc"):
            continue
        inside = str(path.relative_to(ROOT / "tunewise"))
        patterns = [
            "/".join([*package.split(".")[1:], pattern])
            for package, some in declared.items()
            for pattern in some
        ]
        if not any(fnmatch(inside, pattern) for pattern in patterns):
            missing.append(inside)
    assert missing == []


def test_every_folder_of_code_is_a_package() -> None:
    folders = {p.parent for p in (ROOT / "tunewise").rglob("*.py")}
    assert [str(f) for f in folders if not (f / "__init__.py").is_file()] == []


def test_continuous_integration_runs_the_tests() -> None:
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    assert "make test" in script.read_text()
    targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.M)
    assert {"venv", "demo", "test", "slow"} <= set(targets)


@pytest.mark.slow
def test_wheel_holds_everything(tmp_path: Path) -> None:
    import zipfile

    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        str(tmp_path),
        str(ROOT),
    ]
    subprocess.run(command, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    held = set(zipfile.ZipFile(wheel).namelist())
    ours = {
        str(p.relative_to(ROOT))
        for p in (ROOT / "tunewise").rglob("*")
        if p.is_file() and "__pycache__" not in p.parts
    }
    assert ours <= held
    assert not any(name.startswith("tests/") for name in held)

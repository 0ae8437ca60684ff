"""What a wheel holds beside Python files: skeletons, launchers, tables."""

import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_a_wheel_holds_tables_and_skeletons(tmp_path):
    """What setuptools copies into it, from a tree in which a table was published."""
    for name in ("pyproject.toml", "setup.py", "README.md"):
        shutil.copy(ROOT / name, tmp_path)
    for name in ("kdagen", "autotune", "templates"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "autotune" / "tables" / "some-gpu-3.json").write_text("{}")
    command = [sys.executable, "setup.py", "-q", "build", "--build-base", "made"]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    made = tmp_path / "made" / "lib" / "kdagen"
    wanted = {
        p.relative_to(ROOT) for f in ("autotune", "templates") for p in (ROOT / f).rglob("*.*") if "__" not in str(p)
    }
    assert {p for p in wanted if not (made / p).exists()} == set()
    assert (made / "autotune" / "tables" / "some-gpu-3.json").exists()
    assert (made / "build" / "launcher.h").exists() and (made / "lower" / "native.c.j2").exists()

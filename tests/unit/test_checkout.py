"""kdagen from a checkout that is on the path and not installed, as on a GPU machine that it was carried to."""

import json
import subprocess
import sys
from pathlib import Path

CHECKOUT = Path(__file__).parents[2]


def run(*words: str) -> str:
    """What python prints that knows no installed package; no editable install either."""
    script = f"import sys; sys.path.insert(0, {str(CHECKOUT)!r}); {'; '.join(words)}"
    return subprocess.run([sys.executable, "-I", "-S", "-c", script], capture_output=True, text=True, check=True).stdout


def test_packages_that_stand_beside_kdagen_are_found():
    found = run(
        "import kdagen.autotune.sweep as m, kdagen.templates", "print(m.__file__, kdagen.templates.__path__[0])"
    )
    assert found.split() == [str(CHECKOUT / "autotune/sweep.py"), str(CHECKOUT / "templates")]


def test_the_worker_starts_without_any_package():
    """It then says what is missing: torch."""
    found = run("sys.argv[1:] = ['cuda:0']", "from kdagen.autotune import worker", "worker.main()")
    assert json.loads(found)["reason"] == "ModuleNotFoundError: No module named 'torch'"

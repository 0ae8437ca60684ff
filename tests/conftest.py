"""`golden` compares text with a file under tests/golden; `pytest --update-golden` rewrites the files instead."""

import os
from pathlib import Path

import pytest

# Before torch is loaded: workers of `pytest -n` share the cores, and loops of two threads would wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")

FOLDER = Path(__file__).parent / "golden"


def pytest_configure(config):
    """Whoever tuned for this machine has other schedules, and bits: tests see no tables of a user but their own."""
    from kdagen.autotune import select

    own = select.user_tables
    select.user_tables = lambda: own() if "KDAGEN_CACHE_DIR" in os.environ else Path(os.devnull)


def pytest_addoption(parser):
    parser.addoption("--update-golden", action="store_true", help="rewrite tests/golden from what the code gives now")


@pytest.fixture
def golden(request):
    """golden(file name, text): the file holds exactly this text."""

    def compare(name: str, text: str) -> None:
        path = FOLDER / name
        if request.config.getoption("--update-golden"):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        assert path.is_file(), f"no golden file {name}: run pytest --update-golden"
        assert text == path.read_text()

    return compare

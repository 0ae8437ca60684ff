"""The programs under examples/, as modules and as commands. Options are dicts: {"save_every": 4} is --save-every 4."""

import importlib.util
import subprocess
import sys
from pathlib import Path

from click.testing import CliRunner

FOLDER = Path(__file__).parents[1] / "examples"
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]


def load(name: str):
    """An example as a module."""
    spec = importlib.util.spec_from_file_location(f"example_{name}", FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def words(options: dict) -> list[str]:
    """As a command line has them."""
    return [str(word) for name, x in options.items() for word in (f"--{name.replace('_', '-')}", x)]


def run(module, *given, **options) -> str:
    """What an example's command prints, in this process; it must end well."""
    done = CliRunner().invoke(module.main, [*map(str, given), *words(options)])
    assert done.exit_code == 0, done.output
    return done.output


def start(name: str, *given, processes: int = 0, **options) -> subprocess.Popen:
    """An example in a process of its own, or in several under torchrun."""
    before = [*TORCHRUN, str(processes)] if processes else []
    options = words(options | {"threads": 1})
    command = [sys.executable, *before, str(FOLDER / f"{name}.py"), *map(str, given), *options]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

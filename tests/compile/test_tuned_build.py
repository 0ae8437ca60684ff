"""`kdagen build` where tables have schedules: their kernels beside the default ones, which stay what they are."""

import hashlib
import json
from pathlib import Path

import pytest
import tuned_tables
from click.testing import CliRunner
from kdagen.autotune import choose, select
from kdagen.autotune.select import Key

from kdagen import cli

pytestmark = pytest.mark.nvcc
LINE = ["build", "--arch", "sm90", "--op", "gla", "--head-dim", "64", "--only", "decode", "--out"]
DEFAULT = "sm90-bf16-64x64-decode"
TUNED = {"v_tile": 64, "threads": 128, "skeleton": "decode"}


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    """One cache for this module, so that each kernel is compiled once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KDAGEN_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))
        select.tables.cache_clear()
        yield
    select.tables.cache_clear()


def tables(*schedules: dict) -> None:
    """A table with an entry for each of these schedules, from bucket 11 on."""
    key = Key(choose.recurrence_of("gla"), "decode", "sm90", (64, 64), 1, "bfloat16", "bfloat16", "KV float32",
              "NVIDIA H100 80GB HBM3", 132, 11)  # fmt: skip
    entries = [tuned_tables.entry(s, key, bucket=11 + i) for i, s in enumerate(schedules)]
    tuned_tables.write(select.user_tables(), entries)


def build(out: Path, *options: str) -> dict[str, str]:
    """The hash of every file that a build leaves, but the lock."""
    result = CliRunner().invoke(cli.main, [*LINE, str(out), *options], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    files = (path for path in out.rglob("*") if path.is_file() and path.name != ".lock")
    return {str(path.relative_to(out)): hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(files)}


def test_tuned_kernels_stand_beside_the_default_ones(tmp_path):
    tables()
    plain = build(tmp_path / "ops")
    assert {Path(name).parent.name for name in plain} == {"", DEFAULT}

    tables(TUNED, {**TUNED, "v_tile": 32})  # the second is the default
    assert (
        build(tmp_path / "untuned", "--untuned") == build(tmp_path / "given", "--decode-schedule", "v_tile=32") == plain
    )
    both = build(tmp_path / "ops")
    (folder,) = {Path(name).parent.name for name in both} - {"", DEFAULT}
    assert folder.startswith(f"{DEFAULT}-t")
    manifests = [json.loads((tmp_path / "ops" / "gla" / f / "manifest.json").read_text()) for f in (DEFAULT, folder)]
    assert [(m["plan"]["schedule"]["v_tile"], [e["key"]["bucket"] for e in m["tuned"]]) for m in manifests] == [
        (32, [12]), (64, [11]),
    ]  # fmt: skip
    same = {name for name in plain if both[name] == plain[name]}
    assert plain.keys() - same == {f"gla/{DEFAULT}/manifest.json"}

    assert build(tmp_path / "one", "--gpu", "H100").keys() == both.keys()
    tables()
    assert build(tmp_path / "ops") == plain

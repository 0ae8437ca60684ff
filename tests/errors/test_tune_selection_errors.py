"""What the choice among schedules, and builds by it, refuse, and in which words."""

import pytest
import tuned_tables
from click.testing import CliRunner
from kdagen.autotune import select, variants

from kdagen import cli
from kdagen.errors import ArgumentError, ArtefactError


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("KDAGEN_CACHE_DIR", str(tmp_path))
    select.tables.cache_clear()
    yield
    select.tables.cache_clear()


@pytest.mark.parametrize(
    "text",
    [
        "", "{", "[]", '{"format": 2, "entries": []}', '{"format": 1}', '{"format": 1, "entries": [{"key": {}}]}',
        '{"format": 1, "entries": [{"key": {"head_dim": [1, 2], "warps": 3}}]}',
    ],
)  # fmt: skip
def test_a_table_that_is_none(tmp_path, text):
    path = tmp_path / "tables" / "some-gpu-3.json"
    path.parent.mkdir()
    path.write_text(text)
    with pytest.raises(ArtefactError) as error:
        select.tables()
    assert str(error.value) == (
        f"{path} is not a table of this kdagen (damaged, or of another version): publish it anew, or remove it"
    )


def test_a_gpu_that_nobody_knows():
    tuned_tables.write(select.user_tables(), [tuned_tables.entry("a", device=("Some GPU", 3))])
    variants.check_gpu("Some GPU", ["sm90"])
    with pytest.raises(ArgumentError) as error:
        variants.check_gpu("Voodoo", ["sm90"])
    assert str(error.value) == (
        "--gpu Voodoo: expected one of H100, H200, A100, B200, RTX 4090, RTX 5090, MI300X, Some GPU; `kdagen tune` "
        "makes tables for others"
    )


def test_a_gpu_of_another_arch():
    with pytest.raises(ArgumentError) as error:
        variants.check_gpu("RTX 4090", ["sm80", "sm90"])
    assert str(error.value) == ("--gpu RTX 4090 is sm89: expected a GPU of --arch sm80,sm90, or that arch too")


def test_tuned_for_a_gpu_and_untuned_exclude_each_other(tmp_path):
    line = ["build", "--arch", "sm90", "--gpu", "H100", "--untuned", "--out", str(tmp_path / "ops")]
    result = CliRunner().invoke(cli.main, line)
    assert result.exit_code != 0 and not (tmp_path / "ops").exists()
    text = " ".join([result.output, str(result.exception)])
    assert "--gpu chooses among tuned schedules, --untuned leaves them out: expected one of the two" in text

"""`kdagen explain`: golden text, LaTeX that is well formed, and what is said of savings."""

import re

import pytest
from click.testing import CliRunner
from foreign import CASES

from kdagen import zoo
from kdagen.cli_explain import command
from kdagen.explain import compare, explain, latex


@pytest.mark.parametrize("name", ["kda", "kda_bounded", "deltaproduct", "mamba2", "linear_attention"])
def test_explanation(name, golden):
    golden(f"explain_{name}.txt", explain(zoo.get(name)))


def test_kda_against_dplr(golden):
    golden("explain_kda_against_dplr.txt", compare(zoo.get("kda"), zoo.get("dplr")))


def test_latex(golden):
    golden("explain_kda.tex", latex(zoo.get("kda")))


def test_kda_halves_the_secondary_matrices_of_dplr_and_drops_three_products():
    text = " ".join(compare(zoo.get("kda"), zoo.get("dplr")).split())
    assert text.startswith("kda has 2 secondary matrices a chunk where dplr has 4, and does without 3 of its other")


@pytest.mark.parametrize("name", [*zoo.names(), *CASES])
def test_any_recurrence_can_be_explained(name):
    recurrence = CASES[name][0] if name in CASES else zoo.get(name)
    text = explain(recurrence)
    for heading in ("Canonical form", "Chunk form", "Secondary matrices", "Cost", "Decays"):
        assert f"\n{heading}\n" in text
    assert all(line == line.rstrip() for line in text.splitlines())
    well_formed(latex(recurrence))


def well_formed(document):
    """Braces and environments close, each line of an align has one mark, no text subscript outside of braces."""
    assert document.count("{") == document.count("}")
    assert document.count(r"\left") == document.count(r"\right")
    opened = re.findall(r"\\begin\{(.*?)\}", document)
    assert sorted(opened) == sorted(re.findall(r"\\end\{(.*?)\}", document))
    blocks = re.findall(r"\\begin\{align\*\}\n(.*?)\n\\end", document, flags=re.DOTALL)
    assert blocks
    for line in (line for block in blocks for line in block.split(" \\\\\n")):
        assert line.count("&=") == 1
        assert not re.search(r"_\w+_|_\{[^{}]*\}_", line), f"double subscript in {line}"


def run(*args):
    return CliRunner().invoke(command, args)


def test_command(golden):
    assert run("kda").output == explain(zoo.get("kda"))
    assert run("kda", "--against", "dplr").output == compare(zoo.get("kda"), zoo.get("dplr"))
    assert run("kda", "--latex").output == latex(zoo.get("kda"))
    golden("tensor_kda.txt", run("kda", "--tensor-ir").output)


def test_views_exclude_each_other():
    result = run("kda", "--latex", "--against", "dplr")
    assert result.exit_code == 2
    assert "three views: choose one" in result.output

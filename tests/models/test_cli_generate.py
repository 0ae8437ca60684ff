"""`kdagen generate` on small saved models: text, ids, batches, caches that are gone on from, what is said meanwhile."""

import base64
import io
import json
import subprocess
import sys

import pytest
import tokenizers
import torch
from click.testing import CliRunner
from rich.console import Console
from small_models import model

from kdagen import cli
from kdagen.models import Cache, KimiLinear
from kdagen.models.progress import Brief, Live
from kdagen.models.tokenizer import RELEASED, open_tokenizer

PROMPTS = [[1, 2, 3], [4], [5, 6, 7, 8, 9, 10, 11]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model of 97 tokens without a tokenizer."""
    path = tmp_path_factory.mktemp("ids")
    model().save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def bytes_folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("bytes")
    model(vocab_size=256).save_pretrained(path)
    return path


def run(*words):
    found = CliRunner().invoke(cli.main, ["generate", "--device", "cpu", *map(str, words)])
    assert found.exit_code == 0, (found.output, found.exception)
    return found


def ids(folder, prompts, *words) -> list[list[int]]:
    """New tokens of prompts that are given as ids."""
    given = [word for prompt in prompts for word in ("--tokens", ",".join(map(str, prompt)))]
    return [[*map(int, line.split(","))] for line in run("--model", folder, *given, *words).stdout.splitlines()]


def test_help_imports_nothing_heavy():
    code = """
import sys
from click.testing import CliRunner
from kdagen import cli
for words in (["--help"], ["generate", "--help"]):
    assert CliRunner().invoke(cli.main, words).exit_code == 0
print(sorted({"torch", "tilelang", "sympy", "rich", "safetensors", "tokenizers", "tiktoken"} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "[]\n", done.stderr


# -- tokens -----------------------------------------------------------------------------------------------------------


def test_ids(folder):
    expected = KimiLinear.from_pretrained(folder).generate(PROMPTS, 9)
    assert ids(folder, PROMPTS, "--max-new-tokens", 9) == expected
    assert ids(folder, PROMPTS, "--max-new-tokens", 9, "--chunk", 2) == expected
    assert ids(folder, PROMPTS[:1], "--max-new-tokens", 9) == expected[:1]
    assert ids(folder, PROMPTS[:1], "--max-new-tokens", 9, "--stop", expected[0][2]) == [expected[0][:3]]


def test_drawing(folder):
    drawing = ("--temperature", 1.2, "--top-p", 0.9)
    drawn = [ids(folder, PROMPTS, "--max-new-tokens", 20, *drawing, "--seed", seed) for seed in (1, 1, 2)]
    expected = KimiLinear.from_pretrained(folder).generate(PROMPTS, 20, temperature=1.2, top_p=0.9, seed=1)
    assert drawn[0] == drawn[1] == expected != drawn[2]


def test_dtype(folder):
    said = ids(folder, PROMPTS, "--dtype", "float64", "--max-new-tokens", 5)
    assert said == KimiLinear.from_pretrained(folder, torch.float64).generate(PROMPTS, 5)


# -- caches -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("drawing", [(), ("--temperature", "1")], ids=["greedy", "drawn"])
def test_two_runs_are_one(folder, tmp_path, drawing):
    seed = ("--seed", 3) if drawing else ()
    whole = ids(folder, PROMPTS, "--max-new-tokens", 9, *drawing, *seed)
    first = ids(folder, PROMPTS, "--max-new-tokens", 4, *drawing, *seed, "--save-cache", tmp_path / "cache")
    goes_on = ("--load-cache", tmp_path / "cache", "--save-cache", tmp_path / "cache", *drawing)
    rest = [ids(folder, [], "--max-new-tokens", count, *goes_on) for count in (1, 4)]
    assert [a + b + c for a, b, c in zip(first, *rest)] == whole


def test_another_process_goes_on(bytes_folder, tmp_path):
    words = ["--model", bytes_folder, "--prompt", "go on", "--max-new-tokens", 12]
    whole = run(*words).stdout
    run(*words[:-1], 0, "--save-cache", tmp_path / "cache")  # reads the prompt alone
    command = [sys.executable, "-m", "kdagen.cli", "generate", "--device", "cpu", *map(str, words[:2])]
    command += ["--max-new-tokens", "12", "--load-cache", str(tmp_path / "cache")]
    done = subprocess.run(command, capture_output=True, check=True)
    assert done.stdout.decode() == whole
    assert "read 1 tokens" in done.stderr.decode()


def test_prompts_behind_a_cache(folder, tmp_path):
    """What was generated, then a new prompt: as one long prompt."""
    first = ids(folder, PROMPTS, "--max-new-tokens", 4, "--save-cache", tmp_path / "cache")
    second = ids(folder, [[9], [8, 7, 6], [5, 4]], "--max-new-tokens", 6, "--load-cache", tmp_path / "cache")
    behind = [a + b + c for a, b, c in zip(PROMPTS, first, [[9], [8, 7, 6], [5, 4]])]
    assert second == ids(folder, behind, "--max-new-tokens", 6)


def test_sequences_that_have_ended_stay_so(folder, tmp_path):
    whole = ids(folder, PROMPTS, "--max-new-tokens", 9)
    stop = whole[1][2]
    until = [row[: row.index(stop) + 1] if stop in row else row for row in whole]
    assert [len(row) < 9 for row in until] == [False, True, False]
    words = ("--stop", stop, "--max-new-tokens")
    first = ids(folder, PROMPTS, *words, 5, "--save-cache", tmp_path / "cache")
    rest = ids(folder, [], *words, 4, "--load-cache", tmp_path / "cache", "--save-cache", tmp_path / "cache")
    assert [first[0] + rest[0], first[1], first[2] + rest[1]] == until
    cache = Cache.load(tmp_path / "cache", KimiLinear.from_pretrained(folder))
    assert cache.lengths == [len(p) + len(row) - 1 for p, row in zip(PROMPTS, until)]
    behind = [a + b + [1] for a, b in zip(PROMPTS, until)]  # a prompt revives it, from where it ended
    revived = ids(folder, [[1]] * 3, "--max-new-tokens", 5, "--load-cache", tmp_path / "cache")
    assert revived == ids(folder, behind, "--max-new-tokens", 5)


# -- text -------------------------------------------------------------------------------------------------------------


def said(model, prompt: str, count: int) -> bytes:
    return bytes(model.generate([list(prompt.encode())], count)[0])


def test_bytes(bytes_folder, tmp_path):
    small, prompt = KimiLinear.from_pretrained(bytes_folder), "héllo\n"
    expected = said(small, prompt, 30).decode(errors="replace")
    words = ("--model", bytes_folder, "--max-new-tokens", 30)
    found = run(*words, "--prompt", prompt)
    assert found.stdout == expected + "\n" * (not expected.endswith("\n"))
    (tmp_path / "prompt.txt").write_text(prompt)
    assert run(*words, "--prompt-file", tmp_path / "prompt.txt").stdout == found.stdout
    several = run(*words, "--prompt", "a", "--prompt", prompt).stdout
    assert several == f"[1]\n{said(small, 'a', 30).decode(errors='replace')}\n[2]\n{expected}\n"


def test_stop_texts(bytes_folder):
    """What is written ends before the text, which may come in several tokens."""
    words = ("--model", bytes_folder, "--prompt", "hello", "--max-new-tokens", 40)
    whole = run(*words).stdout.rstrip("\n")
    at = next(i for i in range(3, 40) if whole[i : i + 2].isascii() and whole.index(whole[i : i + 2]) == i)
    assert run(*words, "--stop", "never", "--stop", whole[at : at + 2]).stdout == whole[:at] + "\n"


def test_tokenizer_json(tmp_path):
    """Words and the spaces before them, which a word's token alone does not say."""
    words = ["▁the", "▁cat", "▁sat", "s", "▁", *(f"▁w{n}" for n in range(92))]
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel({word: n for n, word in enumerate(words)}, "▁"))
    made.pre_tokenizer, made.decoder = tokenizers.pre_tokenizers.Metaspace(), tokenizers.decoders.Metaspace()
    small = model()
    small.save_pretrained(tmp_path)
    made.save(str(tmp_path / "tokenizer.json"))
    new = small.generate([[0, 1]], 12)[0]
    text = "".join(words[token] for token in new).replace("▁", " ")
    assert run("--model", tmp_path, "--prompt", "the cat", "--max-new-tokens", 12).stdout == text + "\n"
    stream = open_tokenizer(tmp_path, 97).stream(0)
    assert [stream.put(n) for n in (1, 3, 2)] == [" cat", "s", " sat"] and stream.rest() == ""


TEXT = "中文English混合, it's 1234567 fine.\n\n///北京市 Pascal  x"
CUT = [
    "中文",
    "English",
    "混合",
    ",",
    " it's",
    " ",
    "123",
    "456",
    "7",
    " fine",
    ".\n\n",
    "///",
    "北京市",
    " Pascal",
    " ",
]


def released(folder, extra: tuple = (), **names) -> dict:
    """A rank file with all bytes and `extra`, and what the release has beside it."""
    ranks = [*(bytes([b]) for b in range(256)), *(word.encode() for word in extra)]
    lines = [f"{base64.b64encode(word).decode()} {rank}" for rank, word in enumerate(ranks)]
    (folder / "tiktoken.model").write_text("\n".join(lines) + "\n")
    said = {"tokenizer_class": RELEASED, "added_tokens_decoder": {str(i): {"content": n} for n, i in names.items()}}
    (folder / "tokenizer_config.json").write_text(json.dumps(said))
    return {word: rank for rank, word in enumerate(ranks)}


def test_ranks(tmp_path):
    """Each part is one token here, if text is cut as the release cuts it."""
    wanted = tuple(dict.fromkeys(part for part in [*CUT, " x"] if len(part.encode()) > 1))
    ranks = released(tmp_path, wanted, im_end=300)
    tokenizer = open_tokenizer(tmp_path, 400)
    expected = [ranks[part.encode()] for part in [*CUT, " x"]]
    assert tokenizer.encode(TEXT) == expected
    assert tokenizer.encode("im_end<|reserved_token_399|>") == [300, 399]
    stream = tokenizer.stream(0)
    assert "".join(map(stream.put, [*expected, 300])) == TEXT + "im_end"
    assert [stream.put(b) for b in "é".encode()] == ["", "é"]


def test_ranks_of_long_texts(tmp_path):
    """Runs of 25,000 characters and texts of 400,000 are cut there, as the release does."""
    released(tmp_path, ("  ", "aa", "ab"))
    tokenizer = open_tokenizer(tmp_path, 400)
    found = tokenizer.encode(" " + "a" * 25_001 + "b")
    assert found[0] == 32 and found[1:12501] == [257] * 12_500 and found[12501:] == [258]
    assert tokenizer.encode("a b " * 100_000 + "a") == [97, 32, 98, 32] * 100_000 + [97]


# -- what is said meanwhile -------------------------------------------------------------------------------------------


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def steps(shown, clock):
    """A prompt of 8 tokens in 2 s, then 3 tokens of 2 sequences in 4 s."""
    with shown:
        for piece in ("so", " it\ngo", "es"):
            clock.now += 2
            if not shown.was_read:
                shown.read(8)
            shown.wrote(2)
            shown.text(piece)


def test_one_line_where_there_is_no_terminal():
    out, err, clock = io.StringIO(), io.StringIO(), Clock()
    steps(Brief(8, 6, 2, out, err, clock), clock)
    assert out.getvalue() == "so it\ngoes\n"
    assert err.getvalue() == "read 8 tokens in 2.0 s (4 a second); wrote 6 in 4.0 s (1 a second)\n"


@pytest.mark.parametrize("beside", [True, False])
def test_a_display_on_a_terminal(beside):
    """Text on the same terminal comes in whole lines above the bar; elsewhere at once."""
    screen, out, err, clock = io.StringIO(), io.StringIO(), io.StringIO(), Clock()
    console = Console(file=screen, force_terminal=True, width=80, color_system=None)
    shown = Live(8, 6, 2, console=console, beside=beside, out=out, err=err, clock=clock)
    pictures = []
    shown.wrote = lambda count: (Live.wrote(shown, count), pictures.append(shown.picture()))
    steps(shown, clock)
    assert out.getvalue() == ("" if beside else "so it\ngoes\n")
    assert ("so it\n" in screen.getvalue()) is beside
    assert "read 8 tokens in 2.0 s (4 a second); wrote 6 in 4.0 s (1 a second)" in err.getvalue()
    shot = Console(file=io.StringIO(), width=100)
    shot.print(Live(80, 6, console=console, clock=clock).picture())
    for picture in pictures:
        shot.print(picture)
    seen = shot.file.getvalue()
    assert "read 0 of 80 tokens" in seen and "wrote 4 in 2.0 s (1 a second)" in seen


def test_a_long_line_on_a_terminal():
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=10, color_system=None)
    with Live(1, 1, console=console, beside=True, err=io.StringIO()) as shown:
        shown.text("x" * 25)
        assert shown.line == "x" * 5
        shown.text("\n[b] :key:\n")
        assert "[b] :key:" in screen.getvalue()  # as it is, not as rich's markup
    assert "x" * 10 + "\n" in screen.getvalue() and "x" * 5 + "\n" in screen.getvalue()


def test_what_is_said(folder):
    assert run("--model", folder, "--tokens", "1,2,3", "--max-new-tokens", 4).stderr.startswith("read 3 tokens in ")


def test_prompts_alone_are_read(folder, tmp_path):
    said = run("--model", folder, "--tokens", "1,2,3", "--max-new-tokens", 0, "--save-cache", tmp_path / "c").stderr
    assert said.startswith("read 2 of 3 tokens")

"""Each message of `kdagen generate`: one line, and how to go on."""

import base64
import json
import sys

import pytest
from click.testing import CliRunner

from kdagen import cli
from kdagen.models import Config, KimiLinear
from kdagen.models.tokenizer import ALTERNATIVES

SMALL = {
    **{"vocab_size": 11, "hidden_size": 16, "intermediate_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2},
    **{"kv_lora_rank": 4, "qk_nope_head_dim": 4, "qk_rope_head_dim": 2, "v_head_dim": 4, "num_experts": 0},
    **{"linear_attn_config": {"head_dim": 8, "num_heads": 1}, "eos_token_id": 7},
}
RANKS = "".join(f"{base64.b64encode(bytes([b])).decode()} {b}\n" for b in range(256))


def folder_of(tmp_path_factory, **fields):
    path = tmp_path_factory.mktemp("model")
    KimiLinear(Config.of(SMALL | fields), seed=0).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model of 11 tokens."""
    return folder_of(tmp_path_factory)


@pytest.fixture(scope="module")
def bytes_folder(tmp_path_factory):
    return folder_of(tmp_path_factory, vocab_size=256)


def error(folder, *words) -> str:
    """The message of a call that fails; nothing goes to stdout."""
    found = CliRunner().invoke(cli.main, ["generate", "--model", str(folder), *map(str, words)])
    assert found.exit_code == 1 and not found.stdout, (found.output, found.exception)
    return found.stderr.removeprefix("error: ").rstrip("\n")


def test_no_such_folder(tmp_path):
    said = error(tmp_path / "nowhere", "--prompt", "a")
    assert said.startswith(f"{tmp_path}/nowhere: expected the config.json of a model: ")


def test_a_folder_without_parameters(tmp_path):
    Config.of(SMALL).save(tmp_path)
    said = f"{tmp_path}: expected model.safetensors, or model.safetensors.index.json and its shards"
    assert error(tmp_path, "--tokens", "1") == said


def test_prompts_that_do_not_go_together(folder):
    for option in ("--prompt", "--prompt-file"):
        assert error(folder, "--tokens", "1", option, "a") == (
            "--tokens beside --prompt or --prompt-file: expected all prompts as ids, or all as text"
        )


def test_no_prompt(folder, bytes_folder):
    said = "no prompt: expected --prompt, --prompt-file or --tokens, or --load-cache to go on from"
    assert error(folder) == said
    assert error(bytes_folder, "--prompt", "") == "a prompt is empty: expected some text"


def test_no_tokenizer(folder):
    assert error(folder, "--prompt", "a") == (
        f"{folder} has no tokenizer.json and no tiktoken.model, and a vocabulary of 11, not of 256 bytes: expected a "
        f"tokenizer, or token ids by --tokens 1,2,3"
    )


@pytest.mark.parametrize("text", ["1,-1", "11", "3,400,12"])
def test_ids_outside_the_vocabulary(folder, text):
    wrong = next(word for word in text.split(",") if not 0 <= int(word) < 11)
    said = f"{wrong} is outside the model's vocabulary: expected token ids from 0 to 10"
    assert error(folder, "--tokens", "1", "--tokens", text) == f"--tokens {text}: {said}"
    assert error(folder, "--tokens", "1", "--stop", text) == f"--stop {text}: {said}"


@pytest.mark.parametrize("text", ["", "1,,2", "a", "1 2"])
def test_ids_that_are_none(folder, text):
    expected = f"--tokens {text}: expected token ids with commas between them, such as 1,2,3"
    assert error(folder, "--tokens", text) == expected
    assert error(folder, "--tokens", "1", "--stop", text) == expected.replace("--tokens", "--stop", 1)


def test_prompt_files(bytes_folder, tmp_path):
    said = f"--prompt-file {tmp_path}/p: expected a file of text in UTF-8: "
    assert error(bytes_folder, "--prompt-file", tmp_path / "p").startswith(said)
    (tmp_path / "p").write_bytes(b"\xff")
    assert error(bytes_folder, "--prompt-file", tmp_path / "p").startswith(said)


def test_devices(folder):
    said = error(folder, "--tokens", "1", "--device", "abacus")
    assert said.startswith("--device abacus: expected a device of this machine, such as cpu or cuda: ")


# -- caches -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def cache(folder, tmp_path):
    """Two sequences, neither of them ended."""
    words = ["--tokens", "1,2", "--tokens", "3", "--max-new-tokens", "0", "--save-cache", str(tmp_path / "cache")]
    assert CliRunner().invoke(cli.main, ["generate", "--model", str(folder), *words]).exit_code == 0
    return tmp_path / "cache"


def test_where_a_cache_cannot_go(folder, tmp_path):
    path = tmp_path / "nowhere" / "cache"
    assert error(folder, "--tokens", "1", "--save-cache", path) == (
        f"--save-cache {path}: there is no folder {path.parent}: expected one that exists"
    )


def test_caches_of_others(cache, bytes_folder, folder, tmp_path_factory):
    fields = {"linear_attn_config": {"head_dim": 4, "num_heads": 1}}
    other = folder_of(tmp_path_factory, **fields)
    said = error(other, "--load-cache", cache)
    assert said.startswith(f"{cache}: the cache of another model: 0.state is [2, 1, 8, 8] there, [2, 1, 4, 4] here")
    weights = folder / "model.safetensors"
    said = f"--load-cache {cache}s: there is no such file: expected one that --save-cache wrote"
    assert error(folder, "--load-cache", f"{cache}s") == said
    said = f"{weights}: expected a cache that was saved by Cache.save, format kdagen-cache-1"
    assert error(folder, "--load-cache", weights) == said


def test_prompts_for_a_cache(cache, folder):
    assert error(folder, "--load-cache", cache, "--tokens", "1") == (
        f"{cache} holds 2 sequences, and there are 1 prompts: expected one for each, or none"
    )


def test_caches_without_an_end(folder, tmp_path):
    """Saved from Python, where nothing says what comes next."""
    small = KimiLinear.from_pretrained(folder)
    cache = small.new_cache(1)
    small.generate([[1, 2]], 2, cache=cache)
    cache.save(tmp_path / "cache")
    assert error(folder, "--load-cache", tmp_path / "cache") == (
        f"{tmp_path}/cache does not say which token comes next: expected --prompt or --tokens to go on with"
    )


def test_sequences_that_have_ended(folder, tmp_path):
    words = ["--tokens", "1", "--save-cache", str(tmp_path / "cache"), *(f"--stop={n}" for n in range(11))]
    assert CliRunner().invoke(cli.main, ["generate", "--model", str(folder), *words]).exit_code == 0
    assert error(folder, "--load-cache", tmp_path / "cache") == (
        f"{tmp_path}/cache: all of its sequences have ended: expected --prompt or --tokens to go on with"
    )


# -- tokenizers -------------------------------------------------------------------------------------------------------


@pytest.fixture
def text_folder(tmp_path):
    """A config of 300 tokens, and what the release has beside a rank file."""
    Config.of(SMALL | {"vocab_size": 300}).save(tmp_path)
    (tmp_path / "tiktoken.model").write_text(RANKS)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "TikTokenTokenizer"}))
    return tmp_path


def test_packages(text_folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "tiktoken", None)
    end = "which is not installed: pip install 'kdagen[models]', or give token ids by --tokens"
    said = f"{text_folder}/tiktoken.model is read by the package tiktoken, {end}"
    assert error(text_folder, "--prompt", "a") == said
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    (text_folder / "tokenizer.json").write_text("{}")
    said = f"{text_folder}/tokenizer.json is read by the package tokenizers, {end}"
    assert error(text_folder, "--prompt", "a") == said


def test_tokenizer_json(text_folder):
    path = text_folder / "tokenizer.json"
    path.write_text("{}")
    said = f"{path}: expected a tokenizer as the package tokenizers writes it: "
    assert error(text_folder, "--prompt", "a").startswith(said)


def test_a_tokenizer_of_another_model(tmp_path):
    import tokenizers

    Config.of(SMALL).save(tmp_path)
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 50}, "a"))
    made.save(str(tmp_path / "tokenizer.json"))
    said = "the tokenizer's 50 is outside the model's vocabulary: expected token ids from 0 to 10"
    assert error(tmp_path, "--prompt", "a") == said


@pytest.mark.parametrize("text", [None, "[]", '{"added_tokens_decoder": {"a": 1}}', "no json"])
def test_no_names_of_special_tokens(text_folder, text):
    path = text_folder / "tokenizer_config.json"
    path.unlink() if text is None else path.write_text(text)
    said = f"{path}: expected it beside tiktoken.model, with the special tokens in added_tokens_decoder: "
    assert error(text_folder, "--prompt", "a").startswith(said)


def test_rank_files_of_other_tokenizers(text_folder):
    """How they cut text is not in the file, and is not guessed."""
    end = (
        "than TikTokenTokenizer of the release: how it cuts text is not known here; give token ids by --tokens, or a "
        "tokenizer.json"
    )
    (text_folder / "tokenization_kimi.py").write_text("pat_str = [" + ", ".join(ALTERNATIVES[1:]))
    said = f"{text_folder}: tiktoken.model with another pattern in tokenization_kimi.py {end}"
    assert error(text_folder, "--prompt", "a") == said
    (text_folder / "tokenizer_config.json").write_text("{}")
    said = f"{text_folder}: tiktoken.model with another tokenizer_class {end}"
    assert error(text_folder, "--prompt", "a") == said


@pytest.mark.parametrize("text", ["YQ== 0 1", "YQ==", "Y 0", "YQ== a"])
def test_lines_of_rank_files(text_folder, text):
    path = text_folder / "tiktoken.model"
    path.write_text(text)
    said = f"{path}: expected lines of a token in base64 and its rank: "
    assert error(text_folder, "--prompt", "a").startswith(said)


@pytest.mark.parametrize("text", ["", "YQ== 0\n", RANKS + "YWE= 257\n"])
def test_ranks_with_gaps(text_folder, text):
    path = text_folder / "tiktoken.model"
    path.write_text(text)
    said = f"{path}: expected ranks from 0 up without gaps, those of all single bytes among them"
    assert error(text_folder, "--prompt", "a") == said


def test_more_ranks_than_the_model_knows(text_folder):
    Config.of(SMALL).save(text_folder)
    assert error(text_folder, "--prompt", "a") == (
        f"{text_folder}/tiktoken.model: 256 tokens for a model with a vocabulary of 11: expected the file and the "
        f"config.json of one model"
    )


def test_ctrl_c(folder, tmp_path, monkeypatch):
    def generate(*_, on_tokens, **__):
        on_tokens([3])
        raise KeyboardInterrupt

    monkeypatch.setattr(KimiLinear, "generate", generate)
    words = ["generate", "--model", str(folder), "--tokens", "1", "--save-cache", str(tmp_path / "cache")]
    found = CliRunner().invoke(cli.main, words)
    assert found.exit_code == 130 and found.stdout == "3\n"
    assert found.stderr.splitlines()[-1] == f"stopped; {tmp_path}/cache was not written"
    assert not (tmp_path / "cache").exists()

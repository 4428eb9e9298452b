"""Models, tokenizers and options that make no sense for examples/hqq-run: one sentence each."""

import json
import os
import shutil

import pytest

from cli_runner import MODEL
from hqq_runner import needs_hqq_run, refusal, run

pytestmark = needs_hqq_run

DEEP = "[" * 300_000 + "]" * 300_000
BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}


@pytest.fixture
def model(tmp_path):
    """A copy that may be changed."""
    return shutil.copytree(MODEL, tmp_path / "model")


def change(file, update):
    data = json.loads(file.read_text(encoding="utf-8"))
    update(data)
    file.write_text(json.dumps(data))


@pytest.mark.parametrize(
    "changes, expected",
    [
        ({"vocab_size": 0}, "vocab_size is 0; it must be an integer from 1 to 16777216"),
        ({"head_dim": 2**40}, "head_dim is 1099511627776"),
        ({"head_dim": 3}, "head_dim 3 even"),
        ({"hidden_size": -256}, "hidden_size is -256"),
        ({"hidden_size": 2**63}, "hidden_size is 9223372036854775808"),
        ({"hidden_size": 256.5}, "hidden_size is 256.5"),
        ({"hidden_size": None}, "hidden_size is missing"),
        ({"intermediate_size": 1e300}, "intermediate_size is 1e+300"),
        ({"num_hidden_layers": 2**60}, "num_hidden_layers is 1152921504606846976"),
        ({"num_hidden_layers": -5}, "num_hidden_layers is -5"),
        ({"num_hidden_layers": 2**24}, "model.layers.3.input_layernorm.weight"),
        ({"num_attention_heads": 2**62}, "num_attention_heads is"),
        ({"num_attention_heads": 0}, "num_attention_heads is 0"),
        ({"max_position_embeddings": "many"}, 'max_position_embeddings is "many"'),
        ({"rms_norm_eps": -1e30}, "rms_norm_eps is -1e+30; it must be from 0 to 1"),
        ({"rms_norm_eps": 1e300}, "rms_norm_eps is 1e+300"),
        ({"rope_parameters": {"rope_theta": -1.0}}, "rope_theta"),
        ({"eos_token_id": 1.5}, "eos_token_id is 1.5"),
        ({"hidden_act": "x" * 3_000_000}, 'hidden_act "xxx'),
        ({"hidden_act": "DEEP"}, "nested deeper than 64 levels"),
        ({"other": " " * 20_000_000}, "more than the 16000000 allowed"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_configs(model, changes, expected):
    config = json.loads((model / "config.json").read_text()) | changes
    (model / "config.json").write_text(json.dumps(config).replace('"DEEP"', DEEP))
    message = refusal(model, "--prompt", "a")
    assert expected in message and len(message) < 1300


def split(expression):
    step = {"type": "Split", "pattern": {"Regex": expression}, "behavior": "Isolated"}
    return {"type": "Sequence", "pretokenizers": [step, BYTE_LEVEL]}


@pytest.mark.parametrize(
    "update, expected",
    [
        (lambda data: data["model"].update(type="DEEP"), "nested deeper than 64 levels"),
        (lambda data: data["model"].update(merges=[["a"]]), '["a"] is no pair of tokens'),
        (lambda data: data["model"].update(merges=[["a", "b", "c"]]), "is no pair of tokens"),
        (lambda data: data["model"].update(merges=["a b c"]), '"a b c" needs a token'),
        (lambda data: data["model"].update(merges=[""]), '"" needs a token'),
        (lambda data: data["model"].update(merges=["x" * 3_000_000]), "needs a token"),
        (lambda data: data["model"].update(vocab={"a": -1}), "a is -1; it must be an integer"),
        (lambda data: data["model"].update(vocab={"a": 2**40}), "a is 1099511627776"),
        (lambda data: data["model"].update(vocab={"a": 0.5}), "a is 0.5"),
        (lambda data: data["added_tokens"][0].update(content=""), "must not be empty"),
        (lambda data: data["added_tokens"][0].update(id=-1), "id is -1"),
        (lambda data: data.update(pre_tokenizer=split("(a+)+$|(.*.*.*.*)*=b")), "takes too long"),
        (lambda data: data.update(pre_tokenizer=split("(" * 9000 + ")" * 9000)), "ICU"),
    ],
)
def test_tokenizers(model, update, expected):
    change(model / "tokenizer.json", update)
    text = (model / "tokenizer.json").read_text()
    (model / "tokenizer.json").write_text(text.replace('"DEEP"', DEEP))
    message = refusal(model, "--prompt", "a" * 60 + "!")
    assert "tokenizer" in message and expected in message and len(message) < 1300


def test_odd_tokenizers_that_work(model):
    """An expression that matches nothing, added tokens with the characters of expressions."""
    prompt = "a\\E(b" + "!" * 40
    change(model / "tokenizer.json", lambda data: data.update(pre_tokenizer=split("")))
    run(model, "--prompt", prompt, "--tokens", "2")
    added = {"id": 5, "content": "\\E(b", "special": True}
    added |= dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    change(model / "tokenizer.json", lambda data: data["added_tokens"].append(added))
    (model / "text").write_text(prompt)
    assert "5" in run(model, "--tokenize", model / "text").split()


def test_one_long_piece(model):
    """Its merges take time in proportion, nearly."""
    change(model / "tokenizer.json", lambda data: data.update(pre_tokenizer=BYTE_LEVEL))
    (model / "text").write_text("the " * 50_000)
    tokens = run(model, "--tokenize", model / "text").split()
    assert 0 < len(tokens) < 200_000


@pytest.mark.parametrize("name", ["tokenizer.json", "config.json", "generation_config.json"])
@pytest.mark.parametrize("kind", ["pipe", "folder", "device", "10 GB"])
def test_what_is_no_file(model, name, kind):
    file = model / name
    file.unlink()
    if kind == "pipe":
        os.mkfifo(file)
    elif kind == "folder":
        file.mkdir()
    elif kind == "device":
        file.symlink_to("/dev/zero")
    else:
        with file.open("wb") as sparse:
            sparse.truncate(10 << 30)
    message = refusal(model, "--prompt", "a")
    assert name in message
    assert ("allowed" if kind == "10 GB" else "regular file") in message


def test_text_that_is_no_file(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for option in ("--tokenize", "--perplexity"):
        assert "regular file" in refusal(MODEL, option, tmp_path / "pipe")
        assert "regular file" in refusal(MODEL, option, tmp_path)


def test_weights_that_are_no_numbers(model, tmp_path):
    torch = pytest.importorskip("torch", reason="bfloat16 weights are read by it")
    from safetensors.torch import load_file, save_file

    tensors = load_file(model / "model.safetensors")
    tensors["model.norm.weight"] = torch.full_like(tensors["model.norm.weight"], float("nan"))
    save_file(tensors, model / "model.safetensors")
    text = tmp_path / "text"
    text.write_text("some words and more of them " * 4)
    for options in (
        ["--prompt", "a"],
        ["--prompt", "a", "--temperature", "1", "--top-p", "0.9"],
        ["--perplexity", text, "--window", "8"],
    ):
        assert "no finite numbers" in refusal(model, *options)


@pytest.mark.parametrize(
    "options, expected",
    [
        (["--threads", "16777216"], "--threads"),
        (["--temperature", "nan"], "--temperature"),
        (["--top-p", "nan"], "--top-p"),
        (["--seed", "-1"], "--seed"),
        (["--random-tokens", "16777216"], "1024 positions (max_position_embeddings)"),
        (["--tokens", "1024"], "--tokens 1024 are more than the model's 1024 positions"),
        (["--logits", "out", "--random-tokens", "1025"], "1025 tokens are more than its 1024"),
    ],
)
def test_options(options, expected, tmp_path):
    options = [str(tmp_path / "out") if option == "out" else option for option in options]
    assert expected in refusal(MODEL, "--prompt", "a b", *options)
    assert not (tmp_path / "out").exists()


def test_options_that_work():
    limit = ["--random-tokens", "1023"]
    for options in (limit, ["--temperature", "1e-40", "--top-p", "0.5"], ["--threads", "2"]):
        run(MODEL, "--prompt", "a b", "--tokens", "2", *options)

"""The C++ program examples/hqq-run against Transformers and the package tokenizers."""

import json
import os
import shutil

import pytest

import cli_runner

torch = pytest.importorskip("torch", reason="the results are compared with Transformers'")
transformers = pytest.importorskip("transformers", reason="the results are compared with it")
tokenizers = pytest.importorskip("tokenizers", reason="the tokens are compared with its")
from safetensors.torch import load_file

from hqq_runner import needs_hqq_run, refusal, run

pytestmark = [needs_hqq_run, cli_runner.needs_binary]

PROMPT = "In the beginning God created the heaven and the earth, and"
EXACT = ["--mode", "exact", "--lm-head-bits", "0"]
SIZES = {
    "vocab_size": 2048,
    "hidden_size": 96,
    "intermediate_size": 160,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "initializer_range": 0.2,
    "bos_token_id": 0,
    "eos_token_id": 0,
}


def llama3():
    """Without tied embeddings, with biases and rotations stretched as in Llama 3."""
    rope = {"rope_type": "llama3", "rope_theta": 5000.0, "factor": 8.0, "low_freq_factor": 1.0}
    rope |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 64}
    config = transformers.LlamaConfig(**SIZES, rope_parameters=rope, attention_bias=True)
    return transformers.LlamaForCausalLM(config)


def qwen3():
    """Norms of heads, whose size is not hidden_size / num_attention_heads."""
    config = transformers.Qwen3Config(**SIZES, head_dim=64, tie_word_embeddings=True)
    return transformers.Qwen3ForCausalLM(config)


@pytest.fixture(scope="module", params=["tiny-llama", "llama3", "qwen3"])
def folder(request, tmp_path_factory):
    """A float model."""
    bundled = cli_runner.MODEL
    if request.param == "tiny-llama":
        return bundled
    out = tmp_path_factory.mktemp("models") / request.param
    torch.manual_seed(0)
    model = {"llama3": llama3, "qwen3": qwen3}[request.param]()
    for name, parameter in model.named_parameters():
        if "norm" in name or "bias" in name:  # else they are ones and zeros
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    dtype = torch.float16 if request.param == "llama3" else torch.float32
    model.to(dtype).save_pretrained(out, max_shard_size="500KB")
    shutil.copy(bundled / "tokenizer.json", out)
    return out


@pytest.fixture(scope="module")
def quantized(folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("quantized") / folder.name
    cli_runner.run("quantize", folder, out, "--nbits", "4", "--group-size", "32")
    return out


@pytest.fixture(scope="module")
def dense(quantized, tmp_path_factory):
    """The quantized model for Transformers: with float32 weights."""
    out = tmp_path_factory.mktemp("dense") / quantized.name
    cli_runner.run("dequantize", quantized, out, "--dtype", "float32")
    return load(out)


def load(folder):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def tokenize(folder, text):
    return tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json")).encode(text).ids


def logits_of(model, ids):
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0]


def relative_error(folder, reference, out, *options):
    run(folder, "--prompt", PROMPT, "--logits", out, *options)
    logits = load_file(out)["logits"]
    expected = logits_of(reference, tokenize(folder, PROMPT))
    assert logits.shape == expected.shape
    return float((logits - expected).norm() / expected.norm())


def test_logits_of_a_float_model(folder, tmp_path):
    assert relative_error(folder, load(folder), tmp_path / "logits") < 5e-6


@pytest.mark.parametrize("threads", [1, 2])
def test_logits_of_a_quantized_model(quantized, dense, tmp_path, threads):
    error = relative_error(quantized, dense, tmp_path / "logits", *EXACT, "--threads", threads)
    assert error < 5e-6


def test_fast_logits(quantized, dense, tmp_path):
    fast = relative_error(quantized, dense, tmp_path / "logits", "--mode", "fast")
    assert 1e-4 < fast < 0.05


def test_greedy_text(quantized, dense):
    text = run(quantized, "--prompt", PROMPT, "--tokens", "100", *EXACT)
    ids = tokenize(quantized, PROMPT)
    generated = dense.generate(
        torch.tensor([ids]), max_new_tokens=100, do_sample=False, pad_token_id=0
    )[0, len(ids) :].tolist()
    if generated[-1] == 0:  # the end of the text
        generated.pop()
    tokenizer = tokenizers.Tokenizer.from_file(str(quantized / "tokenizer.json"))
    assert text.replace("\ufffd", "") == tokenizer.decode(generated).replace("\ufffd", "") + "\n"


def test_sampled_text(folder, tmp_path):
    def sample(*options, tokens=20):
        return run(folder, "--prompt", PROMPT, "--tokens", tokens, "--ignore-eos", *options)

    draw = ["--temperature", "1.5", "--seed"]
    assert sample(*draw, "1") == sample(*draw, "1") != sample(*draw, "2")
    greedy = sample()
    assert sample(*draw, "1", "--top-p", "0") == greedy
    assert sample("--temperature", "0.001") == greedy
    # One token after another comes from the most likely ones, and not always the same.
    top_p, temperature = 0.5, 1.5
    ids = tokenize(folder, PROMPT)
    logits = logits_of(load(folder), ids)[-1].double()
    probabilities, order = (logits / temperature).softmax(0).sort(descending=True)
    count = int((probabilities.cumsum(0) < top_p - 1e-4).sum()) + 1
    decode = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json")).decode
    likely = {decode([i]) + "\n" for i in order[: count + 1].tolist()}
    seen = {sample(*draw, seed, "--top-p", top_p, tokens=1) for seed in range(20)}
    assert seen <= likely and len(seen) > 1


def test_generation_stops(tmp_path, folder):
    """At the end token of config.json or generation_config.json."""
    text = run(folder, "--prompt", PROMPT, "--tokens", "8", "--ignore-eos")
    third = tokenize(folder, PROMPT)
    with torch.no_grad():
        ids = load(folder).generate(
            torch.tensor([third]), max_new_tokens=3, do_sample=False, eos_token_id=None
        )
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    (copy / "generation_config.json").write_text(json.dumps({"eos_token_id": [ids[0, -1].item()]}))
    stopped = run(copy, "--prompt", PROMPT, "--tokens", "8")
    assert text.startswith(stopped[:-1]) and len(stopped) < len(text)


def test_perplexity(folder, tmp_path):
    text = (cli_runner.MODEL.parent / "text" / "valid.txt").read_text(encoding="utf-8")[:4000]
    (tmp_path / "text").write_text(text, encoding="utf-8")
    window, windows = 100, 3
    printed = run(
        folder, "--perplexity", tmp_path / "text", "--window", window, "--windows", windows
    )
    ids = torch.tensor(tokenize(folder, text)[: window * windows]).reshape(windows, window)
    with torch.no_grad():
        logits = load(folder)(ids).logits[:, :-1]
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1).double(), ids[:, 1:].flatten())
    assert float(printed) == pytest.approx(loss.exp().item(), rel=1e-4)
    assert "window" in refusal(folder, "--perplexity", tmp_path / "text", "--window", "5000")


def mean_squares(model, ids):
    """Layer -> mean square of each of its inputs."""
    result, handles = {}, []
    for name, layer in model.named_modules():
        if isinstance(layer, torch.nn.Linear):

            def hook(module, args, name=name):
                result[name] = args[0][0].square().mean(0)

            handles.append(layer.register_forward_pre_hook(hook))
    logits_of(model, ids)
    for handle in handles:
        handle.remove()
    if model.config.tie_word_embeddings:
        del result["lm_head"]  # is never quantized
    return result


def test_importance(folder, tmp_path):
    run(folder, "--importance", tmp_path / "importance", "--prompt", PROMPT)
    importance = load_file(tmp_path / "importance")
    expected = mean_squares(load(folder), tokenize(folder, PROMPT))
    assert importance.keys() == expected.keys()
    for name, values in expected.items():
        assert importance[name].dtype == torch.float32
        torch.testing.assert_close(importance[name], values, rtol=1e-3, atol=1e-6)


def test_importance_of_random_tokens(tmp_path):
    """Other random tokens than torch's give about the same; hqq-cpp takes the file."""
    file, again = tmp_path / "importance", tmp_path / "again"
    run(cli_runner.MODEL, "--importance", file, "--random-tokens", "512")
    importance = load_file(file)
    ids = torch.randint(2048, [512], generator=torch.Generator().manual_seed(5)).tolist()
    for name, values in mean_squares(load(cli_runner.MODEL), ids).items():
        assert torch.corrcoef(torch.stack([importance[name], values]))[0, 1] > 0.8, name
    report = cli_runner.run_json(
        "quantize", cli_runner.MODEL, tmp_path / "out", "--importance", file
    )
    assert {layer["config"]["balance"] for layer in report["layers"]} == {"none"}

    run(cli_runner.MODEL, "--importance", again, "--random-tokens", "512", "--seed", "0")
    assert again.read_bytes() == file.read_bytes()
    run(cli_runner.MODEL, "--importance", again, "--random-tokens", "512", "--seed", "7")
    assert again.read_bytes() != file.read_bytes()


LLAMA3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
LLAMA3 += r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
BYTES = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False, "trim_offsets": False}


def split(expression):
    step = {"type": "Split", "pattern": {"Regex": expression}, "behavior": "Isolated"}
    return {"type": "Sequence", "pretokenizers": [step | {"invert": False}, BYTES]}


def template(token, token_id):
    special = {token: {"id": token, "ids": [token_id], "tokens": [token]}}
    single = [
        {"SpecialToken": {"id": token, "type_id": 0}},
        {"Sequence": {"id": "A", "type_id": 0}},
    ]
    step = {"type": "TemplateProcessing", "special_tokens": special, "single": single, "pair": []}
    return {"type": "Sequence", "processors": [BYTES, step]}


DIGITS = {"type": "Digits", "individual_digits": True}
TOKENIZERS = {
    "gpt2": {},
    "smollm": {
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [DIGITS, BYTES | {"use_regex": True}],
        }
    },
    "llama3": {
        "pre_tokenizer": split(LLAMA3),
        "post_processor": template("<|endoftext|>", 0),
        "model": {"ignore_merges": True},
    },
    "qwen": {"pre_tokenizer": split(LLAMA3.replace("{1,3}", "")), "normalizer": {"type": "NFC"}},
}
TEXTS = [
    "Hello world",
    "  two  spaces\n\n\nnew lines\t\ttabs ",
    "don't I'LL we\u2019ve 'S 123456 3.14 \u0663\u2167\u00bd",
    "\u65e5\u672c\u8a9e\u306e\u30c6\u30ad\u30b9\u30c8 \ud55c\uad6d\uc5b4 \u0645\u0631\u062d\u0628\u0627",
    "\U0001f600 \U0001f468\u200d\U0001f469\u200d\U0001f467 na\u00efve cafe\u0301 A\u030a \ufb01",
    "\r\n\r\n x\u00a0y\u2003z\x85\x1c\x00\ufeff",
    "<|endoftext|>x<|endoftext|><|endoftext|> y <|endof",
    "_under__score" + "a" * 300 + "!" * 300 + " " * 300,
    "",
]


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_tokens(tmp_path, rng, kind):
    data = json.loads((cli_runner.MODEL / "tokenizer.json").read_text(encoding="utf-8"))
    changes = TOKENIZERS[kind]
    data["model"] |= changes.get("model", {})
    data |= {key: value for key, value in changes.items() if key != "model"}
    (tmp_path / "tokenizer.json").write_text(json.dumps(data))
    tokenizer = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    valid = (cli_runner.MODEL.parent / "text" / "valid.txt").read_text(encoding="utf-8")
    ranges = [
        (0x20, 0x7F),
        (0x9, 0xE),
        (0xA0, 0x250),
        (0x300, 0x370),
        (0x391, 0x3C9),
        (0x4E00, 0x9FA5),
    ]
    chosen = rng.choice(len(ranges), 20000)
    mixed = "".join(chr(rng.integers(*ranges[i])) for i in chosen)
    for text in [*TEXTS, mixed, valid]:
        (tmp_path / "text").write_bytes(text.encode())
        printed = run(tmp_path, "--tokenize", tmp_path / "text")
        assert [int(token) for token in printed.split()] == tokenizer.encode(text).ids


@pytest.mark.parametrize(
    "change, expected",
    [
        (lambda data: data["model"].update(type="Unigram"), '"Unigram"'),
        (lambda data: data["model"].pop("vocab"), "vocab"),
        (lambda data: data["model"].update(byte_fallback=True), "byte_fallback"),
        (lambda data: data["model"]["merges"].append(["no", "such"]), "merges"),
        (lambda data: data.update(pre_tokenizer=None), "ByteLevel"),
        (lambda data: data.update(pre_tokenizer={"type": "Metaspace"}), '"Metaspace"'),
        (lambda data: data.update(pre_tokenizer=split("(")), "ICU"),
        (lambda data: data.update(normalizer={"type": "Lowercase"}), '"Lowercase"'),
        (lambda data: data.update(post_processor={"type": "BertProcessing"}), '"BertProcessing"'),
        (lambda data: data["added_tokens"][0].update(lstrip=True), "lstrip"),
    ],
)
def test_refused_tokenizers(tmp_path, change, expected):
    data = json.loads((cli_runner.MODEL / "tokenizer.json").read_text(encoding="utf-8"))
    change(data)
    (tmp_path / "tokenizer.json").write_text(json.dumps(data))
    message = refusal(tmp_path, "--tokenize", cli_runner.MODEL / "config.json")
    assert "[tokenizer.json]" in message and expected in message


@pytest.mark.parametrize(
    "changes, expected",
    [
        ({"model_type": "mamba"}, 'model_type "mamba"'),
        ({"hidden_act": "gelu"}, 'hidden_act "gelu"'),
        ({"use_sliding_window": True}, "use_sliding_window"),
        ({"rope_parameters": {"rope_type": "yarn"}}, 'rope_type "yarn"'),
        ({"hidden_size": "wide"}, 'hidden_size is "wide"'),
        ({"num_key_value_heads": 3}, "heads"),
        ({"vocab_size": 2049}, "model.embed_tokens.weight"),
        ({"num_hidden_layers": 4}, "model.layers.3.input_layernorm.weight"),
        ({"intermediate_size": 641}, "[641, 256]"),
    ],
)
def test_refused_models(tmp_path, changes, expected):
    copy = tmp_path / "model"
    shutil.copytree(cli_runner.MODEL, copy)
    config = json.loads((copy / "config.json").read_text()) | changes
    (copy / "config.json").write_text(json.dumps(config))
    assert expected in refusal(copy, "--prompt", PROMPT)


def test_refused_files(tmp_path):
    assert "no-folder" in refusal(tmp_path / "no-folder", "--prompt", PROMPT)
    (tmp_path / "tokenizer.json").write_text('{"model": ')
    assert "[tokenizer.json]" in refusal(tmp_path, "--prompt", PROMPT)
    assert "no-text" in refusal(cli_runner.MODEL, "--perplexity", tmp_path / "no-text")
    copy = tmp_path / "model"
    shutil.copytree(cli_runner.MODEL, copy)
    os.truncate(copy / "model.safetensors", 100_000)
    assert "model.safetensors" in refusal(copy, "--prompt", PROMPT)


def test_tokens_that_the_model_lacks(tmp_path):
    copy = tmp_path / "model"
    shutil.copytree(cli_runner.MODEL, copy)
    data = json.loads((copy / "tokenizer.json").read_text(encoding="utf-8"))
    data["added_tokens"].append(data["added_tokens"][0] | {"id": 2048, "content": "<new>"})
    (copy / "tokenizer.json").write_text(json.dumps(data))
    assert "2048" in refusal(copy, "--prompt", "a <new> token")


@pytest.mark.parametrize(
    "options, expected",
    [
        (["--prompt", PROMPT, "--mode", "slow"], "slow"),
        (["--prompt", PROMPT, "--temperature", "-1"], "--temperature"),
        (["--prompt", PROMPT, "--top-p", "1.5"], "--top-p"),
        (["--prompt", PROMPT, "--tokens", "-1"], "--tokens"),
        (["--prompt", PROMPT, "--lm-head-bits", "7"], "--lm-head-bits"),
        (["--prompt", PROMPT, "--no-such-option"], "--no-such-option"),
        (["--logits", "a", "--importance", "b"], "--importance"),
        ([], "--prompt"),
    ],
)
def test_refused_options(options, expected):
    assert expected in refusal(cli_runner.MODEL, *options)
    assert "FOLDER" in refusal()

"""The example model and the quick start that README.md begins with."""

import random
import subprocess
import sys
from pathlib import Path

import pytest

import hqq_cpp

EXAMPLES = Path(__file__).resolve().parents[3] / "examples"
MODEL = EXAMPLES / "tiny-llama"
sys.path.insert(0, str(EXAMPLES))
import tiny_llama

FLOAT_PERPLEXITY = 23.163  # measured with torch and transformers in float32


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_llama.Tokenizer(MODEL)


@pytest.fixture(scope="module")
def ids(tokenizer):
    return tokenizer.encode((EXAMPLES / "text" / "valid.txt").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def quantized(tmp_path_factory):
    """Perplexity of a quantized copy, by nbits."""
    folder = tmp_path_factory.mktemp("quantized")

    def make(nbits):
        out = folder / f"{nbits}bit"
        if not out.exists():
            hqq_cpp.quantize_checkpoint(MODEL, out, hqq_cpp.HqqConfig(nbits=nbits))
        return tiny_llama.TinyLlama(out)

    return make


def test_float_perplexity_is_the_reference(ids):
    assert tiny_llama.perplexity(tiny_llama.TinyLlama(MODEL), ids) == pytest.approx(
        FLOAT_PERPLEXITY, abs=0.002
    )


# Measured: 1.0001, 1.004, 1.013 and 1.09 times the float perplexity; the bounds allow twice the loss.
# Below float is chance, and little of it.
@pytest.mark.parametrize("nbits, worst", [(8, 1.002), (4, 1.01), (3, 1.03), (2, 1.21)])
def test_quantized_perplexity(ids, quantized, nbits, worst):
    ratio = tiny_llama.perplexity(quantized(nbits), ids) / FLOAT_PERPLEXITY
    assert 0.99 < ratio < worst


def test_fewer_bits_cost_more(ids, quantized):
    values = [tiny_llama.perplexity(quantized(nbits), ids, windows=16) for nbits in (4, 3, 2, 1)]
    assert values == sorted(values) and values[-1] > 1.5 * values[0]


def test_perplexity_refuses_a_short_text(ids):
    with pytest.raises(ValueError, match="at least 512 tokens, got 511"):
        tiny_llama.perplexity(None, ids[:511])


def test_split_words_follows_the_expression():
    text = "I'll say  \n\tit's 12\u00b2 a\u0301-b!?"
    expected = [
        "I",
        "'ll",
        " say",
        "  \n",
        "\t",
        "it",
        "'s",
        " 12\u00b2",
        " a",
        "\u0301-",
        "b",
        "!?",
    ]
    assert list(tiny_llama.split_words(text)) == expected


def test_tokenizer_equals_the_tokenizers_package(tokenizer, ids):
    tokenizers = pytest.importorskip(
        "tokenizers", reason="the package tokenizers, the reference here, is not installed"
    )
    reference = tokenizers.Tokenizer.from_file(str(MODEL / "tokenizer.json"))
    text = (EXAMPLES / "text" / "valid.txt").read_text(encoding="utf-8")
    assert reference.encode(text).ids == ids

    # Letters, digits, white space, marks and symbols of every sort the expression tells apart.
    alphabet = [*"ab'  \n\t\v sdretvlm12.,!_", *"\u00e9\u00b2\u00bd\u4e00\u2160\u3000\u00a0\u1680"]
    alphabet += [*"\u2028\x85\x1c\x1f\u0301\U0001d7d8\U0001f600\u200b\u180e\u0e01"]
    alphabet += ["'ll", "'re", "<|endoftext|>"]
    rng = random.Random(0)
    for _ in range(2000):
        text = "".join(rng.choices(alphabet, k=rng.randint(0, 16)))
        assert tokenizer.encode(text) == reference.encode(text).ids, ascii(text)


def test_quickstart_prints_both_tables(tmp_path):
    out = tmp_path / "with a space" / "tiny"
    command = [sys.executable, EXAMPLES / "quickstart.py", "--nbits", "3", "--out", out]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    lines = [line.split() for line in done.stdout.splitlines()]
    kinds = {line[0] for line in lines if line and "_proj" in line[0]}
    assert kinds == {
        *(f"self_attn.{p}_proj" for p in "qkvo"),
        *(f"mlp.{p}_proj" for p in ("gate", "up", "down")),
    }
    (perplexity,) = (line for line in lines if line[:1] == ["perplexity"])
    assert float(perplexity[1]) == pytest.approx(FLOAT_PERPLEXITY, abs=0.002)
    assert float(perplexity[1]) < float(perplexity[2]) < 1.03 * float(perplexity[1])
    size = sum(path.stat().st_size for path in out.glob("*.safetensors"))
    assert f"{size:,} B" in done.stdout
    assert size < 0.5 * (MODEL / "model.safetensors").stat().st_size


def test_quickstart_refuses_a_width_that_is_none(tmp_path):
    command = [sys.executable, EXAMPLES / "quickstart.py", "--nbits", "7", "--out", tmp_path / "x"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode != 0 and "nbits" in done.stderr
    assert not (tmp_path / "x").exists()

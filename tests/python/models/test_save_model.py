"""save_model and load_model: any torch model with quantized layers, as a folder."""

from __future__ import annotations

import json
import os

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from torch import nn

import hqq_cpp
from cli_runner import needs_binary, run_json

CONFIG = {
    "nbits": 4,
    "group_size": 32,
    "dynamic_config": {"table": {"nbits": 8}, "b": {"nbits": 3}},
}
pytestmark = pytest.mark.filterwarnings("ignore:.*stays? as :UserWarning")


class Net(nn.Module):
    """A bit of everything."""

    def __init__(self):
        super().__init__()
        # The head comes first, and is tied to an embedding.
        self.head = nn.Linear(64, 40, bias=False)
        self.table = nn.Embedding(40, 64)
        self.head.weight = self.table.weight
        self.a = nn.Linear(64, 32).to(torch.bfloat16)
        self.b = nn.Linear(32, 32)
        self.again = self.b
        self.c, self.d = nn.Linear(64, 64), nn.Linear(64, 64)
        self.d.weight = self.c.weight
        self.conv = nn.Conv2d(64, 32, 1)
        self.other = nn.Conv2d(32, 8, 3)
        self.attention = nn.MultiheadAttention(64, 4)
        self.norm = nn.BatchNorm1d(64)
        self.e, self.f = nn.LayerNorm(64), nn.LayerNorm(64)
        self.f.weight = self.e.weight
        self.register_buffer("mask", torch.ones(3, dtype=torch.bool))
        self.frozen = nn.Parameter(torch.randn(3).double(), requires_grad=False)

    def forward(self, ids):
        x = self.f(self.e(self.table(ids)))
        y = self.again(self.b(self.a(x.bfloat16()).float()))
        image = self.conv(self.d(self.c(x)).movedim(-1, 1)[..., None])
        return self.head(x), y, image, self.attention(x, x, x)[0]


@pytest.fixture(scope="module")
def net():
    torch.manual_seed(0)
    return hqq_cpp.quantize_model_(Net().eval(), CONFIG)


@pytest.fixture(scope="module")
def saved(net, tmp_path_factory):
    """Read only."""
    folder = tmp_path_factory.mktemp("saved") / "net"
    hqq_cpp.save_model(net, folder)
    return folder


def same(a, b):
    a, b = a.state_dict(), b.state_dict()
    assert a.keys() == b.keys()
    for name, tensor in a.items():
        assert tensor.dtype == b[name].dtype and torch.equal(tensor, b[name]), name


def edit(folder, change):
    """Changes the tensors of a folder with one file."""
    path = folder / "model.safetensors"
    metadata = hqq_cpp.safetensors_metadata(path)
    tensors = {k: torch.from_dlpack(v).clone() for k, v in hqq_cpp.load_safetensors(path).items()}
    change(tensors)
    path.unlink()
    hqq_cpp.save_safetensors(path, tensors, metadata)


@pytest.fixture
def copy(net, tmp_path):
    hqq_cpp.save_model(net, tmp_path / "copy")
    return tmp_path / "copy"


@pytest.mark.parametrize("meta", [False, True])
def test_round_trip(net, saved, meta):
    ids = torch.tensor([[1, 5, 39]])
    with torch.no_grad():
        expected = net(ids)
    with torch.device("meta" if meta else "cpu"):
        fresh = Net().eval()
    loaded = hqq_cpp.load_model(fresh, saved)
    assert loaded is fresh
    same(net, loaded)
    assert not any(t.is_meta for t in [*loaded.parameters(), *loaded.buffers()])
    with torch.no_grad():
        assert all(torch.equal(x, y) for x, y in zip(loaded(ids), expected))
    assert loaded.head.W_q is loaded.table.W_q and loaded.again is loaded.b
    assert loaded.c.W_q is loaded.d.W_q and loaded.f.weight is loaded.e.weight
    assert not loaded.frozen.requires_grad and loaded.norm.weight.requires_grad
    assert loaded.a.compute_dtype == torch.bfloat16


def test_the_files(net, saved, copy):
    names = hqq_cpp.load_safetensors(saved / "model.safetensors").keys()
    # Once what is tied; nothing that only the process needs.
    assert sum(name.endswith("W_q") for name in names) == 5
    assert not [name for name in names if "marker" in name or name.startswith(("d.W", "f.weight"))]
    config = json.loads((saved / "config.json").read_text())["quantization_config"]
    assert config["quantizer"] == "hqq_cpp" and "quant_method" not in config
    assert sorted(config["not_quantized"]) == [
        "attention.in_proj_weight",
        "attention.out_proj",
        "other",
    ]
    settings = hqq_cpp.HqqConfig.from_dict(config)
    assert settings.layer("a").nbits == 4 and settings.layer("b").nbits == 3
    # The same bytes again, whoever ran in between.
    net(torch.tensor([[1]]))
    hqq_cpp.save_model(net, copy, overwrite=True)
    for name in ("model.safetensors", "config.json"):
        assert (copy / name).read_bytes() == (saved / name).read_bytes()


def test_shards(net, tmp_path):
    hqq_cpp.save_model(net, tmp_path / "net", max_shard_size="8KB")
    files = sorted((tmp_path / "net").glob("model-*.safetensors"))
    assert len(files) > 2
    for file in files:
        names = hqq_cpp.load_safetensors(file).keys()
        layers = json.loads(hqq_cpp.safetensors_metadata(file)["hqq_cpp"])["layers"]
        assert layers.keys() == {n.removesuffix(".W_q") for n in names if n.endswith(".W_q")}
        assert layers.keys() == {n.removesuffix(".scale") for n in names if n.endswith(".scale")}
    same(net, hqq_cpp.load_model(Net(), tmp_path / "net"))
    with pytest.raises(ValueError, match="max_shard_size is '5 apples'"):
        hqq_cpp.save_model(net, tmp_path / "other", max_shard_size="5 apples")


@needs_binary
def test_the_command_reads_it(net, saved, tmp_path):
    layers = {layer["name"]: layer for layer in run_json("inspect", saved)["layers"]}
    assert {name: layer["config"]["nbits"] for name, layer in layers.items()} == {
        "head": 8, "a": 4, "b": 3, "c": 4, "conv": 4,
    }  # fmt: skip
    report = hqq_cpp.verify_checkpoint(saved)
    assert report.layers == 5 and [p[:32] for p in report.problems] == [
        "hqq_cpp.manifest.json is missing"
    ]
    hqq_cpp.dequantize_checkpoint(saved, tmp_path / "dense", dtype="float32")
    dense = hqq_cpp.load_safetensors(tmp_path / "dense" / "model.safetensors")
    np.testing.assert_array_equal(dense["b.weight"].numpy(), net.b.dequantize().numpy())


class Doubled(nn.Linear):
    """Has a forward of its own, which no file tells."""

    def forward(self, x):
        return 2 * super().forward(x)


def test_what_the_command_wrote(tmp_path):
    """`hqq-cpp quantize` of the plain weights; what torch cannot hold quantized becomes dense."""

    def build():
        net = Net().eval()
        net.doubled = Doubled(64, 32)
        net.shared = net.doubled
        return net

    torch.manual_seed(0)
    net = build()
    once = ("again", "head", "d.w", "f.w", "shared")
    state = {k: v.detach() for k, v in net.state_dict().items() if not k.startswith(once)}
    hqq_cpp.save_safetensors(tmp_path / "model.safetensors", state)
    hqq_cpp.quantize_checkpoint(tmp_path / "model.safetensors", tmp_path / "small", {"nbits": 8})
    with pytest.warns(
        UserWarning, match=r"1 of \d quantized weights become dense.*: doubled.weight"
    ):
        loaded = hqq_cpp.load_model(build(), tmp_path / "small")
    assert isinstance(loaded.b, hqq_cpp.HqqLinear) and loaded.again is loaded.b
    stored = hqq_cpp.Checkpoint(tmp_path / "small").load("doubled")
    weight = torch.from_dlpack(hqq_cpp.Tensor(hqq_cpp.dequantize(stored)))
    assert type(loaded.doubled) is Doubled and torch.equal(loaded.doubled.weight, weight)
    assert loaded.shared.weight is loaded.doubled.weight
    ids = torch.tensor([[1, 5, 39]])
    with torch.no_grad():
        for x, y in zip(loaded(ids), net(ids)):
            assert (x - y).norm() < 0.05 * y.norm()


# Refusals, before anything is changed.


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("e.weight"), r"1 missing in the files \(e.weight\)"),
        (lambda t: t.pop("b.scale"), r"1 missing in the files \(b.scale\)"),
        (lambda t: t.update(extra=torch.ones(2)), r"1 not in the model \(extra\)"),
        (lambda t: t.update(frozen=torch.ones(4)), r"different \(frozen is \[4\], in the model \[3\]"),
        (lambda t: t.update(frozen=torch.ones(3).int()), "frozen is whole numbers, in the model floating"),
        (lambda t: t.update({"f.weight": torch.zeros(64)}), "f.weight is tied to e.weight in the model"),
        (lambda t: t.update({"b.W_q": t["b.W_q"][:-1]}), r"b.W_q is uint8 \[31, 12\] and must be uint8 \[32, 12\]"),
        (lambda t: t.update({"b.zero": t["b.zero"].float()}), "b.zero is float32 .* must be float16"),
    ],
)  # fmt: skip
def test_what_does_not_fit(copy, change, message):
    edit(copy, change)
    fresh = Net()
    before = {name: tensor.clone() for name, tensor in fresh.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        hqq_cpp.load_model(fresh, copy)
    after = fresh.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[n], after[n]) for n in before)


def test_another_model(saved):
    class Other(Net):
        def __init__(self):
            super().__init__()
            self.b = nn.Linear(64, 32)
            self.again = nn.Linear(32, 32)
            del self.norm

    with pytest.raises(
        ValueError, match=r"does not fit Other: 2 missing .*again.weight.*not in.*norm"
    ):
        hqq_cpp.load_model(Other(), saved)


def test_untied(saved):
    """The file has the tensor once, the model wants two."""
    fresh = Net()
    fresh.head.weight = nn.Parameter(torch.randn(40, 64))
    with pytest.raises(ValueError, match=r"missing in the files \(table.weight\)"):
        hqq_cpp.load_model(fresh, saved)


def test_models_that_cannot_be_loaded_into(net, saved):
    with pytest.raises(ValueError, match="are quantized already; build the model anew"):
        hqq_cpp.load_model(net, saved)
    with torch.device("meta"):
        fresh = Net()
        fresh.register_buffer("angles", torch.ones(2), persistent=False)
    with pytest.raises(ValueError, match="angles: no file has non-persistent buffers"):
        hqq_cpp.load_model(fresh, saved)
    assert isinstance(fresh.b, nn.Linear) and not isinstance(fresh.b, hqq_cpp.HqqLinear)


def test_folders_that_are_none(saved, tmp_path):
    with pytest.raises(OSError):
        hqq_cpp.load_model(Net(), tmp_path / "nowhere")
    hqq_cpp.save_safetensors(tmp_path / "model.safetensors", {"a": torch.ones(2)})
    with pytest.raises(hqq_cpp.FormatError, match="describes no quantized layer"):
        hqq_cpp.load_model(Net(), tmp_path)
    hqq_cpp.save_safetensors(
        tmp_path / "model.safetensors", {"a": torch.ones(2)}, {"hqq_cpp": '{"layers": {"a": 3}}'}
    )
    with pytest.raises(hqq_cpp.FormatError, match="is no description of layers"):
        hqq_cpp.load_model(Net(), tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../x"}}')
    with pytest.raises(hqq_cpp.FormatError, match="has no weight_map"):
        hqq_cpp.load_model(Net(), tmp_path)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: nn.Sequential(nn.Linear(4, 4)), "no quantized layer below Sequential"),
        (lambda: hqq_cpp.quantize_linear(nn.Linear(64, 8), {"nbits": 4}), "is a single layer"),
    ],
)
def test_models_that_cannot_be_saved(tmp_path, make, message):
    with pytest.raises(ValueError, match=message):
        hqq_cpp.save_model(make(), tmp_path / "net")
    assert not os.listdir(tmp_path)


def test_states_that_cannot_be_stored(tmp_path):
    def small():
        return hqq_cpp.quantize_model_(
            nn.Sequential(nn.Linear(64, 8), nn.LayerNorm(8)), {"nbits": 4}
        )

    class Extra(nn.LayerNorm):
        def get_extra_state(self):
            return {"steps": 3}

    extra, meta, complex_one = small(), small(), small()
    extra.append(Extra(8))
    meta[1].to("meta")
    complex_one.register_buffer("phase", torch.ones(2, dtype=torch.complex64))
    for model, message in (
        (extra, "2._extra_state is a dict; only tensors"),
        (meta, "1.weight is on device meta"),
        (complex_one, "phase is torch.complex64"),
    ):
        with pytest.raises(ValueError, match=message):
            hqq_cpp.save_model(model, tmp_path / "net")
    assert not os.listdir(tmp_path)


def test_whole_or_nothing(net, saved, copy, tmp_path, monkeypatch):
    before = {path.name: path.read_bytes() for path in copy.iterdir()}
    with pytest.raises(FileExistsError, match="has 2 files or folders in it; overwrite=True"):
        hqq_cpp.save_model(net, copy)

    def full(*arguments, **keywords):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("hqq_cpp.models.saving.save_safetensors", full)
    for folder in (copy, tmp_path / "new"):
        with pytest.raises(OSError, match="No space left"):
            hqq_cpp.save_model(net, folder, overwrite=True)
    monkeypatch.undo()
    assert {path.name: path.read_bytes() for path in copy.iterdir()} == before
    assert os.listdir(tmp_path) == ["copy"]

    (copy / "stale.txt").write_text("of the old checkpoint")
    hqq_cpp.save_model(net, copy, overwrite=True)
    assert sorted(os.listdir(copy)) == ["config.json", "model.safetensors"]
    (tmp_path / "empty").mkdir()
    hqq_cpp.save_model(net, tmp_path / "empty")
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.txt").write_text("")
    with pytest.raises(FileExistsError, match="is no checkpoint"):
        hqq_cpp.save_model(net, tmp_path / "home", overwrite=True)
    with pytest.raises(FileExistsError, match="is a file"):
        hqq_cpp.save_model(net, tmp_path / "home" / "thesis.txt")


# Layers of Transformers.


@pytest.mark.parametrize("width", [64, 96])
def test_conv1d(tmp_path, width):
    """Stored transposed: a square one tells by the mark of its writer only."""
    Conv1D = pytest.importorskip("transformers.pytorch_utils").Conv1D

    def build():
        return nn.ModuleDict({"proj": Conv1D(64, width)})

    net = hqq_cpp.quantize_model_(build(), {"nbits": 4})
    hqq_cpp.save_model(net, tmp_path / "net")
    loaded = hqq_cpp.load_model(build(), tmp_path / "net")
    same(net, loaded)
    assert isinstance(hqq_cpp.dequantize_model_(loaded)["proj"], Conv1D)

    dense = build().requires_grad_(False)
    # The bias would have told the command, which packed such weights as they are once.
    hqq_cpp.save_safetensors(tmp_path / "model.safetensors", {"proj.weight": dense["proj"].weight})
    hqq_cpp.quantize_checkpoint(tmp_path / "model.safetensors", tmp_path / "small", {"nbits": 8})
    edit(tmp_path / "small", lambda tensors: tensors.update({"proj.bias": dense["proj"].bias}))
    if width == 64:
        with pytest.raises(ValueError, match="nothing says whether these square ones"):
            hqq_cpp.load_model(build(), tmp_path / "small")
        return
    with pytest.warns(UserWarning, match="1 of 1 quantized weights become dense"):
        loaded = hqq_cpp.load_model(build(), tmp_path / "small")
    weight = dense["proj"].weight
    assert (loaded["proj"].weight - weight).norm() < 0.02 * weight.norm()


@pytest.mark.parametrize("family", ["Mixtral", "GPT2"])
def test_models_of_transformers(tmp_path, family):
    transformers = pytest.importorskip("transformers")
    sizes = {
        "Mixtral": dict(
            hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
            num_key_value_heads=2, vocab_size=48, num_local_experts=2,
        ),
        "GPT2": dict(n_embd=32, n_layer=1, n_head=2, vocab_size=48),
    }[family]  # fmt: skip
    config = getattr(transformers, f"{family}Config")(**sizes)
    build = getattr(transformers, {"GPT2": "GPT2LMHeadModel"}.get(family, f"{family}ForCausalLM"))
    torch.manual_seed(0)
    model = hqq_cpp.quantize_model_(build(config).eval(), {"nbits": 4, "group_size": 32})
    hqq_cpp.save_model(model, tmp_path / "saved")
    loaded = hqq_cpp.load_model(build(type(config)(**sizes)).eval(), tmp_path / "saved")
    ids = torch.arange(6)[None]
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, model(ids).logits)
    # As one that quantize_model_ made: save_pretrained works.
    loaded.save_pretrained(tmp_path / "again")
    again = build.from_pretrained(tmp_path / "again")
    with torch.no_grad():
        assert torch.equal(again(ids).logits, model(ids).logits)

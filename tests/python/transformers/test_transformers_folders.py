"""Quantized folders in models that cannot hold all of their layers packed, or that lack some."""

import pytest

torch = pytest.importorskip("torch", reason="Transformers needs torch")
transformers = pytest.importorskip("transformers", reason="the integration needs Transformers")

from torch import nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
)

import hqq_cpp
import hqq_cpp.transformers
from folder_maker import change, outputs, pack
from hqq_cpp.find.layers import quantized_layers

pytestmark = pytest.mark.usefixtures("log")


IDS = torch.arange(3, 15)[None]
TEXT = dict(
    vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
)  # fmt: skip


def warnings_of_dense(log):
    return [r.getMessage() for r in log.records if "become dense" in r.getMessage()]


# What a module cannot hold.


class OwnForward(nn.Linear):
    def forward(self, x):
        return 3 * nn.functional.linear(x, self.weight)


class Router(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(64, 64))


class OddConfig(PreTrainedConfig):
    model_type = "odd"


class OddModel(PreTrainedModel):
    """Weights of two dimensions that are no plain linear layers."""

    config_class = OddConfig
    base_model_prefix = "odd"

    def __init__(self, config):
        super().__init__(config)
        self.plain = nn.Linear(64, 64)
        self.router = Router()
        self.attention = nn.MultiheadAttention(64, 4, batch_first=True)
        self.normed = nn.Embedding(64, 64, max_norm=1.0)
        self.conv = nn.Conv1d(64, 64, 1)
        self.transposed = transformers.pytorch_utils.Conv1D(128, 64)
        self.square = transformers.pytorch_utils.Conv1D(128, 128)
        self.post_init()

    def forward(self, ids):
        x = self.plain(self.normed(ids)) @ self.router.weight
        x = x + self.attention(x, x, x)[0] + self.conv(x.transpose(1, 2)).transpose(1, 2)
        return self.square(self.transposed(x))


ODD = ("plain", "router", "attention.out_proj", "normed", "transposed", "square")


def test_what_a_module_cannot_hold_becomes_dense(tmp_path, log):
    torch.manual_seed(0)
    model = OddModel(OddConfig()).eval()
    model.save_pretrained(tmp_path / "dense")
    names = {f"{name}.weight": {"nbits": 8} for name in ODD}
    folder = pack(tmp_path / "dense", tmp_path / "q", names)
    loaded, info = OddModel.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    assert [name for name, _ in quantized_layers(loaded)] == ["plain"]
    (warning,) = warnings_of_dense(log)
    assert "5 of 6 quantized weights" in warning and "and 2 more" in warning
    assert "router.weight (Router computes with a dense weight)" in warning
    # As hqq-cpp packed them when it did not know them: [in, out].
    exact, ours = outputs(model, IDS), outputs(loaded, IDS)
    assert (ours - exact).norm() < 0.02 * exact.norm()
    assert loaded.router.weight.requires_grad and loaded.transposed.weight.requires_grad
    loaded.save_pretrained(tmp_path / "again")
    assert torch.equal(outputs(OddModel.from_pretrained(tmp_path / "again"), IDS), ours)


def test_conv1d_packed_as_a_matrix_stays_quantized(tmp_path, log):
    """As save_pretrained writes it: [out, in]."""
    torch.manual_seed(0)
    model = OddModel(OddConfig()).eval()
    hqq_cpp.quantize_model_(model, {"nbits": 8}, filter=lambda name, _: name != "plain")
    model.save_pretrained(tmp_path / "q")
    loaded = OddModel.from_pretrained(tmp_path / "q")
    assert {"transposed", "square"} <= dict(quantized_layers(loaded)).keys()
    assert torch.equal(outputs(loaded, IDS), outputs(model, IDS))
    assert not warnings_of_dense(log)
    # The same without descriptions.
    folder = change(tmp_path / "q", tmp_path / "bare", layers=None)
    assert torch.equal(outputs(OddModel.from_pretrained(folder), IDS), outputs(model, IDS))


def test_types_of_what_becomes_dense(tmp_path):
    """The model's, and float32 where it keeps weights in that."""

    class Fp32Router(OddModel):
        _keep_in_fp32_modules_strict = {"router"}

    OddModel(OddConfig()).save_pretrained(tmp_path / "dense")
    names = {f"{name}.weight": {"nbits": 8} for name in ODD}
    folder = pack(tmp_path / "dense", tmp_path / "q", names)
    loaded = Fp32Router.from_pretrained(folder, dtype=torch.bfloat16)
    assert loaded.router.weight.dtype == torch.float32
    assert loaded.attention.out_proj.weight.dtype == torch.bfloat16


# Experts.


@pytest.fixture(scope="module")
def moe(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("moe")
    MixtralForCausalLM(MixtralConfig(**TEXT, num_local_experts=4)).eval().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("odd", [None, {"nbits": 6}], ids=["dense", "other settings"])
@pytest.mark.parametrize("names", ["*.experts.2.w1", "*.layers.1.*.experts.0.w2"])
def test_experts_that_are_not_alike(moe, tmp_path, log, odd, names):
    config = {"nbits": 8, "group_size": 32, "dynamic_config": {names: odd}}
    hqq_cpp.quantize_checkpoint(moe, tmp_path / "q", config)
    loaded, info = MixtralForCausalLM.from_pretrained(tmp_path / "q", output_loading_info=True)
    assert not any(info.values()), info
    (warning,) = warnings_of_dense(log)
    assert ("not all quantized" if odd is None else "different settings") in warning
    exact, ours = (outputs(m, IDS) for m in (MixtralForCausalLM.from_pretrained(moe), loaded))
    assert (ours - exact).norm() < 0.1 * exact.norm()
    # Every expert comes from its own tensors.
    checkpoint = hqq_cpp.Checkpoint(tmp_path / "q")
    for layer in range(2):
        for e in range(4):
            name = f"model.layers.{layer}.block_sparse_moe.experts.{e}.w2"
            if name in checkpoint.quantized_layers():
                q = torch.from_numpy(hqq_cpp.dequantize(checkpoint.load(name)))
                assert torch.equal(loaded.model.layers[layer].mlp.experts.down_proj[e], q)
    loaded.save_pretrained(tmp_path / "again")
    again, info = MixtralForCausalLM.from_pretrained(tmp_path / "again", output_loading_info=True)
    assert not any(info.values()), info
    assert torch.equal(outputs(again, IDS), ours)


def test_a_missing_expert_is_refused(moe, tmp_path):
    hqq_cpp.quantize_checkpoint(moe, tmp_path / "q", {"nbits": 8, "group_size": 32})
    lost = "model.layers.1.block_sparse_moe.experts.2.w3"

    def pop(tensors):
        for key in [key for key in tensors if key.startswith(lost)]:
            del tensors[key]

    folder = change(tmp_path / "q", tmp_path / "p", pop)
    with pytest.raises(hqq_cpp.FormatError, match=f"1 of 32 layers .* not in them: {lost}"):
        MixtralForCausalLM.from_pretrained(folder)
    folder = change(tmp_path / "q", tmp_path / "r", pop, layers=None)
    with pytest.raises(hqq_cpp.FormatError, match=r"layers.1.*gate_up_proj.*w3.weight: 3 of 4"):
        MixtralForCausalLM.from_pretrained(folder)


def test_base_model_of_experts(moe, tmp_path):
    """The names in the file change by a prefix, in both directions."""
    transformers.MixtralModel.from_pretrained(moe).save_pretrained(tmp_path / "base")
    hqq_cpp.quantize_checkpoint(tmp_path / "base", tmp_path / "q", {"nbits": 8, "group_size": 32})
    model, info = MixtralForCausalLM.from_pretrained(tmp_path / "q", output_loading_info=True)
    assert info["missing_keys"] == {"lm_head.weight"} and torch.isfinite(outputs(model, IDS)).all()
    model.save_pretrained(tmp_path / "again")
    again, info = MixtralForCausalLM.from_pretrained(tmp_path / "again", output_loading_info=True)
    assert not any(info.values()) and torch.equal(outputs(again, IDS), outputs(model, IDS))
    base, info = transformers.MixtralModel.from_pretrained(
        tmp_path / "again", output_loading_info=True
    )
    assert not info["missing_keys"] and len(list(quantized_layers(base))) == 12


# Linear layers that Transformers merges or cuts.


class FusedConfig(PreTrainedConfig):
    model_type = "hqq_cpp_fused"


class FusedModel(PreTrainedModel):
    """Has q, k and v in one layer; its files have three."""

    config_class = FusedConfig

    def __init__(self, config):
        super().__init__(config)
        self.plain = nn.Linear(64, 64)
        self.fused_qkv = nn.Linear(64, 192, bias=False)
        self.post_init()

    def forward(self, x):
        return self.fused_qkv(self.plain(x))


class CutConfig(PreTrainedConfig):
    model_type = "hqq_cpp_cut"


class CutModel(PreTrainedModel):
    """The other way round."""

    config_class = CutConfig

    def __init__(self, config):
        super().__init__(config)
        self.plain = nn.Linear(64, 64)
        for name in ("the_q", "the_k", "the_v"):
            self.add_module(name, nn.Linear(64, 64, bias=False))
        self.post_init()

    def forward(self, x):
        x = self.plain(x)
        return torch.cat([self.the_q(x), self.the_k(x), self.the_v(x)], -1)


@pytest.fixture(scope="module")
def conversions():
    from transformers.conversion_mapping import register_checkpoint_conversion_mapping
    from transformers.core_model_loading import Chunk, Concatenate, WeightConverter

    three, one = ["the_q.weight", "the_k.weight", "the_v.weight"], ["fused_qkv.weight"]
    merge = WeightConverter(list(three), list(one), [Concatenate(dim=0)])
    cut = WeightConverter(list(one), list(three), [Chunk(dim=0)])
    for name, conversion in (("hqq_cpp_fused", merge), ("hqq_cpp_cut", cut)):
        register_checkpoint_conversion_mapping(name, [conversion], overwrite=True)


@pytest.mark.parametrize("balance", ["none", "sinkhorn"])
@pytest.mark.parametrize("cls", [FusedModel, CutModel])
def test_linear_layers_that_are_merged_or_cut(conversions, tmp_path, log, cls, balance):
    torch.manual_seed(0)
    model = cls(cls.config_class()).eval()
    model.save_pretrained(tmp_path / "dense")
    from safetensors.torch import load_file, save_file

    # As the files of such a model are.
    tensors = load_file(tmp_path / "dense" / "model.safetensors")
    state = model.state_dict()
    qkv = ["the_q.weight", "the_k.weight", "the_v.weight"]
    tensors = {key: tensor for key, tensor in tensors.items() if "plain" in key}
    if cls is FusedModel:
        names = qkv
        parts = state["fused_qkv.weight"].chunk(3)
        tensors |= {name: part.clone() for name, part in zip(names, parts)}
    else:
        names = ["fused_qkv.weight"]
        tensors[names[0]] = torch.cat([state[name] for name in qkv])
    save_file(tensors, tmp_path / "dense" / "model.safetensors", {"format": "pt"})
    x = torch.randn(2, 64)
    assert torch.equal(outputs(cls.from_pretrained(tmp_path / "dense"), x), outputs(model, x))

    layers = {name: {"nbits": 8, "balance": balance} for name in [*names, "plain.weight"]}
    folder = pack(tmp_path / "dense", tmp_path / "q", layers)
    loaded, info = cls.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    assert (outputs(loaded, x) - outputs(model, x)).norm() < 0.02 * outputs(model, x).norm()
    # Rows with groups of their own are put below each other as they are.
    is_packed = cls is FusedModel and balance == "none"
    assert isinstance(loaded.plain, hqq_cpp.HqqLinear)
    assert len(list(quantized_layers(loaded))) == 1 + is_packed
    assert len(warnings_of_dense(log)) == (not is_packed)
    loaded.save_pretrained(tmp_path / "again")
    again, info = cls.from_pretrained(tmp_path / "again", output_loading_info=True)
    assert not any(info.values()), info
    assert torch.equal(outputs(again, x), outputs(loaded, x))


# Layers that the model does not have.


def test_layers_that_the_model_lacks(moe, tmp_path, log):
    hqq_cpp.quantize_checkpoint(moe, tmp_path / "q", {"nbits": 8, "group_size": 32})
    for folder in (tmp_path / "q", change(tmp_path / "q", tmp_path / "bare", layers=None)):
        model, info = MixtralForCausalLM.from_pretrained(
            folder, num_hidden_layers=1, output_loading_info=True
        )
        assert not info["missing_keys"] and torch.isfinite(outputs(model, IDS)).all()
        unexpected = info["unexpected_keys"]
        assert "model.layers.1.mlp.experts.down_proj.W_q" in unexpected
        assert "model.layers.1.self_attn.q_proj.scale" in unexpected


def test_layers_that_the_model_ignores(tmp_path):
    class Ignores(OddModel):
        _keys_to_ignore_on_load_unexpected = [r"mtp\.0", "head.weight"]

    model = OddModel(OddConfig())
    for name in ("mtp.0", "head", "other"):
        model.add_module(name.replace(".", "_"), nn.Linear(64, 64, bias=False))
    model.save_pretrained(tmp_path / "dense")
    from safetensors.torch import load_file, save_file

    file = tmp_path / "dense" / "model.safetensors"
    tensors = load_file(file)
    tensors["mtp.0.weight"] = tensors.pop("mtp_0.weight")
    save_file(tensors, file, {"format": "pt"})
    names = {f"{name}.weight": {} for name in ("plain", "mtp.0", "head", "other")}
    folder = pack(tmp_path / "dense", tmp_path / "q", names)
    _, info = Ignores.from_pretrained(folder, output_loading_info=True)
    assert {key.rpartition(".")[0] for key in info["unexpected_keys"]} == {"other"}
    assert not info["missing_keys"]


# Names.


def test_key_mapping(moe, tmp_path):
    def rename(tensors):
        for key in list(tensors):
            tensors[key.replace("model.layers", "blocks")] = tensors.pop(key)

    def describe(layers):
        for name in list(layers):
            layer = layers.pop(name)
            layer["tensor"] = layer["tensor"].replace("model.layers", "blocks")
            layers[name.replace("model.layers", "blocks")] = layer

    hqq_cpp.quantize_checkpoint(moe, tmp_path / "q", {"nbits": 8, "group_size": 32})
    folder = change(tmp_path / "q", tmp_path / "renamed", rename, describe)
    mapping = {"^blocks": "model.layers"}
    model = MixtralForCausalLM.from_pretrained(tmp_path / "q")
    renamed, info = MixtralForCausalLM.from_pretrained(
        folder, key_mapping=mapping, output_loading_info=True
    )
    assert not any(info.values()), info
    assert torch.equal(outputs(renamed, IDS), outputs(model, IDS))
    with pytest.raises(hqq_cpp.FormatError, match="hold no W_q of a layer of MixtralForCausalLM"):
        MixtralForCausalLM.from_pretrained(folder)


def test_renamings_of_parts_of_a_layer(moe, quantized_llama):
    """They know nothing of packed tensors, some of whose names they may hit."""
    mapping = {r"\.zero$": ".offset"}
    auto = transformers.AutoModelForCausalLM
    loaded = auto.from_pretrained(quantized_llama, key_mapping=mapping)
    assert torch.equal(outputs(loaded, IDS), outputs(auto.from_pretrained(quantized_llama), IDS))


def test_tensors_that_nothing_reads_are_named(moe, tmp_path):
    hqq_cpp.quantize_checkpoint(moe, tmp_path / "q", {"nbits": 8, "group_size": 32})
    with pytest.raises(hqq_cpp.FormatError, match="4 packed tensors were not read.*_proj.zero"):
        MixtralForCausalLM.from_pretrained(tmp_path / "q", key_mapping={r"\.zero$": ".offset"})


# Tied weights.


@pytest.mark.parametrize("head", ["packed", "dense"])
def test_an_embedding_and_a_head_of_its_own(tmp_path, log, head):
    """A config that ties them is wrong when the file has two weights: Transformers says so and
    does not tie them."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**TEXT)).eval()
    model.save_pretrained(tmp_path / "dense")
    names = ["model.embed_tokens.weight"] + ["lm_head.weight"] * (head == "packed")
    folder = pack(tmp_path / "dense", tmp_path / "q", {name: {"nbits": 8} for name in names})
    folder = change(folder, tmp_path / "tied", config=lambda c: c.update(tie_word_embeddings=True))
    loaded = LlamaForCausalLM.from_pretrained(folder)
    exact, ours = outputs(model, IDS), outputs(loaded, IDS)
    assert (ours - exact).norm() < 0.02 * exact.norm()
    assert "we will NOT tie them" in log.text and warnings_of_dense(log)


@pytest.mark.parametrize("name", ["model.embed_tokens.weight", "lm_head.weight"])
def test_the_only_one_of_two_tied_weights(tmp_path, name):
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**TEXT, tie_word_embeddings=True)).eval()
    model.save_pretrained(tmp_path / "dense")
    from safetensors.torch import load_file, save_file

    file = tmp_path / "dense" / "model.safetensors"
    tensors = load_file(file)
    tensors[name] = tensors.pop("model.embed_tokens.weight")
    save_file(tensors, file, {"format": "pt"})
    folder = pack(tmp_path / "dense", tmp_path / "q", {name: {"nbits": 8}})
    loaded, info = LlamaForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    exact, ours = outputs(model, IDS), outputs(loaded, IDS)
    assert (ours - exact).norm() < 0.02 * exact.norm()

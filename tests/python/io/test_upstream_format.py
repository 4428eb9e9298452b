"""Conversion to and from the layout of upstream hqq, with upstream itself at the other end."""

import json
from pathlib import Path

import numpy as np
import pytest

import hqq_cpp
import reference

torch = pytest.importorskip("torch", reason="upstream needs torch")
upstream = pytest.importorskip("hqq.core.quantize", reason="the other end is the package hqq 0.2.8")
safetensors_torch = pytest.importorskip("safetensors.torch", reason="files need safetensors")

COMPUTE_DTYPES = {
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
}
GOLDEN = Path(__file__).resolve().parents[2] / "golden" / "upstream"


def write_folder(folder, tensors, config=None):
    folder.mkdir()
    tensors = {name: tensor.data.contiguous() for name, tensor in tensors.items()}
    safetensors_torch.save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config or {"model_type": "llama"}))
    return folder


def convert(source, to):
    destination = source.with_name(f"{source.name}-{to}")
    hqq_cpp.convert_checkpoint(source, destination, to)
    return destination


def upstream_layer(nbits, axis, group_size, shape, dtype, bias=False):
    torch.manual_seed(nbits * 2 + axis)
    linear = torch.nn.Linear(shape[1], shape[0], bias=bias)
    config = upstream.hqq_base_quant_config(nbits=nbits, group_size=group_size, axis=axis)
    return upstream.HQQLinear(linear, config, compute_dtype=dtype, device="cpu")


def load_layer(tensors, name, dtype):
    """An HQQLinear from a folder's tensors, the way Transformers 4 loaded it."""
    state = {k[len(name) + 1 :]: v for k, v in tensors.items() if k.startswith(name + ".")}
    layer = upstream.HQQLinear(None, None, compute_dtype=dtype, device="cpu")
    layer.load_state_dict(state)
    return layer


# ---- hqq -> format 1 -> hqq ----------------------------------------------------------------------


def up_proj(index):
    return f"model.layers.{index}.mlp.up_proj"


@pytest.mark.parametrize("dtype", COMPUTE_DTYPES)
@pytest.mark.parametrize("group_size", (8, 64, None))
@pytest.mark.parametrize("axis", (0, 1))
def test_state_dicts_come_back_byte_for_byte(tmp_path, axis, group_size, dtype):
    dtype = COMPUTE_DTYPES[dtype]
    layers = {
        up_proj(i): upstream_layer(nbits, axis, group_size, (64, 128), dtype, bias=i % 2 == 1)
        for i, nbits in enumerate(reference.NBITS)
    }
    tensors = {"model.norm.weight": torch.ones(64)}
    for name, layer in layers.items():
        tensors |= {f"{name}.{key}": value for key, value in layer.state_dict().items()}
    source = write_folder(tmp_path / "hqq", tensors)
    ours = convert(source, "hqq_cpp")
    assert hqq_cpp.verify_checkpoint(ours).ok
    back = convert(ours, "upstream")
    # The order of the file is that of the safetensors package, so even the header is the same.
    assert (back / "model.safetensors").read_bytes() == (source / "model.safetensors").read_bytes()

    checkpoint = hqq_cpp.Checkpoint(ours)
    assert sorted(checkpoint.quantized_layers()) == sorted(layers)
    for (name, layer), nbits in zip(layers.items(), reference.NBITS, strict=True):
        q = checkpoint.load(name)
        assert q.nbits == nbits
        unpacked = upstream.Quantizer.unpack[layer.meta["packing"]](layer.W_q, dtype=torch.uint8)
        codes = unpacked.reshape(-1)[: 64 * 128].reshape(64, 128).numpy()
        np.testing.assert_array_equal(q.codes(), codes)
        scale, zero = (layer.meta[key].float().numpy().ravel() for key in ("scale", "zero"))
        groups = reference.Groups(64, 128, group_size, axis)
        expected = reference.dequantize(codes, scale, zero, groups)
        np.testing.assert_array_equal(hqq_cpp.dequantize(q), expected)
        if dtype == torch.float32:
            np.testing.assert_array_equal(hqq_cpp.dequantize(q), layer.dequantize().numpy())


def test_golden_files_are_what_hqq_writes_today(tmp_path):
    """The files that the C++ tests read, loaded by the installed hqq."""
    tensors = safetensors_torch.load_file(GOLDEN / "layers.safetensors")
    codes = safetensors_torch.load_file(GOLDEN / "codes.safetensors")
    for name in codes:
        layer = load_layer(tensors, name, torch.float32)
        scale, zero = (layer.meta[key].numpy().ravel() for key in ("scale", "zero"))
        group_size, axis = layer.meta["group_size"], layer.meta["axis"]
        groups = reference.Groups(*codes[name].shape, group_size, axis)
        expected = reference.dequantize(codes[name].numpy(), scale, zero, groups)
        np.testing.assert_array_equal(layer.dequantize().numpy(), expected)


def test_float_views_keep_their_values(tmp_path):
    """view_as_float is not kept; what the layer computes is."""
    tensors = {
        key: value
        for key, value in safetensors_torch.load_file(GOLDEN / "layers.safetensors").items()
        if key.startswith("float_view")
    }
    source = write_folder(tmp_path / "hqq", tensors)
    back = convert(convert(source, "hqq_cpp"), "upstream")
    after = safetensors_torch.load_file(back / "model.safetensors")
    assert tensors["float_view.W_q"].dtype == torch.bfloat16
    assert after["float_view.W_q"].dtype == torch.uint8
    for name, dtype in (("float_view", torch.bfloat16), ("float_view_3", torch.float16)):
        a, b = load_layer(tensors, name, dtype), load_layer(after, name, dtype)
        assert torch.equal(a.dequantize(), b.dequantize())


def test_layers_hqq_loaded_and_saved_again(tmp_path):
    """hqq reads nbits 1.58 back as the integer 1."""
    layer = upstream_layer(1.58, 1, 8, (32, 64), torch.float32)
    state = {"fc." + key: value for key, value in layer.state_dict().items()}
    again = load_layer({**state}, "fc", torch.float32)
    assert again.meta["nbits"] == 1
    saved = {"fc." + key: value for key, value in again.state_dict().items()}
    ours = convert(write_folder(tmp_path / "hqq", saved), "hqq_cpp")
    q = hqq_cpp.Checkpoint(ours).load("fc")
    assert q.nbits == 1.58
    np.testing.assert_array_equal(hqq_cpp.dequantize(q), layer.dequantize().numpy())


# ---- format 1 -> hqq -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    """One layer for every nbits, the first with a bias."""
    rng = np.random.default_rng(0)
    tensors = {
        up_proj(i) + ".weight": rng.standard_normal((64, 128)) * 0.05
        for i in range(len(reference.NBITS))
    }
    tensors[up_proj(0) + ".bias"] = rng.standard_normal(64)
    tensors["lm_head.weight"] = rng.standard_normal((40, 64))
    folder = tmp_path_factory.mktemp("dense") / "model"
    return write_folder(folder, {k: torch.tensor(v).float() for k, v in tensors.items()})


@pytest.mark.parametrize("meta_dtype", COMPUTE_DTYPES)
@pytest.mark.parametrize("solver", ("minmax", "joint"))
@pytest.mark.parametrize("axis", (0, 1))
def test_hqq_loads_our_layers(tmp_path, dense, axis, solver, meta_dtype):
    config = {"group_size": 16, "axis": axis, "solver": solver, "balance": "none"}
    config["meta_dtype"] = meta_dtype
    config["dynamic_config"] = {up_proj(i): {"nbits": n} for i, n in enumerate(reference.NBITS)}
    hqq_cpp.quantize_checkpoint(dense, tmp_path / "ours", config)
    checkpoint = hqq_cpp.Checkpoint(tmp_path / "ours")
    folder = convert(tmp_path / "ours", "upstream")
    tensors = safetensors_torch.load_file(folder / "model.safetensors")
    dtype = COMPUTE_DTYPES[meta_dtype]
    bias = tensors[up_proj(0) + ".bias"]
    assert len(checkpoint.quantized_layers()) == len(reference.NBITS)
    for i, nbits in enumerate(reference.NBITS):
        q = checkpoint.load(up_proj(i))
        layer = load_layer(tensors, up_proj(i), dtype)
        # hqq makes an integer of 1.58.
        assert layer.meta["nbits"] == int(nbits)
        assert (layer.out_features, layer.in_features) == q.shape
        assert layer.quant_config["weight_quant_params"]["optimize"] == (solver != "minmax")
        if i == 0:
            assert torch.equal(layer.bias, bias.to(dtype))
        else:
            assert layer.bias is None
        W_r = layer.dequantize().float().numpy()
        # hqq computes in compute_dtype: a difference and a product, each rounded once.
        groups = reference.Groups(*q.shape, 16, axis)
        scale, zero = (np.asarray(t).astype(np.float32) for t in (q.scale, q.zero))
        shifted = reference.round_to(q.codes() - groups.spread(zero), meta_dtype)
        expected = reference.round_to(shifted * groups.spread(scale), meta_dtype)
        np.testing.assert_array_equal(W_r, expected)
        if meta_dtype == "float32":
            np.testing.assert_array_equal(W_r, hqq_cpp.dequantize(q))


def test_modules_load_through_their_parent(tmp_path, dense):
    """load_state_dict of a whole module finds every key it expects and no other."""
    hqq_cpp.quantize_checkpoint(dense, tmp_path / "ours", {"group_size": 16, "balance": "none"})
    folder = convert(tmp_path / "ours", "upstream")
    tensors = safetensors_torch.load_file(folder / "model.safetensors")
    prefix = "model.layers.0.mlp."
    state = {k[len(prefix) :]: v for k, v in tensors.items() if k.startswith(prefix)}
    assert {key.split(".")[1] for key in state} == upstream.HQQLinear(
        None, None, device="cpu"
    ).state_dict_keys()
    parent = torch.nn.Module()
    parent.up_proj = upstream.HQQLinear(None, None, compute_dtype=torch.float16, device="cpu")
    parent.load_state_dict(state)
    x = torch.randn(3, 128, dtype=torch.float16)
    expected = x @ parent.up_proj.dequantize().t() + parent.up_proj.bias
    assert torch.equal(parent.up_proj(x), expected)


def test_quant_config_builds_the_same_settings(tmp_path, dense):
    """config.json holds what BaseQuantizeConfig returns."""
    config = {"nbits": 3, "group_size": 16, "axis": 0, "solver": "hqq", "balance": "none"}
    hqq_cpp.quantize_checkpoint(dense, tmp_path / "ours", config)
    folder = convert(tmp_path / "ours", "upstream")
    written = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert written == {
        "quant_config": upstream.hqq_base_quant_config(nbits=3, group_size=16, axis=0),
        "quant_method": "hqq",
        "skip_modules": ["lm_head"],
    }
    assert hqq_cpp.HqqConfig.from_dict(written).to_dict()["nbits"] == 3


def test_eight_bit_metadata_becomes_float32(tmp_path, dense):
    config = {"group_size": 16, "balance": "none", "quant_scale": True, "quant_zero": True}
    hqq_cpp.quantize_checkpoint(dense, tmp_path / "ours", config)
    q = hqq_cpp.Checkpoint(tmp_path / "ours").load("model.layers.0.mlp.up_proj")
    folder = convert(tmp_path / "ours", "upstream")
    tensors = safetensors_torch.load_file(folder / "model.safetensors")
    layer = load_layer(tensors, "model.layers.0.mlp.up_proj", torch.float32)
    np.testing.assert_array_equal(layer.dequantize().numpy(), hqq_cpp.dequantize(q))


# ---- refusals ------------------------------------------------------------------------------------


def test_balanced_layers_are_refused(tmp_path, dense):
    hqq_cpp.quantize_checkpoint(dense, tmp_path / "ours", {"balance": "sinkhorn"})
    with pytest.raises(ValueError, match="no place for col_scale; quantize with balance none"):
        convert(tmp_path / "ours", "upstream")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["ours"]


def test_one_scale_for_a_whole_matrix_is_refused(tmp_path):
    W_q, meta = upstream.Quantizer.quantize(
        torch.randn(16, 32), nbits=4, channel_wise=False, group_size=None, axis=1, device="cpu"
    )
    layer = upstream_layer(4, 1, 8, (16, 32), torch.float16)
    state = {"fc." + key: value for key, value in layer.state_dict().items()}
    state |= {"fc.W_q": W_q, "fc.scale": meta["scale"], "fc.zero": meta["zero"]}
    state["fc.channel_wise"] = torch.tensor(0, dtype=torch.uint8)
    with pytest.raises(ValueError, match="channel_wise is false"):
        convert(write_folder(tmp_path / "hqq", state), "hqq_cpp")


def test_groups_across_rows_are_refused(tmp_path):
    layer = upstream_layer(4, 1, 64, (16, 32), torch.float16)
    state = {"fc." + key: value for key, value in layer.state_dict().items()}
    with pytest.raises(ValueError, match="groups of 64 weights run over the ends of rows of 32"):
        convert(write_folder(tmp_path / "hqq", state), "hqq_cpp")


@pytest.mark.parametrize("key", ("scale", "zero", "nbits", "shape", "axis"))
def test_missing_tensors_are_named(tmp_path, key):
    layer = upstream_layer(4, 1, 8, (16, 32), torch.float16)
    state = {"fc." + k: value for k, value in layer.state_dict().items() if k != key}
    with pytest.raises(hqq_cpp.FormatError, match=rf'layer "fc"\] tensor {key} is missing'):
        convert(write_folder(tmp_path / "hqq", state), "hqq_cpp")


@pytest.mark.parametrize("to", ("upstream", "hqq_cpp"))
def test_dense_folders_are_refused(tmp_path, dense, to):
    with pytest.raises(ValueError, match="holds no layer"):
        hqq_cpp.convert_checkpoint(dense, tmp_path / "out", to)
    assert not (tmp_path / "out").exists()

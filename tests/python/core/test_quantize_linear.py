"""quantize_linear, QuantizedLinear (NumPy) and HqqLinear (torch)."""

import copy
import itertools
import pickle

import numpy as np
import pytest

import hqq_cpp
import reference

SMALL = {"nbits": 4, "group_size": 16, "balance": "none"}


# ---- NumPy ---------------------------------------------------------------------------------------


def test_numpy_layer(rng):
    W, bias = rng.standard_normal((24, 80), dtype=np.float32), rng.standard_normal(24)
    layer = hqq_cpp.quantize_linear(W, {"nbits": 4}, bias=bias)
    assert isinstance(layer, hqq_cpp.QuantizedLinear)
    assert (layer.in_features, layer.out_features) == (80, 24)
    x = rng.standard_normal((2, 3, 80), dtype=np.float32)
    y = layer(x)
    assert y.shape == (2, 3, 24) and y.dtype == np.float32 and y.flags.writeable
    exact = x.astype(np.float64) @ layer.dequantize().astype(np.float64).T
    exact += bias.astype(np.float32)
    # Rounding of a dot product of 80 terms, plus that of the bias.
    bound = 82 * 2.0**-24 * (np.abs(x) @ np.abs(layer.dequantize()).T + np.abs(bias))
    assert (np.abs(y - exact) <= bound).all()
    assert np.array_equal(layer(x[0, 0]), layer(x[:1, :1])[0, 0])
    assert layer(x[:0]).shape == (0, 3, 24)
    assert "bias=True" in repr(layer)
    without = hqq_cpp.quantize_linear(W, {"nbits": 4})
    assert without.bias is None and not np.array_equal(without(x), y)


@pytest.mark.parametrize("settings, has_tiles", [({}, True), ({"axis": 0, "group_size": 8}, False)])
def test_numpy_layer_keeps_its_tiles(rng, settings, has_tiles, monkeypatch):
    tiled = []
    tile = hqq_cpp.QuantizedTensor.tile
    monkeypatch.setattr(
        hqq_cpp.QuantizedTensor, "tile", lambda q, *a: (tiled.append(1), tile(q, *a))[1]
    )
    q = hqq_cpp.quantize(rng.standard_normal((24, 80), dtype=np.float32), settings)
    layer = hqq_cpp.QuantizedLinear(q)
    assert layer.weight is q and tiled == []
    x = rng.standard_normal((3, 80), dtype=np.float32)
    text, y = repr(layer), layer(x)
    assert np.array_equal(layer(x), y) and len(tiled) == has_tiles
    assert np.array_equal(y, hqq_cpp.linear(x, q))
    # The layer holds one of the two, and gives format 1 bit for bit.
    assert isinstance(layer._weight, hqq_cpp.TiledTensor) == has_tiles
    for other in (layer, pickle.loads(pickle.dumps(layer)), copy.copy(layer)):
        assert np.array_equal(other(x), y) and repr(other) == text
        for name, tensor in q.tensors().items():
            assert bytes(other.weight.tensors()[name].numpy()) == bytes(tensor.numpy()), name


def test_numpy_layer_refuses(rng):
    W = rng.standard_normal((24, 80), dtype=np.float32)
    for bias in (np.zeros(23), np.zeros((1, 24))):
        with pytest.raises(ValueError, match=r"it must be \[24\]"):
            hqq_cpp.quantize_linear(W, bias=bias)
    layer = hqq_cpp.quantize_linear(W)
    with pytest.raises(ValueError, match="81"):
        layer(np.zeros((2, 81), np.float32))
    with pytest.raises(ValueError, match="int64"):
        layer(np.zeros((2, 80), np.int64))
    with pytest.raises(ValueError, match="single number"):
        layer(np.float32(1))
    with pytest.raises(ValueError, match=r"\[linear\] bias has 0 values"):
        hqq_cpp.linear(np.zeros((2, 80), np.float32), layer.weight, [])
    with pytest.raises(ValueError, match="bias"):
        hqq_cpp.linear(np.zeros((2, 80), np.float32), layer.weight, np.zeros(3))


def test_names_and_importance(rng):
    W = rng.standard_normal((24, 80), dtype=np.float32)
    config = hqq_cpp.HqqConfig(dynamic_config={"mlp.up_proj": {"nbits": 2}})
    assert hqq_cpp.quantize_linear(W, config, "model.layers.1.mlp.up_proj").weight.nbits == 2
    assert hqq_cpp.quantize_linear(W, config).weight.nbits == 4
    importance = np.arange(1.0, 81)
    weighted = hqq_cpp.quantize_linear(W, config, importance=importance).weight
    expected = hqq_cpp.quantize(W, config, importance=importance)
    assert np.array_equal(weighted.codes(), expected.codes())
    with pytest.raises(ValueError, match=r"\[lm_head\].*unquantized"):
        hqq_cpp.quantize_linear(W, config, name="lm_head")
    with pytest.raises(ValueError, match="matrix"):
        hqq_cpp.quantize_linear(np.zeros(8))


# ---- torch ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def torch():
    return pytest.importorskip("torch", reason="HqqLinear is a torch module")


def test_linear_module(torch):
    torch.manual_seed(0)
    source = torch.nn.Linear(80, 24)
    layer = hqq_cpp.quantize_linear(source, {"nbits": 8})
    assert isinstance(layer, hqq_cpp.HqqLinear) and isinstance(layer, torch.nn.Module)
    x = torch.randn(2, 3, 80)
    assert layer(x).shape == (2, 3, 24)
    assert (layer(x) - source(x)).abs().max() < 0.02
    assert torch.equal(layer.bias, source.bias)
    assert hqq_cpp.quantize_linear(torch.nn.Linear(80, 24, bias=False)).bias is None
    assert "in_features=80, out_features=24, bias=True, nbits=8, group_size=64" in repr(layer)


def test_torch_weight_and_bias(torch):
    W = torch.randn(24, 80, dtype=torch.bfloat16)
    assert hqq_cpp.quantize_linear(W).bias is None
    for bias in (torch.ones(24), np.ones(24, np.float32)):
        layer = hqq_cpp.quantize_linear(W, bias=bias)
        assert torch.equal(layer.bias, torch.ones(24))
    own = torch.nn.Linear(80, 24)
    assert torch.equal(hqq_cpp.quantize_linear(own, bias=torch.ones(24)).bias, torch.ones(24))
    with pytest.raises(ValueError, match=r"bias has the shape \[23\]; it must be \[24\]"):
        hqq_cpp.quantize_linear(W, bias=torch.ones(23))


def test_bfloat16_module_equals_its_float32_values(torch):
    source = torch.nn.Linear(80, 24).bfloat16()
    ours = hqq_cpp.quantize_linear(source, {"nbits": 3})
    theirs = hqq_cpp.quantize_linear(source.weight.detach().float(), {"nbits": 3})
    assert torch.equal(ours.W_q, theirs.W_q) and torch.equal(ours.scale, theirs.scale)


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("nbits", reference.NBITS)
def test_torch_dequantize_equals_the_library(torch, rng, nbits, axis):
    """Unpacking and arithmetic in torch give the library's bits: blocks, tails, all metadata."""
    options = itertools.product((8, 24, 64, None), (8, 30, 64, 200), ("none", "sinkhorn"))
    for count, (group_size, cols, balance) in enumerate(options):
        config = {"nbits": nbits, "axis": axis, "group_size": group_size, "balance": balance}
        config |= {"meta_dtype": reference.META_DTYPES[count % 3], "quant_zero": count % 2 == 0}
        config |= {"quant_scale": count % 5 < 2}
        q = hqq_cpp.quantize(rng.standard_normal((20, cols), dtype=np.float32), config)
        layer = hqq_cpp.HqqLinear(q)
        assert torch.equal(layer.dequantize(), torch.from_numpy(hqq_cpp.dequantize(q))), config
        dense = torch.from_dlpack(hqq_cpp.dequantize(q, "bfloat16"))
        assert torch.equal(layer.dequantize(torch.bfloat16), dense)


@pytest.mark.parametrize("backend", ["torch", "native"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float64"])
@pytest.mark.parametrize("rows", [1, 5, 20])
def test_forward_is_linear_of_dequantize(torch, dtype, rows, backend):
    dtype = getattr(torch, dtype)
    layer = hqq_cpp.quantize_linear(torch.nn.Linear(80, 24), {"nbits": 3})
    x = torch.randn(rows, 80, dtype=dtype)
    exact = x.double() @ layer.dequantize(torch.float64).T + layer.bias.double()
    # Of a sum of 80 products and of the rounded weights and results.
    size = x.double().abs() @ layer.dequantize(torch.float64).abs().T + layer.bias.double().abs()
    bound = 80 * max(torch.finfo(dtype).eps, torch.finfo(torch.float32).eps) * size
    hqq_cpp.set_backend(backend)
    try:
        y = layer(x)
        assert y.dtype == dtype and bool(((y.double() - exact).abs() <= bound).all())
        with pytest.raises(
            ValueError, match=r"x has the shape .*79\]; its last dimension must be 80"
        ):
            layer(x[:, 1:])
    finally:
        hqq_cpp.set_backend("auto")


def test_tensors_are_shared_with_the_module(torch, rng):
    q = hqq_cpp.quantize(rng.standard_normal((24, 80)), {"nbits": 3})
    layer = hqq_cpp.HqqLinear(q)
    assert layer.W_q.data_ptr() == q.W_q.data_ptr
    back = layer.quantized_tensor()
    assert back.W_q.data_ptr == q.W_q.data_ptr and back.config == q.config
    assert np.array_equal(hqq_cpp.dequantize(back), hqq_cpp.dequantize(q))


def test_state_dict_has_the_names_of_a_checkpoint(torch, rng):
    W = rng.standard_normal((24, 80))
    config = {"nbits": 3, "quant_scale": True}
    layer = hqq_cpp.quantize_linear(torch.from_numpy(W), config, bias=torch.ones(24))
    names = ["W_q", "scale", "zero", "scale_step", "scale_offset", "col_scale", "bias"]
    assert list(layer.state_dict()) == names
    assert list(hqq_cpp.quantize(W, config).tensors()) == names[:-1]
    other = hqq_cpp.quantize_linear(torch.randn(24, 80), config, bias=torch.zeros(24))
    assert not torch.equal(other.dequantize(), layer.dequantize())
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other.dequantize(), layer.dequantize())
    with pytest.raises(RuntimeError, match=r"W_q is uint8 \[24, 33\]; it must be uint8 \[24, 30\]"):
        other.load_state_dict(hqq_cpp.quantize_linear(torch.randn(24, 88), config).state_dict())


def test_casts_leave_the_weights_alone(torch):
    """half() must not round scale and zero a second time."""
    layer = hqq_cpp.quantize_linear(torch.nn.Linear(80, 24), {"meta_dtype": "float32"})
    expected = layer.dequantize()
    for cast in (lambda m: m.half(), lambda m: m.to(torch.bfloat16), lambda m: m.double()):
        model = cast(torch.nn.Sequential(copy.deepcopy(layer)))
        assert model[0].scale.dtype == torch.float32 and model[0].W_q.dtype == torch.uint8
        assert torch.equal(model[0].dequantize(), expected)
        assert model[0].bias.dtype != torch.float32, "the bias is no metadata"
    assert layer.to("meta").W_q.device.type == "meta"


def test_gradients_reach_x_and_nothing_else(torch):
    layer = hqq_cpp.quantize_linear(torch.nn.Linear(80, 24))
    x = torch.randn(5, 80, requires_grad=True)
    layer(x).sum().backward()
    assert torch.allclose(x.grad, layer.dequantize().sum(0).expand(5, 80), atol=1e-5)
    weights = [p for name, p in layer.named_parameters() if name != "bias"]
    assert weights and not any(p.requires_grad for p in weights)


def test_saving_and_copying(torch, tmp_path):
    layer = hqq_cpp.quantize_linear(torch.nn.Linear(80, 24), {"nbits": 5})
    torch.save(layer, tmp_path / "layer.pt")
    loaded = torch.load(tmp_path / "layer.pt", weights_only=False)
    for other in (loaded, copy.deepcopy(layer)):
        assert torch.equal(other.dequantize(), layer.dequantize())
        assert other.layer_config == layer.layer_config


def test_a_layer_of_a_checkpoint(torch, model, tmp_path):
    hqq_cpp.quantize_checkpoint(model, tmp_path / "out", {"nbits": 3})
    checkpoint = hqq_cpp.Checkpoint(tmp_path / "out")
    name = "model.layers.1.self_attn.q_proj"
    layer = hqq_cpp.HqqLinear(checkpoint.load(name))
    dense = hqq_cpp.Checkpoint(model).tensor(name + ".weight")
    error = (layer.dequantize() - torch.from_dlpack(dense).float()).norm()
    assert 0 < error < 0.25 * torch.from_dlpack(dense).float().norm()


FORK = """
import os, sys
import torch
import hqq_cpp

torch.set_num_threads(2)
W = torch.randn(512, 512)
W @ W  # starts torch's threads, which quantize() joins
expected = hqq_cpp.quantize(W, threads=2).codes()
child = os.fork()
if child == 0:
    same = (hqq_cpp.quantize(W, threads=2).codes() == expected).all()
    os._exit(0 if same else 1)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


def test_works_in_a_forked_process(torch, run_python):
    done = run_python(FORK)
    assert done.returncode == 0, done.stderr

"""Quantized layers of torch: custom operators, compilers, copies, backends, quantize_model_."""

import copy
import pickle

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the layers need torch")

import hqq_cpp
from hqq_cpp.find.layers import find_layers, quantized_layers

SETTINGS = [
    {"nbits": 4, "group_size": 32},
    {"nbits": 3, "group_size": 64, "quant_zero": True, "quant_scale": True},
    {"nbits": 1.58, "axis": 0, "group_size": 8, "balance": "none"},
    {"nbits": 6, "group_size": None, "meta_dtype": "bfloat16"},
]


@pytest.fixture(params=SETTINGS, ids=str)
def layer(request):
    torch.manual_seed(0)
    return hqq_cpp.quantize_linear(torch.nn.Linear(96, 40), request.param)


@pytest.fixture(params=["torch", "native"])
def backend(request):
    hqq_cpp.set_backend(request.param)
    yield request.param
    hqq_cpp.set_backend("auto")


@pytest.fixture(autouse=True)
def fresh_compiler():
    """The compiler gives up after some layers of different settings in one function."""
    torch._dynamo.reset()


def dense(layer):
    """The same layer with its dequantized weight, by torch alone."""
    other = torch.nn.Linear(layer.in_features, layer.out_features)
    other.weight.data = layer.dequantize()
    other.bias.data = layer.bias.detach().clone()
    return other


def close(a, b, factor=1e-5):
    assert a.shape == b.shape and a.dtype == b.dtype
    assert (a - b).abs().max() <= factor * b.abs().max(), (a - b).abs().max()


# Operators.


def test_operators_hold_what_they_promise(layer):
    """Schema, fake implementation, autograd registration and dispatch under AOT."""
    x = torch.randn(3, 5, 96, requires_grad=True)
    bias = layer.bias.detach().clone().requires_grad_()
    torch.library.opcheck(
        torch.ops.hqq_cpp.linear, (x, *layer.packed(), bias, *layer._layout.numbers)
    )
    torch.library.opcheck(
        torch.ops.hqq_cpp.linear_backward,
        (torch.randn(3, 40), *layer.packed(), *layer._layout.numbers),
    )


def test_gradients_are_those_of_the_dense_layer(layer, backend):
    reference = dense(layer)
    layer.bias.requires_grad_()
    x = torch.randn(2, 7, 96, requires_grad=True)
    grad = torch.randn(2, 7, 40)
    ours = torch.autograd.grad(layer(x), (x, layer.bias), grad)
    theirs = torch.autograd.grad(reference(x), (x, reference.bias), grad)
    for a, b in zip(ours, theirs):
        close(a, b)
    assert all(not p.requires_grad for p in layer.packed() if p is not None)


def test_only_the_packed_weight_is_kept_for_the_way_back(layer):
    x = torch.randn(4, 96, requires_grad=True)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        layer(x)
    assert saved and all(t.numel() < 40 * 96 for t in saved)


def test_autocast(layer):
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(torch.randn(2, 96)).dtype == torch.bfloat16
    assert layer(torch.randn(2, 96)).dtype == torch.float32


# Compilers.


def test_compiles_without_breaks_for_any_batch(layer, backend):
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")
    for rows in (2, 5, 20):
        x = torch.randn(rows, 96, requires_grad=rows == 5)
        close(compiled(x).detach(), dense(layer)(x).detach())
        if x.requires_grad:
            (grad,) = torch.autograd.grad(compiled(x).sum(), x)
            close(grad, layer.dequantize().sum(0).expand(5, -1).contiguous())


def test_inductor():
    layer = hqq_cpp.quantize_linear(torch.nn.Linear(96, 40), SETTINGS[0])
    compiled = torch.compile(layer, fullgraph=True)
    x = torch.randn(3, 96)
    close(compiled(x), dense(layer)(x))


def test_export(layer):
    rows = torch.export.Dim("rows")
    program = torch.export.export(layer, (torch.randn(3, 96),), dynamic_shapes=({0: rows},))
    x = torch.randn(11, 96)
    close(program.module()(x), layer(x))
    assert any("hqq_cpp.linear" in str(node.target) for node in program.graph.nodes)


# Modules.


def test_copies(layer, tmp_path):
    x = torch.randn(3, 96)
    torch.save(layer, tmp_path / "layer.pt")
    loaded = torch.load(tmp_path / "layer.pt", weights_only=False)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), loaded):
        assert torch.equal(other(x), layer(x))
        assert other.W_q.data_ptr() != layer.W_q.data_ptr()
        assert other.layer_config == layer.layer_config


def test_meta_and_state_dict(layer):
    empty = hqq_cpp.HqqLinear.empty(layer.layer_config, 40, 96, True, device="meta")
    assert {k: (v.shape, v.dtype) for k, v in empty.state_dict().items()} == {
        k: (v.shape, v.dtype) for k, v in layer.state_dict().items()
    }
    empty = empty.to_empty(device="cpu")
    empty.load_state_dict(layer.state_dict())
    x = torch.randn(3, 96)
    assert torch.equal(empty(x), layer(x))
    stored = layer.state_dict()
    empty.load_state_dict(stored, assign=True)
    assert empty.W_q.data_ptr() == stored["W_q"].data_ptr() and torch.equal(empty(x), layer(x))


def test_tiles(layer):
    """A forward pass changes the order in memory, and nothing that leaves the layer."""
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    dense, x = layer.dequantize(), torch.randn(3, 96)
    first = layer(x)
    has_tiles = layer.layer_config.axis == 1
    assert layer.is_tiled == has_tiles and layer.W_q.dim() == (3 if has_tiles else 2)
    assert before.keys() == layer.state_dict().keys()
    assert all(torch.equal(before[k], v) for k, v in layer.state_dict().items())
    assert torch.equal(layer.dequantize(), dense)
    assert hqq_cpp.dequantize(layer.quantized_tensor()).tolist() == dense.tolist()
    hqq_cpp.set_backend("torch")
    try:
        assert torch.equal(layer.dequantize(), dense)
        torch.testing.assert_close(layer(x), first)
    finally:
        hqq_cpp.set_backend("auto")
    layer.half()
    assert not layer.is_tiled and all(
        torch.equal(before[k], v) for k, v in layer.state_dict().items() if k != "bias"
    )
    assert layer.tile_().is_tiled == has_tiles and not layer.untile_().is_tiled


def test_modules_that_share_parameters_share_tiles(layer):
    other = copy.copy(layer)
    other._parameters = dict(layer._parameters)
    layer.tile_()
    assert other.is_tiled == layer.is_tiled and torch.equal(
        other(torch.ones(1, 96)), layer(torch.ones(1, 96))
    )


def test_state_dict_of_other_settings_is_refused(layer):
    other = hqq_cpp.quantize_linear(torch.nn.Linear(96, 40), {"nbits": 8, "group_size": 24})
    with pytest.raises(
        RuntimeError, match=r"does not fit a layer of nbits=.*W_q is uint8 \[40, 96\]; it must"
    ):
        layer.load_state_dict(other.state_dict())
    wrong = layer.state_dict() | {"scale": layer.scale.double()}
    with pytest.raises(RuntimeError, match="scale is float64"):
        layer.load_state_dict(wrong)
    extra = layer.state_dict() | {"zero_step": torch.ones(1)}
    if layer.zero_step is None:
        with pytest.raises(RuntimeError, match="zero_step is present, but the settings exclude it"):
            layer.load_state_dict(extra)


def test_empty_needs_a_decided_balance():
    with pytest.raises(ValueError, match="balance is 'auto'"):
        hqq_cpp.HqqLinear.empty(hqq_cpp.HqqConfig().layer("x"), 8, 64)


def test_weight_stands_for_the_dense_one(layer):
    weight = layer.weight
    assert (weight.shape, weight.dtype, weight.device.type) == ((40, 96), torch.float32, "cpu")
    assert weight.numel() == 40 * 96 and weight.is_floating_point() and not weight.requires_grad
    W_r = layer.dequantize()
    assert torch.equal(weight + 0, W_r) and torch.equal(weight.t() @ torch.eye(40), W_r.t())
    x = torch.randn(2, 96)
    close(torch.nn.functional.linear(x, weight, layer.bias), layer(x))
    assert layer.to(torch.bfloat16).weight.dtype == torch.bfloat16
    assert isinstance(layer, torch.nn.Linear)
    with pytest.raises((KeyError, AttributeError)):
        layer.weight = torch.nn.Parameter(W_r)


def test_weight_is_read_only(layer):
    before = layer.dequantize()
    for change in (
        lambda: layer.weight.add_(1),
        lambda: layer.weight.copy_(before),
        lambda: torch.nn.init.zeros_(layer.weight),
        lambda: setattr(layer.weight, "data", before),
        lambda: layer.weight.__setitem__(0, 1),
    ):
        with pytest.raises(RuntimeError, match=r"layer.quantize_\(W\) quantizes another one"):
            change()
    assert torch.equal(layer.weight.data, before)


def test_result_can_be_changed_in_place(layer):
    x = torch.randn(2, 12, 96, requires_grad=True)
    y = layer(x)
    y += 1
    assert torch.autograd.grad(y.sum(), x)[0].shape == x.shape


def test_casts_keep_the_bits(layer):
    before = copy.deepcopy(layer.state_dict())
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        layer.to(dtype)
        assert layer.compute_dtype == dtype and layer.bias.dtype == dtype
        for name, tensor in layer.state_dict().items():
            if name != "bias":
                assert tensor.dtype == before[name].dtype and torch.equal(tensor, before[name])


def test_quantize_again(layer):
    W = torch.randn(40, 96)
    expected = hqq_cpp.quantize(W, layer.layer_config)
    layer.quantize_(W)
    assert np.array_equal(layer.dequantize().numpy(), hqq_cpp.dequantize(expected))
    with pytest.raises(ValueError, match=r"W has the shape \[40, 95\]; the layer takes \[40, 96\]"):
        layer.quantize_(W[:, 1:])


def test_backends(layer):
    assert hqq_cpp.get_backend() == "auto"
    with pytest.raises(ValueError, match="'cuda' is no backend; there are auto, torch, native"):
        hqq_cpp.set_backend("cuda")
    hqq_cpp.set_backend("native")
    try:
        on_meta = layer.to("meta").requires_grad_(False)
        with pytest.raises(ValueError, match="native kernels take float32.*the layer is on meta"):
            on_meta(torch.randn(1, 96, device="meta"))
    finally:
        hqq_cpp.set_backend("auto")


# Experts.


def experts(parts, settings=None):
    settings = settings or {"nbits": 4, "group_size": 32}
    matrices = [[torch.randn(24, 64) for _ in range(parts)] for _ in range(4)]
    quantized = [[hqq_cpp.quantize(W, settings) for W in row] for row in matrices]
    if parts == 1:
        return hqq_cpp.HqqExperts([row[0] for row in quantized]), quantized
    made = hqq_cpp.HqqExperts.empty(
        quantized[0][0].config, (4, 24 * parts, 64), parts=parts, device="cpu"
    )
    tensors = {}
    for name in quantized[0][0].tensors():
        rows = [[torch.from_dlpack(q.tensors()[name]) for q in row] for row in quantized]
        join = torch.stack if name == "col_scale" else torch.cat
        tensors[name] = torch.stack([join(row) for row in rows])
    made.set_packed(tensors, "cpu")
    return made, quantized


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("parts", [1, 2])
def test_experts(parts, settings, backend):
    made, quantized = experts(parts, settings)
    W_r = torch.stack(
        [torch.cat([torch.from_numpy(hqq_cpp.dequantize(q)) for q in row]) for row in quantized]
    )
    assert torch.equal(made.dequantize(), W_r) and torch.equal(made[2], W_r[2])
    assert torch.equal(made[torch.tensor([1, 3])], W_r[[1, 3]])
    assert (made.shape, made.dtype, len(made)) == (W_r.shape, torch.float32, 4)

    counts = torch.tensor([2, 0, 12, 1])
    x = torch.randn(16, 64, requires_grad=True)  # one row more: routed to no expert here
    bias = torch.randn(4, 24 * parts, requires_grad=True)
    owner = [0, 0, *[2] * 12, 3]
    expected = torch.stack(
        [*(W_r[e] @ x[i] + bias[e] for i, e in enumerate(owner)), torch.zeros(24 * parts)]
    )
    y = made(x, counts, bias)
    close(y, expected)
    grad = torch.randn_like(y)
    for a, b in zip(
        torch.autograd.grad(y, (x, bias), grad), torch.autograd.grad(expected, (x, bias), grad)
    ):
        close(a, b)
    flipped = made(torch.randn(15, 24 * parts), counts, transposed=True)
    assert flipped.shape == (15, 64)
    torch.library.opcheck(
        torch.ops.hqq_cpp.experts_linear,
        (x, counts, *made.packed(), bias, *made._layout.numbers, parts, False),
    )


def test_experts_refuse():
    q = hqq_cpp.quantize(torch.randn(8, 64), {"nbits": 4})
    with pytest.raises(ValueError, match="there are 0 matrices"):
        hqq_cpp.HqqExperts([])
    with pytest.raises(ValueError, match="expert 1 is .*one shape"):
        hqq_cpp.HqqExperts([q, hqq_cpp.quantize(torch.randn(16, 64), {"nbits": 4})])
    made = hqq_cpp.HqqExperts([q, q])
    with pytest.raises(IndexError, match="no expert 2; there are 2"):
        made[2]
    with pytest.raises(ValueError, match=r"x has the shape \[3, 63\]; it must be \[rows, 64\]"):
        made(torch.randn(3, 63), torch.tensor([1, 2]))
    for counts in ([1, 3], [-1, 2]):
        with pytest.raises(ValueError, match=f"counts .* add up to {sum(counts)} rows"):
            made(torch.randn(3, 64), torch.tensor(counts))
    with pytest.raises(ValueError, match="W_q is uint8"):
        made.set_packed(
            {k: v[:1] for k, v in made.packed()._asdict().items() if v is not None}, "cpu"
        )


# Whole models.


def net():
    torch.manual_seed(0)
    return torch.nn.ModuleDict(
        {
            "a": torch.nn.Linear(64, 32),
            "conv": torch.nn.Conv2d(32, 48, 1),
            "wide": torch.nn.Conv2d(32, 48, 3),
            "attention": torch.nn.MultiheadAttention(32, 2),
            "inner": torch.nn.Sequential(torch.nn.ReLU(), torch.nn.Linear(32, 16, bias=False)),
        }
    )


def test_quantize_model():
    model, source = net(), net()
    seen = []
    with pytest.warns(UserWarning, match=r"2 layers stay as they are: wide .*; attention.out_proj"):
        out = hqq_cpp.quantize_model_(
            model, {"nbits": 8, "group_size": 32}, progress=lambda *a: seen.append(a)
        )
    assert out is model
    assert seen == [("a", 1, 3), ("conv", 2, 3), ("inner.1", 3, 3)]
    assert [name for name, _ in quantized_layers(model)] == ["a", "conv", "inner.1"]
    x = torch.randn(3, 64)
    close(model["a"](x), source["a"](x), 0.02)
    image = torch.randn(2, 32, 5, 7)
    close(model["conv"](image), source["conv"](image), 0.02)
    assert type(model["wide"]) is torch.nn.Conv2d
    # nn.MultiheadAttention reads the weight of its out_proj itself.
    assert not isinstance(model["attention"].out_proj, hqq_cpp.HqqLinear)
    with pytest.raises(ValueError, match="there is nothing to quantize below ModuleDict"):
        hqq_cpp.quantize_model_(model)


def test_quantize_model_chooses():
    model = hqq_cpp.quantize_model_(
        net(),
        hqq_cpp.HqqConfig(nbits=4, dynamic_config={"inner.*": {"nbits": 2}, "conv": None}),
        filter=lambda name, module: name != "a",
    )
    assert [(n, m.nbits) for n, m in quantized_layers(model)] == [("inner.1", 2)]
    with pytest.raises(ValueError, match="quantize_linear takes a single layer"):
        hqq_cpp.quantize_model_(torch.nn.Linear(64, 64))
    with pytest.raises(
        ValueError, match=r"\[a\] importance has the shape \[63\]; it must be \[64\]"
    ):
        hqq_cpp.quantize_model_(net(), importance={"a": torch.ones(63)})


def test_quantize_model_takes_importance():
    importance = {"a": torch.rand(64) + 0.01}
    model = hqq_cpp.quantize_model_(net(), {"nbits": 2, "group_size": 16}, importance=importance)
    expected = hqq_cpp.quantize(
        net()["a"].weight, {"nbits": 2, "group_size": 16}, importance=importance["a"]
    )
    assert np.array_equal(model["a"].dequantize().numpy(), hqq_cpp.dequantize(expected))
    assert model["inner"][1].col_scale is not None


def test_shared_weights_are_one_layer():
    model = torch.nn.ModuleDict({"a": torch.nn.Linear(64, 32), "b": torch.nn.Linear(64, 32)})
    assert [layer.name for layer in find_layers(model)] == ["a", "b"]
    model["b"].weight = model["a"].weight
    (layer,) = find_layers(model)
    assert (layer.name, layer.tied) == ("a", ("b",))
    model["b"].other = model["a"].weight  # somebody else's
    assert list(find_layers(model)) == []

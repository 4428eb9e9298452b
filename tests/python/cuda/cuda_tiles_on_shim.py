"""Codes in the order of the CUDA kernels, on the SIMT shim: see cuda_linear_on_shim.py."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import hqq_cpp
from hqq_cpp import backends
from hqq_cpp.backends import chooser, cuda_calls
from hqq_cpp.format import CPU_TILES, CUDA_TILES, FORMAT_1
from hqq_cpp.nn import base
from shim import (  # noqa: F401
    ALL_NBITS,
    is_right,
    is_right_product,
    make_experts,
    make_layer,
    on_gpu,
    random_matrix,
    rng,
)


@pytest.fixture
def record(monkeypatch):
    """Runs a function as if a graph were recorded."""

    def record(function):
        with monkeypatch.context() as patch:
            patch.setattr(cuda_calls, "is_capturing", lambda tensor: True)
            patch.setattr(backends.cuda, "is_capturing", lambda tensor: True)
            return function()

    return record


def one_row(rng):
    return random_matrix(rng, (1, 64), torch.float16)


def packing(module):
    return module.packed_weight().packing


def addresses(module):
    return [t.data_ptr() for t in module.packed().present().values()]


def copied(state):
    return {name: tensor.clone() for name, tensor in state.items()}


def assert_same_state(module, state):
    mine = module.state_dict()
    assert mine.keys() == state.keys()
    for name, tensor in mine.items():
        assert torch.equal(tensor, state[name]), name


def bytes_of(module):
    return sum(t.nbytes for t in module.packed().present().values())


# ---- Packing -----------------------------------------------------------------------------------


@pytest.mark.parametrize("nbits", ALL_NBITS)
@pytest.mark.parametrize("axis", [1, 0])
def test_the_first_product_packs(rng, on_gpu, nbits, axis):
    layer = make_layer(rng, 48, 104, nbits=nbits, axis=axis, group_size=16)
    state = copied(layer.state_dict())
    assert packing(layer) == FORMAT_1 and not layer.is_tiled
    x = random_matrix(rng, (2, 104), torch.float16)
    assert is_right(layer, x, layer(x))
    assert packing(layer) == CUDA_TILES and layer.is_tiled and on_gpu == ["linear"]
    assert_same_state(layer, state)
    # Only the codes are reordered, and once.
    before = addresses(layer)
    layer(x)
    assert addresses(layer) == before
    assert is_right(layer, x, layer(x))
    layer.untile_()
    assert packing(layer) == FORMAT_1
    assert_same_state(layer, state)


def test_a_layer_takes_its_own_size(rng, on_gpu):
    layer, experts = make_layer(rng, 64, 128), make_experts(rng, 2, 2, 64, 128)
    counts = torch.tensor([1, 1])
    for module, arguments in ((layer, ()), (experts, (counts,))):
        assert bytes_of(module) == module.packed_nbytes
        module(random_matrix(rng, (2, 128), torch.float16), *arguments)
        # Nothing is padded in these shapes, and nothing is kept beside the parameters.
        assert packing(module) == CUDA_TILES and bytes_of(module) == module.packed_nbytes


def test_a_layer_without_tiles_is_dense(rng, on_gpu):
    layer = make_layer(rng, 16, 64, group_size=8)
    x = one_row(rng)
    expected = torch.addmm(layer.bias, x, layer.dequantize(torch.float16).t())
    assert torch.equal(layer(x), expected)
    assert packing(layer) == FORMAT_1 and on_gpu == []


@pytest.mark.parametrize("nbits", ALL_NBITS)
def test_shapes_tell_the_packing(rng, monkeypatch, nbits):
    layer, stack = make_layer(rng, 64, 128, nbits=nbits), make_experts(rng, 2, 2, 64, 128)
    for module in (layer, stack):
        assert packing(module) == FORMAT_1
        assert packing(module.tile_()) == CPU_TILES
        module.untile_()
    monkeypatch.setattr(cuda_calls, "DEVICE_TYPE", "cpu")
    monkeypatch.setitem(chooser._KERNELS, "cpu", chooser._KERNELS["cuda"])
    for module in (layer, stack):
        assert packing(module.tile_()) == CUDA_TILES


def test_packed_layers_are_copied_and_cast(rng, on_gpu):
    layer = make_layer(rng, 16, 64, bias=False)
    state, x = copied(layer.state_dict()), one_row(rng)
    layer(x)
    before = addresses(layer)
    # Graphs may hold the addresses, and nothing need change.
    layer.to(torch.bfloat16).to("cpu").half()
    assert packing(layer) == CUDA_TILES and addresses(layer) == before
    other = copy.deepcopy(layer)
    assert packing(other) == CUDA_TILES
    assert is_right(other, x, other(x)) and torch.equal(other(x), layer(x))
    assert_same_state(other, state)
    # Another kind of device takes format 1.
    layer.to("meta")
    assert packing(layer) == FORMAT_1
    other.checked()


def test_the_torch_backend_reads_tiles(rng, on_gpu):
    layer = make_layer(rng, 16, 64)
    x, W_r = one_row(rng), layer.dequantize()
    layer(x)
    hqq_cpp.set_backend("torch")
    try:
        assert torch.equal(layer.dequantize(), W_r)
        assert is_right(layer, x, layer(x))
    finally:
        hqq_cpp.set_backend("auto")
    assert torch.equal(layer.dequantize(), W_r)


def test_many_rows_are_dense(rng, on_gpu):
    layer, experts = make_layer(rng, 16, 64), make_experts(rng, 2, 1, 16, 64)
    layer.bias.requires_grad_()
    limit = backends.cuda.max_rows(layer._layout, torch.float16, 0)
    x = random_matrix(rng, (limit + 1, 64), torch.float16)
    layer(x.requires_grad_()).sum().backward()
    more = random_matrix(rng, (2 * limit + 1, 64), x.dtype)
    experts(more, torch.tensor([1, len(more) - 1]))
    assert on_gpu == []
    layer(x[:-1])
    assert on_gpu == ["linear"]


# ---- Changes of the weight ---------------------------------------------------------------------


def change_in_place(layer, other):
    with torch.no_grad():
        layer.scale.mul_(2)


def change_all_in_place(layer, other):
    other.tile_()
    with torch.no_grad():
        for mine, new in zip(layer.parameters(), other.parameters()):
            mine.copy_(new)


def replace_scale(layer, other):
    layer.scale = nn.Parameter(other.scale.clone(), requires_grad=False)


def replace_data_of_scale(layer, other):
    layer.scale.data = other.scale.clone()


def write_in_inference_mode(layer, other):
    with torch.inference_mode():
        layer.W_q.data.copy_(other.tile_().W_q)


CHANGES = [
    lambda layer, other: layer.load_state_dict(other.state_dict()),
    lambda layer, other: layer.load_state_dict(other.state_dict(), assign=True),
    lambda layer, other: layer.quantize_(other.weight),
    change_in_place,
    change_all_in_place,
    replace_scale,
    replace_data_of_scale,
    write_in_inference_mode,
]


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("settings", [{"balance": "none"}, {"quant_zero": True}])
def test_products_follow_the_weight(rng, on_gpu, change, settings):
    layer, other = (make_layer(rng, 16, 64, **settings) for _ in range(2))
    x = random_matrix(rng, (2, 64), torch.float16)
    before = layer(x)
    change(layer, other)
    y = layer(x)
    assert is_right(layer, x, y) and not is_right(layer, x, before)
    assert on_gpu == ["linear"] * 2


@pytest.mark.parametrize("parts", [0, 1, 2])
def test_loading_keeps_the_memory(rng, on_gpu, parts):
    """Recorded graphs hold the addresses."""
    x, counts = random_matrix(rng, (3, 64), torch.float16), torch.tensor([1, 2])
    if parts == 0:
        module, other = (make_layer(rng, 16, 64) for _ in range(2))
        arguments = (x,)
    else:
        module, other = (make_experts(rng, 2, parts, 16, 64) for _ in range(2))
        arguments = (x, counts)
    state, expected = copied(other.state_dict()), other(*arguments)
    module(*arguments)
    before = addresses(module)
    module.load_state_dict(state)
    assert packing(module) == CUDA_TILES and addresses(module) == before
    assert torch.equal(module(*arguments), expected)
    assert_same_state(module, state)


def test_a_part_of_a_state_is_loaded(rng, on_gpu):
    layer, other = (make_layer(rng, 16, 64, balance="none") for _ in range(2))
    x = one_row(rng)
    layer(x)
    layer.load_state_dict({"scale": other.scale}, strict=False)
    assert packing(layer) == CUDA_TILES and torch.equal(layer.scale, other.scale)
    assert is_right(layer, x, layer(x))
    wrong = {**other.state_dict(), "W_q": other.W_q[:8]}
    with pytest.raises(RuntimeError, match="W_q is uint8"):
        layer.load_state_dict(wrong)
    assert is_right(layer, x, layer(x))


# ---- Recorded graphs ---------------------------------------------------------------------------


def test_a_graph_that_is_recorded_packs_nothing(rng, on_gpu, record):
    layer = make_layer(rng, 16, 64)
    x = random_matrix(rng, (2, 64), torch.float16)
    before = addresses(layer)
    y = record(lambda: layer(x))
    assert packing(layer) == FORMAT_1 and on_gpu == [] and is_right(layer, x, y)
    # The graph reads this memory for good.
    assert is_right(layer, x, layer(x))
    assert packing(layer) == FORMAT_1 and addresses(layer) == before
    # Unless somebody asks for tiles, or the memory is another.
    layer.tile_()
    assert packing(layer) == CUDA_TILES and is_right(layer, x, layer(x))
    layer.untile_()
    record(lambda: layer(x))
    layer.quantize_(random_matrix(rng, (16, 64)))
    assert is_right(layer, x, layer(x)) and packing(layer) == CUDA_TILES


def test_a_packed_layer_is_recorded(rng, on_gpu, record):
    layer = make_layer(rng, 16, 64)
    x = one_row(rng)
    expected = layer(x)
    assert torch.equal(record(lambda: layer(x)), expected)
    assert on_gpu == ["linear"] * 2
    experts = make_experts(rng, 2, 1, 16, 64)
    limit = backends.cuda.max_rows(experts._layout, torch.float16, 0)
    more, counts = random_matrix(rng, (2 * limit + 1, 64), x.dtype), torch.tensor([1, 2 * limit])
    # Rows cannot be counted in a recording.
    expected = experts(more, counts)
    assert on_gpu == ["linear"] * 2
    y = record(lambda: experts(more, counts))
    assert on_gpu == ["linear"] * 2 + ["experts_linear"]
    assert torch.allclose(y, expected, rtol=0.02, atol=0.1)


def test_memory_that_a_graph_reads_is_kept(rng, on_gpu, record):
    layer = make_layer(rng, 16, 64)
    x = one_row(rng)
    layer(x)
    record(lambda: layer(x))
    tiles, before = layer.W_q.data_ptr(), layer.W_q.clone()
    # Each of these takes the tiles from the layer, but not from the graph.
    layer.untile_()
    list(layer.named_parameters(recurse=False))
    layer(x)
    kept = base._recorded[layer._parameters["W_q"]]
    assert kept.data_ptr() == tiles and torch.equal(kept, before)
    # What keeps the memory keeps format 1 too: a cast does not make it forget.
    plain = make_layer(rng, 16, 64)
    record(lambda: plain(x))
    plain.half()
    plain(x)
    assert packing(plain) == FORMAT_1
    # Who moves the layer away has its memory back.
    layer._apply(lambda tensor: tensor.to("meta"))
    assert layer._parameters["W_q"] not in base._recorded


def test_an_assigned_state_takes_all_tensors(rng, on_gpu):
    layer, other = (make_layer(rng, 16, 64) for _ in range(2))
    x = one_row(rng)
    layer(x)
    state = other.state_dict()
    layer.load_state_dict(state, assign=True)
    # The tensors themselves, which may be on another device than the tiles were.
    assert packing(layer) == FORMAT_1 and layer.W_q.data_ptr() == state["W_q"].data_ptr()
    assert_same_state(layer, state)
    assert torch.equal(layer(x), other(x))


# ---- Tiles of a CPU that came to a GPU past the module -----------------------------------------


def test_tiles_of_a_cpu_are_put_in_order(rng, monkeypatch):
    """What accelerate does to a layer that has run on the CPU: it replaces the parameters."""
    layer = make_layer(rng, 32, 64, group_size=32, quant_zero=True)
    experts = make_experts(rng, 3, 2, 32, 64, group_size=32, nbits=4)
    table = hqq_cpp.HqqEmbedding(layer.quantized_tensor(), dtype=torch.float16)
    x, counts = random_matrix(rng, (4, 64), torch.float16), torch.tensor([1, 0, 3])
    back = torch.ones(4, 64, dtype=torch.float16)
    expected = [copied(layer.state_dict()), copied(experts.state_dict())]
    dense = [layer.dequantize(), experts.dequantize()]
    y_transposed = experts(back, counts, transposed=True)
    layer.tile_(), experts.tile_()
    table._parameters.update({k: v for k, v in layer._parameters.items() if k != "bias"})
    weights = [copied(module.packed().present()) for module in (layer, experts)]
    monkeypatch.setattr(cuda_calls, "DEVICE_TYPE", "cpu")
    monkeypatch.setitem(chooser._KERNELS, "cpu", chooser._KERNELS["cuda"])

    def put_tiles():
        for module, weight in zip((layer, experts), weights):
            for name, tensor in weight.items():
                module._parameters[name] = nn.Parameter(tensor, requires_grad=False)
        assert packing(layer) == packing(experts) == CPU_TILES

    put_tiles()
    assert torch.equal(layer.dequantize(), dense[0])
    assert torch.equal(experts.dequantize(), dense[1])
    assert torch.equal(table(torch.tensor([3, 31])), dense[0].half()[[3, 31]])
    # As a compiler and autograd call it.
    y = backends.linear(x, layer.packed_weight(), None)
    assert is_right_product(layer, dense[0], x, y)
    assert torch.equal(backends.linear_backward(y, layer.packed_weight()), y @ dense[0].half())
    y_experts = backends.experts_linear(x, counts, experts.packed_weight(), None, False)
    assert packing(layer) == packing(experts) == CPU_TILES
    assert is_right(layer, x, layer(x)) and packing(layer) == CUDA_TILES
    y = experts(x, counts)
    assert packing(experts) == CUDA_TILES
    for rows, e in ((slice(0, 1), 0), (slice(1, 4), 2)):
        for given in (y, y_experts):
            assert is_right_product(experts, dense[1][e], x[rows], given[rows])
    put_tiles()
    assert torch.equal(experts(back, counts, transposed=True), y_transposed)
    for module, state in zip((layer, experts), expected):
        put_tiles()
        assert_same_state(module, state)
        module.untile_()
        assert_same_state(module, state)

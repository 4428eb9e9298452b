"""Layers on a GPU, on the SIMT shim instead.

test_cuda.py runs this file in a process of its own, whose library is the shim's.
"""

from __future__ import annotations

import pytest
import torch

import hqq_cpp
from hqq_cpp import _core, backends
from hqq_cpp.backends import cuda
from shim import (  # noqa: F401
    ALL_NBITS,
    HALVES,
    is_right,
    largest_scale,
    make_experts,
    make_layer,
    on_gpu,
    random_matrix,
    rng,
    tolerance,
)


@pytest.mark.parametrize("nbits", ALL_NBITS)
@pytest.mark.parametrize("axis", [1, 0])
def test_linear(rng, on_gpu, nbits, axis):
    for dtype in HALVES:
        layer = make_layer(
            rng, 64, 128, dtype=dtype, nbits=nbits, axis=axis, group_size=32, quant_zero=nbits == 4
        )
        for shape in [(1, 128), (2, 3, 128), (17, 128)]:
            x = random_matrix(rng, shape, dtype)
            y = layer(x)
            assert y.shape == (*shape[:-1], 64) and y.dtype == dtype
            assert is_right(layer, x, y)
            assert not is_right(layer, x, torch.roll(y, 1, -1))
    assert len(on_gpu) == 6


def test_linear_of_few_and_no_rows_and_strides(rng, on_gpu):
    layer = make_layer(rng, 32, 64, bias=False, group_size=64)
    assert layer(torch.zeros(0, 64, dtype=torch.float16)).shape == (0, 32)
    wide = random_matrix(rng, (3, 100), torch.float16)
    for x in (wide[:, 3:67], wide[:, 36:].t().contiguous().t(), wide[0, 1:65]):
        assert is_right(layer, x, layer(x))
    assert len(on_gpu) == 4


def test_linear_without_a_kernel_is_dense(rng, on_gpu):
    """float32 and float64, and more rows than products of tiles win with."""
    layer = make_layer(rng, 16, 64)
    for dtype in (torch.float32, torch.float64):
        x = random_matrix(rng, (3, 64), dtype)
        hqq_cpp.set_backend("torch")
        expected = layer(x)
        hqq_cpp.set_backend("auto")
        assert torch.equal(layer(x), expected)
    rows = cuda.max_rows(layer._layout, torch.float16, 0) + 1
    x = random_matrix(rng, (rows, 64), torch.float16)
    hqq_cpp.set_backend("torch")
    expected = layer(x)
    hqq_cpp.set_backend("auto")
    assert torch.equal(layer(x), expected)
    assert on_gpu == []


@pytest.mark.parametrize("nbits", ALL_NBITS)
@pytest.mark.parametrize("axis", [1, 0])
def test_dequantize_and_embedding_give_the_bits_of_the_cpu(rng, on_gpu, nbits, axis):
    q = hqq_cpp.quantize(
        random_matrix(rng, (24, 104)), {"nbits": nbits, "axis": axis, "group_size": 8}
    )
    table = hqq_cpp.HqqEmbedding(q, dtype=torch.bfloat16)
    for dtype in (torch.float32, torch.float64, *HALVES):
        dense = torch.from_numpy(hqq_cpp.dequantize(q)).to(dtype)
        assert torch.equal(backends.dequantize(table.packed_weight(), dtype), dense)
    ids = torch.tensor([[0, 23, 5], [7, 7, 0]], dtype=torch.int32)
    assert torch.equal(table(ids), table.dequantize(torch.bfloat16)[ids])
    assert table(ids[:0]).shape == (0, 3, 104)
    for wrong in (-1, 24):
        with pytest.raises(RuntimeError, match=r"\[embedding\] an id is not in 0 to 23"):
            table(torch.tensor([3, wrong]))


def test_backward(rng, on_gpu):
    layer = make_layer(rng, 32, 64, group_size=32)
    layer.bias.requires_grad_()
    x = random_matrix(rng, (3, 64), torch.float16).requires_grad_()
    y = layer(x)
    assert len(on_gpu) == 1
    grad_y = random_matrix(rng, (3, 32), torch.float16)
    y.backward(grad_y)
    assert torch.equal(x.grad, grad_y @ layer.dequantize(torch.float16))
    assert torch.equal(layer.bias.grad, grad_y.sum(0))


def test_compiled_forward_is_one_graph(rng, on_gpu):
    layer = make_layer(rng, 32, 64, group_size=32)
    x = random_matrix(rng, (2, 64), torch.float16)
    expected = layer(x)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), expected)
    assert len(on_gpu) == 2


def test_a_compiler_asks_for_the_library_itself(monkeypatch):
    monkeypatch.setattr(cuda, "_available", None)

    def forward(x):
        return x + 1 if cuda.is_available() else x - 1

    assert torch.compile(forward, fullgraph=True, backend="eager")(torch.zeros(1)) == 1
    assert cuda._available is True


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("settings", [{"nbits": 4}, {"nbits": 3, "quant_zero": True}])
@pytest.mark.parametrize("bias", [False, True])
def test_experts(rng, on_gpu, parts, settings, bias):
    module = make_experts(rng, 4, parts, 32, 64, group_size=32, **settings)
    counts = torch.tensor([2, 0, 5, 1])
    x = random_matrix(rng, (10, 64), torch.float16)  # two more rows than there are
    biases = random_matrix(rng, (4, 32 * parts), torch.float16) if bias else None
    y = module(x, counts, biases)
    assert on_gpu == ["experts_linear"]
    assert torch.equal(y[8:], torch.zeros(2, 32 * parts, dtype=torch.float16))
    start = 0
    for expert, count in enumerate(counts.tolist()):
        rows = slice(start, start + count)
        start += count
        W_r = module.dequantize(expert, torch.float64)
        expected = x[rows].double() @ W_r.t() + (0 if biases is None else biases[expert].double())
        error = (y[rows].double() - expected).abs()
        more = 0 if biases is None else 2.0**-10 * biases[expert].double().abs()
        assert (error <= tolerance(W_r, largest_scale(module), x[rows]) + more).all()


def test_experts_of_many_rows_and_gradients(rng, on_gpu):
    module = make_experts(rng, 2, 1, 16, 64)
    max_rows = cuda.max_rows(module._layout, torch.float16, 0)
    x = random_matrix(rng, (2 * max_rows + 1, 64), torch.float16).requires_grad_()
    counts = torch.tensor([1, 2 * max_rows])
    y = module(x, counts)
    assert on_gpu == []
    y.sum().backward()
    grad = torch.ones(1, 16, dtype=torch.float16) @ module.dequantize(0, torch.float16)
    assert torch.equal(x.grad[:1], grad)
    transposed = module(
        torch.ones(2, 16, dtype=torch.float16), torch.tensor([1, 1]), transposed=True
    )
    assert transposed.shape == (2, 64) and on_gpu == []


# ---- refusals ----------------------------------------------------------------------------------


def test_native_refuses_what_it_cannot_run(rng):
    config = hqq_cpp.HqqConfig(balance="none").layer("x")
    layer = hqq_cpp.HqqLinear.empty(config, 8, 64, device="meta")
    hqq_cpp.set_backend("native")
    try:
        with pytest.raises(ValueError, match="libhqq_cuda can use"):
            layer(torch.empty(1, 64, device="meta"))
        layer = make_layer(rng, 8, 64)
        with pytest.raises(ValueError, match="x is torch.float16 on meta"):
            layer(torch.empty(1, 64, dtype=torch.float16, device="meta"))
    finally:
        hqq_cpp.set_backend("auto")


def test_devices_are_checked():
    with pytest.raises(hqq_cpp.CudaError, match="there is no device cuda:7"):
        _core.cuda_require_device(7)
    _core.cuda_require_device(0)

"""Slices of format 1 are layers: what tensor parallelism needs (docs/cuda.md)."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

import hqq_cpp
from hqq_cpp._core import packed_row_bytes

OUT, IN = 64, 512
ALL_NBITS = [8, 6, 5, 4, 3, 2, 1.58, 1]


@pytest.fixture(autouse=True)
def exact_products():
    hqq_cpp.set_backend("auto", mode="exact")
    yield
    hqq_cpp.set_backend("auto", mode="auto")


def quantized(**settings):
    W = torch.randn(OUT, IN, generator=torch.Generator().manual_seed(1))
    layer = hqq_cpp.quantize_linear(W, settings)
    return layer, {name: t.detach() for name, t in layer.state_dict().items()}


def layer_of(layer, tensors, out_features, in_features):
    part = hqq_cpp.HqqLinear.empty(layer.layer_config, out_features, in_features, device="meta")
    part.set_packed(tensors, "cpu")
    return part


def rows_of(layer, tensors, begin, end):
    """Rows of an axis-1 layer; with 8-bit metadata their groups must fill blocks of 128."""
    groups = tensors["scale"].shape[1]
    part = {}
    for name, tensor in tensors.items():
        if name == "col_scale":
            part[name] = tensor
        elif name.endswith(("_step", "_offset")):
            part[name] = tensor[begin * groups // 128 : end * groups // 128]
        else:
            part[name] = tensor[begin:end]
    return layer_of(layer, part, end - begin, IN)


def columns_of(layer, tensors, begin, end):
    nbits, group = layer.layer_config.nbits, layer.layer_config.group_size
    step = group if layer.layer_config.axis == 1 else 1
    part = {"W_q": tensors["W_q"][:, packed_row_bytes(nbits, begin) : packed_row_bytes(nbits, end)]}
    for name in ("scale", "zero"):
        part[name] = tensors[name][:, begin // step : end // step]
    if "col_scale" in tensors:
        part["col_scale"] = tensors["col_scale"][begin:end]
    return layer_of(layer, part, OUT, end - begin)


@pytest.mark.parametrize("nbits", ALL_NBITS)
@pytest.mark.parametrize("settings", [{}, {"quant_zero": True, "quant_scale": True}])
def test_rows_follow_each_other(nbits, settings):
    layer, tensors = quantized(nbits=nbits, group_size=64, **settings)
    # 16 rows of 8 groups are a block of 8-bit metadata.
    parts = [rows_of(layer, tensors, a, b) for a, b in [(0, 16), (16, 48), (48, 64)]]
    W_r = layer.dequantize()
    assert torch.equal(torch.cat([part.dequantize() for part in parts]), W_r)
    x = torch.randn(3, IN)
    # Rows are independent.
    assert torch.equal(torch.cat([part(x) for part in parts], 1), layer(x))


@pytest.mark.parametrize("nbits", ALL_NBITS)
@pytest.mark.parametrize(
    "settings",
    [
        {"group_size": 64},
        {"group_size": 128, "balance": "none"},
        {"axis": 0, "group_size": 16, "balance": "none"},
        {"axis": 0, "group_size": 16, "balance": "sinkhorn"},
    ],
)
def test_columns_sum_to_the_whole(nbits, settings):
    layer, tensors = quantized(nbits=nbits, **settings)
    bounds = [(0, 128), (128, 384), (384, 512)]
    parts = [columns_of(layer, tensors, a, b) for a, b in bounds]
    assert torch.equal(torch.cat([part.dequantize() for part in parts], 1), layer.dequantize())
    x = torch.randn(3, IN)
    y = sum(part(x[:, a:b].contiguous()) for part, (a, b) in zip(parts, bounds))
    # Sums of 512 products in float32 in two orders.
    size = x.abs() @ layer.dequantize().abs().t()
    assert ((y - layer(x)).abs() <= 2 * IN * 2.0**-24 * size).all()


def test_other_slices_are_refused():
    layer, tensors = quantized(nbits=4, group_size=64, balance="none")
    with pytest.raises(ValueError, match=r"scale is float16 \[64, 1\]; it must be .* \[64, 2\]"):
        columns_of(layer, tensors, 0, 96)
    layer, tensors = quantized(nbits=4, group_size=64, quant_zero=True)
    with pytest.raises(ValueError, match=r"zero_step is float32 \[0\]; it must be .* \[1\]"):
        rows_of(layer, tensors, 0, 8)

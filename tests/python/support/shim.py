"""What the tests on the SIMT shim share: CPU tensors stand for device memory."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import hqq_cpp
from hqq_cpp.backends import chooser, cuda, cuda_calls
from hqq_cpp.format import tensors_of

ALL_NBITS = [8, 6, 5, 4, 3, 2, 1.58, 1]
HALVES = [torch.float16, torch.bfloat16]


@pytest.fixture
def on_gpu(monkeypatch):
    """CPU tensors count as tensors on a GPU. Gives the products of tiles that ran."""
    ran = []

    def counting(name):
        call = getattr(cuda, f"_tiles_{name}")

        def run(*arguments):
            y = call(*arguments)
            if y is not None:
                ran.append(name)
            return y

        return run

    for name in ("linear", "experts_linear"):
        monkeypatch.setattr(cuda, f"_tiles_{name}", counting(name))
    monkeypatch.setattr(cuda_calls, "DEVICE_TYPE", "cpu")
    monkeypatch.setitem(chooser._KERNELS, "cpu", chooser._KERNELS["cuda"])
    return ran


@pytest.fixture
def rng():
    return np.random.default_rng(7)


def same_bits(a, b):
    a, b = a.tensors(), b.tensors()
    return a.keys() == b.keys() and all(
        bytes(np.asarray(a[k]).view(np.uint8)) == bytes(np.asarray(b[k]).view(np.uint8)) for k in a
    )


def random_matrix(rng, shape, dtype=torch.float32):
    return torch.from_numpy(rng.standard_normal(shape, dtype=np.float32)).to(dtype)


# ---- layers ------------------------------------------------------------------------------------


def make_layer(rng, out_features, in_features, bias=True, dtype=torch.float16, **settings):
    W = random_matrix(rng, (out_features, in_features))
    q = hqq_cpp.quantize(W, settings)
    bias = random_matrix(rng, (out_features,), dtype) if bias else None
    return hqq_cpp.HqqLinear(q, bias, dtype)


def tolerance(W_r, scale, x):
    """What roundings make of a product, for every element of x W_r^T.

    A term x w has at most four roundings to 16 bits, of x times col_scale, and of a weight's parts, which
    exceed it by a step of its code at most (docs/cuda-kernels.md). They are independent, so errors add as
    squares do: 8 standard deviations of errors that are evenly spread. Sums of codes up to 256 + 128 are
    in float32. y is rounded once.
    """
    unit = torch.finfo(x.dtype).eps / 2
    rows, W_r = x.reshape(-1, x.shape[-1]).double(), W_r.double()
    squares = (rows**2) @ ((W_r.abs() + scale) ** 2).t()
    rounding = 8 * 4 * unit / 3**0.5 * squares.sqrt()
    sums = rows.shape[1] * 2.0**-24 * rows.abs().sum(1, keepdim=True) * 384 * scale
    return rounding + sums + unit * (rows @ W_r.t()).abs()


def largest_scale(module):
    """An upper bound of scale times col_scale."""
    scale = module.scale.double().abs().amax()
    if module.scale_step is not None:
        scale = (255 * module.scale_step.double() + module.scale_offset.double().abs()).amax()
    return scale if module.col_scale is None else scale * module.col_scale.double().abs().amax()


def is_right_product(module, W_r, x, y):
    """Without bias."""
    error = (y.double() - x.double() @ W_r.double().t()).abs()
    return bool((error <= tolerance(W_r.double(), largest_scale(module), x)).all())


def is_right(layer, x, y):
    W_r = layer.dequantize(torch.float64)
    bias = 0 if layer.bias is None else layer.bias.double()
    error = (y.double() - (x.double() @ W_r.t() + bias)).abs().reshape(-1, layer.out_features)
    # Of y with its bias.
    more = torch.finfo(y.dtype).eps * (0 if layer.bias is None else bias.abs())
    return bool((error <= tolerance(W_r, largest_scale(layer), x) + more).all())


# ---- experts -----------------------------------------------------------------------------------


def make_experts(rng, experts, parts, rows, cols, **settings):
    config = hqq_cpp.HqqConfig(**settings).layer("x")
    config = config.replace(balance="none" if config.balance == "none" else "sinkhorn")
    module = hqq_cpp.HqqExperts.empty(
        config, (experts, parts * rows, cols), parts=parts, dtype=torch.float16
    )
    pieces = [
        [
            tensors_of(hqq_cpp.quantize(random_matrix(rng, (rows, cols)), config))
            for _ in range(parts)
        ]
        for _ in range(experts)
    ]
    for name in module._specs():
        tensor = torch.stack(
            [
                (torch.stack if name == "col_scale" and parts > 1 else torch.cat)(
                    [getattr(piece, name) for piece in expert]
                )
                for expert in pieces
            ]
        )
        module._parameters[name].data = tensor.reshape(module._parameters[name].shape)
    return module

"""What the tests of quantize_model_ on odd models share."""

import warnings

import pytest

torch = pytest.importorskip("torch", reason="the layers need torch")


import hqq_cpp
from hqq_cpp.find.layers import quantized_layers

EIGHT = {"nbits": 8}


def names(model):
    return [name for name, _ in quantized_layers(model)]


def close(a, b):
    assert a.shape == b.shape and (a - b).norm() <= 0.02 * b.norm()


def quietly(model, *args, **kwargs):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return hqq_cpp.quantize_model_(model, *args, **kwargs)

"""The tables of format 1 that the module exports: bit widths and the tensors of a layer."""

import numpy as np
import pytest

import hqq_cpp
import reference
from hqq_cpp import _core

WEIGHT = np.sin(np.arange(40 * 96, dtype=np.float32)).reshape(40, 96)


def test_bit_widths_are_those_of_the_reference():
    widths = {width.nbits: width for width in _core.BIT_WIDTHS}
    assert list(widths) == [8, 6, 5, 4, 3, 2, 1.58, 1]
    for nbits, (low, high) in reference._PLANES.items():
        width = widths[nbits]
        assert (width.low_bits, width.high_bits) == (low, high)
        assert width.max_code == 2**nbits - 1
    ternary = widths[1.58]
    assert (ternary.low_bits, ternary.block, ternary.max_code) == (0, 64, 2)


def test_bit_widths_cannot_be_changed():
    with pytest.raises(AttributeError):
        _core.BIT_WIDTHS[0].max_code = 3


@pytest.mark.parametrize("nbits", [width.nbits for width in _core.BIT_WIDTHS])
@pytest.mark.parametrize("cols", [1, 31, 32, 64, 100])
def test_row_bytes_are_those_of_a_packed_row(nbits, cols):
    codes = np.zeros(cols, np.uint8)
    assert _core.packed_row_bytes(nbits, cols) == len(reference.pack_row(codes, nbits))


def test_row_bytes_of_an_unknown_width_are_refused():
    with pytest.raises(ValueError, match="nbits must be one of 8, 6, 5, 4, 3, 2, 1.58, 1"):
        _core.packed_row_bytes(7, 32)


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("group_size", [24, None])
@pytest.mark.parametrize("quant", [False, True])
@pytest.mark.parametrize("balance", ["none", "sinkhorn"])
def test_tensor_specs_are_the_tensors_of_a_quantized_matrix(axis, group_size, quant, balance):
    config = hqq_cpp.LayerConfig(
        nbits=3, group_size=group_size, axis=axis, quant_scale=quant, balance=balance
    )
    q = hqq_cpp.quantize(WEIGHT, config)
    specs = _core.tensor_specs(config, 40, 96)
    assert specs == [(name, t.shape, t.dtype) for name, t in q.tensors().items()]
    assert [name for name, _, _ in specs] == [n for n in _core.TENSOR_NAMES if n in q.tensors()]


def test_tensor_specs_need_a_balance_that_is_known():
    with pytest.raises(ValueError, match="balance is 'auto'; a stored layer has 'none' or"):
        _core.tensor_specs(hqq_cpp.LayerConfig(), 40, 96)


def test_torch_layers_have_the_tensors_of_the_module():
    pytest.importorskip("torch")
    from hqq_cpp.format import Tensors

    assert Tensors._fields == _core.TENSOR_NAMES

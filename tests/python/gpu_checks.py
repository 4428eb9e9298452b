"""What the tests on a GPU share: layers that it solved, and how far its products may be from float64."""

import contextlib

import numpy as np
import pytest
import torch

import hqq_cpp
from hqq_cpp.backends import cuda
from hqq_cpp.format import CUDA_TILES
from test_linear import metadata


def why_not():
    if not torch.cuda.is_available():
        return "torch finds no GPU"
    if not hqq_cpp.cuda_is_available():
        return "libhqq_cuda is missing or cannot use the GPU ('hqq-cpp doctor' says more)"
    return None


REASON = why_not()
DEVICE = "cuda"
# Relative error of a step of a sum in a tensor core: up to four units in the last place of float32.
STEP = 2.0**-22


# The products of tiles in this test.
_ran = []


@contextlib.contextmanager
def only_native_kernels():
    """No test passes by way of the CPU or of plain torch, or with sums of 16-bit parts in cuBLAS."""
    matmul = torch.backends.cuda.matmul

    def counting(call):
        def run(*arguments):
            y = call(*arguments)
            if y is not None and y.numel():
                _ran.append(True)
            return y

        return run

    # torch makes these attributes up: a MonkeyPatch cannot put them back.
    names = [f"allow_{dtype}_reduced_precision_reduction" for dtype in ("fp16", "bf16")]
    kept = [getattr(matmul, name) for name in names]
    with pytest.MonkeyPatch.context() as patch:
        for name in ("_tiles_linear", "_tiles_experts_linear"):
            patch.setattr(cuda, name, counting(getattr(cuda, name)))
        for name in names:
            setattr(matmul, name, False)
        hqq_cpp.set_backend("native")
        try:
            yield
        finally:
            hqq_cpp.set_backend("auto")
            for name, value in zip(names, kept):
                setattr(matmul, name, value)
            _ran.clear()


def max_rows(layer, dtype):
    """Rows of x (for one expert, on average) up to which tiles are multiplied; None: they never are."""
    tiles = cuda.packing_for(layer.packed_weight()) == CUDA_TILES
    return cuda.max_rows(layer._layout, dtype, 0) if tiles else None


def has_kernel(layer, dtype):
    return max_rows(layer, dtype) is not None


def product(layer, x, *arguments):
    """layer(x, ...), after a look at who has multiplied: a kernel for tiles if there is one for so many
    rows (of an expert, on average)."""
    before, rows = len(_ran), x.numel() // layer.in_features
    y = layer(x, *arguments)
    limit = max_rows(layer, x.dtype)
    experts = layer.num_experts if isinstance(layer, hqq_cpp.HqqExperts) else 1
    has_product = limit is not None and 0 < rows <= limit * experts
    assert _ran[before:] == [True] * has_product
    return y


def make_layer(nbits, axis, out=384, columns=512, group_size=64, balance="none", bias=None):
    settings = {
        "nbits": nbits, "axis": axis, "group_size": group_size, "balance": balance,
        "solver": "minmax",
    }  # fmt: skip
    return gpu_layer(normal(out, columns), settings, bias)


def replace_parameters(module, tensors):
    """As accelerate does: past the module."""
    for name, tensor in tensors.items():
        module._parameters[name] = torch.nn.Parameter(tensor.to(DEVICE), requires_grad=False)


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def gpu_layer(W, settings, bias=None, importance=None):
    """An HqqLinear that the GPU has solved: the CPU's solver is out of reach."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delattr(hqq_cpp.api, "quantize")
        layer = hqq_cpp.quantize_linear(
            W.to(DEVICE), settings, bias=None if bias is None else bias.to(DEVICE),
            importance=importance,
        )  # fmt: skip
    assert layer.device.type == DEVICE
    return layer


def same_tensors(layer, q):
    """Whether a layer has the bits of a QuantizedTensor."""
    theirs = {name: torch.from_dlpack(tensor) for name, tensor in q.tensors().items()}
    ours = {k: v.detach().cpu() for k, v in layer.packed()._asdict().items() if v is not None}
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype and ours[name].shape == tensor.shape, name
        assert torch.equal(bits(ours[name]), bits(tensor)), name


def bits(tensor):
    return tensor.contiguous().view(torch.uint8)


def parts_of(layer):
    """codes, scale and zero of every weight [out, in], and col_scale [in], in float64."""
    q = layer.quantized_tensor()
    return (q.codes().astype(np.float64), *metadata(q))


def product_bound(layer, x, bias=None, sixteen=True):
    """The product x W_r^T + bias in float64, and how far one in 16 bits may be from it.

    Three roundings come together. Sums of codes times x, and of zeros times x, are in float32, where a tensor
    core may lose STEP a step; bfloat16 codes carry 128 around with them. With `sixteen`, weights become
    16-bit floats as fma(code - part, scale, -(zero - part) scale), where part is the integer nearest to zero: two
    rounded factors and the result; and so does x times col_scale. y is rounded to 16 bits, also before the bias.
    """
    codes, scale, zero, col_scale = parts_of(layer)
    u, tiny = (2.0**-11, 2.0**-25) if x.dtype == torch.float16 else (2.0**-8, 2.0**-133)
    base = 256 if x.dtype == torch.bfloat16 else 0
    x64 = x.detach().double().cpu().numpy().reshape(-1, codes.shape[1])
    scaled = np.abs(x64 * col_scale)
    products = (x64 * col_scale) @ (scale * (codes - zero)).T
    y = products if bias is None else products + bias.double().cpu().numpy()
    steps = STEP * (codes.shape[1] + 16)
    bound = steps * scaled @ (np.abs(scale) * (codes + np.abs(zero) + base)).T
    if sixteen:
        width = 2 if layer.nbits == 1.58 else int(layer.nbits)
        part = np.clip(np.floor(zero + 0.5), 0, 2**width - 1)
        size = np.abs(codes - part) + np.abs(zero - part)
        weight_error = 2 * u * (1 + 8 * u) * np.abs(scale) * size + tiny * (size + 2)
        x_error = u * scaled + tiny
        bound += scaled @ weight_error.T + np.abs(x64) @ np.full_like(scale, tiny).T
        bound += x_error @ (np.abs(scale * (codes - zero)) + weight_error).T
    return y, bound + 2 * u * (np.abs(y) + np.abs(products)) + 2 * tiny


def check(x, y, bounds):
    """y of the first rows of what `bounds`, a result of product_bound(), is about."""
    expected, bound = (values[: y[..., 0].numel()] for values in bounds)
    assert y.dtype == x.dtype and y.shape == (*x.shape[:-1], expected.shape[-1])
    error = np.abs(y.detach().double().cpu().numpy().reshape(expected.shape) - expected)
    assert (error <= bound).all(), (error / bound).max(initial=0)


def check_product(layer, x, y, bias=None):
    check(x, y, product_bound(layer, x, bias))


def record(function):
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = function()
    return graph, result

"""How each peer multiplies with low-bit weights on a GPU. Packages are imported where they are used.

A builder takes a weight [n, k] in the peer's dtype, in device memory, and a width; groups are of 64. Errors
of a builder are the reason why its peer is not measured.
"""

from __future__ import annotations

import copy
import importlib
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from shapes import GROUP, METADATA_BITS, WIDTHS, bits_per_weight
from timing import reason
from torch.nn import functional


class Layer(NamedTuple):
    """A weight that is ready: copies of `state` are other weights."""

    state: Any
    multiply: Callable[[Any, torch.Tensor], torch.Tensor]  # (state, x [m, k]) -> [m, n]

    def copies(self, count: int) -> list[Any]:
        return [self.state] + [copy.deepcopy(self.state) for _ in range(count - 1)]


class Peer(NamedTuple):
    name: str
    widths: tuple[float, ...]
    build: Callable[[torch.Tensor, float], Layer]
    module: str | None = None  # what must be importable
    dtype: torch.dtype = torch.float16
    bits: Callable[[float], float] = bits_per_weight  # stored bits a weight

    def missing(self) -> str | None:
        """Why the peer cannot be tried; None: it can."""
        if self.module is None:
            return None
        try:
            importlib.import_module(self.module)
        except Exception as error:
            return reason(error)
        return None

    def row_name(self, nbits: float) -> str:
        return self.name if nbits == 16 else f"{self.name} {nbits:g}-bit"


def ours(weight: torch.Tensor, nbits: float, axis: int = 1) -> Layer:
    import hqq_cpp

    settings = {"nbits": nbits, "group_size": GROUP, "axis": axis, "balance": "none"}
    return Layer(hqq_cpp.quantize_linear(weight, settings), lambda layer, x: layer(x))


def dense(weight: torch.Tensor, nbits: float) -> Layer:
    return Layer(weight, lambda w, x: functional.linear(x, w))


def round_to_nearest(weight: torch.Tensor, nbits: float):
    """codes uint8 [n, k]; scale and zero [n, k / 64] in float32, w = (code - zero) scale."""
    groups = weight.float().unflatten(1, (-1, GROUP))
    low, high = groups.aminmax(dim=2)
    most = 2**nbits - 1
    scale = (high - low).clamp(min=1e-6) / most
    zero = -low / scale
    codes = (groups / scale.unsqueeze(2) + zero.unsqueeze(2)).round().clamp(0, most)
    return codes.to(torch.uint8).flatten(1), scale, zero


def tinygemm(weight: torch.Tensor, nbits: float) -> Layer:
    """torch._weight_int4pack_mm: w = (code - 8) scale + zero."""
    codes, scale, zero = round_to_nearest(weight, nbits)
    # Two codes a byte, the first in the upper half; 8 k-tiles inside.
    packed = torch.ops.aten._convert_weight_to_int4pack(
        (codes[:, ::2] << 4 | codes[:, 1::2]).contiguous(), 8
    )
    offset = (8 - zero) * scale
    scales_and_zeros = (
        torch.stack([scale, offset], 2).transpose(0, 1).to(torch.bfloat16).contiguous()
    )

    def multiply(state, x):
        return torch.ops.aten._weight_int4pack_mm(x, state[0], GROUP, state[1])

    return Layer((packed, scales_and_zeros), multiply)


def gemlite(weight: torch.Tensor, nbits: float) -> Layer:
    from gemlite.helper import A16Wn

    codes, scale, zero = round_to_nearest(weight, nbits)
    made = A16Wn(device=weight.device, dtype=weight.dtype).from_weights(
        codes, scale.to(weight.dtype), zero.to(weight.dtype), int(nbits), GROUP
    )
    return Layer(made, lambda layer, x: layer(x))


def torchao(weight: torch.Tensor, nbits: float) -> Layer:
    from torchao.quantization import Int4WeightOnlyConfig, quantize_

    n, k = weight.shape
    linear = torch.nn.Linear(k, n, bias=False, dtype=weight.dtype, device="meta")
    linear.weight = torch.nn.Parameter(weight, requires_grad=False)
    quantize_(
        linear,
        Int4WeightOnlyConfig(
            group_size=GROUP,
            int4_packing_format="tile_packed_to_4d",
            int4_choose_qparams_algorithm="hqq",
        ),
    )
    return Layer(linear, lambda layer, x: layer(x))


def humming(weight: torch.Tensor, nbits: float) -> Layer:
    """With zero points in floating point, as HQQ has them."""
    from humming.layer import HummingLayer

    n, k = weight.shape
    layer = HummingLayer(
        shape_n=n,
        shape_k=k,
        weight_config={
            "dtype": f"uint{int(nbits)}", "group_size": GROUP, "has_zero_point": True,
            "is_fp_zero_point": True,
        },
        torch_dtype=weight.dtype,
    ).cuda()  # fmt: skip
    layer.load_from_unquantized(weight)
    layer.transform()
    return Layer(layer, lambda layer, x: layer(x))


def marlin(weight: torch.Tensor, nbits: float) -> Layer:
    """Of vLLM, with integer zero points (uint4), which have the bits of AWQ."""
    from vllm import _custom_ops as ops
    from vllm.model_executor.layers.quantization.utils import (
        marlin_utils,
        marlin_utils_test,
    )
    from vllm.scalar_type import scalar_types

    n, k = weight.shape
    quant_type = scalar_types.uint4
    _, packed, scale, zero = marlin_utils_test.awq_marlin_quantize(weight.t(), quant_type, GROUP)
    workspace = marlin_utils_test.MarlinWorkspace(
        n, marlin_utils.GPTQ_MARLIN_MIN_THREAD_N, marlin_utils.GPTQ_MARLIN_MAX_PARALLEL
    ).scratch
    known = inspect.signature(ops.marlin_gemm).parameters
    # Of act-order, which later versions do not have.
    unused = {name: None for name in ("g_idx", "perm") if name in known}

    def multiply(state, x):
        return ops.marlin_gemm(
            a=x, c=None, b_q_weight=state[0], b_bias=None, b_scales=state[1], a_scales=None,
            global_scale=None, b_zeros=state[2], workspace=workspace, b_q_type=quant_type,
            size_m=x.shape[0], size_n=n, size_k=k, use_atomic_add=False, use_fp32_reduce=True,
            is_zp_float=False, **unused,
        )  # fmt: skip

    return Layer((packed, scale, zero), multiply)


def bitsandbytes(weight: torch.Tensor, nbits: float) -> Layer:
    from bitsandbytes.nn import Linear4bit, Params4bit

    n, k = weight.shape
    layer = Linear4bit(
        k, n, bias=False, compute_dtype=weight.dtype, compress_statistics=False, quant_type="nf4",
        device="meta",
    )  # fmt: skip
    layer.weight = Params4bit(
        weight.cpu(), requires_grad=False, compress_statistics=False, quant_type="nf4", module=layer
    )
    # Quantized when it moves.
    return Layer(layer.to(weight.device), lambda layer, x: layer(x))


def upstream(weight: torch.Tensor, nbits: float, axis: int = 1) -> Layer:
    """hqq's own layer: it dequantizes, by torch (axis 1) or by its CUDA kernel (axis 0), then cuBLAS."""
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

    layer = HQQLinear.from_weights(
        weight.clone(), None, BaseQuantizeConfig(nbits=int(nbits), group_size=GROUP, axis=axis),
        compute_dtype=weight.dtype, device=str(weight.device),
    )  # fmt: skip
    name = "forward_pytorch" if axis == 1 else "forward_aten"
    return Layer(layer, lambda layer, x: getattr(layer, name)(x))


def upstream_aten(weight: torch.Tensor, nbits: float) -> Layer:
    return upstream(weight, nbits, axis=0)


def _with_integer_zero(nbits: float) -> float:
    return nbits + (16 + nbits) / GROUP


def _upstream_bits(nbits: float) -> float:
    # Ten codes of 3 bits in 32; 5 and 6 bits take a byte.
    stored = {3: 3.2, 5: 8, 6: 8}.get(nbits, nbits)
    return stored + METADATA_BITS / GROUP


INTEGER_WIDTHS = tuple(b for b in WIDTHS if b != 1.58)
BASELINE = "torch fp16"
OURS = "hqq.cpp"

PEERS = [
    Peer(OURS, WIDTHS, ours, "hqq_cpp"),
    Peer(BASELINE, (16,), dense, bits=lambda nbits: 16),
    Peer("humming", INTEGER_WIDTHS, humming, "humming.layer"),
    Peer("marlin (vllm)", (4,), marlin, "vllm._custom_ops", bits=_with_integer_zero),
    Peer("gemlite", (8, 4, 2, 1), gemlite, "gemlite.helper"),
    Peer("tinygemm (torch)", (4,), tinygemm, dtype=torch.bfloat16),
    Peer("torchao", (4,), torchao, "torchao.quantization", torch.bfloat16),
    Peer("bitsandbytes nf4", (4,), bitsandbytes, "bitsandbytes"),
    Peer("hqq, pytorch", INTEGER_WIDTHS, upstream, "hqq.core.quantize", bits=_upstream_bits),
    Peer("hqq, aten", (8, 4, 3, 2, 1), upstream_aten, "hqq_aten", bits=_upstream_bits),
]


def available(peers: list[Peer]) -> tuple[list[Peer], dict[str, str]]:
    """The peers that can be tried, and why the others cannot."""
    reasons = {peer.name: why for peer in peers if (why := peer.missing()) is not None}
    return [peer for peer in peers if peer.name not in reasons], reasons

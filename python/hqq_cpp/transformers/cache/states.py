"""Packed keys and values: quantizing them, appending to them, and unpacking them at every step of
generation.

A cache is written once and read for every token, so this layout is made for reading with few
operations of any device, not for files: a byte holds codes of channels that lie far apart, and a group
is ``code * scale + shift``.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from ... import api, backends
from ...format import ROW_FORMATS, plane_bits

# nbits -> bits of each plane of codes, the low one first.
PLANES = {nbits: plane_bits(nbits) for nbits in ROW_FORMATS}
# Codes of 8 bits are stored around 0: bfloat16 rounds code * scale to 8 digits, which costs least
# there.
_CENTER = 128
# Refits of scale and shift to the codes, for tensors that are not in CPU memory. More change
# little.
_REFITS = 3


class PackedStates(NamedTuple):
    """Quantized keys or values [batch, heads, tokens, head_dim].

    For axis 1 a group is up to `group_size` channels of one token, for axis 0 `group_size` tokens
    of one channel.
    """

    planes: tuple[torch.Tensor, ...]  # uint8, for 8 bits int8 [batch, heads, tokens, bytes]
    # [batch, heads, tokens, groups] for axis 1, [batch, heads, groups, head_dim] for axis 0.
    scale: torch.Tensor
    shift: torch.Tensor
    nbits: float
    group_size: int
    axis: int
    head_dim: int

    @property
    def tokens(self) -> int:
        """How many tokens these are."""
        return self.planes[0].shape[-2]

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(t.nbytes for t in (*self.planes, self.scale, self.shift))

    def map(self, function) -> PackedStates:
        """A copy with function(tensor) for every tensor."""
        return self._replace(
            planes=tuple(map(function, self.planes)),
            scale=function(self.scale),
            shift=function(self.shift),
        )

    def append(self, other: PackedStates) -> PackedStates:
        """Both, one after the other. Nothing is quantized again."""

        def join(a, b):
            return torch.cat([a, b], dim=-2)

        return self._replace(
            planes=tuple(map(join, self.planes, other.planes)),
            scale=join(self.scale, other.scale),
            shift=join(self.shift, other.shift),
        )


@torch.no_grad()
def quantize(states: torch.Tensor, nbits: float, group_size: int, axis: int) -> PackedStates:
    """Quantizes keys or values.

    Args:
        states: [batch, heads, tokens, head_dim], floating; for axis 0 with whole groups of tokens.
            A group with NaN or Inf does not become finite.
        nbits: 8, 6, 5, 4, 3, 2, 1.58 or 1.
        group_size: Values in a group.
        axis: 0: groups of tokens. 1: groups of channels; the last of a token may be shorter.
    """
    rows = states.transpose(-1, -2) if axis == 0 else states
    lead, length = rows.shape[:-1], rows.shape[-1]
    group = min(group_size, length)
    groups = math.ceil(length / group)
    W = rows.reshape(-1, length)
    solved = _solve_native(W, nbits, group)
    if solved is None:
        solved = _solve_torch(W, nbits, group)
    codes, scale, shift = solved
    scale = scale.to(states.dtype)
    center = _CENTER if nbits == 8 else 0
    shift = shift + center * scale.float()
    if length % group == 0:
        # The least squared error that is left once scale is rounded to the type of the states.
        code_mean = codes.view(-1, groups, group).mean(2, dtype=torch.float32) - center
        shift = W.view(-1, groups, group).mean(2, dtype=torch.float32) - code_mean * scale.float()
    shift = shift.to(states.dtype)

    codes = codes.view(*lead, length)
    scale, shift = scale.view(*lead, groups), shift.view(*lead, groups)
    if axis == 0:
        codes, scale, shift = (t.transpose(-1, -2).contiguous() for t in (codes, scale, shift))
    return PackedStates(pack(codes, nbits), scale, shift, nbits, group_size, axis, states.shape[-1])


def dequantize(packed: PackedStates, out: torch.Tensor) -> torch.Tensor:
    """Writes the states [batch, heads, tokens, head_dim] into `out`, in its type, and returns
    it."""
    unpack(packed, out)
    scale, shift, group = packed.scale, packed.shift, packed.group_size
    if packed.axis == 0:
        view = out.unflatten(-2, (-1, group))
        scale, shift = scale.unsqueeze(-2), shift.unsqueeze(-2)
    elif packed.head_dim % group == 0:
        view = out.unflatten(-1, (-1, group))
        scale, shift = scale.unsqueeze(-1), shift.unsqueeze(-1)
    else:
        view = out
        if scale.shape[-1] > 1:
            scale, shift = (
                t.repeat_interleave(group, -1)[..., : packed.head_dim] for t in (scale, shift)
            )
    view.mul_(scale).add_(shift)
    return out


def pack(codes: torch.Tensor, nbits: float) -> tuple[torch.Tensor, ...]:
    """uint8 codes [..., head_dim] -> the planes of a PackedStates.

    A plane of b bits splits head_dim in 8 / b runs of w channels: byte i has the codes of channels
    i, i + w, ..., the first in its lowest bits. So unpacking reads and writes whole runs. Codes of
    8 bits are int8, less 128.
    """
    if nbits == 8:
        return ((codes ^ _CENTER).view(torch.int8),)
    planes = []
    low = 0
    for bits in PLANES[nbits]:
        plane = (codes >> low) & (2**bits - 1)
        count = 8 // bits
        plane = torch.nn.functional.pad(plane, (0, -codes.shape[-1] % count))
        runs = plane.unflatten(-1, (count, -1)).unbind(-2)
        packed = runs[0]
        for i, run in enumerate(runs[1:], 1):
            packed = packed | (run << (i * bits))
        planes.append(packed.contiguous())
        low += bits
    return tuple(planes)


def unpack(packed: PackedStates, out: torch.Tensor) -> torch.Tensor:
    """Writes the codes, for 8 bits less 128, into `out` [batch, heads, tokens, head_dim]."""
    if packed.nbits == 8:
        return out.copy_(packed.planes[0])
    low = 0
    for plane, bits in zip(packed.planes, PLANES[packed.nbits]):
        width = plane.shape[-1]
        for i in range(8 // bits):
            run = out[..., i * width : (i + 1) * width]
            if not run.shape[-1]:
                break
            codes = ((plane >> (i * bits)) & (2**bits - 1))[..., : run.shape[-1]]
            if low:
                run.add_(codes << low)
            else:
                run.copy_(codes)
        low += bits
    return out


def _solve_native(W, nbits, group):
    """Codes, scale and shift by the C++ solver, or None where it does not run."""
    if W.device.type != "cpu" or backends.get_backend() == "torch":
        return None
    # The format has no groups below 8.
    config = {
        "nbits": nbits,
        "group_size": group if group % 8 == 0 else None,
        "balance": "none",
        "meta_dtype": "float32",
        "skip_modules": (),
    }
    try:
        q = api.quantize(W, config, threads=torch.get_num_threads())
    except ValueError:
        # It refuses NaN and Inf; a running model must go on.
        return None
    scale = torch.from_dlpack(q.scale)
    return torch.from_numpy(q.codes()), scale, -torch.from_dlpack(q.zero) * scale


def _solve_torch(W, nbits, group):
    """Codes, scale and shift in torch operations, none of which waits for the device."""
    rows, length = W.shape
    levels = 2 if nbits == 1.58 else 2 ** int(nbits) - 1
    W = W.float()
    if pad := -length % group:
        # Repeating the last value moves no bound.
        W = torch.cat([W, W[:, -1:].expand(rows, pad)], dim=1)
    W = W.unflatten(1, (-1, group))
    low, high = torch.aminmax(W, dim=2, keepdim=True)
    tiny = torch.finfo(torch.float32).tiny
    scale, shift = ((high - low) / levels).clamp(min=tiny), low

    def fit(scale, shift):
        codes = ((W - shift) / scale).round_().clamp_(0, levels)
        return codes, (codes * scale + shift - W).square_().sum(2, keepdim=True)

    codes, error = fit(scale, shift)
    mean = W.mean(2, keepdim=True)
    for _ in range(_REFITS):
        code_mean = codes.mean(2, keepdim=True)
        centered = codes - code_mean
        # NaN where all codes are equal; then nothing below is better.
        slope = (centered * W).sum(2, keepdim=True) / centered.square().sum(2, keepdim=True)
        new_scale = slope.clamp(min=tiny)
        new_shift = mean - code_mean * new_scale
        new_codes, new_error = fit(new_scale, new_shift)
        better = new_error < error
        scale, shift = torch.where(better, new_scale, scale), torch.where(better, new_shift, shift)
        codes, error = torch.where(better, new_codes, codes), torch.where(better, new_error, error)
    codes = codes.to(torch.uint8).flatten(1)[:, :length]
    return codes.contiguous(), scale.view(rows, -1), shift.view(rows, -1)

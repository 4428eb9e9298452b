"""Writes the files of this folder with hqq 0.2.8 itself (torch and hqq must be installed).

layers.safetensors    state_dict() of small HQQLinear layers, as Transformers 4 saved them
codes.safetensors     their codes, uint8 [out_features, in_features], unpacked by hqq
"""

from pathlib import Path

import torch
from hqq.core.quantize import HQQLinear, Quantizer, hqq_base_quant_config
from safetensors.torch import save_file

# name, nbits, axis, group_size, shape, compute_dtype, view_as_float, bias
LAYERS = [
    (f"b{str(nbits).replace('.', '_')}_axis{axis}", nbits, axis, 16, (16, 32), torch.float16, 0, 0)
    for nbits in (8, 6, 5, 4, 3, 2, 1.58, 1)
    for axis in (0, 1)
] + [
    ("bf16_bias", 4, 1, 8, (8, 24), torch.bfloat16, 0, 1),
    ("fp32_rows", 4, 1, None, (8, 20), torch.float32, 0, 0),
    ("fp32_columns", 3, 0, None, (12, 10), torch.float32, 0, 0),
    # 13 groups of a row: the ten fields of a 3-bit word are not filled.
    ("padded", 3, 1, 8, (3, 104), torch.float16, 0, 0),
    # The groups of a column run over more than one row count: out_features % group_size != 0.
    ("flat_columns", 2, 0, 32, (24, 40), torch.float16, 0, 0),
    ("float_view", 4, 1, 16, (8, 32), torch.bfloat16, 1, 0),
    ("float_view_3", 3, 0, 16, (16, 32), torch.float16, 1, 0),
]


def main():
    torch.manual_seed(7)
    tensors, codes = {}, {}
    for name, nbits, axis, group_size, shape, dtype, view, bias in LAYERS:
        config = hqq_base_quant_config(
            nbits=nbits, group_size=group_size, axis=axis, view_as_float=bool(view)
        )
        linear = torch.nn.Linear(shape[1], shape[0], bias=bool(bias))
        layer = HQQLinear(linear, config, compute_dtype=dtype, device="cpu")
        for key, value in layer.state_dict().items():
            tensors[f"{name}.{key}"] = value.data.contiguous()
        packed = layer.W_q.data
        if view:
            packed = packed.view(layer.meta["unpack_view_dtype"])
        unpacked = Quantizer.unpack[layer.meta["packing"]](packed, dtype=torch.uint8)
        codes[name] = unpacked.reshape(-1)[: shape[0] * shape[1]].reshape(shape).contiguous()
    folder = Path(__file__).parent
    save_file(tensors, folder / "layers.safetensors", {"format": "pt"})
    save_file(codes, folder / "codes.safetensors", {"format": "pt"})


if __name__ == "__main__":
    main()

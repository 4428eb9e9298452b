"""Gives every kind of layer its own bits: 4 bits for attention, 3 for the MLP.

pip install . torch transformers
python examples/transformers_per_tag.py
"""

import argparse
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, HqqConfig

import hqq_cpp.transformers  # noqa: F401  (HqqConfig works from here on)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--model", default=Path(__file__).parent / "tiny-llama", help="model folder"
    )
    args = parser.parse_args()

    q4_config = {"nbits": 4, "group_size": 64}
    q3_config = {"nbits": 3, "group_size": 32}
    config = HqqConfig(
        dynamic_config={
            "self_attn.q_proj": q4_config,
            "self_attn.k_proj": q4_config,
            "self_attn.v_proj": q4_config,
            "self_attn.o_proj": q4_config,
            "mlp.gate_proj": q3_config,
            "mlp.up_proj": q3_config,
            "mlp.down_proj": q3_config,
        }
    )
    model = AutoModelForCausalLM.from_pretrained(
        args.model, dtype=torch.float16, quantization_config=config
    )
    print(model.hqq_report(by="tag"))


if __name__ == "__main__":
    main()

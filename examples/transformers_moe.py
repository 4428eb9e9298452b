"""Quantizes a mixture of experts: 2 bits for the experts, 4 for the rest.

    pip install . torch transformers
    python examples/transformers_moe.py [--model FOLDER]

Without a folder it makes a small random Qwen3-MoE.
"""

import argparse
import tempfile

import torch
from transformers import AutoModelForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

import hqq_cpp
import hqq_cpp.transformers


def random_model(folder):
    config = Qwen3MoeConfig(
        vocab_size=512, hidden_size=256, moe_intermediate_size=128, intermediate_size=512,
        num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=64,
        num_experts=16, num_experts_per_tok=2,
    )  # fmt: skip
    Qwen3MoeForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="model folder")
    args = parser.parse_args()
    config = hqq_cpp.HqqConfig(
        nbits=4,
        dynamic_config={
            # Fused experts have the names of their parameters.
            "mlp.experts.gate_up_proj": {"nbits": 2},
            "mlp.experts.down_proj": {"nbits": 2},
        },
    )
    with tempfile.TemporaryDirectory() as folder:
        if args.model is None:
            random_model(folder)
        model = AutoModelForCausalLM.from_pretrained(
            args.model or folder, quantization_config=config
        )
    print(model.hqq_report(by="tag"))
    with torch.no_grad():
        print(model(torch.arange(1, 9)[None]).logits.shape)


if __name__ == "__main__":
    main()

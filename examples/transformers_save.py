"""Saves a quantized model and loads it again: the same logits to the last bit.

pip install . torch transformers
python examples/transformers_save.py OUT
"""

import argparse
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

import hqq_cpp
import hqq_cpp.transformers


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="folder to write")
    parser.add_argument(
        "--model", default=Path(__file__).parent / "tiny-llama", help="model folder"
    )
    args = parser.parse_args()

    config = hqq_cpp.HqqConfig(nbits=4)
    model = AutoModelForCausalLM.from_pretrained(args.model, quantization_config=config)
    model.save_pretrained(args.out)

    # What it needs is in the folder: no quantization_config here.
    again = AutoModelForCausalLM.from_pretrained(args.out)
    ids = torch.arange(1, 33)[None]
    with torch.no_grad():
        same = torch.equal(model(ids).logits, again(ids).logits)
    size = sum(file.stat().st_size for file in args.out.glob("*.safetensors"))
    print(f"{size:,} bytes of weights; logits are {'equal' if same else 'NOT equal'}")


if __name__ == "__main__":
    main()

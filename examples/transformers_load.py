"""Quantizes a model while Transformers loads it, and prints what that did.

pip install . torch transformers
python examples/transformers_load.py --nbits 3
"""

import argparse
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

import hqq_cpp
import hqq_cpp.transformers


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--model", default=Path(__file__).parent / "tiny-llama", help="model folder"
    )
    parser.add_argument("--nbits", type=float, default=4)
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()

    config = hqq_cpp.HqqConfig(nbits=args.nbits, group_size=args.group_size)
    start = time.perf_counter()
    model = AutoModelForCausalLM.from_pretrained(
        args.model, dtype=torch.bfloat16, device_map=args.device, quantization_config=config
    )
    print(f"loaded and quantized in {time.perf_counter() - start:.2f} s\n")
    print(model.hqq_report(by="tag"))


if __name__ == "__main__":
    main()

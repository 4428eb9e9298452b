"""Generates text with a quantized model.

pip install . torch transformers
python examples/transformers_generate.py --prompt "And it came to pass" --nbits 4
"""

import argparse
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import hqq_cpp
import hqq_cpp.transformers


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--model", default=Path(__file__).parent / "tiny-llama", help="model folder"
    )
    parser.add_argument("--prompt", default="And it came to pass")
    parser.add_argument("--nbits", type=float, default=4)
    parser.add_argument("--tokens", type=int, default=40)
    parser.add_argument("--kv-bits", type=int, help="quantize the cache of keys and values too")
    args = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(
        args.model, quantization_config=hqq_cpp.HqqConfig(nbits=args.nbits)
    )
    options = {}
    if args.kv_bits is not None:
        cache = {"backend": "hqq", "nbits": args.kv_bits}
        options = {"cache_implementation": "quantized", "cache_config": cache}
    inputs = tokenizer(args.prompt, return_tensors="pt")
    torch.manual_seed(0)
    out = model.generate(
        inputs["input_ids"], max_new_tokens=args.tokens, do_sample=True, top_p=0.9, **options
    )
    print(tokenizer.decode(out[0]))


if __name__ == "__main__":
    main()

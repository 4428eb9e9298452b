"""Repairs a quantized model: a LoRA adapter on its 2-bit weights learns to answer as the float
model does.

    pip install . torch transformers peft
    python examples/lora_finetune.py --nbits 2

Trains on the first part of a text and measures perplexity on the rest, for the float model, the
quantized one, and the quantized one with its adapter. 200 steps take about a minute on two cores.
With --task text the adapter learns the text instead, as in any other fine-tuning.
"""

import argparse
import math
import time
from pathlib import Path

import peft
import torch
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer

import hqq_cpp.transformers

EXAMPLES = Path(__file__).parent


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=EXAMPLES / "tiny-llama", help="model folder")
    parser.add_argument("--text", default=EXAMPLES / "text" / "valid.txt", help="a text file")
    parser.add_argument("--nbits", type=float, default=2, help="8, 6, 5, 4, 3, 2, 1.58 or 1")
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch", type=int, default=4, help="windows in a step")
    parser.add_argument("--window", type=int, default=128, help="tokens in a window")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--task", choices=("repair", "text"), default="repair")
    parser.add_argument("--dora", action="store_true", help="train DoRA instead of LoRA")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", help="folder to save the adapter to")
    args = parser.parse_args()
    nbits = args.nbits if args.nbits == 1.58 else int(args.nbits)
    torch.manual_seed(args.seed)

    text = Path(args.text).read_text(encoding="utf-8")
    ids = AutoTokenizer.from_pretrained(args.model)(text, return_tensors="pt").input_ids[0]
    train, held_out = ids.split([len(ids) * 2 // 3, len(ids) - len(ids) * 2 // 3])
    print(f"{len(train)} tokens to train on, {len(held_out)} held out")

    dense = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    quantized = AutoModelForCausalLM.from_pretrained(
        args.model,
        dtype=torch.float32,
        quantization_config=hqq_cpp.HqqConfig(nbits=nbits, group_size=args.group_size),
    )
    float_perplexity = perplexity(dense, held_out)
    before = perplexity(quantized, held_out)

    quantized = peft.prepare_model_for_kbit_training(quantized, use_gradient_checkpointing=False)
    tuned = peft.get_peft_model(
        quantized,
        peft.LoraConfig(
            r=args.rank,
            lora_alpha=args.rank,
            target_modules="all-linear",
            use_dora=args.dora,
            task_type="CAUSAL_LM",
        ),
    )
    tuned.print_trainable_parameters()
    start = time.perf_counter()
    teacher = dense if args.task == "repair" else None
    losses = finetune(tuned, train, args.steps, args.batch, args.window, args.lr, teacher)
    seconds = time.perf_counter() - start
    tenth = max(1, len(losses) // 10)
    first, last = (sum(part) / tenth for part in (losses[:tenth], losses[-tenth:]))
    print(f"loss {first:.3f} -> {last:.3f} in {args.steps} steps, {seconds:.0f} s")

    after = perplexity(tuned, held_out)
    print("perplexity of the held-out text:")
    print(f"  float             {float_perplexity:8.2f}")
    print(f"  {nbits} bits            {before:8.2f}")
    print(f"  {nbits} bits, adapted   {after:8.2f}")
    if args.out:
        tuned.save_pretrained(args.out)
        print(f"adapter saved to {args.out}")


def finetune(model, ids, steps, batch, window, lr, teacher=None):
    """Trains what is trainable on random windows of ids; returns the losses.

    The loss is the divergence from the predictions of `teacher`; without one, that of predicting
    the text.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps)
    windows = ids.unfold(0, window, 1)
    model.train()
    losses = []
    for _ in range(steps):
        x = windows[torch.randint(len(windows), (batch,))]
        if teacher is None:
            loss = model(input_ids=x, labels=x).loss
        else:
            with torch.no_grad():
                target = functional.log_softmax(teacher(input_ids=x).logits.flatten(0, 1), -1)
            logits = functional.log_softmax(model(input_ids=x).logits.flatten(0, 1), -1)
            loss = functional.kl_div(logits, target, reduction="batchmean", log_target=True)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    model.eval()
    return losses


@torch.no_grad()
def perplexity(model, ids, window=256):
    """exp of the mean loss over windows of the text."""
    model.eval()
    x = ids[: len(ids) // window * window].view(-1, window)
    losses = [
        model(input_ids=part, labels=part).loss.item() for part in x.split(8) if len(part) == 8
    ]
    return math.exp(sum(losses) / len(losses))


if __name__ == "__main__":
    main()

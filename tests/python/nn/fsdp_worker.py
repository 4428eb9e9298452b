"""What every process of test_fsdp.py runs; prints one JSON line in the first."""

from __future__ import annotations

import json
import sys

import peft
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import hqq_cpp
import hqq_cpp.transformers

IDS = torch.arange(1, 20)[None]
CONFIG = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
}


def base(quantized=True, **config):
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**CONFIG, **config)).eval()
    if not quantized:
        return model
    rules = {"dynamic_config": {"embed_tokens": {"nbits": 8}}} if config else {}
    return hqq_cpp.quantize_model_(model, {"nbits": 4, **rules})


def with_adapters(model):
    torch.manual_seed(1)
    config = peft.LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    return peft.get_peft_model(model, config)


def qlora(warm=False, **config):
    model = with_adapters(base(**config))
    if warm:
        with torch.no_grad():
            model(IDS)
        assert some_layer(model).is_tiled
    return model


def dense_twin():
    model, quantized = base(quantized=False), base()
    for name, layer in quantized.named_modules():
        if isinstance(layer, hqq_cpp.HqqLinear):
            model.get_submodule(name).weight.data = layer.dequantize()
    return with_adapters(model)


def some_layer(model):
    return model.base_model.model.model.layers[0].mlp.up_proj.base_layer


def frozen(model):
    return {p for p in model.parameters() if not p.requires_grad}


def shard(model, mesh, **options):
    for layer in model.base_model.model.model.layers:
        fully_shard(layer, mesh=mesh, **options)
    fully_shard(model, mesh=mesh, **options)
    return model


def losses(model, steps=8):
    learned = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(learned, lr=5e-3)
    done = []
    for _ in range(steps):
        loss = model(input_ids=IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        done.append(loss.item())
    return done


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


def refusal(call):
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing was refused"


def stored_as_before(model):
    """Whether state_dict() has the packed tensors of the model that was not sharded."""
    expected = qlora().state_dict()
    state = model.state_dict()
    return list(state) == list(expected) and all(
        torch.equal(t.full_tensor() if hasattr(t, "full_tensor") else t, expected[name])
        for name, t in state.items()
        if "lora" not in name
    )


def sharded(mesh, folder):
    result = {"plain": losses(qlora()), "dense": losses(dense_twin())}
    for warm in (False, True):
        model = shard(qlora(warm), mesh)
        result[f"fsdp2 {warm}"] = losses(model)
        result[f"state {warm}"] = stored_as_before(model)
    before = logits(model)
    dcp.save(get_model_state_dict(model), checkpoint_id=folder + "/dcp")
    again = shard(qlora(), mesh)
    state = get_model_state_dict(again)
    dcp.load(state, checkpoint_id=folder + "/dcp")
    set_model_state_dict(again, state)
    result["checkpoint"] = torch.equal(logits(again), before)
    tied = {"tie_word_embeddings": True}
    result["tied plain"] = losses(qlora(**tied), 3)
    result["tied"] = losses(shard(qlora(True, **tied), mesh), 3)
    model = qlora()
    result["ignored"] = losses(shard(model, mesh, ignored_params=frozen(model)))
    result["ddp"] = losses(DistributedDataParallel(qlora(True)))
    model = qlora()
    options = {"use_orig_params": True, "ignored_states": frozen(model)}
    cpu = torch.device("cpu")
    result["fsdp1"] = losses(FullyShardedDataParallel(model, device_id=cpu, **options))
    return result


def refused(mesh, folder):
    half = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
    model = shard(qlora(), mesh)
    pair = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    hqq_cpp.quantize_model_(pair, {"nbits": 4})
    cpu = torch.device("cpu")
    return {
        "cast": refusal(lambda: shard(qlora(), mesh, mp_policy=half)(IDS)),
        "layer": refusal(lambda: some_layer(model)(torch.ones(2, 64))),
        "weight": refusal(lambda: some_layer(model).weight + 1),
        "tile": refusal(lambda: some_layer(model).tile_()),
        "merge": refusal(lambda: model.merge_adapter()),
        "fsdp1": refusal(lambda: FullyShardedDataParallel(qlora(), device_id=cpu)),
        "rowwise": refusal(lambda: parallelize_module(pair, mesh, {"1": RowwiseParallel()})),
        "colwise": refusal(
            lambda: parallelize_module(pair, mesh, {"0": ColwiseParallel()})(torch.ones(2, 64))
        ),
        "tp_plan": refusal(lambda: load_parallel(folder + "/dense", hqq_cpp.HqqConfig(nbits=4))),
        "tp_plan of a folder": refusal(lambda: load_parallel(folder + "/quantized")),
    }


def load_parallel(folder, config=None):
    options = {} if config is None else {"quantization_config": config}
    AutoModelForCausalLM.from_pretrained(folder, tp_plan="auto", **options)


def main():
    folder = sys.argv[1]
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    if dist.get_rank() == 0:
        base(quantized=False).save_pretrained(folder + "/dense")
        hqq_cpp.quantize_checkpoint(folder + "/dense", folder + "/quantized", {"nbits": 4})
    dist.barrier()
    result = sharded(mesh, folder) | {"refused": refused(mesh, folder)}
    if dist.get_rank() == 0:
        print(json.dumps(result))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()

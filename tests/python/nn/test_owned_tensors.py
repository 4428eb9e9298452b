"""Only tensors that a module owns are tiled: offloaded, lent and shared ones stay in format 1."""

import copy
import pickle
import threading

import pytest

torch = pytest.importorskip("torch", reason="the layers need torch")

import torch.multiprocessing as multiprocessing
from torch import nn

import hqq_cpp

X = torch.linspace(-1, 1, 3 * 64).reshape(3, 64)


def net():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 64))
    return hqq_cpp.quantize_model_(model, {"nbits": 4}).eval().requires_grad_(False)


def warmed(model):
    model(X)
    assert model[0].is_tiled
    return model


@pytest.fixture(params=["as made", "after a call"])
def model(request):
    return net() if request.param == "as made" else warmed(net())


# Who asks for the tensors, and who lends others.


def test_who_asks_a_layer_gets_format_1(model):
    layer, expected = model[0], net()[0].state_dict()
    given = dict(layer.named_parameters(recurse=False))
    assert all(torch.equal(given[name], tensor) for name, tensor in expected.items())
    # It is the layer's still.
    model(X)
    assert layer.is_tiled and layer.W_q is given["W_q"]
    assert all(torch.equal(layer.state_dict()[name], tensor) for name, tensor in expected.items())


def test_tensors_for_one_call_are_not_tiled(model):
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    y = torch.func.functional_call(model, tensors, (X,))
    assert tensors["0.W_q"].dim() == 2 and torch.equal(y, model(X))
    own = model[0].W_q
    lent = nn.Parameter(tensors["0.W_q"], requires_grad=False)
    for name, tensor in tensors.items():
        if name.startswith("0."):
            model[0]._parameters[name[2:]] = nn.Parameter(tensor, requires_grad=False)
    model[0]._parameters["W_q"] = lent
    assert torch.equal(model(X), y) and not model[0].is_tiled and model[0].W_q is not own
    # The twin: who sets an attribute gives the tensor away, and tile_() takes what is there.
    model[0].tile_()
    assert model[0].is_tiled and torch.equal(model(X), y)
    for name, tensor in tensors.items():
        if name.startswith("0."):
            setattr(model[0], name[2:], nn.Parameter(tensor, requires_grad=False))
    assert torch.equal(model(X), y) and model[0].is_tiled


def test_tensors_of_two_orders_are_refused():
    model = warmed(net())
    scale = net()[0].scale
    with pytest.raises(
        ValueError, match=r"scale has the shape \[128, 1\]; it must be \[8, 1, 16\] in cpu tiles"
    ):
        torch.func.functional_call(model, {"0.scale": scale}, (X,))
    model[0].untile_()
    torch.func.functional_call(model, {"0.scale": scale}, (X,))


@pytest.mark.parametrize(
    ("name", "change", "text"),
    [
        ("scale", lambda t: t.bfloat16(), "scale is bfloat16; it must be float16"),
        ("W_q", lambda t: t[:64], r"W_q has the shape \[64, 32\]; it must be \[128, 32\]"),
        ("col_scale", lambda t: None, "col_scale is missing"),
        ("zero", lambda t: t.to("meta"), "zero is on meta, but W_q on cpu"),
    ],
)
def test_wrong_tensors_are_refused(name, change, text):
    layer = net()[0]
    tensor = change(getattr(layer, name))
    tensor = None if tensor is None else nn.Parameter(tensor, requires_grad=False)
    layer._parameters[name] = tensor
    for use in (lambda: layer(X), layer.dequantize, layer.quantized_tensor, layer.tile_):
        with pytest.raises(ValueError, match=text):
            use()


def test_tiles_of_another_layer_are_refused():
    """Kernels would read beyond the end of tiles that are too few."""
    layer, small = warmed(net())[0], warmed(net())[2]
    layer._parameters["W_q"] = nn.Parameter(small.W_q[:1], requires_grad=False)
    with pytest.raises(ValueError, match=r"W_q has the shape .*; it must be .* in cpu tiles"):
        layer(X)


def test_freed_memory_is_refused():
    """What FSDP leaves behind, and what a call on null addresses would read."""
    layer = net()[0]
    lent = nn.Parameter(layer.W_q.clone(), requires_grad=False)
    layer._parameters["W_q"] = lent
    lent.untyped_storage().resize_(0)
    with pytest.raises(ValueError, match="W_q has no memory: it was freed"):
        layer(X)


def test_a_weight_cannot_be_set():
    layer = net()[0]
    with pytest.raises(AttributeError, match="weight of a quantized layer is packed and cannot"):
        layer.weight = nn.Parameter(torch.zeros(128, 64))
    with pytest.raises(ValueError, match="use torch.nn.parallel.DistributedDataParallel"):
        layer._replicate_for_data_parallel()


@pytest.mark.parametrize(
    "again", [copy.deepcopy, copy.copy, lambda m: pickle.loads(pickle.dumps(m))]
)
def test_copies_own_their_tensors(model, again):
    expected = model(X)
    other = again(model)
    assert torch.equal(other(X), expected) and other[0].is_tiled
    assert other[0].is_ready(other[0].packed())
    table = hqq_cpp.HqqEmbedding(hqq_cpp.quantize(torch.randn(10, 64), {"nbits": 8}))
    assert torch.equal(again(table)(torch.tensor([3])), table(torch.tensor([3])))


# Threads and processes.


def test_first_call_by_many_threads():
    expected = net()(X)
    for _ in range(5):
        model, results, barrier = net(), [], threading.Barrier(4)

        def run(model=model, results=results, barrier=barrier):
            barrier.wait()
            results.append(model(X))

        threads = [threading.Thread(target=run) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(results) == 4 and all(torch.equal(y, expected) for y in results)


def _in_child(model, queue):
    torch.set_num_threads(1)
    queue.put((model(X).tolist(), model[0].is_tiled))


@pytest.mark.parametrize("tiled", [False, True])
def test_memory_that_processes_share(tiled):
    model = warmed(net()) if tiled else net().share_memory()
    expected = net()(X).tolist()
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    child = context.Process(target=_in_child, args=(model, queue))
    child.start()
    # Tiles are shared as they are; what is shared in format 1 is nobody's to reorder.
    assert queue.get(timeout=120) == (expected, tiled)
    child.join()
    assert model(X).tolist() == expected and model[0].is_tiled == tiled
    model[0].tile_()
    assert model(X).tolist() == expected and model[0].is_tiled


# Offloading by accelerate.


def llama(warm, **config):
    transformers = pytest.importorskip("transformers", reason="the model is Transformers'")
    torch.manual_seed(0)
    sizes = {"vocab_size": 128, "hidden_size": 64, "intermediate_size": 128}
    heads = {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2}
    settings = transformers.LlamaConfig(**sizes, **heads, **config)
    model = transformers.LlamaForCausalLM(settings).eval()
    rules = {"dynamic_config": {"embed_tokens": {"nbits": 8}}} if config else {}
    hqq_cpp.quantize_model_(model, {"nbits": 4, **rules})
    if warm:
        generate(model)
    return model


def generate(model):
    ids = torch.arange(1, 10)[None]
    return model.generate(ids, max_new_tokens=6, do_sample=False).tolist()


def on_disk(model, folder):
    accelerate = pytest.importorskip("accelerate", reason="offloading needs accelerate")
    places = ("embed_tokens", "layers.0", "layers.1", "norm", "rotary_emb")
    places = {f"model.{name}": "cpu" for name in places} | {"lm_head": "cpu"}
    return accelerate.dispatch_model(
        model,
        places | {"model.layers.0": "disk"},
        offload_dir=folder,
        main_device="cpu",
        force_hooks=True,
    )


def all_on_disk(model, folder):
    accelerate = pytest.importorskip("accelerate", reason="offloading needs accelerate")
    accelerate.disk_offload(model, folder, execution_device=torch.device("cpu"))
    return model


def in_memory(model, folder):
    accelerate = pytest.importorskip("accelerate", reason="offloading needs accelerate")
    return accelerate.cpu_offload(model, execution_device=torch.device("cpu"))


@pytest.mark.parametrize("warm", [False, True])
@pytest.mark.parametrize("offload", [on_disk, all_on_disk, in_memory])
def test_offloaded_models_generate(offload, warm, tmp_path):
    expected = generate(llama(False))
    model = offload(llama(warm), tmp_path)
    layer = model.model.layers[0].mlp.up_proj
    assert generate(model) == expected and generate(model) == expected
    assert layer.W_q.device.type == "meta" and layer.W_q.dim() == 2
    from accelerate.hooks import remove_hook_from_module

    remove_hook_from_module(model, recurse=True)
    if offload is on_disk:
        assert generate(model) == expected
        model.to("cpu")
        assert generate(model) == expected and layer.is_tiled


def test_offloaded_tied_embedding(tmp_path):
    tied = {"tie_word_embeddings": True}
    expected = generate(llama(False, **tied))
    for warm in (False, True):
        assert generate(in_memory(llama(warm, **tied), tmp_path)) == expected

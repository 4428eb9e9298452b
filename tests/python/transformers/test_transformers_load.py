"""from_pretrained and save_pretrained with quantized models."""

import copy
import json
import pickle
import subprocess
import sys
import textwrap

import pytest

torch = pytest.importorskip("torch", reason="Transformers needs torch")
transformers = pytest.importorskip("transformers", reason="the integration needs Transformers")

from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import hqq_cpp
import hqq_cpp.transformers
from hqq_cpp.find.layers import quantized_layers

IDS = torch.arange(5, 45)[None]


def load(path, **kwargs):
    return AutoModelForCausalLM.from_pretrained(path, **kwargs)


def logits(model):
    with torch.no_grad():
        return model(IDS, use_cache=False).logits


@pytest.fixture(scope="module")
def quantized(model):
    return load(model, quantization_config=hqq_cpp.HqqConfig(nbits=4))


@pytest.fixture(scope="module")
def saved(quantized, tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    quantized.save_pretrained(folder)
    return folder


# The documented ways.


def test_documented_snippet(model):
    """Transformers' own page, with one more import."""
    from transformers import HqqConfig

    config = HqqConfig(nbits=8, group_size=64, quant_zero=False, quant_scale=False, axis=0)
    loaded = AutoModelForCausalLM.from_pretrained(
        model, dtype=torch.float16, device_map="cpu", quantization_config=config
    )
    layer = loaded.model.layers[0].self_attn.q_proj
    assert (layer.nbits, layer.layer_config.group_size, layer.layer_config.axis) == (8, 64, 0)
    exact = logits(load(model, dtype=torch.float32))
    assert (logits(loaded).float() - exact).norm() < 0.02 * exact.norm()


def test_documented_snippet_per_tag(model):
    from transformers import HqqConfig

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
        }
    )
    loaded = load(model, dtype=torch.float16, device_map="cpu", quantization_config=config)
    block = loaded.model.layers[1]
    assert block.self_attn.k_proj.nbits == 4 and block.mlp.up_proj.nbits == 3
    assert block.mlp.up_proj.layer_config.group_size == 32
    # As upstream: what no tag names stays as it is.
    assert type(block.mlp.down_proj) is torch.nn.Linear


WITHOUT_HQQ = """
    import importlib.util, sys

    sys.modules["hqq"] = None  # "import hqq" raises ModuleNotFoundError
    find_spec = importlib.util.find_spec
    importlib.util.find_spec = lambda name, *rest: None if name == "hqq" else find_spec(name, *rest)
    {first}
    from transformers import AutoModelForCausalLM, HqqConfig
    {last}
    model = AutoModelForCausalLM.from_pretrained({model!r}, quantization_config=HqqConfig(nbits=4))
    print(type(model.model.layers[0].mlp.up_proj).__name__)
    model.to(device="cpu")
    print(HqqConfig(nbits=4).to_dict()["quant_config"]["weight_quant_params"]["nbits"])
"""


@pytest.mark.parametrize("order", ["first", "last"])
def test_needs_no_package_hqq(model, order):
    lines = {"first": "", "last": ""} | {order: "import hqq_cpp.transformers"}
    code = textwrap.dedent(WITHOUT_HQQ).format(model=str(model), **lines)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["HqqLinear", "4"]


def test_wrong_settings_name_the_right_ones(model):
    from transformers import HqqConfig

    with pytest.raises(ValueError, match="unknown key 'group_sise'; did you mean 'group_size'"):
        HqqConfig(nbits=4, group_sise=64)
    with pytest.raises(ValueError, match="nbits is 7"):
        HqqConfig(nbits=7)
    with pytest.raises(ValueError, match="leave every layer.*model.layers.0.self_attn.q_proj"):
        load(model, quantization_config=HqqConfig(dynamic_config={"no.such": {"nbits": 4}}))


@pytest.mark.parametrize(
    "config",
    [
        {"quant_method": "hqq_cpp", "nbits": 3},
        {"quant_method": "hqq", "quant_config": {"weight_quant_params": {"nbits": 3, "axis": 1}},
         "skip_modules": ["lm_head"]},
    ],
)  # fmt: skip
def test_dicts_are_taken(model, config):
    if config["quant_method"] == "hqq":
        from transformers import HqqConfig

        config = HqqConfig.from_dict(config)
    assert load(model, quantization_config=config).model.layers[0].mlp.up_proj.nbits == 3


def test_equals_the_library(model, quantized):
    """The very bits of quantize() on the stored weight."""
    weight = hqq_cpp.Checkpoint(model).tensor("model.layers.2.mlp.down_proj.weight")
    q = hqq_cpp.quantize(weight, {"nbits": 4})
    ours = quantized.model.layers[2].mlp.down_proj.quantized_tensor()
    for name, tensor in q.tensors().items():
        assert (ours.tensors()[name].numpy() == tensor.numpy()).all(), name


def test_rules_by_name(model):
    config = hqq_cpp.HqqConfig(
        nbits=4,
        dynamic_config={"model.layers.0.*": {"nbits": 8}, "mlp.up_proj": None, "re:.*2.*k_proj": {"nbits": 2}},
    )  # fmt: skip
    loaded = load(model, quantization_config=config)
    layers = loaded.model.layers
    assert layers[0].mlp.down_proj.nbits == 8 and layers[1].mlp.down_proj.nbits == 4
    assert layers[2].self_attn.k_proj.nbits == 2
    assert type(layers[1].mlp.up_proj) is torch.nn.Linear


# Saving and loading.


@pytest.mark.parametrize(
    "options", [{}, {"max_shard_size": "200KB"}, {"save_original_format": False}]
)
def test_reload_is_bit_equal(quantized, tmp_path, options):
    quantized.save_pretrained(tmp_path, **options)
    again, info = load(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    assert torch.equal(logits(again), logits(quantized))
    assert all(
        not p.requires_grad for _, m in quantized_layers(again) for p in m.packed() if p is not None
    )
    settings = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert "quant_method" not in settings
    assert settings["quantizer"] == "hqq_cpp" and settings["not_quantized"] == [
        "model.embed_tokens"
    ]


def test_reload_in_another_dtype_keeps_the_bits(saved, quantized):
    again = load(saved, dtype=torch.float32)
    ours, theirs = again.model.layers[0].mlp.up_proj, quantized.model.layers[0].mlp.up_proj
    ours.untile_(), theirs.untile_()
    assert ours.scale.dtype == torch.float16 and torch.equal(ours.scale, theirs.scale)
    assert torch.equal(ours.dequantize(), theirs.dequantize())
    assert ours.weight.dtype == torch.float32 and again.model.norm.weight.dtype == torch.float32


@pytest.mark.parametrize(
    "settings",
    [
        {"nbits": 3, "quant_scale": True, "quant_zero": True},
        {"nbits": 1.58, "axis": 0, "group_size": 8},
        {"nbits": 2, "balance": "none", "meta_dtype": "bfloat16", "group_size": None},
    ],
)
def test_folders_of_the_command_load(model, tmp_path, settings):
    """hqq-cpp quantize, then from_pretrained: the same model as quantizing on load, no
    conversion."""
    hqq_cpp.quantize_checkpoint(model, tmp_path / "q", settings)
    loaded, info = load(tmp_path / "q", output_loading_info=True)
    assert not any(info.values()), info
    direct = load(model, quantization_config=hqq_cpp.HqqConfig(**settings))
    assert torch.equal(logits(loaded), logits(direct))


def test_tensors_of_a_folder_are_views_of_the_file(saved):
    layer = load(saved).model.layers[1].mlp.up_proj
    with open("/proc/self/maps") as maps:
        mapped = [line.split() for line in maps if "model.safetensors" in line]
    ranges = [tuple(int(end, 16) for end in line[0].split("-")) for line in mapped]
    for tensor in (layer.W_q, layer.scale, layer.zero):
        assert any(first <= tensor.data_ptr() < last for first, last in ranges)


def test_settings_come_with_the_tensors(model, tmp_path):
    """A layer with importance has no col_scale where its neighbours have one."""
    importance = {"model.layers.1.mlp.up_proj": torch.rand(256) + 0.1}
    loaded = load(model, quantization_config=hqq_cpp.HqqConfig(nbits=3, importance=importance))
    up = [layer.mlp.up_proj.col_scale for layer in loaded.model.layers]
    assert up[1] is None and up[0] is not None
    loaded.save_pretrained(tmp_path)
    assert torch.equal(logits(load(tmp_path)), logits(loaded))


def test_importance_that_does_not_fit(model):
    importance = {"model.layers.1.mlp.up_proj": torch.ones(255)}
    with pytest.raises(ValueError, match=r"importance has the shape \[255\]; it must be \[256\]"):
        load(model, quantization_config=hqq_cpp.HqqConfig(importance=importance))


def damaged(saved, folder, change):
    """A copy of a saved folder whose config.json went through change()."""
    import shutil

    shutil.copytree(saved, folder, dirs_exist_ok=True)
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_quantized_in_name_only(model, saved, tmp_path):
    quantization = json.loads((saved / "config.json").read_text())["quantization_config"]
    folder = damaged(model, tmp_path, lambda c: c.update(quantization_config=quantization))
    with pytest.raises(hqq_cpp.FormatError, match="its files hold no W_q"):
        load(folder)


def test_a_layer_the_model_lacks(saved, tmp_path):
    """Transformers reports it, as for any model; the base model of a checkpoint can be loaded."""
    folder = damaged(saved, tmp_path, lambda c: c.update(num_hidden_layers=2))
    model, info = load(folder, output_loading_info=True)
    assert len(list(quantized_layers(model))) == 14 and not info["missing_keys"]
    assert "model.layers.2.mlp.up_proj.W_q" in info["unexpected_keys"]
    base, info = transformers.AutoModel.from_pretrained(saved, output_loading_info=True)
    assert len(list(quantized_layers(base))) == 21 and not any(info.values())


def test_a_layer_that_cannot_be_quantized(saved, tmp_path):
    from safetensors.torch import load_file, save_file

    folder = damaged(saved, tmp_path, lambda c: None)
    tensors = load_file(folder / "model.safetensors")
    for name in ("W_q", "scale", "zero"):
        tensors[f"model.norm.{name}"] = tensors[f"model.layers.0.mlp.up_proj.{name}"].clone()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        hqq_cpp.FormatError, match="model.norm.weight is quantized in the checkpoint"
    ):
        load(folder)


def test_weights_that_cannot_be_quantized(model, tmp_path):
    source = load(model)
    with torch.no_grad():
        source.model.layers[1].mlp.up_proj.weight[3, 5] = float("nan")
    source.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"model.layers.1.mlp.up_proj.*NaN"):
        load(tmp_path, quantization_config=hqq_cpp.HqqConfig())


# Devices.


def test_weights_too_small_for_float16_metadata(model, tmp_path):
    dense = load(model, dtype=torch.float32)
    with torch.no_grad():
        dense.model.layers[1].mlp.up_proj.weight.mul_(1e-7)
    dense.save_pretrained(tmp_path / "dense")
    refusal = (
        r"\[model.layers.1.mlp.up_proj\] the scale of .* too small for float16; use meta_dtype"
    )
    with pytest.raises(ValueError, match=refusal):
        load(tmp_path / "dense", quantization_config=hqq_cpp.HqqConfig(nbits=4))
    with pytest.raises(ValueError, match=refusal):
        hqq_cpp.quantize_model_(dense, {"nbits": 4})
    with pytest.raises(ValueError, match=refusal):
        hqq_cpp.quantize_checkpoint(tmp_path / "dense", tmp_path / "out", {"nbits": 4})
    config = hqq_cpp.HqqConfig(nbits=4, meta_dtype="bfloat16")
    layer = load(tmp_path / "dense", quantization_config=config).model.layers[1].mlp.up_proj
    assert layer.quantize_stats["relative_error"] < 0.2


@pytest.mark.parametrize("on_the_fly", [True, False])
@pytest.mark.parametrize("device_map", ["auto", "cpu", "disk"])
def test_device_map(model, saved, quantized, tmp_path, device_map, on_the_fly):
    pytest.importorskip("accelerate", reason="device_map needs accelerate")
    if device_map == "disk":
        device_map = {"": "cpu", "model.layers.0": "disk", "model.layers.2.mlp": "disk"}
        names = [f"model.{n}" for n in ("embed_tokens", "norm", "rotary_emb", "layers.1")]
        names += [
            f"model.layers.2.{n}"
            for n in ("self_attn", "input_layernorm", "post_attention_layernorm")
        ]
        device_map |= dict.fromkeys([*names, "lm_head"], "cpu")
        del device_map[""]
    kwargs = {"quantization_config": hqq_cpp.HqqConfig(nbits=4)} if on_the_fly else {}
    loaded = load(
        model if on_the_fly else saved, device_map=device_map, offload_folder=tmp_path, **kwargs
    )
    if isinstance(device_map, dict):
        assert loaded.model.layers[0].mlp.up_proj.W_q.device.type == "meta"
    assert torch.equal(logits(loaded), logits(quantized))


def test_device_map_counts_packed_bytes(model, tmp_path):
    """A limit that the quantized model keeps and the dense one does not."""
    pytest.importorskip("accelerate", reason="device_map needs accelerate")
    size = hqq_cpp.Checkpoint(model).total_bytes
    options = {"device_map": "auto", "max_memory": {"cpu": int(0.6 * size)}}
    options["offload_folder"] = tmp_path
    config = hqq_cpp.HqqConfig(nbits=2)
    small = load(model, quantization_config=config, **options)
    assert all(p.device.type == "cpu" for p in small.parameters())
    assert "disk" in load(model, **options).hf_device_map.values()


# The model.


def test_casts_and_copies(saved, quantized):
    again = load(saved)
    expected = logits(quantized)
    assert torch.equal(logits(copy.deepcopy(again)), expected)
    assert torch.equal(logits(pickle.loads(pickle.dumps(again))), expected)
    half = copy.deepcopy(again).to(torch.float16)
    assert half.model.layers[0].mlp.up_proj.scale.dtype == torch.float16
    assert half.model.layers[0].mlp.up_proj.weight.dtype == torch.float16
    assert torch.equal(half.model.layers[0].mlp.up_proj.W_q, again.model.layers[0].mlp.up_proj.W_q)


def test_generates(quantized):
    out = quantized.generate(IDS, max_new_tokens=8, do_sample=False)
    assert out.shape == (1, 48)


def test_compiles_whole(quantized):
    compiled = torch.compile(quantized, fullgraph=True, dynamic=True, backend="aot_eager")
    with torch.no_grad():
        for length in (40, 7, 13):
            ids = IDS[:, :length]
            eager = quantized(ids, use_cache=False).logits.float()
            fast = compiled(ids, use_cache=False).logits.float()
            assert (fast - eager).norm() < 0.02 * eager.norm()


def test_dequantize_gives_the_dense_model(saved, quantized, model):
    dense = load(saved, dtype=torch.float32).dequantize()
    assert type(dense.model.layers[0].mlp.up_proj) is torch.nn.Linear
    assert not list(quantized_layers(dense)) and not hasattr(dense.config, "quantization_config")
    W_r = quantized.model.layers[0].mlp.up_proj.dequantize()
    assert torch.equal(dense.model.layers[0].mlp.up_proj.weight, W_r)


def test_report(quantized, saved):
    report = quantized.hqq_report()
    assert len(report.rows) == 21 and 4.5 < report.bits_per_weight < 4.7
    row = {row.name: row for row in report.rows}["model.layers.0.mlp.up_proj"]
    assert (row.nbits, row.weights) == (4, 640 * 256) and 0.05 < row.relative_error < 0.15
    tags = quantized.hqq_report(by="tag")
    assert {row.layers for row in tags.rows} == {3} and tags.nbytes == report.nbytes
    assert "mlp.up_proj" in str(tags) and "MB in all" in str(tags)
    assert load(saved).hqq_report().rows[0].relative_error is None
    with pytest.raises(ValueError, match="by is 'bits'; it must be 'layer' or 'tag'"):
        quantized.hqq_report(by="bits")
    with pytest.raises(ValueError, match="Linear has no quantized layer"):
        hqq_cpp.hqq_report(torch.nn.Linear(8, 8))


def test_memory_of_quantizing_on_load(tmp_path):
    """At most the quantized model, two of the largest tensors and 200 MB, in anonymous memory."""
    config = LlamaConfig(
        vocab_size=512, hidden_size=2048, intermediate_size=8192, num_hidden_layers=3,
        num_attention_heads=16, num_key_value_heads=16, tie_word_embeddings=True,
    )  # fmt: skip
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path)
    code = f"""
        import threading, time
        import torch, hqq_cpp, hqq_cpp.transformers
        from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
        from pathlib import Path

        def anonymous():
            text = Path("/proc/self/status").read_text()
            return 1024 * int(text.split("RssAnon:")[1].split()[0])

        # Imports and everything that is allocated once.
        small = LlamaForCausalLM(LlamaConfig(vocab_size=64, hidden_size=64, intermediate_size=64,
                                             num_hidden_layers=1, num_attention_heads=2))
        hqq_cpp.quantize_model_(small, {{"nbits": 4}})
        before, peak, done = anonymous(), 0, False

        def watch():
            global peak
            while not done:
                peak = max(peak, anonymous())
                time.sleep(0.001)

        thread = threading.Thread(target=watch)
        thread.start()
        model = AutoModelForCausalLM.from_pretrained({str(tmp_path)!r},
                                                     quantization_config=hqq_cpp.HqqConfig(nbits=4))
        done = True
        thread.join()
        print(peak - before, sum(p.nbytes for p in model.parameters()))
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    peak, size = map(int, done.stdout.split())
    largest = 2 * 8192 * 2048
    dense = 3 * 2 * (4 * 2048 * 2048 + 3 * 8192 * 2048)
    assert peak <= size + 2 * largest + 200e6
    assert size + 2 * largest + 200e6 < dense + 150e6  # the bound means something

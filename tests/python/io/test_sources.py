"""What a source folder may be: sources that are quantized already, and numbers of config.json."""

import json
import math
import shutil
import struct

import pytest

import hqq_cpp
from cli_runner import FORMAT, MODEL, USER, needs_binary, run, run_json

BIG = 1000000000000000019884624838656  # transformers' VERY_LARGE_INTEGER
ODD_CONFIG = (
    '{\n    "model_type": "llama", "max_length": 1000000000000000019884624838656,\n'
    '    "floats": [1e-05, 1.0, 0.1000000000000000055], "limit": [0.0, Infinity, NaN, -Infinity],\n'
    '    "b": "\\u00e9 NaN", "a": {"quantization_config": {}}\n}\n'
)
LAYER = "model.layers.0.mlp.up_proj"
DENSE = {"model.layers.0.self_attn.o_proj.weight": ("F16", [64, 64], 8192)}
SIZES = {"F16": 2, "BF16": 2, "F32": 4, "I32": 4, "U32": 4, "F4": 0.5}


def save(path, tensors):
    """`tensors`: name -> (dtype, shape)."""
    header, at = {}, 0
    for name, (dtype, shape, *_) in tensors.items():
        size = int(math.prod(shape) * SIZES.get(dtype, 1))
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header).encode()
    # Finite in every float type.
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(range(60)) * (at // 60 + 1))
    with open(path, "r+b") as file:
        file.truncate(8 + len(text) + at)


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "m").mkdir()
    return tmp_path / "m"


def make(folder, tensors, config=None, **files):
    save(folder / "model.safetensors", DENSE | tensors)
    if config is not None:
        (folder / "config.json").write_text(json.dumps({"model_type": "llama"} | config))
    for name, text in files.items():
        (folder / f"{name}.json").write_text(text)


FP8 = {f"{LAYER}.weight": ("F8_E4M3", [64, 64]), f"{LAYER}.weight_scale_inv": ("F32", [1, 1])}
GPTQ = {f"{LAYER}.qweight": ("I32", [8, 64]), f"{LAYER}.scales": ("F16", [1, 64])}
MLX = {f"{LAYER}.weight": ("U32", [64, 8]), f"{LAYER}.scales": ("BF16", [64, 1])}
MXFP4 = {f"{LAYER}_blocks": ("U8", [2, 64, 2, 16]), f"{LAYER}_scales": ("U8", [2, 64, 2])}
F4 = {f"{LAYER}.weight": ("F4", [64, 64]), f"{LAYER}.weight_scale": ("F8_E8M0", [64, 2])}
METHOD = {"quant_method": "fp8"}

QUANTIZED = [
    (FP8, {"text_config": {"quantization_config": METHOD}}, {}, "text_config.quantization_config"),
    (
        {},
        {"thinker_config": {"text_config": {"quantization_config": METHOD}}},
        {},
        "thinker_config",
    ),
    (FP8, {"compression_config": METHOD}, {}, 'compression_config of method "fp8"'),
    (GPTQ, {}, {"quantize_config": "{}"}, 'has the file "quantize_config.json" of AutoGPTQ'),
    ({}, {}, {"hf_quant_config": "{}"}, 'has the file "hf_quant_config.json" of ModelOpt'),
    (MLX, {"quantization": {"bits": 4, "group_size": 64}}, {}, "quantization of 4 bits"),
    (FP8, {}, {}, f'"{LAYER}.weight" in "model.safetensors" is F8_E4M3'),
    (FP8, None, {}, f'has "{LAYER}.weight_scale_inv" beside it'),
    (GPTQ, None, {}, "the form of GPTQ or AWQ"),
    (MLX, {}, {}, "is U32"),
    (MXFP4, {}, {}, "the form of MXFP4"),
    (F4, {}, {}, "is F4"),
]


@pytest.mark.parametrize("tensors, config, files, message", QUANTIZED)
def test_quantized_sources_are_refused(folder, tensors, config, files, message):
    make(folder, tensors, config, **files)
    with pytest.raises(ValueError, match=r"^\[quantize\] .* is already quantized: ") as error:
        hqq_cpp.quantize_checkpoint(folder, folder.parent / "q")
    assert message in str(error.value)
    assert str(error.value).endswith("; an unquantized checkpoint is needed")
    assert not (folder.parent / "q").exists()


def test_dense_sources_with_such_names_are_quantized(folder):
    names = {
        f"{LAYER}.weight": ("F16", [64, 64]),
        f"{LAYER}.weight_scale": ("F32", [1]),
        f"{LAYER}.scales": ("F16", [64]),
        "logit_scale": ("F32", []),
        "model.layer_scale.weight": ("F16", [64]),
        "attn.bias": ("U8", [1, 1, 8, 8]),
        "buffer": ("F8_E4M3", [8, 8]),
    }
    make(folder, names, {"text_config": {"quantization_config": None}, "quantization": {}})
    report = hqq_cpp.quantize_checkpoint(folder, folder.parent / "q")
    assert len(report.layers) == 2 and report.warnings == []


@needs_binary
def test_command_says_what_is_no_dense_model(folder, tmp_path):
    make(folder, {f"{LAYER}.weight": ("F8_E5M2", [64, 64])})
    error = run("quantize", folder, tmp_path / "q", code=USER).stderr
    assert "is an 8-bit float weight without a scale; convert it to F16, BF16 or F32 first" in error
    (folder / "model.safetensors").rename(folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text("{}")
    error = run("quantize", folder, tmp_path / "q", code=FORMAT).stderr
    assert "holds an adapter (adapter_config.json) and no model; merge it" in error


@needs_binary
def test_command_names_weights_beside_the_checkpoint(folder, tmp_path):
    make(folder, {}, {})
    save(folder / "consolidated.safetensors", DENSE)
    result = run("quantize", folder, tmp_path / "q")
    assert 'warning: no part of the checkpoint, and left out: "consolidated.saf' in result.stderr
    assert not (tmp_path / "q" / "consolidated.safetensors").exists()
    assert "consolidated" in run_json("quantize", folder, tmp_path / "r")["warnings"][0]
    assert run("quantize", folder, tmp_path / "s", "-q").stderr == ""


@pytest.fixture
def odd(folder):
    """The bundled model with numbers in its config that no 64-bit type holds."""
    shutil.copy(MODEL / "model.safetensors", folder)
    (folder / "config.json").write_text(ODD_CONFIG)
    return folder


def test_config_keeps_every_byte(odd, tmp_path):
    hqq_cpp.quantize_checkpoint(odd, tmp_path / "q", {"balance": "none"})
    text = (tmp_path / "q" / "config.json").read_text()
    assert text.startswith(ODD_CONFIG[:-3] + ",\n") and text.endswith("}\n")
    assert json.loads(text)["quantization_config"]["nbits"] == 4
    hqq_cpp.dequantize_checkpoint(tmp_path / "q", tmp_path / "d")
    assert (tmp_path / "d" / "config.json").read_text() == ODD_CONFIG
    hqq_cpp.convert_checkpoint(tmp_path / "q", tmp_path / "u", "upstream")
    assert (tmp_path / "u" / "config.json").read_text().startswith(ODD_CONFIG[:-3] + ",\n")


def test_index_keeps_what_it_says_besides_the_tensors(folder, tmp_path):
    name = "model-00001-of-00001.safetensors"
    save(folder / name, DENSE)
    note = f'"note": [NaN, {BIG}, 1e-05]'
    weight_map = json.dumps(dict.fromkeys(DENSE, name))
    index = f'{{"metadata": {{"total_size": 8192, {note}}}, "weight_map": {weight_map}, "z": 1.0}}'
    (folder / "model.safetensors.index.json").write_text(index)
    report = hqq_cpp.quantize_checkpoint(folder, tmp_path / "q")
    text = (tmp_path / "q" / "model.safetensors.index.json").read_text()
    size = f'"total_size": {report.bytes_after}'
    assert text.startswith(f'{{"metadata": {{{size}, {note}}}, "weight_map": {{')
    assert text.endswith('}, "z": 1.0}')


def test_config_of_a_checkpoint_has_pythons_numbers(odd):
    config = hqq_cpp.Checkpoint(odd).config
    assert config["max_length"] == BIG
    assert config["limit"][1] == math.inf and math.isnan(config["limit"][2])


@needs_binary
def test_dtype_of_a_config_with_odd_numbers(odd, tmp_path):
    hqq_cpp.quantize_checkpoint(odd, tmp_path / "q")
    config = tmp_path / "q" / "config.json"
    config.write_text(config.read_text().replace('"b":', '"dtype": "bfloat16", "b":', 1))
    assert run_json("dequantize", tmp_path / "q", tmp_path / "d")["dtype"] == "bfloat16"


def test_transformers_and_importance_go_by_the_same_rule(tmp_path):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    import hqq_cpp.transformers

    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=1,
        num_attention_heads=4,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config)
    model.save_pretrained(tmp_path)
    load = transformers.LlamaForCausalLM.from_pretrained
    load(tmp_path, quantization_config=hqq_cpp.HqqConfig())
    state = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    weight = f"{LAYER}.weight"
    state[weight] = state[weight].to(torch.float8_e4m3fn)
    state[f"{LAYER}.weight_scale_inv"] = torch.ones(1)
    from safetensors.torch import save_file

    save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"\[from_pretrained\] .* is already quantized: tensor"):
        load(tmp_path, quantization_config=hqq_cpp.HqqConfig())
    with pytest.raises(ValueError, match=r"\[importance\] .* is already quantized: tensor"):
        hqq_cpp.collect_importance_folder(tmp_path, None)
    # A cast without a scale has the values of the weights.
    del state[f"{LAYER}.weight_scale_inv"]
    save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    cast = load(tmp_path, quantization_config=hqq_cpp.HqqConfig(), dtype=torch.float32)
    dense = state[weight].float()
    error = (cast.get_submodule(LAYER).dequantize() - dense).norm() / dense.norm()
    assert error < 0.15
    # A nested mark, with dense weights.
    model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    saved["draft_config"] = {"quantization_config": {"quant_method": "gptq"}}
    (tmp_path / "config.json").write_text(json.dumps(saved))
    with pytest.raises(ValueError, match="draft_config.quantization_config of method"):
        load(tmp_path, quantization_config=hqq_cpp.HqqConfig())

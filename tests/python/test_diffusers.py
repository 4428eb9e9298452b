"""Models of diffusers: quantized in place and on load, saved, loaded, dense again."""

from __future__ import annotations

import copy
import json

import pytest

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
pytest.importorskip("accelerate")

from torch import nn

import hqq_cpp
import hqq_cpp.diffusers

pytestmark = pytest.mark.filterwarnings("ignore:.*stays? as :UserWarning")
CONFIG = {"nbits": 8, "group_size": 32, "dynamic_config": {"*.to_q": {"nbits": 4}, "*.to_v": None}}
MODELS = {
    "unet": dict(
        sample_size=8, in_channels=4, out_channels=4, layers_per_block=1, block_out_channels=(32, 64),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=32, attention_head_dim=8, norm_num_groups=8,
    ),
    "flux": dict(
        patch_size=1, in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=32, pooled_projection_dim=32,
        axes_dims_rope=[4, 4, 8],
    ),
}  # fmt: skip
CLASSES = {"unet": "UNet2DConditionModel", "flux": "FluxTransformer2DModel"}


def build(kind="unet"):
    torch.manual_seed(0)
    return getattr(diffusers, CLASSES[kind])(**MODELS[kind]).eval()


def run(model, kind="unet"):
    generator = torch.Generator().manual_seed(1)

    def random(*shape):
        return torch.randn(*shape, generator=generator).to(model.dtype)

    with torch.no_grad():
        if kind == "unet":
            return model(random(1, 4, 8, 8), torch.tensor(3), random(1, 7, 32)).sample
        return model(
            hidden_states=random(1, 6, 4), encoder_hidden_states=random(1, 5, 32),
            pooled_projections=random(1, 32), timestep=torch.tensor([0.5], dtype=model.dtype),
            img_ids=torch.zeros(6, 3), txt_ids=torch.zeros(5, 3),
        ).sample  # fmt: skip


def same(a, b):
    a, b = a.state_dict(), b.state_dict()
    assert a.keys() == b.keys()
    for name, tensor in a.items():
        assert tensor.dtype == b[name].dtype and torch.equal(tensor, b[name]), name


@pytest.fixture
def quantized():
    return hqq_cpp.quantize_model_(build(), CONFIG)


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_saved_and_loaded(tmp_path, kind, dtype):
    model = hqq_cpp.quantize_model_(build(kind).to(dtype), CONFIG)
    assert model.dtype == dtype
    expected = run(model, kind)
    for name, size in (("whole", "10GB"), ("shards", "50KB")):
        model.save_pretrained(tmp_path / name, max_shard_size=size)
        again = type(model).from_pretrained(tmp_path / name, torch_dtype=dtype)
        same(model, again)
        assert again.dtype == dtype and torch.equal(run(again, kind), expected)
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    settings = json.loads((tmp_path / "whole" / "config.json").read_text())["quantization_config"]
    assert settings["quant_method"] == "hqq_cpp" and settings["format_version"] == 1
    config = hqq_cpp.HqqConfig.from_dict(settings)
    for name, module in again.named_modules():
        if isinstance(module, hqq_cpp.HqqLinear):
            assert config.layer(name) == module.layer_config, name
        elif isinstance(module, nn.Linear):
            assert config.layer(name) is None, name
    # What was loaded can be saved, and so can a copy.
    copy.deepcopy(again).save_pretrained(tmp_path / "copy")
    same(model, type(model).from_pretrained(tmp_path / "copy", torch_dtype=dtype))


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_quantized_on_load(tmp_path, kind, dtype):
    dense = build(kind)
    dense.save_pretrained(tmp_path / "dense", max_shard_size="100KB")
    load = type(dense).from_pretrained
    model = load(
        tmp_path / "dense",
        torch_dtype=dtype,
        quantization_config=hqq_cpp.HqqConfig.from_dict(CONFIG),
    )
    same(model, hqq_cpp.quantize_model_(load(tmp_path / "dense", torch_dtype=dtype), CONFIG))
    assert not any(t.is_meta for t in [*model.parameters(), *model.buffers()])
    expected = run(model, kind)
    model.save_pretrained(tmp_path / "small")
    assert torch.equal(run(load(tmp_path / "small", torch_dtype=dtype), kind), expected)
    # As diffusers' documentation writes it, too.
    settings = CONFIG | {"quant_method": "hqq_cpp"}
    same(model, load(tmp_path / "dense", torch_dtype=dtype, quantization_config=settings))
    with pytest.raises(ValueError, match="leave every layer of .* unquantized"):
        load(tmp_path / "dense", quantization_config=hqq_cpp.HqqConfig(dynamic_config={"*": None}))


def test_pipelines(tmp_path):
    sizes = MODELS["unet"] | {"down_block_types": ("AttnDownBlock2D", "DownBlock2D")}
    sizes |= {"up_block_types": ("UpBlock2D", "AttnUpBlock2D")}
    del sizes["cross_attention_dim"]
    pipeline = diffusers.DDPMPipeline(diffusers.UNet2DModel(**sizes), diffusers.DDPMScheduler())
    pipeline.save_pretrained(tmp_path / "dense")
    hqq_cpp.quantize_model_(pipeline.unet, CONFIG)
    pipeline.save_pretrained(tmp_path / "small")
    again = diffusers.DDPMPipeline.from_pretrained(tmp_path / "small")
    same(again.unet, pipeline.unet)
    mapping = {"unet": hqq_cpp.diffusers.HqqQuantizationConfig(CONFIG)}
    on_load = diffusers.DDPMPipeline.from_pretrained(
        tmp_path / "dense",
        quantization_config=diffusers.PipelineQuantizationConfig(quant_mapping=mapping),
    )
    same(on_load.unet, pipeline.unet)


def test_models_inside_of_others(tmp_path):
    whole = nn.ModuleDict({"one": build(), "two": build("flux"), "three": build("flux")})
    hqq_cpp.quantize_model_(
        whole, {"nbits": 4, "group_size": 32, "dynamic_config": {"three.*": None}}
    )
    for name, kind in (("one", "unet"), ("two", "flux")):
        whole[name].save_pretrained(tmp_path / name)
        same(whole[name], type(whole[name]).from_pretrained(tmp_path / name))
    whole["three"].save_pretrained(tmp_path / "three")
    assert "quantization_config" not in (tmp_path / "three" / "config.json").read_text()


@pytest.mark.parametrize("way", ["method", "function"])
def test_dense_again(tmp_path, quantized, way, run_python):
    quantized.dequantize() if way == "method" else hqq_cpp.dequantize_model_(quantized)
    assert not hasattr(quantized, "hf_quantizer")
    quantized.save_pretrained(tmp_path / "dense")
    assert "quantization_config" not in json.loads((tmp_path / "dense" / "config.json").read_text())
    same(quantized, type(quantized).from_pretrained(tmp_path / "dense"))


def test_casts(tmp_path, quantized):
    quantized.save_pretrained(tmp_path)
    again = type(quantized).from_pretrained(tmp_path)
    for model in (quantized, again):
        assert model.to(torch.bfloat16).dtype == torch.bfloat16
        assert model.down_blocks[0].attentions[0].proj_in.scale.dtype == torch.float16
        assert run(model).dtype == torch.bfloat16
    same(quantized, again)


def test_save_model_takes_them(tmp_path, quantized):
    hqq_cpp.save_model(quantized, tmp_path / "saved")
    loaded = hqq_cpp.load_model(build(), tmp_path / "saved")
    same(quantized, loaded)
    loaded.save_pretrained(tmp_path / "again")
    same(quantized, type(loaded).from_pretrained(tmp_path / "again"))


# Refusals.


def edit(folder, change):
    (path,) = folder.glob("*.safetensors")
    metadata = hqq_cpp.safetensors_metadata(path)
    tensors = {k: torch.from_dlpack(v).clone() for k, v in hqq_cpp.load_safetensors(path).items()}
    change(tensors, metadata)
    path.unlink()
    hqq_cpp.save_safetensors(path, tensors, metadata)


LAYER = "mid_block.attentions.0.proj_in"


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            lambda t, m: t.pop(f"{LAYER}.scale"),
            ValueError,
            f"1 missing in the files .{LAYER}.scale",
        ),
        (lambda t, m: t.pop("conv_in.bias"), ValueError, "1 missing in the files .conv_in.bias"),
        (lambda t, m: t.update(x=torch.ones(1)), ValueError, r"1 not in the model \(x\)"),
        (
            lambda t, m: t.update({f"{LAYER}.W_q": t[f"{LAYER}.W_q"][:8]}),
            ValueError,
            "W_q is uint8",
        ),
        (lambda t, m: m.pop("hqq_cpp"), hqq_cpp.FormatError, "describe no quantized layer"),
    ],
)
def test_broken_folders(tmp_path, quantized, change, error, message):
    quantized.save_pretrained(tmp_path)
    edit(tmp_path, change)
    with pytest.raises(error, match=message):
        type(quantized).from_pretrained(tmp_path)


def test_what_cannot_work(tmp_path, quantized):
    with pytest.raises(ValueError, match="leave safe_serialization=True"):
        quantized.save_pretrained(tmp_path / "bin", safe_serialization=False)
    quantized.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="device_map puts quantized layers on 'disk'"):
        type(quantized).from_pretrained(
            tmp_path, device_map={"": "cpu", "mid_block": "disk"}, offload_folder=tmp_path / "off"
        )


def test_adapters_are_saved_apart(tmp_path, quantized):
    peft = pytest.importorskip("peft")
    quantized.add_adapter(peft.LoraConfig(target_modules=["to_q"], init_lora_weights=False))
    with pytest.raises(ValueError, match="have adapters, .* save_lora_adapter"):
        quantized.save_pretrained(tmp_path)
    quantized.unload_lora()
    quantized.save_pretrained(tmp_path)
    same(quantized, type(quantized).from_pretrained(tmp_path))


LOAD = """
import sys
{imports}
model = diffusers.UNet2DConditionModel.from_pretrained(sys.argv[1])
print(type(model.mid_block.attentions[0].proj_in).__name__)
"""


@pytest.mark.parametrize("imports", ["import hqq_cpp, diffusers", "import diffusers, hqq_cpp"])
def test_importing_us_is_enough(tmp_path, quantized, run_python, imports):
    quantized.save_pretrained(tmp_path / "small")
    result = run_python(LOAD.format(imports=imports), tmp_path / "small")
    assert result.returncode == 0 and "HqqPointwiseConv2d" in result.stdout, result.stderr


def test_diffusers_alone_refuses(tmp_path, quantized, run_python):
    quantized.save_pretrained(tmp_path / "small")
    environment = {"HQQ_CPP_NO_HOOK": "1"}
    result = run_python(LOAD.format(imports="import diffusers"), tmp_path / "small", **environment)
    assert result.returncode != 0
    assert "Unknown quantization type, got hqq_cpp" in result.stderr

"""The rule for roles (src/model) against the modules of every model of Transformers, so that the
command and from_pretrained quantize the same layers."""

import os
import re

import pytest

torch = pytest.importorskip("torch", reason="Transformers needs torch")
transformers = pytest.importorskip("transformers", reason="the models are those of Transformers")

from model_zoo import Difference, build, differences, model_classes

IS_LONG = os.environ.get("HQQ_LONG_TESTS") == "1"

# Models that have every kind of tensor between them.
SAMPLE = [
    "AfmoeForCausalLM",
    "AlbertForMaskedLM",
    "AriaTextForCausalLM",
    "BarkFineModel",
    "BartForConditionalGeneration",
    "BertForMaskedLM",
    "CTRLLMHeadModel",
    "CanineModel",
    "ClvpModelForConditionalGeneration",
    "DeepseekV3ForCausalLM",
    "DeepseekV4ForCausalLM",
    "Ernie4_5_VLMoeForConditionalGeneration",
    "FalconForCausalLM",
    "GPT2LMHeadModel",
    "GPTNeoXForCausalLM",
    "GptOssForCausalLM",
    "GraniteMoeForCausalLM",
    "IBertForMaskedLM",
    "ImageGPTModel",
    "JambaForCausalLM",
    "JetMoeForCausalLM",
    "LlamaForCausalLM",
    "Llama4ForCausalLM",
    "LongcatFlashForCausalLM",
    "MambaForCausalLM",
    "MaskFormerSwinModel",
    "MixtralForCausalLM",
    "MusicgenForCausalLM",
    "NemotronHForCausalLM",
    "NllbMoeForConditionalGeneration",
    "OpenAIGPTLMHeadModel",
    "PhimoeForCausalLM",
    "Qwen2MoeForCausalLM",
    "Qwen2VLForConditionalGeneration",
    "Sam3Model",
    "SiglipModel",
    "SwitchTransformersForConditionalGeneration",
    "T5ForConditionalGeneration",
    "ViTModel",
    "Wav2Vec2ForXVector",
    "WhisperForConditionalGeneration",
    "ZayaForCausalLM",
]

# Differences that are meant: (kind in the model, role, pattern of the tensor's name), and why.
REASONS = {
    ("linear", "router", r".*\.shared_expert_gate\.weight"):
        "It weighs the shared expert, as a router weighs the others, and is one row.",
    ("linear of its own", "linear", r".*\.(query_key_value|dense|dense_\w+)\.weight"):
        "FalconLinear writes the product of nn.Linear in another way, and is quantized as one.",
    ("linear of its own", "head", r"lm_head\.weight"):
        "Idefics' and Dory's heads add to what nn.Linear does; skip_modules has lm_head.",
    ("linear", "none", r".*attn\.in_proj_weight"):
        "Files hold an nn.MultiheadAttention, which Transformers takes apart while loading.",
    ("linear", "none", r".*attn\.out_proj\.weight"):
        "Of such an nn.MultiheadAttention.",
    ("linear", "none", r".*\.(weight_proj|down_weight|forget_weight|gain_weight)|weight"):
        "Files have no X.weight, so a packed weight would have no name that Transformers knows.",
    ("missing", "linear", r".*\.swin\..*|.*\.encoder\.model\.encoder\..*"):
        "Transformers writes names for this backbone that it does not read.",
    ("linear", "embedding", r"(.*\.)?(embed|\w*embedder|quantize\.embedding|single_to_token)\.weight"):
        "A linear layer without bias under the name of a table: it stays dense in files, unless a "
        "rule names it.",
}  # fmt: skip


def unexplained(model):
    def has_reason(difference: Difference) -> bool:
        return any(
            (kind, role) == difference[:2] and re.fullmatch(pattern, difference.tensor)
            for kind, role, pattern in REASONS
        )

    return [difference for difference in differences(model) if not has_reason(difference)]


def test_reasons_are_sentences():
    assert all(reason.endswith(".") for reason in REASONS.values())


@pytest.fixture(autouse=True)
def quiet():
    before = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    yield
    transformers.logging.set_verbosity(before)


@pytest.mark.parametrize("name", SAMPLE)
def test_the_rule_agrees_with_the_model(name):
    cls = getattr(transformers, name, None)
    if cls is None:
        pytest.skip(f"this version of Transformers has no {name}")
    assert unexplained(build(cls)) == []


def test_differences_are_found():
    model = build(transformers.LlamaForCausalLM)
    model.model.lookup = torch.nn.Embedding(8, 8, device="meta")
    model.model.layers[0].mlp.router = torch.nn.Linear(8, 8, device="meta")
    router = "model.layers.0.mlp.router.weight"
    assert unexplained(model) == [
        ("linear", "router", router, "Linear"),
        ("embedding", "linear", "model.lookup.weight", "Embedding"),
        ("linear", "router", router, "Linear"),
    ]


@pytest.mark.skipif(not IS_LONG, reason="HQQ_LONG_TESTS=1 builds every model of Transformers")
def test_the_rule_agrees_with_every_model():
    built, found = 0, {}
    for name, cls in model_classes().items():
        try:
            model = build(cls)
        except Exception:  # its default config makes no model, or a package is missing
            continue
        built += 1
        if wrong := unexplained(model):
            found[name] = wrong
    assert built >= 577
    assert found == {}

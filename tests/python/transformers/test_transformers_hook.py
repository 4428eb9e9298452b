"""Saved folders in programs that do not import hqq_cpp.transformers: they load right or not at
all."""

from __future__ import annotations

import json
import shutil
import textwrap

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from transformers import (
    AutoModelForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

import hqq_cpp
import hqq_cpp.transformers

REFUSAL = "The model's quantization config from the arguments has no `quant_method` attribute"
LOAD = """
import sys
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
print(type(model.model.layers[0].mlp.up_proj).__name__)
"""


@pytest.fixture(scope="module")
def saved(model, tmp_path_factory):
    """A folder that save_pretrained wrote, of layers that upstream's format can hold."""
    folder = tmp_path_factory.mktemp("hook") / "saved"
    config = hqq_cpp.HqqConfig(nbits=4, balance="none")
    AutoModelForCausalLM.from_pretrained(model, quantization_config=config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def llava(tmp_path_factory):
    """A folder with quantization_config in its text_config only, as some models have it."""
    torch.manual_seed(0)
    text = {"model_type": "llama", "vocab_size": 64, "hidden_size": 64, "intermediate_size": 64}
    text |= {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2}
    vision = {"model_type": "clip_vision_model", "hidden_size": 64, "intermediate_size": 64}
    vision |= {"num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28, "patch_size": 14}
    model = LlavaForConditionalGeneration(LlavaConfig(vision_config=vision, text_config=text))
    hqq_cpp.quantize_model_(model, {"nbits": 4, "group_size": 32})
    folder = tmp_path_factory.mktemp("hook") / "llava"
    model.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["quantization_config"] = config.pop("quantization_config")
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def with_settings(saved, folder, change):
    """A copy of the folder with another quantization_config."""
    shutil.copytree(saved, folder)
    config = json.loads((folder / "config.json").read_text())
    change(config["quantization_config"])
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def kind(folder):
    return type(AutoModelForCausalLM.from_pretrained(folder).model.layers[0].mlp.up_proj).__name__


def last_line(done):
    return (done.stdout.strip() or done.stderr.strip()).splitlines()[-1]


@pytest.fixture
def start(run_python, repository, tmp_path):
    """run_python as after `pip install`: with the .pth file in site-packages."""
    folder = tmp_path / "site-packages"
    folder.mkdir()
    for name in ("hqq_cpp.pth", "_hqq_cpp_hook.py"):
        shutil.copy(repository / "python" / name, folder)

    def run(code, *arguments, **environment):
        site = f"import site; site.addsitedir({str(folder)!r})\n"
        return run_python(site + textwrap.dedent(code), *arguments, **environment)

    return run


# Without us.

WAYS = {
    "saved": (
        "t.AutoModelForCausalLM.from_pretrained(saved)",
        "t.AutoModel.from_pretrained(saved)",
        "t.LlamaForCausalLM.from_pretrained(saved)",
        "t.pipeline('text-generation', saved)",
        "t.AutoModel.from_pretrained(saved, config=t.AutoConfig.from_pretrained(saved))",
        "t.AutoModel.from_pretrained(saved, quantization_config=t.BitsAndBytesConfig())",
        "AutoQuantizationConfig.from_pretrained(saved)",
    ),
    "of the command": ("t.AutoModel.from_pretrained(command)",),
    "settings in a part": ("t.LlavaForConditionalGeneration.from_pretrained(llava)",),
    "base of an adapter": ("peft.AutoPeftModelForCausalLM.from_pretrained(adapter)",),
}


def test_transformers_alone_refuses(run_python, saved, llava, model, tmp_path):
    peft = pytest.importorskip("peft")
    hqq_cpp.quantize_checkpoint(model, tmp_path / "command", {"nbits": 4})
    adapter = peft.LoraConfig(
        base_model_name_or_path=str(saved), task_type="CAUSAL_LM", target_modules=["q_proj"]
    )
    adapter.save_pretrained(tmp_path / "adapter")
    code = """
import sys
sys.modules["hqq_cpp"] = None  # as if it were not installed
import peft, transformers as t
from transformers.quantizers import AutoQuantizationConfig
saved, llava, command, adapter = sys.argv[1:]
"""
    ways = [way for ways in WAYS.values() for way in ways]
    for way in ways:
        code += f"try:\n    {way}\nexcept ValueError as error:\n"
        code += f"    print({way!r} if {REFUSAL!r} in str(error) else error)\n"
    folders = (saved, llava, tmp_path / "command", tmp_path / "adapter")
    done = run_python(code, *folders, HQQ_CPP_NO_HOOK="1")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().splitlines() == ways


# With `import hqq_cpp`.


@pytest.mark.parametrize("before", ("", "import transformers.modeling_utils"))
def test_import_hqq_cpp_is_enough(run_python, saved, before):
    done = run_python(f"{before}\nimport hqq_cpp\n{LOAD}", saved, HQQ_CPP_NO_HOOK="0")
    assert last_line(done) == "HqqLinear", done.stderr


def test_other_spellings_of_our_name(saved, tmp_path):
    def first_folders(settings):
        del settings["quantizer"]
        settings["quant_method"] = "hqq_cpp"

    assert kind(with_settings(saved, tmp_path / "first", first_folders)) == "HqqLinear"
    for method in (None, ""):
        folder = tmp_path / f"method {method}"
        with_settings(saved, folder, lambda settings: settings.update(quant_method=method))
        assert kind(folder) == "HqqLinear"


def test_settings_of_nobody_and_of_others(saved, tmp_path):
    folder = with_settings(saved, tmp_path / "nobody", lambda settings: settings.pop("quantizer"))
    with pytest.raises(ValueError, match="has no `quant_method` attribute"):
        kind(folder)
    folder = tmp_path / "other"
    with_settings(saved, folder, lambda settings: settings.update(quant_method="other"))
    assert kind(folder) == "Linear"


def test_settings_in_a_part_of_the_config(llava):
    model = LlavaForConditionalGeneration.from_pretrained(llava)
    assert type(model.model.language_model.layers[0].mlp.up_proj) is hqq_cpp.HqqLinear


def test_what_is_saved_again_is_the_same(saved, tmp_path):
    AutoModelForCausalLM.from_pretrained(saved).save_pretrained(tmp_path / "again")
    first, again = (
        json.loads((folder / "config.json").read_text())["quantization_config"]
        for folder in (saved, tmp_path / "again")
    )
    assert first == again and first["quantizer"] == "hqq_cpp" and "quant_method" not in first


# With the .pth file of the wheel, and no import.


def test_installed_is_enough(start, saved):
    code = """
import sys, transformers
assert not [m for m in sys.modules if m.startswith("hqq_cpp") or m == "torch"]
"""
    done = start(code + LOAD, saved)
    assert last_line(done) == "HqqLinear", done.stderr


def test_the_start_of_python_imports_one_small_module(start):
    done = start("import sys; print(*[m for m in sys.modules if 'hqq' in m or m == 'torch'])")
    assert done.stdout.split() == ["_hqq_cpp_hook"], done.stderr


def test_the_variable_switches_it_off(start, saved):
    refused = f"try:{textwrap.indent(LOAD, '    ')}except ValueError as error:\n    print(error)\n"
    code = "import hqq_cpp\n" + refused + "import hqq_cpp.transformers" + LOAD
    done = start(code, saved, HQQ_CPP_NO_HOOK="1")
    first, last = done.stdout.strip().splitlines()
    assert first.startswith(REFUSAL) and last == "HqqLinear"


def test_a_broken_hqq_cpp_breaks_no_transformers(start, saved):
    done = start("import sys; sys.modules['hqq_cpp'] = None\n" + LOAD, saved)
    assert REFUSAL in last_line(done)
    assert "[hqq_cpp] cannot be imported, so folders that it quantized will not load" in done.stderr


def test_a_left_over_pth_file_is_silent(start, tmp_path):
    (tmp_path / "site-packages" / "_hqq_cpp_hook.py").unlink()
    done = start("print('here')")
    assert (done.stdout, done.stderr) == ("here\n", "")


# The method "hqq", which Transformers may get again (transformers#45147).

THEIRS = """
import sys
from transformers import AutoModelForCausalLM
from transformers.quantizers import auto
from transformers.quantizers.base import HfQuantizer

class Theirs(HfQuantizer):
    is_trainable = True

    def is_serializable(self):
        return True

    def get_weight_conversions(self):
        return []

auto.AUTO_QUANTIZER_MAPPING["hqq"] = Theirs
theirs = auto.AUTO_QUANTIZATION_CONFIG_MAPPING["hqq"]

def init(self):
    self.quant_method = "hqq"

theirs.__init__ = init

def show(folder):
    model = AutoModelForCausalLM.from_pretrained(folder)
    print(type(model.hf_quantizer).__name__, theirs.__init__ is init, end=" ")
"""


@pytest.fixture(scope="module")
def upstream(saved, tmp_path_factory):
    folder = tmp_path_factory.mktemp("hook") / "upstream"
    hqq_cpp.convert_checkpoint(saved, folder, "upstream")
    config = json.loads((folder / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "hqq"
    return folder


def test_hqq_is_ours_while_nobody_else_can(run_python, upstream):
    done = run_python("import hqq_cpp" + LOAD, upstream)
    assert last_line(done) == "HqqLinear", done.stderr


def test_hqq_stays_theirs_where_it_works(run_python, saved, upstream):
    code = "import hqq_cpp" + THEIRS + "show(sys.argv[1]); show(sys.argv[2])\n"
    # Whoever wants ours says so.
    code += "import hqq_cpp.transformers as ours; ours.register(); show(sys.argv[2])"
    done = run_python(code, saved, upstream)
    assert done.stdout.split() == [
        "HqqQuantizer",
        "True",
        "Theirs",
        "True",
        "HqqQuantizer",
        "False",
    ]


def test_hqq_is_ours_for_who_imports_us(run_python, upstream):
    done = run_python(THEIRS + "import hqq_cpp.transformers; show(sys.argv[1])", upstream)
    assert done.stdout.split() == ["HqqQuantizer", "False"], done.stderr

"""Settings, names and expressions that nobody has checked: used, or refused in one sentence."""

import json
import math
import os
import shutil
from pathlib import Path

import pytest

import hqq_cpp
from cli_runner import FORMAT, MODEL, USER, needs_binary, run
from hqq_cpp import _core

DEEP = 100_000
LONG = "x" * 3_000_000
SURROGATE = "\ud800"
NOT_UNICODE = r"'\\ud800.*' is not valid Unicode"


NO_FILE = r"'\\ud800.*cannot be the name of a file"


def nested(levels):
    value = {}
    for _ in range(levels):
        value = {"a": value}
    return value


@needs_binary
@pytest.mark.parametrize("option", ["--config", "--dynamic-config"])
@pytest.mark.parametrize(
    "text, message",
    [
        ("[" * 200_000, "nested deeper than 64 levels"),
        ('{"a": ' * 200_000, "nested deeper than 64 levels"),
        ('{"lp_norm": 1e999}', "number overflow parsing '1e999' at byte 17"),
        ('{"a": {"lp_norm": -1e999}}', "number overflow"),
        ('{"a": {"lp_norm": NaN}}', "NaN is not a JSON number"),
        ('{"a": {"iterations": 99999999999999999999}}', "'a'"),
        ('{"a": {}}\0{"b": {}}', "NUL byte at byte 9"),
        ('{"a": {}} {"b": {}}', "not JSON at byte 11"),
        ('{"a": {}, "a": {}}', 'JSON key "a" appears twice'),
        (f'{{"{LONG}": {{}}, "{LONG}": {{}}}}', "appears twice"),
        (f'{{"{LONG}": 1}}', "xxx..."),
        (f'{{"re:({LONG}": {{}}}}', "xxx..."),
        (f'{{"a": "{LONG}', "missing closing quote"),
        (f'{{"a": {{"solver": "{LONG}"}}}}', "'a'"),
        ("\ufeff{}", "byte order mark"),
    ],
    ids=lambda text: text[:20],
)
def test_config_files(tmp_path, option, text, message):
    (tmp_path / "c.json").write_text(text)
    result = run("quantize", MODEL, tmp_path / "out", option, tmp_path / "c.json", code=USER)
    assert result.stderr.startswith("hqq-cpp: [") and result.stderr.count("\n") == 1
    assert message in result.stderr or "unknown key 'a'" in result.stderr
    assert len(result.stderr) < 1000 and not (tmp_path / "out").exists()


@needs_binary
def test_names_that_are_not_utf8(tmp_path):
    """Bytes that no JSON can hold, from the command line and the file system."""
    out = tmp_path / "out"
    for name in (b"\xff", b"re:\xff", b"*\xff"):
        refused = run("quantize", MODEL, out, "--skip", os.fsdecode(name), code=USER).stderr
        assert "is not UTF-8" in refused and "\\xff" in refused
    single = tmp_path / os.fsdecode(b"\xff.safetensors")
    shutil.copy(MODEL / "model.safetensors", single)
    assert "is not UTF-8" in run("quantize", single, out, code=FORMAT).stderr
    assert not out.exists()
    odd = tmp_path / os.fsdecode(b"out\xff")
    run("quantize", MODEL, odd, "-q", "--iterations", "1", "--skip", "\u00e9")
    assert "\ufffd" in run("verify", odd, "--json").stdout


@needs_binary
def test_a_large_config_json(tmp_path):
    """Work grows with its size, which has a limit."""
    model, out = tmp_path / "model", tmp_path / "out"
    shutil.copytree(MODEL, model)
    config = json.loads((model / "config.json").read_text())
    for count in (150_000, 1_200_000):
        extra = {str(i): "123456" for i in range(count)}
        (model / "config.json").write_text(json.dumps(config | extra))
        if count == 150_000:
            run("quantize", model, out, "--nbits", 4, "--iterations", 1, "-q")
            written = json.loads((out / "config.json").read_text())
            assert written.pop("quantization_config") and written == config | extra
    refused = run("quantize", model, out, "--force", code=FORMAT).stderr
    assert "more than the 16000000 allowed" in refused


BOMBS = {
    "re:((((((((.?)?)?)?){10}){10}){10}){10})*": "is too large",
    "re:" + "(" * 300 + "." + ")" * 180: "not a valid regex",
    "re:(.|.|..)*[!#]{2}": "steps, the limit",
    "re:((.?)*)*[!#]{2}": "steps, the limit",
    "re:(.)\\1": "back-references",
    "re:(?i)a": "of groups only",
}


@needs_binary
@pytest.mark.parametrize("where", ["dynamic_config", "skip_modules"])
@pytest.mark.parametrize("pattern", BOMBS)
def test_expressions_that_take_too_long(tmp_path, where, pattern):
    config = {where: {pattern: {"nbits": 3}} if where == "dynamic_config" else [pattern]}
    (tmp_path / "c.json").write_text(json.dumps(config))
    out = tmp_path / "out"
    result = run("quantize", MODEL, out, "--config", tmp_path / "c.json", code=USER)
    assert BOMBS[pattern] in result.stderr and len(result.stderr) < 600
    assert not out.exists()


def test_expressions_that_look_like_it():
    """120 groups with a star each match at once, as do those of real configs."""
    config = hqq_cpp.HqqConfig(
        dynamic_config={
            "re:" + "(" * 120 + "[0-9]" + ")*" * 120: {"nbits": 2},
            r"re:model\.layers\.(0|1|31)\.(self_attn|mlp)\..*_proj": {"nbits": 3},
            r"re:(?!.*mlp).*[qk]_proj$": {"nbits": 5},
        }
    )
    assert config.layer("123456789").nbits == 2
    assert config.layer("model.layers.31.mlp.up_proj").nbits == 3
    assert config.layer("model.layers.30.self_attn.q_proj").nbits == 5
    assert config.layer("model.layers.30.mlp.q_proj").nbits == 4


def tensors(name):
    return {name: hqq_cpp.dequantize(hqq_cpp.quantize([[1.0] * 64] * 8))}


@pytest.mark.parametrize(
    "call",
    [
        lambda text: hqq_cpp.HqqConfig(dynamic_config={text: None}),
        lambda text: hqq_cpp.HqqConfig(dynamic_config={"a": {text: 1}}),
        lambda text: hqq_cpp.HqqConfig(skip_modules=[text]),
        lambda text: hqq_cpp.HqqConfig(solver=text),
        lambda text: hqq_cpp.HqqConfig(meta_dtype=text),
        lambda text: hqq_cpp.HqqConfig(**{text: 1}),
        lambda text: hqq_cpp.HqqConfig.from_dict({text: 1}),
        lambda text: hqq_cpp.HqqConfig().layer(text),
        lambda text: hqq_cpp.HqqConfig().unmatched_names([text]),
        lambda text: hqq_cpp.HqqConfig().unmatched_names(["a"], [text]),
        lambda text: setattr(hqq_cpp.HqqConfig(), "balance", text),
        lambda text: hqq_cpp.layer_tag(text),
        lambda text: hqq_cpp.quantize([[1.0] * 64], name=text),
        lambda text: hqq_cpp.quantize([[1.0] * 64], device=text),
        lambda text: hqq_cpp.Checkpoint(MODEL).load(text),
        lambda text: hqq_cpp.Checkpoint(MODEL).tensor(text),
        lambda text: text in hqq_cpp.Checkpoint(MODEL),
        lambda text: hqq_cpp.save_safetensors("/nowhere/at/all", tensors(text)),
        lambda text: hqq_cpp.save_safetensors("/nowhere/at/all", tensors("a"), {text: "a"}),
        lambda text: _core.Roles([(text, (1, 1), "float32")]),
        lambda text: _core.settings_of(hqq_cpp.HqqConfig(), text, "linear"),
        lambda text: _core.parse_json(text, "test"),
        lambda text: hqq_cpp.QuantizedTensor.from_tensors({text: None}, {}, (1, 1)),
    ],
)
def test_text_that_is_not_unicode(call):
    with pytest.raises(ValueError, match=NOT_UNICODE) as caught:
        call(SURROGATE + "x" * 10_000)
    assert type(caught.value) is ValueError and len(str(caught.value)) < 300
    try:
        call("\u00e9")
    except (ValueError, KeyError, OSError) as error:
        assert "not valid Unicode" not in str(error)


@pytest.mark.parametrize(
    "call",
    [
        hqq_cpp.Checkpoint,
        hqq_cpp.load_safetensors,
        hqq_cpp.safetensors_metadata,
        hqq_cpp.verify_checkpoint,
        lambda path: hqq_cpp.save_safetensors(path, tensors("a")),
        lambda path: hqq_cpp.quantize_checkpoint(path, "/nowhere/at/all"),
        lambda path: hqq_cpp.dequantize_checkpoint(MODEL, path),
        lambda path: hqq_cpp.diff_checkpoints(MODEL, path),
    ],
)
def test_paths_that_no_file_can_have(call):
    for text in (SURROGATE + "x" * 10_000, Path(SURROGATE), SURROGATE + "\0"):
        with pytest.raises(ValueError, match=NO_FILE) as caught:
            call(text)
        assert len(str(caught.value)) < 300
    with pytest.raises(ValueError, match="cannot be the name of a file"):
        call("a\0b")
    with pytest.raises((OSError, ValueError)) as caught:
        call("/nowhere/\udcff/\u00e9")
    assert "cannot be the name" not in str(caught.value)


@pytest.mark.parametrize(
    "call",
    [
        lambda value: hqq_cpp.HqqConfig(dynamic_config={"a": value}),
        lambda value: hqq_cpp.HqqConfig(dynamic_config=value),
        lambda value: hqq_cpp.HqqConfig(skip_modules=[value]),
        lambda value: hqq_cpp.HqqConfig.from_dict(value),
        lambda value: hqq_cpp.quantize([[1.0] * 64], value),
        lambda value: hqq_cpp.quantize_checkpoint(MODEL, "/nowhere/at/all", value),
    ],
)
def test_deep_dicts(call):
    with pytest.raises(ValueError, match="nested deeper than 64 levels"):
        call(nested(DEEP))
    with pytest.raises(ValueError, match="."):
        call(nested(60))


@pytest.mark.parametrize("key", ["nbits", "group_size", "lp_norm", "iterations", "beta", "kappa"])
@pytest.mark.parametrize(
    "value",
    [math.nan, math.inf, -math.inf, 10**5000, -(10**30)],
    ids=["nan", "inf", "-inf", "large", "small"],
)
def test_numbers_that_nothing_can_be(key, value):
    shown = str(value) if isinstance(value, float) else "more than 64 bits"
    with pytest.raises(ValueError, match=shown):
        hqq_cpp.HqqConfig(**{key: value})
    with pytest.raises(ValueError, match=shown):
        hqq_cpp.HqqConfig(dynamic_config={"a": {key: value}})
    if key != "nbits":
        assert hqq_cpp.HqqConfig(**{key: 1 if key != "group_size" else 8})


def test_a_number_that_fails_to_convert():
    class Broken:
        def __float__(self):
            raise ZeroDivisionError("no number")

    with pytest.raises(ZeroDivisionError, match="no number"):
        hqq_cpp.HqqConfig(lp_norm=Broken())


def test_json_for_python(tmp_path):
    assert _core.parse_json('{"a": [2.5, null, "\u00e9"]}', "x") == {"a": [2.5, None, "\u00e9"]}
    for text in ("[" * DEEP, "[NaN]", '{"a": 1, "a": 2}', "1e999", "{}\0"):
        with pytest.raises(hqq_cpp.FormatError, match=r"^\[x\] "):
            _core.parse_json(text, "x")
    file = tmp_path / "index.json"
    file.write_text('{"a": NaN, "b": 1e999, "c": 1}')
    assert _core.read_json_file(file) == {"a": None, "b": None, "c": 1}
    file.write_text("[" * DEEP)
    with pytest.raises(hqq_cpp.FormatError, match="nested deeper"):
        _core.read_json_file(file)
    with pytest.raises(hqq_cpp.FormatError, match="a folder"):
        _core.read_json_file(tmp_path)


def test_long_names_in_messages():
    for call in (
        lambda: hqq_cpp.quantize([[math.nan] * 64], name=LONG),
        lambda: hqq_cpp.Checkpoint(MODEL).load(LONG),
        lambda: hqq_cpp.HqqConfig(dynamic_config={LONG: {"nbits": 7}}),
        lambda: hqq_cpp.HqqConfig(**{LONG: 7}),
        lambda: hqq_cpp.HqqConfig(solver=LONG),
        lambda: hqq_cpp.HqqConfig(dynamic_config={"\u00e9" * 200: {"nbits": 7}}),
        lambda: hqq_cpp.HqqConfig(dynamic_config={"re:a": None}).layer(LONG),
    ):
        with pytest.raises(ValueError) as caught:
            call()
        assert not isinstance(caught.value, UnicodeError) and len(str(caught.value)) < 1000
    with pytest.raises(KeyError) as missing:
        hqq_cpp.Checkpoint(MODEL).tensor(LONG)
    assert len(str(missing.value)) < 300

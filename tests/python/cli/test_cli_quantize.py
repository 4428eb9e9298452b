"""`hqq-cpp quantize` on the bundled model: output, settings, rules, importance."""

import json

import pytest

from cli_runner import (
    DIFFERENCES,
    FORMAT,
    MODEL,
    USER,
    files_of,
    needs_binary,
    run,
    run_json,
)

pytestmark = needs_binary


# ---- quantize ---------------------------------------------------------------------------------------


def test_quantize_prints_a_table(tmp_path):
    result = run("quantize", MODEL, tmp_path / "out")
    lines = result.stdout.splitlines()
    assert lines[0].split()[:2] == ["layer", "type"]
    rows = {line.split()[0]: line.split() for line in lines[2:]}
    assert rows["self_attn.q_proj"][1:4] == ["3", "4", "64"]
    relative = float(rows["mlp.down_proj"][-2])
    assert 0.02 < relative < 0.2
    assert "->" in result.stdout and "times smaller" in result.stdout
    # A run this short shows no progress in a file, and there is nothing to warn of.
    assert result.stderr == ""
    assert (tmp_path / "out" / "model.safetensors").exists()


def test_quantize_json(tmp_path):
    report = run_json("quantize", MODEL, tmp_path / "out", "--nbits", "3", "--group-size", "32")
    assert report["command"] == "quantize"
    assert report["config"]["nbits"] == 3
    layer = next(l for l in report["layers"] if l["name"] == "model.layers.1.mlp.down_proj")
    assert layer["tag"] == "mlp.down_proj"
    assert layer["shape"] == [256, 640]
    assert layer["config"]["group_size"] == 32
    assert layer["bytes_before"] == 256 * 640 * 2
    assert 0 < layer["bytes_after"] < layer["bytes_before"] / 3
    assert 0 < layer["mean_abs_error"] < layer["rms_error"] < layer["max_abs_error"]
    assert 0.05 < layer["relative_error"] < 0.3
    assert report["weights"] == sum(l["shape"][0] * l["shape"][1] for l in report["layers"])
    quantized_bytes = sum(l["bytes_after"] for l in report["layers"])
    assert report["bits_per_weight"] == pytest.approx(8 * quantized_bytes / report["weights"])


def test_quantize_quiet_prints_nothing(tmp_path):
    result = run("quantize", MODEL, tmp_path / "out", "--quiet")
    assert result.stdout == "" and result.stderr == ""
    assert (tmp_path / "out").is_dir()


def test_json_and_quiet_still_give_the_document(tmp_path):
    result = run("quantize", MODEL, tmp_path / "out", "--json", "--quiet")
    assert json.loads(result.stdout)["layers"] and result.stderr == ""


def test_dry_run_writes_nothing(tmp_path):
    report = run_json("quantize", MODEL, tmp_path / "out", "--dry-run")
    assert list(tmp_path.iterdir()) == []
    assert report["dry_run"] is True
    assert "rms_error" not in report["layers"][0]
    real = run_json("quantize", MODEL, tmp_path / "out")
    for key in ("weights", "bits_per_weight", "bytes_before", "bytes_after"):
        assert report[key] == real[key], key
    assert [l["bytes_after"] for l in report["layers"]] == [
        l["bytes_after"] for l in real["layers"]
    ]
    text = run("quantize", MODEL, tmp_path / "plan", "--dry-run").stdout
    assert "nothing was written" in text and "error" not in text


def test_threads_do_not_change_the_result(tmp_path):
    run("quantize", MODEL, tmp_path / "one", "--threads", "1")
    run("quantize", MODEL, tmp_path / "three", "--threads", "3")
    assert files_of(tmp_path / "one") == files_of(tmp_path / "three")


SETTINGS = {
    "--nbits": ("1.58", "nbits", 1.58),
    "--group-size": ("none", "group_size", None),
    "--axis": ("0", "axis", 0),
    "--solver": ("minmax", "solver", "minmax"),
    "--balance": ("none", "balance", "none"),
    "--lp-norm": ("0.7", "lp_norm", 0.7),
    "--iterations": ("3", "iterations", 3),
    "--meta-dtype": ("bfloat16", "meta_dtype", "bfloat16"),
}


@pytest.mark.parametrize("option", SETTINGS)
def test_each_setting_reaches_the_config(tmp_path, option):
    value, key, expected = SETTINGS[option]
    report = run_json("quantize", MODEL, tmp_path / "out", option, value, "--dry-run")
    assert report["config"][key] == expected


@pytest.mark.parametrize("key", ["quant_zero", "quant_scale"])
def test_8_bit_metadata_flags(tmp_path, key):
    flag = key.replace("_", "-")
    (tmp_path / "c.json").write_text(json.dumps({key: True}))
    common = ["quantize", MODEL, tmp_path / "out", "--dry-run"]
    assert run_json(*common, f"--{flag}")["config"][key] is True
    assert run_json(*common, "--config", tmp_path / "c.json")["config"][key] is True
    undone = run_json(*common, "--config", tmp_path / "c.json", f"--no-{flag}")
    assert undone["config"][key] is False


def plan(tmp_path, *args):
    """Bits of each layer tag of the first decoder layer."""
    report = run_json("quantize", MODEL, tmp_path / "out", "--dry-run", *args)
    return {l["tag"]: l["config"]["nbits"] for l in report["layers"] if "layers.0." in l["name"]}


def test_options_win_over_the_config_file(tmp_path):
    config = {
        "nbits": 3,
        "group_size": 32,
        "dynamic_config": {"mlp.down_proj": {"nbits": 8}, "mlp.up_proj": {"group_size": 64}},
    }
    (tmp_path / "c.json").write_text(json.dumps(config))
    bits = plan(tmp_path, "--config", tmp_path / "c.json")
    assert (bits["mlp.down_proj"], bits["mlp.up_proj"], bits["mlp.gate_proj"]) == (8, 3, 3)
    bits = plan(tmp_path, "--config", tmp_path / "c.json", "--nbits", "2")
    assert (bits["mlp.down_proj"], bits["mlp.up_proj"], bits["mlp.gate_proj"]) == (8, 2, 2)


def test_dynamic_config_replaces_the_rules(tmp_path):
    (tmp_path / "c.json").write_text('{"dynamic_config": {"mlp.down_proj": {"nbits": 8}}}')
    (tmp_path / "d.json").write_text('{"re:.*[kv]_proj": {"nbits": 6}, "*o_proj": null}')
    bits = plan(tmp_path, "--config", tmp_path / "c.json", "--dynamic-config", tmp_path / "d.json")
    assert bits["mlp.down_proj"] == 4
    assert bits["self_attn.k_proj"] == bits["self_attn.v_proj"] == 6
    assert "self_attn.o_proj" not in bits


def test_skip_adds_to_the_list_and_wins_over_a_rule_of_the_same_name(tmp_path):
    (tmp_path / "d.json").write_text('{"mlp.down_proj": {"nbits": 8}}')
    bits = plan(
        tmp_path,
        "--dynamic-config",
        tmp_path / "d.json",
        "--skip",
        "mlp.down_proj",
        "--skip",
        "q_proj",
    )
    assert "mlp.down_proj" not in bits and "self_attn.q_proj" not in bits
    assert "self_attn.k_proj" in bits


def test_names_that_match_nothing_are_mentioned(tmp_path):
    (tmp_path / "d.json").write_text('{"mlp.dwn_proj": {"nbits": 8}}')
    result = run(
        "quantize",
        MODEL,
        tmp_path / "out",
        "--dry-run",
        "--dynamic-config",
        tmp_path / "d.json",
        "--skip",
        "qq_proj",
    )
    said = "warning: dynamic_config names no layer: 'mlp.dwn_proj'; nearest is 'mlp.down_proj'\n"
    assert said in result.stderr
    assert "skip_modules names no layer: 'qq_proj'; nearest is 'q_proj'" in result.stderr
    report = run_json("quantize", MODEL, tmp_path / "out", "--dry-run", "--skip", "mlp.dwn_proj")
    assert report["warnings"] == [
        "skip_modules names no layer: 'mlp.dwn_proj'; nearest is 'mlp.down_proj'"
    ]


def test_skip_takes_the_name_of_a_parent(tmp_path):
    bits = plan(tmp_path, "--skip", "mlp")
    assert not [tag for tag in bits if tag.startswith("mlp")]
    assert "self_attn.q_proj" in bits
    assert plan(tmp_path, "--skip", "model.layers.0") == {}
    assert "mlp.up_proj" in plan(tmp_path, "--skip", "model.layers.1")


# What transformers.HqqConfig(...).to_dict() and hqq's BaseQuantizeConfig(...) give.
UPSTREAM = {
    "weight_quant_params": {
        "nbits": 3,
        "channel_wise": True,
        "group_size": 32,
        "optimize": True,
        "round_zero": False,
        "axis": 1,
        "view_as_float": False,
    },
    "scale_quant_params": None,
    "zero_quant_params": None,
    "offload_meta": False,
}


@pytest.mark.parametrize("form", ["upstream", "transformers"])
def test_configs_of_other_packages(tmp_path, form):
    config = (
        UPSTREAM
        if form == "upstream"
        else {"quant_config": UPSTREAM, "quant_method": "hqq", "skip_modules": ["lm_head"]}
    )
    (tmp_path / "c.json").write_text(json.dumps(config))
    common = ["quantize", MODEL, tmp_path / "out", "--dry-run", "--config", tmp_path / "c.json"]
    read = run_json(*common)["config"]
    assert (read["nbits"], read["group_size"], read["balance"]) == (3, 32, "none")
    changed = run_json(*common, "--nbits", "2", "--solver", "hqq")["config"]
    assert (changed["nbits"], changed["group_size"], changed["solver"]) == (2, 32, "hqq")


def test_settings_per_layer_of_other_packages(tmp_path):
    config = {
        "quant_config": {"mlp.up_proj": UPSTREAM},
        "quant_method": "hqq",
        "skip_modules": ["lm_head"],
    }
    (tmp_path / "c.json").write_text(json.dumps(config))
    assert plan(tmp_path, "--config", tmp_path / "c.json") == {"mlp.up_proj": 3}
    common = ["quantize", MODEL, tmp_path / "out", "--dry-run", "--config", tmp_path / "c.json"]
    report = run_json(*common, "--solver", "hqq")
    assert {l["config"]["solver"] for l in report["layers"]} == {"hqq"}
    assert "gives nbits for each layer" in run(*common, "--nbits", "2", code=USER).stderr


def test_importance(tmp_path):
    numpy = pytest.importorskip("numpy")
    save_file = pytest.importorskip("safetensors.numpy").save_file
    name = "model.layers.0.mlp.down_proj"
    weights = numpy.linspace(0.1, 4, 640, dtype=numpy.float32) ** 2
    save_file({name: weights}, tmp_path / "importance.safetensors")
    run("quantize", MODEL, tmp_path / "a")
    run("quantize", MODEL, tmp_path / "b", "--importance", tmp_path / "importance.safetensors")
    diff = run_json("diff", tmp_path / "a", tmp_path / "b", code=DIFFERENCES)
    assert [t["name"] for t in diff["tensors"] if not t["identical"]] == [name + ".weight"]

    save_file({name: weights[:-1]}, tmp_path / "short.safetensors")
    error = run(
        "quantize",
        MODEL,
        tmp_path / "c",
        "--importance",
        tmp_path / "short.safetensors",
        code=FORMAT,
    ).stderr
    assert "640" in error and "639" in error
    assert not (tmp_path / "c").exists()

"""hqq-cpp on the bundled model: help, `quantize`, exit codes, interruption."""

import json
import os
import re
import shutil
import signal
import struct
import subprocess
import time

import pytest

from cli_runner import (
    BINARY,
    COMMANDS,
    DIFFERENCES,
    FORMAT,
    INTERRUPTED,
    MODEL,
    OK,
    SLOW,
    SYSTEM,
    USER,
    files_of,
    needs_binary,
    run,
    run_json,
)

pytestmark = needs_binary


@pytest.fixture(scope="module")
def sharded(tmp_path_factory):
    """The bundled model in one shard a layer."""
    folder = tmp_path_factory.mktemp("cli") / "sharded"
    folder.mkdir()
    shutil.copy(MODEL / "config.json", folder)
    raw = (MODEL / "model.safetensors").read_bytes()
    size = struct.unpack("<Q", raw[:8])[0]
    header = json.loads(raw[8 : 8 + size])
    header.pop("__metadata__", None)
    shards = {}
    for name, info in header.items():
        number = re.search(r"layers\.(\d+)", name)
        shard = f"model-{number.group(1) if number else 'rest'}.safetensors"
        begin, end = info["data_offsets"]
        shards.setdefault(shard, []).append((name, info, raw[8 + size + begin : 8 + size + end]))
    index = {"metadata": {}, "weight_map": {}}
    for shard, tensors in shards.items():
        at, head, data = 0, {}, b""
        for name, info, content in tensors:
            head[name] = {**info, "data_offsets": [at, at + len(content)]}
            at += len(content)
            data += content
            index["weight_map"][name] = shard
        text = json.dumps(head).encode()
        (folder / shard).write_bytes(struct.pack("<Q", len(text)) + text + data)
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


# ---- help and usage ---------------------------------------------------------------------------------


def test_help_names_every_command_and_exit_code():
    text = run("--help").stdout
    for command in COMMANDS:
        assert command in text
    assert "130 interrupted" in text


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_a_command(command):
    result = run(command, "--help")
    assert "--json" in result.stdout and result.stderr == ""


def test_every_option_is_documented():
    text = (MODEL.parents[1] / "docs" / "cli.md").read_text()
    for command in COMMANDS:
        for option in re.findall(r"--[a-z][a-z-]+", run(command, "--help").stdout):
            assert option in text, f"{command} {option} is not in docs/cli.md"


def test_version():
    assert re.fullmatch(r"hqq-cpp \d+\.\d+\.\d+\n", run("--version").stdout)


def test_without_a_command():
    result = run(code=USER)
    assert result.stdout == "" and "quantize" in result.stderr


def test_unknown_names_get_a_suggestion():
    assert "did you mean 'quantize'?" in run("quantise", "a", "b", code=USER).stderr
    error = run("quantize", MODEL, "out", "--nbit", "4", code=USER).stderr
    assert "unknown option '--nbit'; did you mean '--nbits'?" in error
    assert "hqq-cpp quantize --help" in error


@pytest.mark.parametrize("command", ["quantize", "inspect", "verify", "dequantize", "diff"])
def test_missing_arguments(command):
    assert "required" in run(command, code=USER).stderr


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


# ---- exit codes -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, message",
    [
        (["--nbits", "7"], "nbits is 7 (a number); it must be one of 8, 6, 5, 4, 3, 2, 1.58, 1"),
        (["--nbits", "four"], "--nbits"),
        (["--nbits"], "--nbits"),
        (["--group-size", "60"], "group_size is 60; it must be a multiple of 8"),
        (["--group-size", "-8"], "group_size is -8"),
        (["--group-size", "64k"], "--group-size must be a multiple of 8 or 'none', not '64k'"),
        (["--axis", "2"], "axis is 2; it must be 0 or 1"),
        (["--solver", "magic"], "it must be one of minmax, hqq, joint"),
        (["--balance", "awq"], "it must be one of auto, none, sinkhorn"),
        (["--solver", "hqq", "--lp-norm", "1.5"], "lp_norm is 1.5"),
        (["--iterations", "0"], "iterations is 0; it must be from 1 to 1000"),
        (["--meta-dtype", "half"], "it must be one of float16, bfloat16, float32"),
        (["--skip", "re:["], "not a valid regex"),
        (["--skip", ""], "must not be empty"),
        (["--threads", "-1"], "--threads"),
        (["--device", "tpu"], "'tpu' is not a device"),
        (["--force", "--resume"], "excludes"),
    ],
)
def test_wrong_options(tmp_path, options, message):
    result = run("quantize", MODEL, tmp_path / "out", *options, code=USER)
    assert message in result.stderr
    assert result.stdout == "" and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "option, text, message",
    [
        ("--config", '{"nbit": 4}', "unknown key 'nbit'; did you mean 'nbits'?"),
        ("--config", '{"nbits": 4', "[config] not JSON at byte 12"),
        ("--config", "", "[config] not JSON at byte 1"),
        ("--config", "[1]", "it must be an object"),
        ("--config", '{"nbits": 4, "nbits": 3}', 'JSON key "nbits" appears twice'),
        ("--dynamic-config", '{"a": {"nbit": 4}}', "[config, rule 'a'] unknown key 'nbit'"),
        ("--dynamic-config", '{"a": {}, "a": {}}', 'JSON key "a" appears twice'),
        ("--dynamic-config", "{", "[dynamic-config] not JSON at byte 2"),
        ("--dynamic-config", "3", "dynamic_config is 3 (a number)"),
    ],
)
def test_wrong_config_files(tmp_path, option, text, message):
    (tmp_path / "c.json").write_text(text)
    result = run("quantize", MODEL, tmp_path / "out", option, tmp_path / "c.json", code=USER)
    assert message in result.stderr
    assert not (tmp_path / "out").exists()


def test_broken_files_are_format_errors(tmp_path):
    whole = (MODEL / "model.safetensors").read_bytes()
    broken = tmp_path / "broken.safetensors"
    for content in (whole[:-1], whole[:100], b"", whole + b"x", b"\xff" * 100):
        broken.write_bytes(content)
        for args in (
            ["inspect", broken],
            ["quantize", broken, tmp_path / "out"],
            ["diff", broken, MODEL],
        ):
            result = run(*args, "--json", code=FORMAT)
            assert result.stdout == "" and result.stderr.startswith("hqq-cpp: [")
    assert not (tmp_path / "out").exists()


def test_operating_system_errors(tmp_path):
    missing = tmp_path / "missing"
    for args in (
        ["inspect", missing],
        ["quantize", missing, tmp_path / "out"],
        ["quantize", MODEL, tmp_path / "out", "--config", missing],
        ["quantize", MODEL, tmp_path / "out", "--config", tmp_path],
        ["diff", MODEL, missing],
    ):
        assert str(tmp_path) in run(*args, code=SYSTEM).stderr
    (tmp_path / "file").write_text("")
    run("quantize", MODEL, tmp_path / "file" / "out", code=SYSTEM)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full here")
def test_full_standard_output_is_an_error():
    with open("/dev/full", "w") as full:
        result = subprocess.run([BINARY, "doctor"], stdout=full, stderr=subprocess.PIPE, text=True)
    assert result.returncode == SYSTEM and "standard output" in result.stderr


def test_no_cuda_is_a_system_error(tmp_path):
    if run_json("doctor")["cuda"]:
        pytest.skip("this machine has CUDA")
    assert (
        "CUDA" in run("quantize", MODEL, tmp_path / "out", "--device", "cuda", code=SYSTEM).stderr
    )
    assert not (tmp_path / "out").exists()


# ---- force, resume, interruption ----------------------------------------------------------------------


def test_an_existing_destination_needs_force(tmp_path):
    run("quantize", MODEL, tmp_path / "out")
    before = files_of(tmp_path / "out")
    assert "exists" in run("quantize", MODEL, tmp_path / "out", "--nbits", "2", code=USER).stderr
    assert files_of(tmp_path / "out") == before
    run("quantize", MODEL, tmp_path / "out", "--nbits", "2", "--force")
    assert files_of(tmp_path / "out") != before
    assert {l["config"]["nbits"] for l in run_json("inspect", tmp_path / "out")["layers"]} == {2}


def test_force_spares_folders_that_are_no_checkpoint(tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.txt").write_text("years of work")
    run("quantize", MODEL, tmp_path / "thesis", "--force", code=USER)
    assert files_of(tmp_path / "thesis") == {"chapter.txt": b"years of work"}


def interrupt(out, args, number=signal.SIGINT):
    """Sends the signal as soon as one shard is finished."""
    process = subprocess.Popen(
        [BINARY, *map(str, args)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    partial = out.with_name(out.name + ".partial")
    deadline = time.monotonic() + 120
    while not any(partial.glob("*.safetensors")) and process.poll() is None:
        assert time.monotonic() < deadline, "no shard within two minutes"
        time.sleep(0.005)
    process.send_signal(number)
    text, error = process.communicate(timeout=120)
    assert process.returncode == INTERRUPTED, f"{process.returncode}\n{text}{error}"
    assert text == ""
    return error


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interruption_leaves_nothing_under_the_name_and_resume_goes_on(tmp_path, sharded, number):
    out = tmp_path / "out"
    args = ["quantize", sharded, out, *SLOW]
    assert "--resume" in interrupt(out, args, number)
    assert not out.exists()

    run(*args, "--resume")
    run("quantize", sharded, tmp_path / "straight", *SLOW)
    assert files_of(out) == files_of(tmp_path / "straight")
    run("verify", out)
    # Nothing is left to do, which is no mistake.
    run(*args, "--resume")


def test_resume_refuses_other_settings(tmp_path, sharded):
    out = tmp_path / "out"
    args = ["quantize", sharded, out, *SLOW]
    interrupt(out, args)
    assert "nbits" in run(*args, "--resume", "--nbits", "3", code=USER).stderr
    run(*args, "--resume")  # as it was, it goes on


# ---- progress -------------------------------------------------------------------------------------


def test_bar_on_a_terminal(tmp_path):
    pty = pytest.importorskip("pty")
    primary, secondary = pty.openpty()
    process = subprocess.Popen(
        [BINARY, "quantize", MODEL, tmp_path / "out", *SLOW],
        stdout=subprocess.PIPE,
        stderr=secondary,
    )
    os.close(secondary)
    shown = b""
    while True:
        try:
            chunk = os.read(primary, 4096)
        except OSError:  # how Linux says that the other side has closed
            break
        if not chunk:
            break
        shown += chunk
    os.close(primary)
    stdout = process.communicate(timeout=120)[0]
    assert process.returncode == OK
    assert b"\r" in shown and b"#" in shown and b"weights/s" in shown and b"ETA" in shown
    assert b"\r" not in stdout

"""The command hqq-cpp on the bundled model: every subcommand, its JSON, its exit codes."""

import json
import os
import re
import shutil
import signal
import struct
import subprocess
import time
from pathlib import Path

import pytest

MODEL = Path(__file__).resolve().parents[2] / "examples" / "tiny-llama"
BINARY = os.environ.get("HQQ_CPP_BIN") or shutil.which("hqq-cpp")
pytestmark = pytest.mark.skipif(
    not BINARY, reason="no hqq-cpp: it is not on the PATH and HQQ_CPP_BIN does not name it"
)

OK, DIFFERENCES, USER, FORMAT, SYSTEM, INTERRUPTED = 0, 1, 2, 3, 4, 130
# Slow enough to be stopped in the middle, on any machine.
SLOW = ["--iterations", "1000", "--threads", "1"]


def run(*args, code=OK, **kwargs):
    result = subprocess.run(
        [BINARY, *map(str, args)], capture_output=True, text=True, timeout=300, **kwargs
    )
    assert result.returncode == code, f"{args}: {result.returncode}\n{result.stdout}{result.stderr}"
    return result


def run_json(*args, code=OK):
    return json.loads(run(*args, "--json", code=code).stdout)


def files_of(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.fixture(scope="module")
def quantized(tmp_path_factory):
    out = tmp_path_factory.mktemp("cli") / "q4"
    run("quantize", MODEL, out)
    return out


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """Quantized without column scales, as upstream's format needs it."""
    out = tmp_path_factory.mktemp("cli") / "plain"
    run("quantize", MODEL, out, "--balance", "none")
    return out


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


COMMANDS = ["quantize", "inspect", "verify", "dequantize", "convert", "diff", "doctor"]


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
    assert [l["bytes_after"] for l in report["layers"]] == [l["bytes_after"] for l in real["layers"]]
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
    return {
        l["tag"]: l["config"]["nbits"] for l in report["layers"] if "layers.0." in l["name"]
    }


def test_options_win_over_the_config_file(tmp_path):
    config = {"nbits": 3, "group_size": 32, "dynamic_config": {
        "mlp.down_proj": {"nbits": 8}, "mlp.up_proj": {"group_size": 64}}}
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
    bits = plan(tmp_path, "--dynamic-config", tmp_path / "d.json", "--skip", "mlp.down_proj",
                "--skip", "q_proj")
    assert "mlp.down_proj" not in bits and "self_attn.q_proj" not in bits
    assert "self_attn.k_proj" in bits


def test_names_that_match_nothing_are_mentioned(tmp_path):
    (tmp_path / "d.json").write_text('{"mlp.dwn_proj": {"nbits": 8}}')
    result = run("quantize", MODEL, tmp_path / "out", "--dry-run", "--dynamic-config",
                 tmp_path / "d.json", "--skip", "qq_proj")
    assert "dynamic_config 'mlp.dwn_proj' names no layer" in result.stderr
    assert "skip_modules 'qq_proj' names no layer" in result.stderr


# What transformers.HqqConfig(...).to_dict() and hqq's BaseQuantizeConfig(...) give.
UPSTREAM = {
    "weight_quant_params": {"nbits": 3, "channel_wise": True, "group_size": 32, "optimize": True,
                            "round_zero": False, "axis": 1, "view_as_float": False},
    "scale_quant_params": None, "zero_quant_params": None, "offload_meta": False}


@pytest.mark.parametrize("form", ["upstream", "transformers"])
def test_configs_of_other_packages(tmp_path, form):
    config = UPSTREAM if form == "upstream" else {
        "quant_config": UPSTREAM, "quant_method": "hqq", "skip_modules": ["lm_head"]}
    (tmp_path / "c.json").write_text(json.dumps(config))
    common = ["quantize", MODEL, tmp_path / "out", "--dry-run", "--config", tmp_path / "c.json"]
    read = run_json(*common)["config"]
    assert (read["nbits"], read["group_size"], read["balance"]) == (3, 32, "none")
    changed = run_json(*common, "--nbits", "2", "--solver", "hqq")["config"]
    assert (changed["nbits"], changed["group_size"], changed["solver"]) == (2, 32, "hqq")


def test_settings_per_layer_of_other_packages(tmp_path):
    config = {"quant_config": {"mlp.up_proj": UPSTREAM}, "quant_method": "hqq",
              "skip_modules": ["lm_head"]}
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
    error = run("quantize", MODEL, tmp_path / "c", "--importance", tmp_path / "short.safetensors",
                code=USER).stderr
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
        ("--config", '{"nbits": 4', "not valid JSON"),
        ("--config", "", "not valid JSON"),
        ("--config", "[1]", "it must be an object"),
        ("--config", '{"nbits": 4, "nbits": 3}', "key 'nbits' given twice"),
        ("--dynamic-config", '{"a": {"nbit": 4}}', "[config, rule 'a'] unknown key 'nbit'"),
        ("--dynamic-config", '{"a": {}, "a": {}}', "key 'a' given twice"),
        ("--dynamic-config", "{", "not valid JSON at byte 2"),
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
        for args in (["inspect", broken], ["quantize", broken, tmp_path / "out"],
                     ["diff", broken, MODEL]):
            result = run(*args, "--json", code=FORMAT)
            assert result.stdout == "" and result.stderr.startswith("hqq-cpp: [")
    assert not (tmp_path / "out").exists()


def test_operating_system_errors(tmp_path):
    missing = tmp_path / "missing"
    for args in (["inspect", missing], ["verify", missing], ["quantize", missing, tmp_path / "out"],
                 ["quantize", MODEL, tmp_path / "out", "--config", missing],
                 ["quantize", MODEL, tmp_path / "out", "--config", tmp_path],
                 ["diff", MODEL, missing]):
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
    assert "CUDA" in run("quantize", MODEL, tmp_path / "out", "--device", "cuda", code=SYSTEM).stderr
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


def interrupt(args, number=signal.SIGINT):
    process = subprocess.Popen(
        [BINARY, *map(str, args)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    time.sleep(0.4)
    process.send_signal(number)
    out, err = process.communicate(timeout=120)
    return process.returncode, out, err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interruption_leaves_nothing_under_the_name_and_resume_goes_on(tmp_path, sharded, number):
    out = tmp_path / "out"
    args = ["quantize", sharded, out, *SLOW]
    code, text, error = interrupt(args, number)
    assert code == INTERRUPTED, error
    assert "--resume" in error and text == ""
    assert not out.exists()

    run(*args, "--resume")
    run("quantize", sharded, tmp_path / "straight", *SLOW)
    assert files_of(out) == files_of(tmp_path / "straight")
    run("verify", out)
    # Nothing is left to do, which is no mistake.
    run(*args, "--resume")


def test_resume_refuses_other_settings(tmp_path, sharded):
    args = ["quantize", sharded, tmp_path / "out", *SLOW]
    code, _, error = interrupt(args)
    assert code == INTERRUPTED, error
    if not list(tmp_path.iterdir()):
        pytest.skip("no shard was finished before the interruption")
    assert "nbits" in run(*args, "--resume", "--nbits", "3", code=USER).stderr


# ---- the other commands ------------------------------------------------------------------------------


def test_inspect(quantized):
    report = run_json("inspect", quantized)
    layers = {l["name"]: l for l in report["layers"]}
    q_proj = layers["model.layers.0.self_attn.q_proj"]
    assert q_proj["format"] == "hqq_cpp"
    assert q_proj["config"]["nbits"] == 4 and q_proj["config"]["group_size"] == 64
    assert q_proj["shape"] == [256, 256]
    assert 4.5 <= q_proj["bits_per_weight"] < 4.7
    assert report["quantized_bytes"] == sum(l["bytes"] for l in report["layers"])
    assert "model.norm.weight" in {t["name"] for t in report["tensors"]}
    text = run("inspect", quantized).stdout
    assert "bits a weight" in text and "model.norm.weight" in text
    assert run("inspect", quantized, "--quiet").stdout == ""


def test_inspect_a_plain_checkpoint():
    report = run_json("inspect", MODEL)
    assert report["layers"] == [] and report["weights"] == 0
    assert len(report["tensors"]) > 20
    assert report["other_bytes"] == sum(t["bytes"] for t in report["tensors"])
    assert run_json("inspect", MODEL / "model.safetensors")["tensors"] == report["tensors"]


def test_names_cannot_control_the_terminal(tmp_path):
    text = json.dumps({"\x1b[31mred\n": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}})
    content = text.encode()
    (tmp_path / "x.safetensors").write_bytes(struct.pack("<Q", len(content)) + content + b"\0")
    result = subprocess.run([BINARY, "inspect", tmp_path / "x.safetensors"], capture_output=True)
    assert b"\x1b" not in result.stdout + result.stderr


def test_verify(tmp_path, quantized):
    assert run("verify", quantized).stdout.startswith("ok: ")
    report = run_json("verify", quantized)
    assert report["ok"] is True and report["problems"] == [] and report["layers"] > 20

    copy = tmp_path / "copy"
    shutil.copytree(quantized, copy)
    content = bytearray((copy / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (copy / "model.safetensors").write_bytes(content)
    report = run_json("verify", copy, code=DIFFERENCES)
    assert report["ok"] is False and any("model.safetensors" in p for p in report["problems"])
    assert "problem" in run("verify", copy, code=DIFFERENCES).stdout
    assert run("verify", copy, "--quiet", code=DIFFERENCES).stdout == ""


def test_dequantize(tmp_path, quantized):
    report = run_json("dequantize", quantized, tmp_path / "auto")
    assert report["dtype"] == "bfloat16"  # what config.json says
    tensors = {t["name"]: t for t in run_json("inspect", tmp_path / "auto")["tensors"]}
    assert tensors["model.layers.0.mlp.down_proj.weight"]["dtype"] == "bfloat16"
    run("dequantize", quantized, tmp_path / "f32", "--dtype", "float32")
    tensors = {t["name"]: t for t in run_json("inspect", tmp_path / "f32")["tensors"]}
    assert tensors["model.layers.0.mlp.down_proj.weight"]["dtype"] == "float32"
    run("diff", quantized, tmp_path / "f32")  # the same values

    error = run("dequantize", quantized, tmp_path / "x", "--dtype", "int8", code=USER).stderr
    assert "--dtype must be auto, float32, bfloat16, float16 or float64, not 'int8'" in error
    run("dequantize", quantized, tmp_path / "f32", code=USER)
    run("dequantize", quantized, tmp_path / "f32", "--dtype", "float16", "--force")


def test_convert_there_and_back(tmp_path, plain):
    assert run_json("convert", plain, tmp_path / "up", "--to", "upstream")["to"] == "upstream"
    layers = run_json("inspect", tmp_path / "up")["layers"]
    assert {l["format"] for l in layers} == {"upstream"}
    assert {l["config"]["nbits"] for l in layers} == {4}
    run("convert", tmp_path / "up", tmp_path / "back", "--to", "hqq_cpp")
    run("diff", plain, tmp_path / "back")
    run("verify", tmp_path / "back")


def test_convert_refuses(tmp_path, plain, quantized):
    assert "not 'gguf'" in run("convert", plain, tmp_path / "x", "--to", "gguf", code=USER).stderr
    assert "--to" in run("convert", plain, tmp_path / "x", code=USER).stderr
    # Column scales have no place in upstream's format.
    run("convert", quantized, tmp_path / "x", "--to", "upstream", code=USER)
    assert list(tmp_path.iterdir()) == []


def test_diff(quantized):
    assert "0 of" in run("diff", MODEL, MODEL).stdout
    result = run("diff", MODEL, quantized, code=DIFFERENCES)
    assert "model.layers.0.mlp.down_proj" in result.stdout and "norm" not in result.stdout
    assert "identical" in run("diff", MODEL, quantized, "--all", code=DIFFERENCES).stdout
    report = run_json("diff", MODEL, quantized, code=DIFFERENCES)
    down = next(t for t in report["tensors"] if "0.mlp.down_proj" in t["name"])
    assert 0.02 < down["relative"] < 0.2 and not down["identical"]
    assert report["different"] == sum(not t["identical"] for t in report["tensors"])
    run("diff", MODEL, quantized, "--tolerance", "0.5")
    run("diff", MODEL, quantized, "--tolerance", "0.001", code=DIFFERENCES)
    run("diff", MODEL, quantized, "--tolerance", "-1", code=USER)


def test_diff_of_other_tensors(tmp_path):
    numpy = pytest.importorskip("numpy")
    save_file = pytest.importorskip("safetensors.numpy").save_file
    zeros = numpy.zeros((4, 8), numpy.float32)
    save_file({"a": zeros, "b": zeros}, tmp_path / "1.safetensors")
    save_file({"a": zeros, "c": zeros}, tmp_path / "2.safetensors")
    report = run_json("diff", tmp_path / "1.safetensors", tmp_path / "2.safetensors",
                      "--tolerance", "9", code=DIFFERENCES)
    assert {t["name"]: t["note"] for t in report["tensors"] if t["note"]} == {
        "b": "only in A", "c": "only in B"}


def test_doctor():
    report = run_json("doctor")
    assert report["cpu_target"] in report["cpu_targets"]
    assert report["threads"] >= 1
    text = run("doctor").stdout
    assert report["cpu_target"] in text and report["version"] in text
    chosen = report["cpu_targets"][-1]
    env = {**os.environ, "HQQ_CPU_TARGET": chosen, "HQQ_NUM_THREADS": "3"}
    report = json.loads(run("doctor", "--json", env=env).stdout)
    assert report["cpu_target"] == chosen and report["threads"] == 3


def test_bar_on_a_terminal(tmp_path):
    pty = pytest.importorskip("pty")
    primary, secondary = pty.openpty()
    process = subprocess.Popen(
        [BINARY, "quantize", MODEL, tmp_path / "out", *SLOW], stdout=subprocess.PIPE,
        stderr=secondary
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

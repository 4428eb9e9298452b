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

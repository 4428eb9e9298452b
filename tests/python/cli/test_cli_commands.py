"""hqq-cpp on the bundled model: every command but `quantize`."""

import json
import os
import shutil
import struct
import subprocess

import pytest

from cli_runner import BINARY, DIFFERENCES, MODEL, USER, needs_binary, run, run_json

pytestmark = needs_binary


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
    assert (
        "it must be 'hqq_cpp' or 'upstream'"
        in run("convert", plain, tmp_path / "x", "--to", "gguf", code=USER).stderr
    )
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
    report = run_json(
        "diff",
        tmp_path / "1.safetensors",
        tmp_path / "2.safetensors",
        "--tolerance",
        "9",
        code=DIFFERENCES,
    )
    assert {t["name"]: t["note"] for t in report["tensors"] if t["note"]} == {
        "b": "only in A",
        "c": "only in B",
    }


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

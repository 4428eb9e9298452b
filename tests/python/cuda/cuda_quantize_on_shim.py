"""Quantizing on a GPU, on the SIMT shim instead.

test_cuda.py runs this file in a process of its own, whose library is the shim's.
"""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from torch import nn

import hqq_cpp
from hqq_cpp import _core, backends
from hqq_cpp.models.quantize import quantize_model_
from hqq_cpp.nn.linear import quantized_on_device
from shim import ALL_NBITS, on_gpu, random_matrix, rng, same_bits  # noqa: F401

# ---- quantize ----------------------------------------------------------------------------------


@pytest.mark.parametrize("nbits", ALL_NBITS)
@pytest.mark.parametrize(
    "settings",
    [
        {"group_size": 32},
        {"group_size": 8, "axis": 0, "solver": "hqq", "balance": "none"},
        {"group_size": None, "solver": "minmax", "quant_zero": True, "quant_scale": True},
        {"group_size": 64, "balance": "none", "meta_dtype": "float32"},
    ],
)
def test_quantize_gives_the_bits_of_the_cpu(rng, nbits, settings):
    W = rng.standard_normal((24, 104), dtype=np.float32)
    config = {"nbits": nbits, **settings}
    q, stats = hqq_cpp.quantize(W, config, stats=True)
    on_gpu, gpu_stats = hqq_cpp.quantize(W, config, stats=True, device="cuda")
    assert same_bits(q, on_gpu)
    for name, value in stats.to_dict().items():
        # Sums of a row in float32 on the CPU: at most 104 roundings of 2^-24 each.
        assert gpu_stats.to_dict()[name] == pytest.approx(value, rel=104 * 2**-24, abs=1e-12), name


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
def test_quantize_types_strides_and_importance(rng, dtype):
    wide = random_matrix(rng, (16, 96), getattr(torch, dtype))
    importance = rng.random(64, dtype=np.float32)
    for W in (wide[:, :64], wide[::2, 32:]):
        for weights in (None, importance):
            pair = [
                hqq_cpp.quantize(W, {"nbits": 3}, importance=weights, device=device)
                for device in ("cpu", "cuda:0")
            ]
            assert same_bits(*pair)


@pytest.mark.parametrize(
    "place, value, settings",
    [
        ((3, 5), np.nan, {}),
        ((0, 0), -np.inf, {}),
        ((2, 40), 1e30, {"balance": "none", "group_size": 32}),
        ((2, 40), 1e30, {"balance": "none", "group_size": 8, "axis": 0}),
    ],
)
def test_quantize_refuses_what_the_cpu_refuses(rng, place, value, settings):
    W = rng.standard_normal((8, 64), dtype=np.float32)
    W[place] = value
    texts = []
    for device in ("cpu", "cuda"):
        with pytest.raises(ValueError) as error:
            hqq_cpp.quantize(W, settings, device=device)
        texts.append(str(error.value))
    assert texts[0] == texts[1]


def test_quantize_refuses_a_device_that_is_not_there():
    W = np.eye(8, dtype=np.float32)
    with pytest.raises(hqq_cpp.CudaError, match=r"no device cuda:3; there is 1 GPU, cuda:0"):
        hqq_cpp.quantize(W, device="cuda:3")


def test_quantize_tensor_where_it_lies(rng, on_gpu):
    W = random_matrix(rng, (16, 96))
    importance = torch.from_numpy(rng.random(96, dtype=np.float32))
    config = hqq_cpp.HqqConfig(nbits=4, group_size=32, dynamic_config={"a": {"nbits": 2}})
    for name, vector, bits, balance in [
        ("", None, 4, "sinkhorn"),
        ("a", importance, 2, "none"),
    ]:
        expected = hqq_cpp.quantize(W, config, name=name, importance=vector)
        solved = backends.quantize(W[:, :96].t().contiguous().t(), config, name, vector)
        assert (solved.settings.nbits, solved.settings.balance) == (bits, balance)
        for key, tensor in expected.tensors().items():
            assert torch.equal(solved.tensors[key], torch.from_dlpack(tensor)), key
        assert solved.stats.relative_error > 0
    layer = quantized_on_device(W, config, "a", torch.zeros(16), importance, 0)
    assert same_bits(layer.quantized_tensor(), expected)
    with pytest.raises(ValueError, match=r"\[a\] W holds 1 values that are NaN"):
        backends.quantize(torch.full((1, 8), float("nan"))[:, :1], config, "a", None)
    with pytest.raises(ValueError, match="importance has 8 values; W has 96 columns"):
        backends.quantize(W, config, "a", torch.ones(8))
    with pytest.raises(ValueError, match="leaves this layer unquantized"):
        backends.quantize(W, {"skip_modules": ["a"]}, "a", None)


@pytest.mark.parametrize("axis", [0, 1])
def test_scales_that_are_too_small_for_float16(rng, on_gpu, axis):
    W = random_matrix(rng, (16, 96))
    for tiny in (W * 1e-8, (W * 1e-8).to(torch.float64)[:, :70]):
        for more in ({}, {"quant_zero": True}, {"balance": "none", "solver": "minmax"}):
            config = {"nbits": 4, "axis": axis, "group_size": 32} | more
            with pytest.raises(ValueError, match="too small for float16") as on_cpu:
                hqq_cpp.quantize(tiny, config, name="a", device="cpu")
            with pytest.raises(ValueError) as refusal:
                backends.quantize(tiny, config, "a", None)
            assert str(refusal.value) == str(on_cpu.value)
            with pytest.raises(ValueError) as refusal:
                hqq_cpp.quantize(tiny, config, name="a", device="cuda")
            assert str(refusal.value) == str(on_cpu.value)
    dead = W.clone()
    dead[3] *= 1e-9
    config = {"nbits": 4, "axis": axis, "group_size": 32}
    assert same_bits(hqq_cpp.quantize(dead, config, device="cuda"), hqq_cpp.quantize(dead, config))


def test_quantize_model_on_the_device(rng, on_gpu):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 32), nn.Linear(32, 8))
    expected = [hqq_cpp.quantize(m.weight.detach(), {"nbits": 4}) for m in model]
    quantize_model_(model, {"nbits": 4})
    for module, q in zip(model, expected):
        assert same_bits(module.quantized_tensor(), q)
        assert module.quantize_stats["relative_error"] > 0


# ---- the command and folders -------------------------------------------------------------------


@pytest.fixture
def source(tmp_path, rng):
    """A file with plain layers, experts and a tensor to copy, in no order of size."""
    tensors = {
        f"model.layers.{i}.mlp.up_proj.weight": rng.standard_normal((16 + 8 * (i % 3), 64))
        for i in range(6)
    }
    tensors["model.layers.0.mlp.experts.gate_up_proj"] = rng.standard_normal((3, 16, 64))
    tensors["model.norm.weight"] = np.ones(64)
    path = tmp_path / "model.safetensors"
    hqq_cpp.save_safetensors(path, {k: v.astype(np.float32) for k, v in tensors.items()})
    return path


def files_of(folder):
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.name != "hqq_cpp_manifest.json"}


def test_folders_have_the_bytes_of_the_cpu(tmp_path, source):
    reports = {}
    for device in ("cpu", "cuda"):
        seen = []
        reports[device] = hqq_cpp.quantize_checkpoint(
            source, tmp_path / device, {"nbits": 3}, device=device, progress=seen.append
        )
        assert seen[-1].done == seen[-1].total == reports[device].weights
    assert files_of(tmp_path / "cpu") == files_of(tmp_path / "cuda")
    assert hqq_cpp.verify_checkpoint(tmp_path / "cuda").ok
    for a, b in zip(reports["cpu"].layers, reports["cuda"].layers):
        assert a.name == b.name
        assert b.stats.rms_error == pytest.approx(a.stats.rms_error, rel=64 * 2**-24)


def test_the_command(tmp_path, source, capfd):
    for device in ("cpu", "cuda", "cuda:0"):
        code = _core.cli_main(
            [
                "hqq-cpp",
                "quantize",
                str(source),
                str(tmp_path / device),
                "--device",
                device,
                "--json",
            ]
        )
        assert code == 0, capfd.readouterr().err
        assert json.loads(capfd.readouterr().out)["weights"] > 0
    assert (
        files_of(tmp_path / "cpu") == files_of(tmp_path / "cuda") == files_of(tmp_path / "cuda:0")
    )


def test_the_command_leaves_nothing_without_the_device(tmp_path, source, capfd):
    code = _core.cli_main(
        ["hqq-cpp", "quantize", str(source), str(tmp_path / "out"), "--device", "cuda:1"]
    )
    assert code == 4
    assert "there is no device cuda:1" in capfd.readouterr().err
    assert not list(tmp_path.glob("*out*"))


def test_errors_of_both_solver_threads_stop_the_folder(tmp_path, rng):
    tensors = {f"a{i}.weight": np.ones((8, 64), np.float32) for i in range(8)}
    tensors["a5.weight"][2, 3] = np.nan
    path = tmp_path / "bad.safetensors"
    hqq_cpp.save_safetensors(path, tensors)
    with pytest.raises(ValueError, match=r"\[a5\] W holds 1 values that are NaN"):
        hqq_cpp.quantize_checkpoint(path, tmp_path / "out", {"skip_modules": []}, device="cuda")
    assert not (tmp_path / "out").exists()


def test_doctor(capfd):
    assert _core.cli_main(["hqq-cpp", "doctor", "--json"]) == 0
    report = json.loads(capfd.readouterr().out)
    assert report["cuda"] is True
    details = report["cuda_details"]
    assert details["problem"] is None and details["library"].endswith("libhqq_cuda_simt.so")
    assert [d["device"] for d in details["devices"]] == ["cuda:0"]
    assert _core.cli_main(["hqq-cpp", "doctor"]) == 0
    assert "CUDA         found" in capfd.readouterr().out

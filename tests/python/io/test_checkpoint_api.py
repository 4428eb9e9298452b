"""Safetensors files and checkpoint folders through Python, and progress callbacks."""

import json
import threading

import numpy as np
import pytest

import hqq_cpp


def tensor_bytes(q):
    return {name: tensor.numpy().tobytes() for name, tensor in q.tensors().items()}


# ---- safetensors ---------------------------------------------------------------------------------


def test_safetensors_round_trip(tmp_path, rng):
    safetensors = pytest.importorskip("safetensors.numpy", reason="the reference reader")
    arrays = {
        "strided": rng.standard_normal((6, 8))[::2, ::2],
        "bool": np.array([True, False]),
        "empty": np.zeros((0, 3), np.int16),
        "scalar": np.array(3, np.uint64),
    }
    path = tmp_path / "a.safetensors"
    hqq_cpp.save_safetensors(path, arrays, {"key": "value"})
    assert hqq_cpp.safetensors_metadata(path) == {"key": "value"}
    for loaded in (hqq_cpp.load_safetensors(str(path)), safetensors.load_file(path)):
        assert loaded.keys() == arrays.keys()
        for name, array in arrays.items():
            assert np.array_equal(np.asarray(loaded[name]), array)
            assert tuple(loaded[name].shape) == array.shape


def test_save_safetensors_refuses(tmp_path):
    path = tmp_path / "a.safetensors"
    with pytest.raises(ValueError, match="safetensors, a. .*complex128"):
        hqq_cpp.save_safetensors(path, {"a": np.zeros(1, complex)})
    with pytest.raises(ValueError, match="name must be a string, not int"):
        hqq_cpp.save_safetensors(path, {1: np.zeros(1)})
    with pytest.raises(TypeError):
        hqq_cpp.save_safetensors(path, {"a": np.zeros(1)}, {"a": 1})
    assert list(tmp_path.iterdir()) == []


# ---- checkpoints ---------------------------------------------------------------------------------

LAYER = "model.layers.0.mlp.down_proj"


@pytest.fixture(scope="module")
def quantized(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("quantized") / "3bit"
    report = hqq_cpp.quantize_checkpoint(model, folder, {"nbits": 3})
    return folder, report


def test_quantize_checkpoint_reports(model, quantized):
    folder, report = quantized
    assert report.weights == sum(np.prod(layer.shape) for layer in report.layers)
    assert report.copied == ["model.embed_tokens.weight"]
    assert report.bytes_after < report.bytes_before / 2 and 3 < report.bits_per_weight < 4
    layer = next(layer for layer in report.layers if layer.name == LAYER)
    assert (layer.tag, layer.shape, layer.config.nbits) == ("mlp.down_proj", (256, 640), 3)
    assert 0.1 < layer.stats.relative_error < 0.3
    document = json.loads(json.dumps(report.to_dict()))
    assert document["layers"][0]["stats"]["rms_error"] == report.layers[0].stats.rms_error
    assert report.layers[0] == report.layers[0] != report.layers[1]


def test_checkpoint_layers_equal_quantize(model, quantized):
    folder, _ = quantized
    dense, checkpoint = hqq_cpp.Checkpoint(model), hqq_cpp.Checkpoint(folder)
    assert dense.quantized_layers() == [] and len(checkpoint.quantized_layers()) == 21
    for name in checkpoint.quantized_layers()[:4]:
        expected = hqq_cpp.quantize(dense.tensor(name + ".weight"), {"nbits": 3}, name=name)
        loaded = checkpoint.load(name)
        assert tensor_bytes(loaded) == tensor_bytes(expected)
        assert np.array_equal(hqq_cpp.dequantize(loaded), hqq_cpp.dequantize(expected))


def test_checkpoint_reads(model, quantized):
    checkpoint = hqq_cpp.Checkpoint(quantized[0])
    assert checkpoint.path == quantized[0] and not checkpoint.is_sharded
    assert checkpoint.shard_names == ["model.safetensors"]
    assert LAYER + ".W_q" in checkpoint and LAYER + ".weight" not in checkpoint
    assert list(checkpoint) == checkpoint.tensor_names and len(checkpoint) == len(list(checkpoint))
    assert checkpoint.config["quantization_config"]["nbits"] == 3
    assert checkpoint.metadata["format"] == "pt"
    assert checkpoint.tensor("model.norm.weight").dtype == "bfloat16"
    assert checkpoint.total_bytes == quantized[1].bytes_after
    assert "tensors in 1 file)" in repr(checkpoint)
    alone = hqq_cpp.Checkpoint(model / "model.safetensors")
    assert len(alone) == len(hqq_cpp.Checkpoint(model))


def test_checkpoint_refuses(model, quantized, tmp_path):
    with pytest.raises(FileNotFoundError):
        hqq_cpp.Checkpoint(tmp_path / "nowhere")
    with pytest.raises(hqq_cpp.FormatError):
        hqq_cpp.Checkpoint(tmp_path)
    checkpoint = hqq_cpp.Checkpoint(quantized[0])
    with pytest.raises(KeyError, match="no tensor 'x'"):
        checkpoint.tensor("x")
    with pytest.raises(ValueError, match="embed"):
        checkpoint.load("model.embed_tokens")
    with pytest.raises(ValueError):
        checkpoint.load(LAYER, expert=1)


def test_dry_run_writes_nothing(model, tmp_path):
    report = hqq_cpp.quantize_checkpoint(model, tmp_path / "out", {"nbits": 2}, dry_run=True)
    assert len(report.layers) == 21 and list(tmp_path.iterdir()) == []


def test_importance_as_dict_and_as_file(model, quantized, tmp_path, rng):
    importance = {LAYER: rng.random(640).astype(np.float32)}
    path = tmp_path / "importance.safetensors"
    hqq_cpp.save_safetensors(path, importance)
    for name, form in (("dict", importance), ("file", path)):
        out = tmp_path / name
        hqq_cpp.quantize_checkpoint(model, out, {"nbits": 3}, importance=form)
        dense = hqq_cpp.Checkpoint(model).tensor(LAYER + ".weight")
        expected = hqq_cpp.quantize(dense, {"nbits": 3}, importance=importance[LAYER])
        assert tensor_bytes(hqq_cpp.Checkpoint(out).load(LAYER)) == tensor_bytes(expected)
    with pytest.raises(ValueError, match="5"):
        wrong = {LAYER: np.ones(5, np.float32)}
        hqq_cpp.quantize_checkpoint(model, tmp_path / "x", importance=wrong)
    assert not (tmp_path / "x").exists()


def test_existing_destination_needs_force(model, quantized, tmp_path):
    out = tmp_path / "out"
    hqq_cpp.quantize_checkpoint(model, out, {"nbits": 2})
    with pytest.raises(ValueError, match="out"):
        hqq_cpp.quantize_checkpoint(model, out, {"nbits": 3})
    hqq_cpp.quantize_checkpoint(model, out, {"nbits": 3}, force=True)
    file = "model.safetensors"
    assert (out / file).read_bytes() == (quantized[0] / file).read_bytes()


def test_verify_dequantize_diff_convert(model, quantized, tmp_path):
    folder, report = quantized
    verified = hqq_cpp.verify_checkpoint(folder)
    assert verified.ok and verified.layers == 21 and verified.problems == []

    hqq_cpp.dequantize_checkpoint(folder, tmp_path / "dense")
    dense = hqq_cpp.Checkpoint(tmp_path / "dense").tensor(LAYER + ".weight")
    assert dense.dtype == "bfloat16", "what config.json says"
    q = hqq_cpp.Checkpoint(folder).load(LAYER)
    assert np.array_equal(dense.numpy(), hqq_cpp.dequantize(q, "bfloat16").numpy())

    diffs = {diff.name: diff for diff in hqq_cpp.diff_checkpoints(model, folder)}
    assert diffs["model.norm.weight"].identical
    diff = next(diff for name, diff in diffs.items() if name.startswith(LAYER))
    stats = next(layer.stats for layer in report.layers if layer.name == LAYER)
    assert diff.relative == pytest.approx(stats.relative_error, rel=1e-3)

    plain = tmp_path / "plain"
    hqq_cpp.quantize_checkpoint(model, plain, {"nbits": 3, "balance": "none"})
    hqq_cpp.convert_checkpoint(plain, tmp_path / "upstream", "upstream")
    hqq_cpp.convert_checkpoint(tmp_path / "upstream", tmp_path / "back", "hqq_cpp")
    assert all(d.identical for d in hqq_cpp.diff_checkpoints(plain, tmp_path / "back"))


def test_checkpoint_functions_refuse(model, quantized, tmp_path):
    folder, _ = quantized
    with pytest.raises(ValueError, match="'hqq_cpp' or 'upstream'"):
        hqq_cpp.convert_checkpoint(folder, tmp_path / "x", "gguf")
    with pytest.raises(ValueError, match="int8"):
        hqq_cpp.dequantize_checkpoint(folder, tmp_path / "x", "int8")
    with pytest.raises(ValueError, match="no folder|not a folder"):
        hqq_cpp.verify_checkpoint(tmp_path / "nowhere")
    with pytest.raises(OSError):
        hqq_cpp.diff_checkpoints(model, tmp_path / "nowhere")
    damaged = tmp_path / "damaged"
    hqq_cpp.quantize_checkpoint(model, damaged)
    data = bytearray((damaged / "model.safetensors").read_bytes())
    data[-1000] ^= 1
    (damaged / "model.safetensors").write_bytes(data)
    report = hqq_cpp.verify_checkpoint(damaged)
    assert not report.ok and "model.safetensors" in report.problems[0]


# ---- progress ------------------------------------------------------------------------------------


def test_progress(model, tmp_path):
    seen = []
    report = hqq_cpp.quantize_checkpoint(model, tmp_path / "out", progress=seen.append)
    assert seen[-1].done == seen[-1].total == report.weights
    assert [p.done for p in seen] == sorted(p.done for p in seen)
    assert seen[0].stage == "quantize" and seen[0].current and seen[-1].seconds > 0
    assert set(seen[0].to_dict()) == {"stage", "current", "done", "total", "seconds"}


def test_progress_runs_in_the_calling_thread(model, tmp_path):
    threads = set()
    hqq_cpp.verify_checkpoint(model, progress=lambda _: threads.add(threading.get_ident()))
    assert threads == {threading.get_ident()}


def test_progress_stops_the_work(model, tmp_path):
    with pytest.raises(hqq_cpp.Interrupted):
        hqq_cpp.quantize_checkpoint(model, tmp_path / "out", progress=lambda _: False)
    assert not (tmp_path / "out").exists()


def test_exceptions_of_progress_arrive_unchanged(model, tmp_path):
    class Mine(Exception):
        pass

    def fail(progress):
        raise Mine(progress.stage)

    with pytest.raises(Mine, match="quantize"):
        hqq_cpp.quantize_checkpoint(model, tmp_path / "out", progress=fail)
    assert not (tmp_path / "out").exists()


def test_progress_must_be_callable(model, tmp_path):
    with pytest.raises(TypeError, match="callable or None, not int"):
        hqq_cpp.quantize_checkpoint(model, tmp_path / "out", progress=3)

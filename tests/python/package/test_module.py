"""Importing, exceptions, the console script, threads and signals."""

import json
import pickle
import signal
import statistics
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

import hqq_cpp

IMPORT_LIMIT = 0.1  # seconds


def test_import_is_quick(run_python):
    code = (
        "import time; start = time.process_time(); import hqq_cpp; "
        "print(time.process_time() - start)"
    )
    # CPU time of this process: what another one does to the machine does not count.
    times = [float(run_python(code).stdout) for _ in range(5)]
    assert statistics.median(times) < IMPORT_LIMIT, times


def test_import_brings_neither_numpy_nor_torch(run_python):
    code = (
        "import sys, hqq_cpp; hqq_cpp.HqqConfig(nbits=3).to_dict(); "
        "print([name for name in ('numpy', 'torch') if name in sys.modules])"
    )
    assert run_python(code).stdout.strip() == "[]"


def test_numpy_work_never_imports_torch(run_python):
    code = (
        "import sys, numpy as np, hqq_cpp; W = np.eye(16, dtype=np.float32); "
        "layer = hqq_cpp.quantize_linear(W, {'group_size': 8}); layer(W); "
        "hqq_cpp.dequantize(layer.weight, 'bfloat16').numpy(); print('torch' in sys.modules)"
    )
    done = run_python(code)
    assert done.stdout.strip() == "False", done.stderr


def test_all_names_exist():
    pytest.importorskip("torch", reason="HqqLinear needs torch")
    for name in hqq_cpp.__all__:
        assert getattr(hqq_cpp, name) is not None
    assert set(hqq_cpp.__all__) <= set(dir(hqq_cpp))


def test_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="has no attribute 'quantise'"):
        hqq_cpp.quantise  # noqa: B018


def test_version_is_that_of_the_header(repository):
    text = (repository / "include/hqq/version.hpp").read_text()
    assert f'HQQ_VERSION_STRING "{hqq_cpp.__version__}"' in text
    assert f"kFormatVersion = {hqq_cpp.FORMAT_VERSION};" in text


def test_targets(run_python):
    assert hqq_cpp.cpu_target() in hqq_cpp.cpu_targets()
    assert hqq_cpp.cpu_targets()[-1] == "scalar"
    code = "import hqq_cpp; print(hqq_cpp.cpu_target(), hqq_cpp.default_threads())"
    done = run_python(code, HQQ_CPU_TARGET="scalar", HQQ_NUM_THREADS="3")
    assert done.stdout.split() == ["scalar", "3"]


def test_every_target_gives_the_same_bytes(run_python):
    code = (
        "import hashlib, numpy as np, hqq_cpp; "
        "W = np.random.default_rng(0).standard_normal((65, 200)).astype(np.float16); "
        "q = hqq_cpp.quantize(W, {'nbits': 3, 'quant_scale': True}); "
        "print(hashlib.sha256(b''.join(t.numpy().tobytes() for t in q.tensors().values()))"
        ".hexdigest())"
    )
    hashes = set()
    for target in hqq_cpp.cpu_targets():
        done = run_python(code, HQQ_CPU_TARGET=target)
        assert done.returncode == 0, done.stderr
        hashes.add(done.stdout)
    assert len(hashes) == 1


# ---- exceptions ----------------------------------------------------------------------------------


def test_exception_classes():
    assert issubclass(hqq_cpp.FormatError, ValueError)
    assert issubclass(hqq_cpp.CudaError, RuntimeError)
    assert issubclass(hqq_cpp.Interrupted, RuntimeError)
    error = pickle.loads(pickle.dumps(hqq_cpp.FormatError("text")))
    assert type(error) is hqq_cpp.FormatError and str(error) == "text"


def test_format_error(tmp_path):
    path = tmp_path / "bad.safetensors"
    path.write_bytes(b"\xff" * 100)
    with pytest.raises(hqq_cpp.FormatError, match="header"):
        hqq_cpp.load_safetensors(path)


def test_os_error_has_errno_and_file(tmp_path):
    path = tmp_path / "none.safetensors"
    with pytest.raises(FileNotFoundError) as caught:
        hqq_cpp.load_safetensors(path)
    assert caught.value.errno == 2 and caught.value.filename == str(path)


def test_os_error_of_a_write(tmp_path):
    path = tmp_path / "no folder" / "x.safetensors"
    with pytest.raises(FileNotFoundError):
        hqq_cpp.save_safetensors(path, {"a": np.zeros(1)})


def test_cuda_error():
    if hqq_cpp.cuda_is_available():
        pytest.skip("this build has CUDA")
    with pytest.raises(hqq_cpp.CudaError, match="CUDA"):
        hqq_cpp.quantize(np.eye(8, dtype=np.float32), {"group_size": 8}, device="cuda")
    with pytest.raises(ValueError, match="gpu"):
        hqq_cpp.quantize(np.eye(8, dtype=np.float32), device="gpu")


# ---- threads and signals -------------------------------------------------------------------------


def tensor_bytes(q):
    return {name: tensor.numpy().tobytes() for name, tensor in q.tensors().items()}


@pytest.mark.parametrize("nbits", [4, 1.58])
def test_thread_counts_give_equal_bytes(rng, nbits):
    W = rng.standard_normal((203, 328), dtype=np.float32)
    results = [tensor_bytes(hqq_cpp.quantize(W, {"nbits": nbits}, threads=n)) for n in (1, 2, 3, 7)]
    assert all(result == results[0] for result in results)


def test_negative_threads_are_refused(rng):
    W = np.eye(8, dtype=np.float32)
    with pytest.raises(ValueError, match="threads is -1"):
        hqq_cpp.quantize(W, threads=-1)
    with pytest.raises(ValueError, match="threads is -2"):
        hqq_cpp.dequantize(hqq_cpp.quantize(W), threads=-2)


def test_concurrent_calls_do_not_disturb_each_other(rng):
    matrices = [rng.standard_normal((64, 256), dtype=np.float32) for _ in range(8)]
    config = hqq_cpp.HqqConfig(nbits=3)

    def quantize(index, **options):
        return tensor_bytes(hqq_cpp.quantize(matrices[index], config, **options))

    expected = [quantize(index) for index in range(len(matrices))]
    wrong = []

    def work(index):
        for _ in range(10):
            if quantize(index, threads=2) != expected[index]:
                wrong.append(index)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(matrices))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_quantize_releases_the_gil(rng):
    W = rng.standard_normal((2048, 2048), dtype=np.float32)
    span = []

    def work():
        span.append(time.monotonic())
        hqq_cpp.quantize(W, {"nbits": 4, "iterations": 200}, threads=1)
        span.append(time.monotonic())

    thread = threading.Thread(target=work)
    moments = []
    thread.start()
    while thread.is_alive():
        moments.append(time.monotonic())
        time.sleep(0.001)
    begin, end = span
    inside = [moment for moment in moments if begin + 0.02 < moment < end - 0.02]
    assert len(inside) > 5, (end - begin, len(moments))


@pytest.fixture(scope="module")
def slow_model(tmp_path_factory):
    """A checkpoint that SLOW takes seconds to quantize."""
    folder = tmp_path_factory.mktemp("slow") / "model"
    folder.mkdir()
    rng = np.random.default_rng(1)
    names = [f"model.layers.{i}.mlp.up_proj.weight" for i in range(24)]
    tensors = {name: rng.standard_normal((512, 512), dtype=np.float32) for name in names}
    hqq_cpp.save_safetensors(folder / "model.safetensors", tensors)
    (folder / "config.json").write_text('{"model_type": "llama"}')
    return folder


SLOW = {"nbits": 8, "iterations": 1000, "lp_norm": 1.0}


def test_a_signal_stops_the_work(slow_model, tmp_path):
    class Alarm(Exception):
        pass

    def handler(number, frame):
        raise Alarm

    previous = signal.signal(signal.SIGALRM, handler)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.2)
        with pytest.raises(Alarm):
            hqq_cpp.quantize_checkpoint(slow_model, tmp_path / "out", SLOW)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
    assert not (tmp_path / "out").exists()


def test_ctrl_c_in_python(slow_model, tmp_path):
    code = (
        "import sys, hqq_cpp\n"
        "print('ready', flush=True)\n"
        f"hqq_cpp.quantize_checkpoint(sys.argv[1], sys.argv[2], {SLOW!r})\n"
    )
    out = tmp_path / "out"
    command = [sys.executable, "-c", code, str(slow_model), str(out)]
    process = subprocess.Popen(
        command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "ready\n"
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert errors.rstrip().endswith("KeyboardInterrupt")
    assert process.returncode != 0 and not out.exists()


# ---- the console script --------------------------------------------------------------------------


def wait_for_work(folder, process):
    """Until the command has begun to write its working folder beside `out`."""
    while not any("out" in path.name for path in folder.iterdir()):
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.01)


CLI = [sys.executable, "-m", "hqq_cpp._cli"]


def test_cli_writes_to_the_real_streams(tmp_path):
    done = subprocess.run([*CLI, "doctor", "--json"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == ""
    document = json.loads(done.stdout)
    assert document["version"] == hqq_cpp.__version__
    assert document["cpu_targets"] == hqq_cpp.cpu_targets()


def test_cli_exit_codes(tmp_path):
    for arguments, code in ((["quantise"], 2), (["inspect", "nowhere"], 4), (["--version"], 0)):
        done = subprocess.run([*CLI, *arguments], cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == code, done
        assert (done.stderr == "") == (code == 0)


def test_cli_takes_file_names_that_are_no_utf8(model, tmp_path):
    command = [*CLI, "inspect", bytes(tmp_path) + b"/caf\xe9"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True)
    assert done.returncode == 4 and b"No such file" in done.stderr
    (tmp_path / "ok").symlink_to(model)
    (tmp_path / "ok").rename(bytes(tmp_path).decode() + "/caf\udce9")
    assert subprocess.run(command, cwd=tmp_path, capture_output=True).returncode == 0


def test_cli_ctrl_c(slow_model, tmp_path):
    out = tmp_path / "out"
    config = tmp_path / "config.json"
    config.write_text(json.dumps(SLOW))
    process = subprocess.Popen(
        [*CLI, "quantize", str(slow_model), str(out), "--config", str(config)],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    wait_for_work(tmp_path, process)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert "interrupted" in errors and not out.exists()

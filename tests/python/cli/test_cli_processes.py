"""hqq-cpp as a process: closed descriptors, closed pipes, files that are no files, sub-interpreters."""

import os
import signal
import struct
import subprocess
import sys
import time

import pytest

import hqq_cpp
from cli_runner import BINARY, INTERRUPTED, MODEL, OK, SLOW, USER, files_of, needs_binary, run

pytestmark = needs_binary


@pytest.mark.parametrize("closed", [(0, 1, 2), (1, 2), (2,), (0,)], ids=str)
def test_closed_descriptors_get_no_file_of_ours(tmp_path, closed):
    """The next file would be number 2, and lines of progress would end up inside of it."""
    run("quantize", MODEL, tmp_path / "whole", *SLOW)
    redirections = " ".join(f"{number}{'<' if number == 0 else '>'}&-" for number in closed)
    command = f'exec "$0" quantize "$1" "$2" {" ".join(SLOW)} {redirections}'
    result = subprocess.run(
        ["bash", "-c", command, BINARY, str(MODEL), str(tmp_path / "q")], timeout=300, check=False
    )
    assert result.returncode == OK
    assert files_of(tmp_path / "q") == files_of(tmp_path / "whole")


def test_a_closed_pipe_ends_a_listing_silently(tmp_path):
    process = subprocess.Popen(
        [BINARY, "inspect", str(MODEL)], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait(60) == OK


def test_a_full_device_is_still_an_error():
    if not os.path.exists("/dev/full"):
        pytest.skip("there is no /dev/full")
    with open("/dev/full", "wb") as full:
        result = subprocess.run(
            [BINARY, "inspect", str(MODEL)], stdout=full, stderr=subprocess.PIPE, check=False
        )
    assert result.returncode == 4
    assert b"cannot write to standard output" in result.stderr


def test_a_config_that_is_a_fifo_can_be_interrupted(tmp_path):
    os.mkfifo(tmp_path / "config")
    process = subprocess.Popen(
        [BINARY, "quantize", MODEL, tmp_path / "q", "--config", tmp_path / "config", "-q"],
        stderr=subprocess.PIPE,
        text=True,
    )
    time.sleep(1)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    _, error = process.communicate(timeout=5)
    assert process.returncode == INTERRUPTED
    assert "interrupted; nothing was written" in error
    assert not (tmp_path / "q").exists()


def test_a_config_comes_through_a_fifo(tmp_path):
    os.mkfifo(tmp_path / "config")
    process = subprocess.Popen(
        [BINARY, "quantize", MODEL, tmp_path / "q", "--config", tmp_path / "config", "-q"]
    )
    (tmp_path / "config").write_text('{"nbits": 3}')
    assert process.wait(60) == OK
    assert '"nbits": 3' in (tmp_path / "q" / "config.json").read_text()


def test_a_config_without_end_is_refused(tmp_path):
    result = run("quantize", MODEL, tmp_path / "q", "--config", "/dev/zero", "-q", code=USER)
    assert len(result.stderr) < 500


def test_diff_works_in_proportion_to_the_data(tmp_path):
    """Many tensors without elements: nothing is cleared for each of them."""
    entries = ",".join(
        f'"t.{i}":{{"dtype":"U8","shape":[0,4],"data_offsets":[0,0]}}' for i in range(20000)
    )
    header = ("{" + entries + "}").encode()
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)
    start = time.monotonic()
    run("diff", tmp_path, tmp_path, "-q")
    # Two minutes before.
    assert time.monotonic() - start < 20


def test_a_link_that_leaves_the_folder(tmp_path):
    source = tmp_path / "m"
    source.mkdir()
    for name in ("config.json", "model.safetensors"):
        (source / name).write_bytes((MODEL / name).read_bytes())
    (tmp_path / "secret.txt").write_text("secret")
    (source / "notes.txt").symlink_to(tmp_path / "secret.txt")
    result = run("quantize", source, tmp_path / "q", "-q", code=3)
    assert "notes.txt" in result.stderr and "--follow-links" in result.stderr
    with pytest.raises(hqq_cpp.FormatError, match="leaves the folder"):
        hqq_cpp.quantize_checkpoint(source, tmp_path / "q")
    assert not (tmp_path / "q").exists()
    run("quantize", source, tmp_path / "q", "-q", "--follow-links")
    assert (tmp_path / "q" / "notes.txt").read_text() == "secret"


def test_a_sub_interpreter_is_refused():
    """Importing waited for ever."""
    code = """
try:
    import _interpreters as interpreters
except ImportError:
    import _xxsubinterpreters as interpreters
script = '''
try:
    import hqq_cpp
except ImportError as error:
    assert "sub-interpreter" in str(error), error
else:
    raise AssertionError("imported")
'''
result = interpreters.run_string(interpreters.create(), script)
assert result is None, result
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr

"""Every system call may fail: strace makes the Nth openat, read, write, ... of a command fail.

The command says so and ends with 4, or its result is right; the destination is whole or as it was,
and --resume goes on to the same bytes. All N with HQQ_LONG_TESTS=1, else a sample. Counts are those
of a thread: a command has several, and each of them meets its Nth call.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from cli_runner import OK, SYSTEM, files_of
from model_maker import bfloat16, save_model

pytest.importorskip("hqq_cpp")

LONG = bool(os.environ.get("HQQ_LONG_TESTS"))
SAMPLE = 3
HANGS = 60  # seconds
# What the system may say to each call. Waiting (futex) is no such call.
ERRORS = {
    "openat": ("EIO", "EMFILE", "EACCES"),
    "read": ("EIO",),
    "pread64": ("EIO",),
    "write": ("EIO", "ENOSPC"),
    "fsync": ("EIO",),
    "rename": ("EIO", "EACCES"),
    "renameat2": ("EIO",),
    "unlink": ("EACCES",),
    "unlinkat": ("EACCES",),
    "mkdir": ("ENOSPC",),
    "close": ("EIO",),
    "mmap": ("ENOMEM",),
    "clone3": ("EAGAIN",),
    "newfstatat": ("EIO",),
    "getdents64": ("EIO",),
    "readlink": ("EIO",),
    "flock": ("ENOLCK",),
}


def why_not() -> str:
    """Why nothing can be injected here, or nothing."""
    if shutil.which("strace") is None:
        return "no strace (Debian package strace)"
    probe = ["strace", "-qq", "-o", os.devnull, "-e", "inject=getuid:error=EIO", "true"]
    result = subprocess.run(probe, capture_output=True, text=True)
    return f"strace cannot be used: {result.stderr.strip()}" if result.returncode else ""


REASON = why_not()
pytestmark = pytest.mark.skipif(bool(REASON), reason=REASON)


class Worker:
    """Runs commands, each in a fresh child of a process that has everything imported."""

    def __init__(self, folder: Path):
        self.folder = folder
        script = Path(__file__).with_name("syscall_worker.py")
        self.process = subprocess.Popen(
            [sys.executable, script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()

    def run(self, argv, strace=()) -> tuple[int, str, str]:
        """Exit code, what it wrote, and what strace did; a command that hangs is a failure."""
        output, trace = self.folder / "output", self.folder / "trace"
        order = {"argv": [str(argument) for argument in argv], "output": str(output)}
        print(json.dumps(order), file=self.process.stdin, flush=True)
        pid = int(self.process.stdout.readline())
        wait_until(lambda: "\nState:\tT" in status_of(pid))
        tracer = None
        if strace:
            command = ["strace", "-f", "-qq", "-o", trace, *strace, "-p", str(pid)]
            tracer = subprocess.Popen(command, stderr=subprocess.DEVNULL)
            wait_until(lambda: "\nTracerPid:\t0\n" not in status_of(pid))
        os.kill(pid, signal.SIGCONT)
        status = self.status(pid)
        if tracer is not None:
            tracer.wait()
        text = output.read_text(errors="replace")
        return os.waitstatus_to_exitcode(status), text, trace.read_text() if strace else ""

    def status(self, pid: int) -> int:
        alarm = subprocess.Popen(
            ["sh", "-c", f"sleep {HANGS}; kill -9 {pid}"], start_new_session=True
        )
        try:
            return int(self.process.stdout.readline())
        finally:
            os.killpg(alarm.pid, signal.SIGKILL)
            alarm.wait()


def status_of(pid: int) -> str:
    return Path(f"/proc/{pid}/status").read_text()


def wait_until(condition) -> None:
    end = time.monotonic() + HANGS
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.001)


@pytest.fixture(scope="module")
def worker(tmp_path_factory):
    worker = Worker(tmp_path_factory.mktemp("worker"))
    yield worker
    worker.close()


@pytest.fixture(scope="module")
def folders(worker, tmp_path_factory):
    """A model of two shards, and what the commands make of it undisturbed."""
    rng = np.random.default_rng(3)
    folder = tmp_path_factory.mktemp("syscalls")
    names = ("model.layers.0.mlp.down_proj.weight", "model.layers.1.mlp.up_proj.weight")
    save_model(folder / "model", [{name: bfloat16(rng, (16, 64))} for name in names])
    plain = ("quantize", "--balance", "none", "--threads", "2", "--quiet")
    assert worker.run([*plain, folder / "model", folder / "ours"])[0] == OK
    return folder


# Name -> the words of the command and whether it writes.
COMMANDS = {
    "quantize": (("quantize", "model", "--threads", "2"), True),
    "convert": (("convert", "ours", "--to", "upstream", "--no-qmodel"), True),
    "dequantize": (("dequantize", "ours"), True),
    "verify": (("verify", "ours"), False),
    "diff": (("diff", "ours", "ours"), False),
}


def arguments(command: str, folders: Path, out: Path) -> list:
    words, writes = COMMANDS[command]
    places = [folders / word if word in ("model", "ours") else word for word in words]
    return [*places, "--quiet"] if not writes else [*places[:2], out, *places[2:], "--quiet"]


def calls_of(worker: Worker, argv) -> dict[str, int]:
    """System call -> how often a thread makes it, undisturbed."""
    code, text, trace = worker.run(argv, ["-e", "trace=" + ",".join(ERRORS)])
    assert code == OK, text
    counts = Counter(re.findall(r"^(\d+) +(\w+)\(", trace, re.MULTILINE))
    most: dict[str, int] = {}
    for (_, call), count in counts.items():
        most[call] = max(most.get(call, 0), count)
    return most


def numbers(count: int):
    """All of 1..count, or the first, the last and some between."""
    if LONG or count <= SAMPLE:
        return range(1, count + 1)
    return sorted({1 + round(i * (count - 1) / (SAMPLE - 1)) for i in range(SAMPLE)})


def problems_of_destination(out: Path, expected: dict[str, bytes], code: int, call: str):
    if code == OK and not out.exists():
        yield "success without a destination"
    if out.exists() and files_of(out) != expected:
        yield "another destination than undisturbed"
    if call.startswith("unlink"):
        return  # what could not be removed stays
    allowed = {out.name, f"{out.name}.partial"}
    if call == "flock":
        allowed.add(f"{out.name}.partial.lock")  # it may be another's
    if left := {path.name for path in out.parent.iterdir()} - allowed:
        yield f"left behind: {left}"
    if left := [path.name for path in out.parent.glob("*/.*.hqq-tmp")]:
        yield f"left behind: {left}"


def problems_of_going_on(worker: Worker, argv, out: Path, expected: dict[str, bytes]):
    again = "--resume" if argv[0] == "quantize" else "--force"
    code, text, _ = worker.run([*argv, again])
    if code != OK:
        yield f"then {again}: exit code {code}, {text}"
    elif files_of(out) != expected:
        yield f"then {again}: another destination than undisturbed"


@pytest.mark.parametrize("command", COMMANDS)
def test_each_call_fails(worker, folders, tmp_path, command):
    writes = COMMANDS[command][1]
    out = tmp_path / "q" / "q"
    out.parent.mkdir()
    argv = arguments(command, folders, out)
    calls = calls_of(worker, argv)
    expected = files_of(out) if writes else {}
    injected, problems = 0, []
    choices = ((call, error) for call in calls for error in ERRORS[call])
    for call, error in choices:
        for number in numbers(calls[call]):
            shutil.rmtree(out.parent)
            out.parent.mkdir()
            inject = ["-e", f"trace={call}", "-e", f"inject={call}:error={error}:when={number}"]
            code, text, trace = worker.run(argv, inject)
            injected += "(INJECTED)" in trace
            found = [] if code in (OK, SYSTEM) else [f"exit code {code}, {text}"]
            if writes:
                found += problems_of_destination(out, expected, code, call)
                found += problems_of_going_on(worker, argv, out, expected)
            problems += [f"{call} number {number} gives {error}: {one}" for one in found]
    print(f"{injected} errors injected into {command}")
    assert injected > 20
    assert not problems, "\n".join(problems)

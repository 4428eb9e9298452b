"""kill -9 at any moment, then --resume: the same bytes as without. And a disk that is full."""

import json
import os
import random
import resource
import shutil
import signal
import subprocess
import time

import numpy as np
import pytest

from cli_runner import BINARY, OK, SYSTEM, USER, files_of, needs_binary, run
from model_maker import bfloat16, llama_layer, save_model

pytestmark = needs_binary

LONG = bool(os.environ.get("HQQ_LONG_TESTS"))
KILLS = 200 if LONG else 20
ROUNDS = 500 if LONG else 5  # of processes at one destination
SHARDS = 6
# Long enough to be hit by a kill, short enough for many.
SETTINGS = ["--threads", "2", "--iterations", "60", "--quiet"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    rng = np.random.default_rng(1)
    shards = [llama_layer(rng, layer, 128, 256) for layer in range(SHARDS)]
    # The largest shard is the last, so that a disk may be full after others are done.
    shards[-1]["model.embed_tokens.weight"] = bfloat16(rng, (1000, 128))
    # Fused experts wait in a temporary file.
    shards[2]["model.layers.2.mlp.experts.down_proj"] = bfloat16(rng, (4, 128, 128))
    folder = tmp_path_factory.mktemp("model") / "m"
    save_model(folder, shards)
    return folder


@pytest.fixture(scope="module")
def expected(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("expected") / "q"
    run("quantize", model, folder, *SETTINGS)
    return files_of(folder)


def start(*args, **kwargs):
    return subprocess.Popen(
        [BINARY, *map(str, args)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, **kwargs
    )


def run_and_kill(args, delay):
    """True if the process was killed, False if it was done before."""
    process = start(*args)
    try:
        _, errors = process.communicate(timeout=delay)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGKILL)
        _, errors = process.communicate()
    assert process.returncode in (OK, -signal.SIGKILL), errors
    return process.returncode != OK


def duration(model, tmp_path):
    begin = time.monotonic()
    run("quantize", model, tmp_path / "timing", *SETTINGS)
    return time.monotonic() - begin


def test_kill_at_random_moments(model, expected, tmp_path):
    longest = duration(model, tmp_path)
    rng = random.Random(os.environ.get("HQQ_TEST_SEED", 1))
    out = tmp_path / "q"
    kills = resumed = runs = 0
    while kills < KILLS:
        killed = run_and_kill(
            ["quantize", model, out, "--resume", *SETTINGS], rng.uniform(0, longest)
        )
        kills += killed
        journal = tmp_path / "q.partial" / "hqq_cpp.journal.json"
        if killed and journal.exists():
            resumed += len(json.loads(journal.read_text())["finished"]) > 0
        if out.exists():
            # Whole under its name, whenever the kill came.
            assert files_of(out) == expected
        elif not killed:
            pytest.fail("done, but there is no destination")
        if not killed:
            assert not (tmp_path / "q.partial").exists()
            shutil.rmtree(out)
            runs += 1
        assert runs < 20 * KILLS, "the kills come too late"
    assert resumed >= KILLS // 10, "hardly any kill left something to resume from"
    run("quantize", model, out, "--resume", *SETTINGS)
    assert files_of(out) == expected
    assert sorted(path.name for path in tmp_path.iterdir()) == ["q", "timing"]


def test_killed_before_the_first_file_is_whole(model, expected, tmp_path):
    left = tmp_path / "q.partial" / ".hqq_cpp.journal.json.00006c951a825a9b.hqq-tmp"
    left.parent.mkdir()
    left.write_text("{")
    run("quantize", model, tmp_path / "q", "--resume", *SETTINGS)
    assert files_of(tmp_path / "q") == expected


def test_a_temporary_file_of_others_is_left_alone(model, tmp_path):
    left = tmp_path / "q.partial" / ".thesis.tmp"
    left.parent.mkdir()
    left.write_text("{")
    done = run("quantize", model, tmp_path / "q", "--resume", *SETTINGS, code=USER)
    assert "nothing in it is touched" in done.stderr
    assert left.read_text() == "{" and not (tmp_path / "q").exists()


def test_kill_while_replacing(model, expected, tmp_path):
    """With --force the old folder stays whole until the new one is."""
    longest = duration(model, tmp_path)
    rng = random.Random(2)
    out = tmp_path / "q"
    run("quantize", model, out, "--nbits", "2", "--quiet")
    old = files_of(out)
    kills = 0
    while kills < KILLS // 2:
        # Half of the kills come where the folders change places.
        delay = rng.choice([rng.uniform(0, longest), rng.uniform(0.8, 1.1) * longest])
        kills += run_and_kill(["quantize", model, out, "--force", *SETTINGS], delay)
        now = files_of(out)
        assert now in (old, expected)
        if now == expected:
            run("quantize", model, out, "--force", "--nbits", "2", "--quiet")
    run("quantize", model, out, "--force", *SETTINGS)
    assert files_of(out) == expected


def check_round(out, results, expected):
    assert any(code == OK for _, code in results), results
    for errors, code in results:
        # A process that comes when all is done finds it done.
        assert code == OK or (code == USER and b"another process is writing" in errors), errors
    assert files_of(out) == expected
    assert [path.name for path in out.parent.iterdir()] == [out.name]


def test_processes_do_not_share_a_destination(model, expected, tmp_path):
    """Four at a time, with --resume and --force in any mixture, begun within a moment."""
    rng = random.Random(os.environ.get("HQQ_TEST_SEED", 3))
    out = tmp_path / "rounds" / "q"
    out.parent.mkdir()
    longest = duration(model, tmp_path)
    for _ in range(ROUNDS):
        if out.exists() and rng.random() < 0.5:
            shutil.rmtree(out)
        processes = []
        for _ in range(4):
            again = rng.choice(["--resume", "--force"])
            processes.append(start("quantize", model, out, again, *SETTINGS))
            time.sleep(rng.uniform(0, longest / 3))
        results = [(process.communicate()[1], process.returncode) for process in processes]
        check_round(out, results, expected)


def limit_file_size(size):
    def limit():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))

    return limit


def test_disk_full(model, expected, tmp_path):
    """RLIMIT_FSIZE stands for a full disk: write() fails in the middle of a shard."""
    sizes = {name: len(content) for name, content in expected.items() if "model-" in name}
    largest = max(sizes, key=sizes.get)
    out = tmp_path / "q"
    limit = limit_file_size(sizes[largest] - 1)
    result = run("quantize", model, out, *SETTINGS, code=SYSTEM, preexec_fn=limit)
    assert largest in result.stderr and "File too large" in result.stderr
    assert not out.exists()
    left = sorted(path.name for path in (tmp_path / "q.partial").iterdir())
    assert all(not name.endswith("hqq-tmp") for name in left)
    run("quantize", model, out, "--resume", *SETTINGS)
    assert files_of(out) == expected


def test_disk_full_at_once_leaves_nothing(model, tmp_path):
    run("quantize", model, tmp_path / "q", code=SYSTEM, preexec_fn=limit_file_size(100))
    assert list(tmp_path.iterdir()) == []

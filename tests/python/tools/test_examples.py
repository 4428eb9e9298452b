"""The scripts under examples/ run."""

import subprocess
import sys

import pytest

SCRIPTS = {
    "transformers_load.py": ([], "weights quantized at 4."),
    "transformers_per_tag.py": ([], "mlp.down_proj"),
    "transformers_moe.py": ([], "mlp.experts.gate_up_proj"),
    "transformers_save.py": (["out"], "logits are equal"),
    "transformers_generate.py": (["--tokens", "4", "--kv-bits", "4"], "And it came to pass"),
}


@pytest.mark.parametrize("script", SCRIPTS)
def test_example(repository, tmp_path, script):
    pytest.importorskip("transformers", reason="the example needs Transformers")
    pytest.importorskip("accelerate", reason="the example needs accelerate")
    arguments, expected = SCRIPTS[script]
    command = [sys.executable, repository / "examples" / script, *arguments]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert expected in done.stdout


def test_an_example_refuses(repository, tmp_path):
    pytest.importorskip("transformers", reason="the example needs Transformers")
    pytest.importorskip("accelerate", reason="the example needs accelerate")
    command = [sys.executable, repository / "examples" / "transformers_load.py", "--nbits", "7"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode != 0 and "nbits is 7" in done.stderr

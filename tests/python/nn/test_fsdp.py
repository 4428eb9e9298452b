"""Sharded models: two processes of fsdp_worker.py, on CPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

torch = pytest.importorskip("torch", reason="the layers need torch")
pytest.importorskip("transformers", reason="the model is Transformers'")
pytest.importorskip("peft", reason="QLoRA needs peft")
if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
    pytest.skip("torch was built without gloo", allow_module_level=True)

WORKER = Path(__file__).parent / "fsdp_worker.py"


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fsdp")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = subprocess.run(
        [*command, str(WORKER), str(folder)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    return json.loads(lines[-1])


@pytest.mark.parametrize("kind", ["fsdp2 False", "fsdp2 True", "ignored", "ddp", "fsdp1"])
def test_losses_are_those_of_one_process(result, kind):
    assert result[kind] == pytest.approx(result["plain"], abs=1e-4)
    assert result[kind][-1] < result[kind][0] - 0.1


def test_losses_are_those_of_the_dense_twin(result):
    # What rounding the inputs of the first layers costs.
    assert result["fsdp2 False"] == pytest.approx(result["dense"], abs=0.02)


def test_tied_embedding(result):
    assert result["tied"] == pytest.approx(result["tied plain"], abs=1e-4)


def test_state_dict_is_in_format_1(result):
    assert result["state False"] and result["state True"] and result["checkpoint"]


@pytest.mark.parametrize(
    ("what", "text"),
    [
        ("cast", "scale is bfloat16; it must be float16: a packed weight is not cast"),
        ("layer", "W_q is a DTensor of 2 processes"),
        ("weight", "W_q is a DTensor of 2 processes"),
        ("tile", "W_q is a DTensor of 2 processes"),
        ("merge", "W_q is a DTensor of 2 processes"),
        ("fsdp1", "uniform dtype"),  # torch's own words
        ("colwise", "W_q is a DTensor of 2 processes"),
        ("rowwise", "leave the layer out of tensor-parallel plans"),
        ("tp_plan", "tp_plan cuts the weights over 2 processes"),
        ("tp_plan of a folder", "tp_plan cuts the weights over 2 processes"),
    ],
)
def test_refusals(result, what, text):
    assert result["refused"][what].startswith(("ValueError: ", "AttributeError: "))
    assert text in result["refused"][what]

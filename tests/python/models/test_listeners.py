"""Libraries are told of models that were quantized or made dense in place, if they are imported."""

import sys
import types

import pytest

import hqq_cpp
from hqq_cpp.models import listeners

torch = pytest.importorskip("torch", reason="quantize_model_ needs torch")


@pytest.fixture
def told(monkeypatch):
    """What a listener to the library "far_library" was told; the library is not imported yet."""
    calls = []
    listener = types.ModuleType("far_listener")
    listener.on_quantized = lambda model, config: calls.append(("quantized", model, config.nbits))
    listener.on_dequantized = lambda model: calls.append(("dequantized", model))
    monkeypatch.setitem(sys.modules, "far_listener", listener)
    monkeypatch.setattr(listeners, "_listeners", dict(listeners._listeners))
    listeners.join("far_library", "far_listener")
    return calls


@pytest.fixture
def net():
    return torch.nn.Sequential(torch.nn.Linear(64, 8))


def test_a_listener_is_told(told, net, monkeypatch):
    monkeypatch.setitem(sys.modules, "far_library", types.ModuleType("far_library"))
    hqq_cpp.quantize_model_(net, {"nbits": 3})
    assert told == [("quantized", net, 3)]
    hqq_cpp.dequantize_model_(net)
    assert told[1:] == [("dequantized", net)]


def test_nobody_is_told_without_the_library(told, net):
    hqq_cpp.dequantize_model_(hqq_cpp.quantize_model_(net, {"nbits": 3}))
    assert told == []


def test_nobody_is_told_of_a_refusal(told, net, monkeypatch):
    monkeypatch.setitem(sys.modules, "far_library", types.ModuleType("far_library"))
    with pytest.raises(ValueError, match="no quantized layer"):
        hqq_cpp.dequantize_model_(net)
    assert told == []


def test_load_model_tells(told, net, tmp_path, monkeypatch):
    hqq_cpp.save_model(hqq_cpp.quantize_model_(net, {"nbits": 3}), tmp_path / "net")
    empty = torch.nn.Sequential(torch.nn.Linear(64, 8))
    monkeypatch.setitem(sys.modules, "far_library", types.ModuleType("far_library"))
    hqq_cpp.load_model(empty, tmp_path / "net")
    assert told == [("quantized", empty, 3)]


def test_joining_again_changes_nothing(told, net, monkeypatch):
    listeners.join("far_library", "no_such_module")
    monkeypatch.setitem(sys.modules, "far_library", types.ModuleType("far_library"))
    hqq_cpp.quantize_model_(net, {"nbits": 3})
    assert len(told) == 1


def test_the_libraries_have_joined():
    assert list(listeners._listeners) == ["peft", "transformers", "diffusers.models.modeling_utils"]

"""explain(): what it says is what runs."""

import pytest

torch = pytest.importorskip("torch", reason="the layers need torch")

from torch import nn

import hqq_cpp
from hqq_cpp import backends


@pytest.fixture(autouse=True)
def settings(monkeypatch):
    monkeypatch.delenv("HQQ_CPU_MODE", raising=False)
    yield
    hqq_cpp.set_backend("auto", mode="auto")


@pytest.fixture
def layer():
    torch.manual_seed(0)
    return hqq_cpp.quantize_linear(nn.Linear(64, 48).requires_grad_(False), {"nbits": 4})


@pytest.fixture
def ran(monkeypatch):
    """Names of the functions of backends that were called."""
    calls = []
    for name in ("cpu", "torch"):
        module = getattr(backends, name)
        for verb in ("linear", "rows", "experts_linear"):

            def call(*arguments, verb=verb, name=name, function=getattr(module, verb)):
                calls.append((name, verb))
                return function(*arguments)

            monkeypatch.setattr(module, verb, call)
    return calls


@pytest.mark.parametrize(
    "rows, kernel", [(1, "decode"), (4, "decode"), (5, "panels"), (300, "panels")]
)
@pytest.mark.parametrize("mode", ["fast", "exact"])
def test_kernels_of_the_cpu(layer, ran, rows, kernel, mode):
    hqq_cpp.set_backend("native", mode=mode)
    x = torch.ones(rows, 64)
    why = hqq_cpp.explain(layer, x)
    assert why.backend == "cpu" and why.kernel == f"{kernel}, {mode}, {hqq_cpp.cpu_target()}"
    assert (why.mode, why.packing, why.reasons) == (mode, "cpu tiles", ())
    assert why.dtype == torch.float32 and why.device == torch.device("cpu")
    # It changes nothing, and the call agrees.
    assert not layer.is_tiled and ran == []
    layer(x)
    assert layer.is_tiled and ran == [("cpu", "linear")]
    assert hqq_cpp.explain(layer, x) == why


def test_the_text(layer):
    text = str(hqq_cpp.explain(layer, torch.ones(2, 3, 64)))
    assert text == f"cpu: panels, fast, {hqq_cpp.cpu_target()} (cpu tiles, float32, cpu)"
    hqq_cpp.set_backend("torch")
    assert str(hqq_cpp.explain(layer, torch.ones(1, 64))) == (
        "torch: dequantize + torch.mm (format 1, float32, cpu)\n  set_backend('torch') was called"
    )


def test_the_mode_of_the_environment(layer, monkeypatch):
    assert hqq_cpp.explain(layer, torch.ones(1, 64)).mode == "fast"
    monkeypatch.setenv("HQQ_CPU_MODE", "exact")
    assert hqq_cpp.explain(layer, torch.ones(1, 64)).mode == "exact"
    monkeypatch.setenv("HQQ_CPU_MODE", "slow")
    with pytest.raises(ValueError, match="HQQ_CPU_MODE is 'slow'"):
        hqq_cpp.explain(layer, torch.ones(1, 64))


def test_gradients_are_exact(layer):
    x = torch.ones(1, 64, requires_grad=True)
    why = hqq_cpp.explain(layer, x)
    assert why.mode == "exact" and "requires a gradient" in why.reasons[0]
    layer.bias.requires_grad_()
    assert hqq_cpp.explain(layer, x.detach()) == why
    with torch.no_grad():
        assert hqq_cpp.explain(layer, x.detach()).mode == "fast"
    hqq_cpp.set_backend("auto", mode="fast")
    assert hqq_cpp.explain(layer, x).mode == "fast"


def test_autocast_and_types(layer):
    x = torch.ones(1, 64)
    with torch.autocast("cpu", torch.bfloat16):
        assert hqq_cpp.explain(layer, x).dtype == torch.bfloat16
    why = hqq_cpp.explain(layer, x.double())
    assert (why.backend, why.kernel, why.mode) == ("cpu", "dequantize + torch.mm", "exact")
    assert "x of float64" in why.reasons[0]


def test_a_layer_without_tiles():
    layer = hqq_cpp.quantize_linear(nn.Linear(64, 48, bias=False), {"axis": 0, "group_size": 8})
    why = hqq_cpp.explain(layer, torch.ones(1, 64))
    assert why.kernel.startswith("row by row, exact") and why.packing == "format 1"
    assert "no tiles" in why.reasons[0]


def test_tensors_of_someone_else(layer, ran):
    layer.share_memory()
    why = hqq_cpp.explain(layer, torch.ones(1, 64))
    assert why.packing == "format 1" and "not the layer's own" in why.reasons[0]
    layer(torch.ones(1, 64))
    assert not layer.is_tiled


def test_experts(ran):
    q = hqq_cpp.quantize(torch.randn(8, 64), {"nbits": 4})
    experts = hqq_cpp.HqqExperts([q, q, q])
    x = torch.ones(15, 64)
    assert hqq_cpp.explain(experts, x[:12]).kernel.startswith("decode")
    assert hqq_cpp.explain(experts, x).kernel.startswith("panels")
    experts(x, torch.tensor([5, 5, 5]))
    assert ran == [("cpu", "experts_linear")]


def test_embeddings(ran):
    table = hqq_cpp.HqqEmbedding(hqq_cpp.quantize(torch.randn(8, 64), {"nbits": 8}))
    ids = torch.tensor([1, 7])
    why = hqq_cpp.explain(table, ids)
    assert (why.backend, why.kernel, why.packing, why.mode) == ("cpu", "rows", "format 1", "exact")
    table(ids)
    hqq_cpp.set_backend("torch")
    assert hqq_cpp.explain(table, ids).backend == "torch"
    table(ids)
    assert ran == [("cpu", "rows"), ("torch", "rows")]


def test_where_no_kernel_runs(layer):
    config = hqq_cpp.HqqConfig(balance="none").layer("x")
    empty = hqq_cpp.HqqLinear.empty(config, 8, 64, device="meta")
    cases = [
        (empty, torch.empty(1, 64, device="meta"), "no kernels for the device of the weight"),
        (layer, torch.empty(1, 64, device="meta"), "x and the weight are on different devices"),
    ]
    for module, x, reason in cases:
        why = hqq_cpp.explain(module, x)
        assert why.backend == "torch" and reason in why.reasons[0]
    # The twin: who asked for kernels is told, by the layer too.
    hqq_cpp.set_backend("native")
    for module, x, _ in cases:
        with pytest.raises(ValueError, match="the native kernels take"):
            hqq_cpp.explain(module, x)
        with pytest.raises(ValueError, match="the native kernels take"):
            module(x)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn])
def test_native_refuses_other_types(layer, dtype):
    x = torch.ones(1, 64).to(dtype)
    assert hqq_cpp.explain(layer, x).reasons == ("no kernel takes this dtype",)
    hqq_cpp.set_backend("native")
    with pytest.raises(ValueError, match="x is torch.float8_e4m3fn"):
        layer(x)


def test_other_modules_are_refused():
    with pytest.raises(TypeError, match="layer is a Linear; it must be an HqqLinear"):
        hqq_cpp.explain(nn.Linear(4, 4), torch.ones(1, 4))

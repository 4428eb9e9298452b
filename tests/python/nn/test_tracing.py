"""Tracers, modes and exporters see the operators of quantized layers."""

import copy
import io
import subprocess
import sys

import pytest

torch = pytest.importorskip("torch", reason="the layers need torch")

from torch import nn
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import hqq_cpp
from hqq_cpp.nn import watched


@pytest.fixture(autouse=True)
def exact_products():
    hqq_cpp.set_backend("auto", mode="exact")
    yield
    hqq_cpp.set_backend("auto", mode="auto")


def net():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 64))
    return hqq_cpp.quantize_model_(model, {"nbits": 4}).eval()


def dense(model):
    """The same model with dequantized weights, by torch alone."""
    twin = nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 64)).eval()
    for ours, theirs in ((model[0], twin[0]), (model[2], twin[2])):
        theirs.weight.data, theirs.bias.data = ours.dequantize(), ours.bias.detach().clone()
    return twin.requires_grad_(False)


@pytest.fixture(params=["as made", "after a call"])
def model(request):
    """A tiled model, and one that a tracer meets first."""
    model = net().requires_grad_(False)
    if request.param == "after a call":
        model(torch.ones(1, 64))
        assert model[0].is_tiled
    return model


X = torch.linspace(-1, 1, 5 * 64).reshape(5, 64)


def check(model, y, x=X):
    torch.testing.assert_close(y, dense(model)(x), rtol=1e-4, atol=1e-5)


def test_jit_trace(model, tmp_path):
    traced = torch.jit.trace(model, X[:3])
    assert "hqq_cpp::linear" in str(traced.inlined_graph)
    check(model, traced(X))
    traced.save(tmp_path / "traced.pt")
    check(model, torch.jit.load(tmp_path / "traced.pt")(X))


def test_saved_programs_need_the_import(model, tmp_path):
    torch.export.save(torch.export.export(model, (X,)), tmp_path / "a.pt2")
    torch.jit.trace(model, X).save(tmp_path / "a.pt")
    code = (
        "import torch\n{}x = torch.linspace(-1, 1, 5 * 64).reshape(5, 64)\n"
        f"y = torch.export.load(r'{tmp_path}/a.pt2').module()(x)\n"
        f"assert torch.equal(y, torch.jit.load(r'{tmp_path}/a.pt')(x))\n"
    )

    def run(imports):
        return subprocess.run([sys.executable, "-c", code.format(imports)], capture_output=True)

    assert run("import hqq_cpp\n").returncode == 0
    assert run("").returncode != 0


@pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
def test_make_fx(model, mode):
    graph = make_fx(model, tracing_mode=mode, _allow_non_fake_inputs=True)(X)
    assert "hqq_cpp.linear" in graph.code
    check(model, graph(X))


def test_fake_tensors(model):
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        y = model(mode.from_tensor(X))
        assert model[0].weight.shape == (128, 64)
        product = mode.from_tensor(X) @ model[0].weight.t()
    assert type(y).__name__ == type(product).__name__ == "FakeTensor" and y.shape == X.shape
    with FakeTensorMode() as mode, pytest.raises(AssertionError, match="FakeTensor"):
        model(mode.from_tensor(X))
    check(model, model(X))


def test_functional_tensors(model):
    check(model, torch.func.functionalize(model)(X))
    check(model, torch._from_functional_tensor(model(torch._to_functional_tensor(X))))


@pytest.mark.parametrize("strict", [True, False])
def test_export_of_the_weight(model, strict):
    class Weight(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = model[0]

        def forward(self, x):
            return nn.functional.linear(x, self.layer.weight, self.layer.bias)

    program = torch.export.export(Weight(), (X,), strict=strict)
    torch.testing.assert_close(program.module()(X), dense(model)[0](X))
    traced = torch.jit.trace(Weight(), X[:2])
    assert "hqq_cpp::dequantize" in str(traced.inlined_graph)
    torch.testing.assert_close(traced(X), dense(model)[0](X))


def test_symbolic_trace(model):
    graph = torch.fx.symbolic_trace(model)
    assert "hqq_cpp.linear" in graph.code
    check(model, graph(X))


class Names(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


class Calls(TorchFunctionMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("mode", [Names, Calls])
def test_modes_see_products(model, mode):
    with mode() as seen, torch.no_grad():
        check(model, model(X))
    assert sum("hqq_cpp.linear" in name for name in seen.names) == 2


def test_no_mode_no_detour(model):
    """The twin: nothing watches, and the kernels are called."""
    assert not watched.is_watched() and watched.is_ordinary(X)
    with Names():
        assert watched.is_watched() and watched.sees_operators()
    with torch.device("meta"):
        assert watched.is_watched() and not watched.sees_operators()
        # A default device is not where results go.
        y = model(X)
    check(model, y)


def test_flops_are_those_of_the_dense_model(model):
    def count(model):
        with FlopCounterMode(display=False) as counter:
            model(X.clone().requires_grad_()).sum().backward()
        return counter.get_total_flops()

    assert count(model) == count(dense(model)) == 2 * 2 * 5 * 2 * 64 * 128


def test_flops_of_experts():
    q = hqq_cpp.quantize(torch.randn(24, 64), {"nbits": 4})
    experts = hqq_cpp.HqqExperts([q, q])
    with FlopCounterMode(display=False) as counter:
        experts(X.clone().requires_grad_(), torch.tensor([2, 3])).sum().backward()
    assert counter.get_total_flops() == 2 * 2 * 5 * 64 * 24


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpoint(model, reentrant):
    def gradient(model):
        x = X.clone().requires_grad_()
        checkpoint(model, x, use_reentrant=reentrant).square().sum().backward()
        return x.grad

    torch.testing.assert_close(gradient(model), gradient(dense(model)), rtol=1e-4, atol=1e-4)


def test_tensors_whose_memory_is_not_their_value(model):
    complex_x = torch.view_as_complex(torch.stack([X, X], -1)).conj()
    assert complex_x.imag.is_neg()
    check(model, model(complex_x.imag), -X)
    zeros = torch._efficientzerotensor(5, 64)
    assert zeros.data_ptr() == 0
    check(model, model(zeros), torch.zeros(5, 64))


def test_subclasses(model):
    class Named(torch.Tensor):
        pass

    y = model(X.as_subclass(Named))
    assert type(y) is Named
    check(model, y.as_subclass(torch.Tensor))


@pytest.mark.parametrize(
    ("x", "text"),
    [
        (X.to_sparse(), "x is torch.sparse_coo; a quantized layer takes dense tensors"),
        (torch.nested.nested_tensor([X, X], layout=torch.jagged), "x is a nested tensor"),
        (X.long(), "x is torch.int64; it must be a floating dtype"),
        (X.to(torch.complex64), "x is torch.complex64; it must be a floating dtype"),
        (X[:, :63], r"x has the shape \[5, 63\]; its last dimension must be 64"),
    ],
)
def test_inputs_that_are_refused(model, x, text):
    with pytest.raises(ValueError, match=text):
        model(x)
    if x.layout is torch.strided and x.is_floating_point():
        with pytest.raises(Exception, match=text):
            make_fx(model, tracing_mode="fake", _allow_non_fake_inputs=True)(x)


def test_embedding_and_experts():
    q = hqq_cpp.quantize(torch.randn(100, 64), {"nbits": 8})
    table, ids = hqq_cpp.HqqEmbedding(q), torch.tensor([[3, 99], [0, 1]])
    for traced in (
        torch.jit.trace(table, ids),
        make_fx(table)(ids),
        torch.fx.symbolic_trace(nn.Sequential(table)),
    ):
        assert torch.equal(traced(ids + 0), table(ids))
        # TorchScript makes a RuntimeError of it.
        with pytest.raises((IndexError, RuntimeError), match="index 100 is out of range"):
            traced(ids + 1)
    with torch.device("meta"):
        assert torch.equal(table(ids), table.dequantize()[ids])
    experts = hqq_cpp.HqqExperts([q, q])
    counts = torch.tensor([2, 3])
    traced = torch.jit.trace(lambda x: experts(x, counts) + x @ experts[1].t(), X)
    assert "hqq_cpp::experts_linear" in str(traced.graph)
    torch.testing.assert_close(traced(-X), -(X + X) @ q_dense(q).t(), rtol=1e-4, atol=1e-4)


def q_dense(q):
    return hqq_cpp.HqqEmbedding(q).dequantize()


def test_onnx_is_refused(model):
    pytest.importorskip("onnx", reason="the exporter of torch.onnx needs onnx")
    with pytest.raises(Exception, match="hqq_cpp::linear"):
        torch.onnx.export(model, (X,), io.BytesIO(), dynamo=False)


def test_copies_under_a_fake_mode(model):
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = copy.deepcopy(model)
        assert fake(mode.from_tensor(X)).shape == X.shape
    check(model, model(X))

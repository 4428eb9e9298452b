"""What fused products keep in device memory, and tensors in another order, on the SIMT shim: see
cuda_on_shim.py."""

from __future__ import annotations

import functools
import gc
import weakref

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

import hqq_cpp
from cuda_on_shim import (  # noqa: F401
    is_right,
    is_right_product,
    make_experts,
    make_layer,
    on_gpu,
    random_matrix,
    rng,
)
from hqq_cpp import backends
from hqq_cpp.backends import chooser, fused
from hqq_cpp.backends import cuda_calls as cuda
from hqq_cpp.nn import ops

SIDE_STREAM = 5


@pytest.fixture
def record(monkeypatch):
    """Runs a function as if a graph were recorded."""

    def record(function):
        with monkeypatch.context() as patch:
            patch.setattr(cuda, "is_capturing", lambda tensor: True)
            patch.setattr(cuda, "stream_of", lambda tensor: SIDE_STREAM)
            return function()

    return record


@pytest.fixture
def no_workspaces(monkeypatch):
    monkeypatch.setattr(fused, "_workspaces", {})
    monkeypatch.setattr(fused, "_graph_workspaces", {})
    monkeypatch.setattr(fused, "_recorded", [])


def one_row(rng):
    return random_matrix(rng, (1, 64), torch.float16)


def only_copy():
    [entry] = fused._copies.values()
    return entry.fused


def contents(copy):
    return [t.clone() for t in copy.tensors]


def same_contents(a, b):
    return all(torch.equal(*pair) for pair in zip(a, b))


# ---- When there is a copy ----------------------------------------------------------------------


def test_the_copy_is_made_once_and_goes_with_the_layer(rng, on_gpu):
    layer = make_layer(rng, 16, 64)
    x = one_row(rng)
    layer(x)
    copy = only_copy()
    layer(x)
    assert only_copy() is copy
    assert not layer.is_tiled and layer.state_dict()["W_q"].shape == layer.W_q.shape
    del layer, copy
    gc.collect()
    assert fused._copies == {}


def test_a_graph_that_is_recorded_makes_no_copy(rng, on_gpu, record):
    layer = make_layer(rng, 16, 64)
    x = random_matrix(rng, (2, 64), torch.float16)
    y = record(lambda: layer(x))
    assert fused._copies == {} and on_gpu == []
    assert is_right(layer, x, y) and is_right(layer, x, layer(x))
    assert len(fused._copies) == 1


def test_many_rows_make_no_copy(rng, on_gpu, monkeypatch):
    layer = make_layer(rng, 16, 64)
    layer.bias.requires_grad_()
    max_rows = fused.limits(layer.packed_weight(), torch.float16).max_rows
    x = random_matrix(rng, (max_rows + 1, 64), torch.float16)
    layer(x.requires_grad_()).sum().backward()
    experts = make_experts(rng, 2, 1, 16, 64)
    more = random_matrix(
        rng, (2 * fused.limits(experts.packed_weight(), x.dtype).max_rows + 1, 64), x.dtype
    )
    counts = torch.tensor([1, len(more) - 1])
    experts(more, counts)
    assert fused._copies == {} and on_gpu == []
    # Made for fewer rows, and not used for more.
    layer(x[:-1])
    assert len(fused._copies) == 1 and on_gpu == [True]
    layer(x)
    # What may come before the recording of a graph, in which rows cannot be counted.
    monkeypatch.setattr(cuda, "stream_of", lambda tensor: SIDE_STREAM)
    experts(more, counts)
    assert len(fused._copies) == 2 and on_gpu == [True]


def test_without_copies(rng, on_gpu):
    layer = make_layer(rng, 16, 64)
    x = one_row(rng)
    layer(x)
    hqq_cpp.set_backend("auto", fused=False)
    try:
        assert fused._copies == {}
        expected = torch.addmm(layer.bias, x, layer.dequantize(torch.float16).t())
        assert torch.equal(layer(x), expected)
        assert len(on_gpu) == 1
    finally:
        hqq_cpp.set_backend("auto", fused=True)
    layer(x)
    assert len(on_gpu) == 2


# ---- Changes of the weight ---------------------------------------------------------------------


def change_in_place(layer, other):
    with torch.no_grad():
        layer.scale.mul_(2)


def change_all_in_place(layer, other):
    with torch.no_grad():
        for mine, new in zip(layer.parameters(), other.parameters()):
            mine.copy_(new)


def replace_scale(layer, other):
    layer.scale = nn.Parameter(other.scale.clone(), requires_grad=False)


def replace_data_of_scale(layer, other):
    layer.scale.data = other.scale.clone()


def write_through_data(layer, other):
    layer.W_q.data.copy_(other.W_q)
    layer.refresh_copies()


def write_in_inference_mode(layer, other):
    with torch.inference_mode():
        layer.W_q.data.copy_(other.W_q)
    layer.refresh_copies()


CHANGES = [
    lambda layer, other: layer.load_state_dict(other.state_dict()),
    lambda layer, other: layer.load_state_dict(other.state_dict(), assign=True),
    lambda layer, other: layer.quantize_(other.weight),
    change_in_place,
    change_all_in_place,
    replace_scale,
    replace_data_of_scale,
    write_through_data,
    write_in_inference_mode,
]


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("settings", [{"balance": "none"}, {"quant_zero": True}])
def test_the_copy_follows_the_weight(rng, on_gpu, change, settings):
    layer, other = (make_layer(rng, 16, 64, **settings) for _ in range(2))
    x = random_matrix(rng, (2, 64), torch.float16)
    before = layer(x)
    change(layer, other)
    y = layer(x)
    assert is_right(layer, x, y) and not is_right(layer, x, before)
    assert len(on_gpu) == 2
    gc.collect()
    assert len(fused._copies) == 1 and fused._retired == []


def test_tensors_of_inference_mode(rng, on_gpu):
    layer, other = (make_layer(rng, 16, 64, balance="none") for _ in range(2))
    x = one_row(rng)
    with torch.inference_mode():
        for module in (layer, other):
            for name in ("W_q", "scale"):
                module._parameters[name] = nn.Parameter(
                    module._parameters[name].clone(), requires_grad=False
                )
        assert layer.scale.is_inference() and not layer.zero.is_inference()
        before = layer(x)
        # Counted, beside tensors that are not.
        layer.zero.data = other.zero
        assert is_right(layer, x, layer(x))
        layer.scale = other.scale
        assert is_right(layer, x, layer(x)) and not is_right(layer, x, before)
        layer.scale.mul_(2)
        layer.refresh_copies()
        assert is_right(layer, x, layer(x))
    layer.zero.add_(1)
    assert is_right(layer, x, layer(x))


def test_layers_that_share_codes(rng, on_gpu):
    layer, other = (make_layer(rng, 16, 64, balance="none") for _ in range(2))
    other.W_q = layer.W_q
    x = one_row(rng)
    for _ in range(2):
        assert all(is_right(module, x, module(x)) for module in (layer, other))
    # Both are seen to change.
    layer.load_state_dict(make_layer(rng, 16, 64, balance="none").state_dict())
    assert all(is_right(module, x, module(x)) for module in (layer, other))


def test_views_of_the_same_codes(rng, on_gpu):
    wide = make_layer(rng, 32, 64, bias=False, balance="none")
    first, even = (make_layer(rng, 16, 64, bias=False, balance="none") for _ in range(2))
    for layer in (first, even):
        layer.scale, layer.zero = first.scale, first.zero
    first.W_q = nn.Parameter(wide.W_q[:16], requires_grad=False)
    even.W_q = nn.Parameter(wide.W_q[::2], requires_grad=False)
    x = one_row(rng)
    assert all(is_right(layer, x, layer(x)) for layer in (first, even))


# ---- Recorded graphs ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change",
    [
        lambda layer, other: layer.load_state_dict(other.state_dict()),
        change_all_in_place,
        write_through_data,
    ],
)
def test_changes_reach_recorded_graphs(rng, on_gpu, record, change):
    """The graph holds addresses: the copy stays where it is."""
    layer, other = (make_layer(rng, 16, 64) for _ in range(2))
    x = one_row(rng)
    layer(x)
    record(lambda: layer(x))
    assert len(on_gpu) == 2
    copy = only_copy()
    addresses, before = [t.data_ptr() for t in copy.tensors], contents(copy)
    change(layer, other)
    if change is change_all_in_place:
        layer(x)
    assert only_copy() is copy and [t.data_ptr() for t in copy.tensors] == addresses
    after = contents(copy)
    assert not same_contents(before, after)
    fused._copies.clear()
    layer(x)
    assert same_contents(contents(only_copy()), after)


def test_copies_stay_for_recorded_graphs(rng, on_gpu, record):
    layer, other = (make_layer(rng, 16, 64, balance="none") for _ in range(2))
    x = one_row(rng)
    layer(x), other(x)
    record(functools.partial(layer, x))
    memory, others = (weakref.ref(e.fused.tensors[0]) for e in fused._copies.values())
    hqq_cpp.set_backend("auto", fused=False)
    try:
        gc.collect()
        assert memory() is not None and others() is None
        before = memory().clone()
        layer(x)
        assert len(on_gpu) == 3
        layer.load_state_dict(other.state_dict())
        assert not torch.equal(memory(), before)
    finally:
        hqq_cpp.set_backend("auto", fused=True)
    layer(x)
    assert only_copy().tensors[0] is memory()
    replace_scale(layer, other)
    assert is_right(layer, x, layer(x))
    gc.collect()
    assert only_copy().tensors[0] is not memory() is not None
    del layer
    gc.collect()
    assert memory() is None and fused._copies == {} and fused._retired == []


# ---- Memory and streams ------------------------------------------------------------------------


class Allocations(TorchDispatchMode):
    """Addresses of everything that this thread makes: what a pool of one thread gets."""

    def __init__(self):
        super().__init__()
        self.seen = set()
        self.kept = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "hqq_cpp":  # torch keeps what happens in an operator from a mode
            with self:
                return ops._linear(*args)
        out = func(*args, **(kwargs or {}))
        for tensor in tree_flatten(out)[0]:
            if isinstance(tensor, torch.Tensor) and "empty" in func.name():
                self.kept.append(tensor)
                self.seen.add(tensor.data_ptr())
        return out


def test_lasting_memory_is_not_of_the_thread(rng, on_gpu, no_workspaces):
    """While torch.compile warms up for a graph, this thread allocates in the memory of the graph."""
    layer = make_layer(rng, 16, 64, balance="sinkhorn")
    x = one_row(rng)
    with Allocations() as allocations:
        y = layer(x)
    assert y.data_ptr() in allocations.seen
    held = [*fused._workspaces.values(), *fused._graph_workspaces.values()]
    lasting = [*only_copy().tensors, *(workspace.memory for workspace in held)]
    assert len(lasting) == 5 and all(t.numel() for t in lasting)
    assert allocations.seen.isdisjoint(t.data_ptr() for t in lasting)


def test_workspaces(rng, no_workspaces):
    like = torch.zeros(1)
    least = fused._MIN_WORKSPACE

    def workspace(size, stream=0, is_recording=False):
        return fused._workspace(size, like, stream, is_recording)

    assert workspace(10, is_recording=True) is None
    small = weakref.ref(workspace(10))
    assert small().numel() == least and not small().any()
    assert workspace(least) is small() and workspace(10, stream=1) is not small()
    large = weakref.ref(workspace(least + 1))
    assert large().numel() == 2 * least and workspace(2 * least) is large()
    assert small() is None
    # A graph of this stream, and of one without.
    assert workspace(10, is_recording=True) is large()
    of_graphs = weakref.ref(workspace(10, stream=SIDE_STREAM, is_recording=True))
    assert of_graphs() is not large() and of_graphs().numel() == 2 * least
    assert workspace(2 * least + 1, stream=SIDE_STREAM, is_recording=True) is None
    larger = workspace(2 * least + 1)
    assert larger.numel() == 4 * least
    assert large() is not None and of_graphs() is not None and len(fused._recorded) == 2


def test_a_product_after_too_little_memory(rng, on_gpu, no_workspaces, monkeypatch):
    layer = make_layer(rng, 16, 64)
    x = one_row(rng)
    allocate = fused._allocate
    for failing in range(3):  # the copy, and both workspaces
        fused._copies.clear()
        fused._workspaces.clear()
        fused._graph_workspaces.clear()
        calls = []

        def allocate_or_fail(*arguments, failing=failing, calls=calls):
            calls.append(arguments)
            if len(calls) == failing + 1:
                raise torch.OutOfMemoryError("no memory")
            return allocate(*arguments)

        monkeypatch.setattr(fused, "_allocate", allocate_or_fail)
        with pytest.raises(torch.OutOfMemoryError):
            layer(x)
        assert is_right(layer, x, layer(x))
    assert on_gpu == [True] * 3


def test_other_streams_wait_once(rng, on_gpu, monkeypatch):
    waits = []
    wait = fused.Fused._wait

    def counting(copy, stream):
        waits.append(stream)
        wait(copy, stream)

    monkeypatch.setattr(fused.Fused, "_wait", counting)
    stream = 0
    monkeypatch.setattr(cuda, "stream_of", lambda tensor: stream)
    layer = make_layer(rng, 16, 64)
    x = one_row(rng)
    for stream in (0, 0, 5, 5, 7, 0):
        layer(x)
    assert waits == [5, 7]
    change_in_place(layer, None)
    stream = 7
    layer(x)  # copies again
    assert waits == [5, 7]
    for stream in (0, 5, 5):
        layer(x)
    assert waits == [5, 7, 0, 5]


# ---- Tiled tensors that came to a GPU past the module ------------------------------------------


def test_tiled_tensors_are_put_back_in_order(rng, monkeypatch):
    """What accelerate does to a layer that has run on the CPU: it replaces the parameters."""
    layer = make_layer(rng, 32, 64, group_size=32, quant_zero=True)
    experts = make_experts(rng, 3, 2, 32, 64, group_size=32, nbits=4)
    table = hqq_cpp.HqqEmbedding(layer.quantized_tensor(), dtype=torch.float16)
    x, counts = random_matrix(rng, (4, 64), torch.float16), torch.tensor([1, 0, 3])
    back = torch.ones(4, 64, dtype=torch.float16)
    expected = [layer.state_dict(), experts.state_dict(), layer.dequantize(), experts.dequantize()]
    y_transposed = experts(back, counts, transposed=True)
    layer.tile_(), experts.tile_()
    table._parameters.update({k: v for k, v in layer._parameters.items() if k != "bias"})
    weights = [
        {k: v.detach().clone() for k, v in module.packed()._asdict().items() if v is not None}
        for module in (layer, experts)
    ]
    monkeypatch.setitem(chooser._KERNELS, "cpu", chooser._KERNELS["cuda"])

    def are_tiled():
        for module, weight in zip((layer, experts), weights):
            for name, tensor in weight.items():
                module._parameters[name] = nn.Parameter(tensor, requires_grad=False)
        assert layer.is_tiled and experts.is_tiled

    are_tiled()
    assert torch.equal(layer.dequantize(), expected[2])
    assert torch.equal(experts.dequantize(), expected[3])
    assert torch.equal(table(torch.tensor([3, 31])), expected[2].half()[[3, 31]])
    # As a compiler and autograd call it.
    y = backends.linear(x, layer.packed_weight(), None)
    assert is_right_product(layer, expected[2], x, y)
    assert torch.equal(backends.linear_backward(y, layer.packed_weight()), y @ expected[2].half())
    y_experts = backends.experts_linear(x, counts, experts.packed_weight(), None, False)
    assert layer.is_tiled and experts.is_tiled
    assert is_right(layer, x, layer(x)) and not layer.is_tiled
    y = experts(x, counts)
    assert not experts.is_tiled
    for rows, e in ((slice(0, 1), 0), (slice(1, 4), 2)):
        for given in (y, y_experts):
            assert is_right_product(experts, expected[3][e], x[rows], given[rows])
    are_tiled()
    assert torch.equal(experts(back, counts, transposed=True), y_transposed)
    for module, state in zip((layer, experts), expected):
        are_tiled()
        for name, tensor in module.state_dict().items():
            assert torch.equal(tensor, state[name]), name
        module.untile_()
        for name, tensor in module.state_dict().items():
            assert torch.equal(tensor, state[name]), name

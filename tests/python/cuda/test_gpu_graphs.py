"""Layers on a GPU inside graphs, compilers, streams and several GPUs. Everything skips where there is no GPU."""

import gc

import pytest

torch = pytest.importorskip("torch", reason="the tests on a GPU need torch")

import hqq_cpp
from gpu_checks import (
    DEVICE,
    REASON,
    check_product,
    gpu_layer,
    make_layer,
    normal,
    only_native_kernels,
    product,
    record,
    same_tensors,
)  # fmt: skip

pytestmark = pytest.mark.skipif(REASON is not None, reason=str(REASON))


@pytest.fixture(autouse=True)
def only_native():
    with only_native_kernels():
        yield


@pytest.mark.parametrize("rows", [1, 16, 65, 512])
def test_cuda_graph(rows):
    layers = [make_layer(nbits, 1, 512, 512) for nbits in (4, 3)]
    x = torch.zeros(rows, 512, dtype=torch.float16, device=DEVICE)
    with torch.no_grad():
        graph, results = record(lambda: [product(layer, x) for layer in layers])
        for seed in range(3):
            new = normal(rows, 512, seed=seed, dtype=torch.float16).to(DEVICE)
            x.copy_(new)
            graph.replay()
            for layer, y in zip(layers, results):
                check_product(layer, new, y)
                # Beyond, cuBLAS multiplies, which may work in another way inside a graph.
                assert rows > 65 or torch.equal(y, layer(new))


def test_cuda_graph_of_experts():
    quantized = [hqq_cpp.quantize(normal(64, 128, seed=e), {"nbits": 4}) for e in range(4)]
    made = hqq_cpp.HqqExperts(quantized).to(DEVICE)
    x = normal(6, 128, dtype=torch.float16).to(DEVICE)
    counts = torch.tensor([2, 2, 1, 1], device=DEVICE)
    with torch.no_grad():
        graph, y = record(lambda: product(made, x, counts))
        for new in ([0, 6, 0, 0], [1, 2, 3, 0]):
            counts.copy_(torch.tensor(new))
            graph.replay()
            assert torch.equal(y, made(x, counts))


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_compiler(mode):
    torch._dynamo.reset()
    bias = normal(384, seed=2, dtype=torch.float16)
    layer = make_layer(4, 1, bias=bias).tile_()
    compiled = torch.compile(lambda x: layer(x) * 2, fullgraph=True, mode=mode)
    with torch.no_grad():
        for rows in (1, 16, 300):
            for seed in range(3):
                x = normal(rows, 512, seed=seed, dtype=torch.float16).to(DEVICE)
                y = compiled(x) / 2  # exact
                check_product(layer, x, y, bias)
                assert rows > 65 or torch.equal(y, layer(x))


def test_two_streams():
    layers = [make_layer(4, 1, 512, 4096), make_layer(3, 1, 512, 4096)]
    x = normal(4, 4096, dtype=torch.float16).to(DEVICE)
    expected = [layer(x) for layer in layers]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in layers]
    results = [[], []]
    for _ in range(50):
        for stream, layer, its in zip(streams, layers, results):
            with torch.cuda.stream(stream):
                its.append(layer(x))
    torch.cuda.synchronize()
    for its, y in zip(results, expected):
        assert all(torch.equal(other, y) for other in its)


def test_other_streams_see_packed_codes():
    layer, twin = (make_layer(4, 1, 1024, 4096) for _ in range(2))
    x = normal(4, 4096, dtype=torch.float16).to(DEVICE)
    torch.cuda.synchronize()
    first, second = torch.cuda.Stream(), torch.cuda.Stream()
    with torch.cuda.stream(first):
        torch.cuda._sleep(200_000_000)  # a tenth of a second
        results = [layer(x)]
    with torch.cuda.stream(second):
        results.append(layer(x))
    torch.cuda.synchronize()
    for y in results:
        check_product(twin, x, y)


def test_a_changed_weight_reaches_graphs():
    layer, other = (
        make_layer(4, 1),
        gpu_layer(normal(384, 512, seed=9), make_layer(4, 1).layer_config),
    )
    x = normal(2, 512, dtype=torch.float16).to(DEVICE)
    with torch.no_grad():
        graph, y = record(lambda: layer(x))
    layer.to(DEVICE)
    gc.collect()
    others = [torch.full((size,), 255, dtype=torch.uint8, device=DEVICE)
              for size in [96 << 10, 12 << 10] * 64]  # fmt: skip
    graph.replay()
    check_product(layer, x, y)
    layer.load_state_dict(other.state_dict())
    graph.replay()
    check_product(other, x, y)
    with torch.no_grad():
        layer.scale.mul_(2)
    graph.replay()
    check_product(layer, x, y)
    assert others


@pytest.mark.skipif(
    REASON is not None or torch.cuda.device_count() < 2, reason="there is no second GPU"
)
def test_second_gpu():
    W, settings = normal(384, 512), {"nbits": 4, "balance": "none"}
    q = hqq_cpp.quantize(W, settings)
    assert torch.cuda.current_device() == 0
    layer = hqq_cpp.quantize_linear(W.to("cuda:1"), settings)
    assert layer.device == torch.device("cuda:1")
    same_tensors(layer, q)
    x = normal(9, 512, dtype=torch.float16)
    check_product(layer, x, layer(x.to("cuda:1")))
    moved = layer.to("cuda:0")
    check_product(moved, x, moved(x.to("cuda:0")))
    assert torch.cuda.current_device() == 0
    host = hqq_cpp.quantize(W, settings, device="cuda:1")
    same_tensors(hqq_cpp.HqqLinear(host), q)

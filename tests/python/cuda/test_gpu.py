"""The CUDA part on a GPU: the bits of the CPU where they are promised, derived bounds where sums are
rounded. Everything skips where there is no GPU; scripts/test-gpu.sh runs it where there is one."""

import itertools

import numpy as np
import pytest

import reference

torch = pytest.importorskip("torch", reason="the tests on a GPU need torch")

import hqq_cpp
from gpu_checks import (
    DEVICE,
    REASON,
    STEP,
    bits,
    check,
    check_product,
    gpu_layer,
    has_kernel,
    make_layer,
    max_rows,
    normal,
    only_native_kernels,
    parts_of,
    product,
    product_bound,
    replace_parameters,
    same_tensors,
)  # fmt: skip
from hqq_cpp.format import CUDA_TILES

pytestmark = pytest.mark.skipif(REASON is not None, reason=str(REASON))

NBITS = reference.NBITS
HALVES = [torch.float16, torch.bfloat16]
ROWS = (1, 2, 7, 8, 9, 16, 17, 64, 65, 256)


@pytest.fixture(autouse=True)
def only_native():
    with only_native_kernels():
        yield


# ---- Quantization --------------------------------------------------------------------------------

SHAPES = [(64, 256, 64), (33, 200, 24), (40, 96, None), (7, 1000, 128)]  # out, in, group_size


@pytest.mark.parametrize("solver", ["joint", "hqq", "minmax"])
@pytest.mark.parametrize("axis", [1, 0])
@pytest.mark.parametrize("nbits", NBITS)
def test_quantize_bits(nbits, axis, solver):
    for shape, balance in itertools.product(SHAPES, ("none", "sinkhorn")):
        out, columns, group_size = shape
        settings = {
            "nbits": nbits, "axis": axis, "group_size": group_size, "solver": solver,
            "balance": balance,
        }  # fmt: skip
        W = normal(out, columns, seed=columns)
        same_tensors(gpu_layer(W, settings), hqq_cpp.quantize(W, settings))


@pytest.mark.parametrize("axis", [1, 0])
@pytest.mark.parametrize("nbits", [4, 3, 1.58])
def test_quantize_bits_with_importance(nbits, axis):
    W = normal(48, 320)
    importance = normal(320, seed=1).square() + 1e-3
    for balance in ("none", "auto"):
        settings = {"nbits": nbits, "axis": axis, "group_size": 32, "balance": balance}
        layer = gpu_layer(W, settings, importance=importance)
        same_tensors(layer, hqq_cpp.quantize(W, settings, importance=importance))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_quantize_bits_of_other_types(dtype):
    W = normal(48, 300).to(dtype)
    for meta_dtype, quant in itertools.product(("float16", "bfloat16", "float32"), (False, True)):
        settings = {
            "group_size": 32, "meta_dtype": meta_dtype, "quant_scale": quant, "quant_zero": quant,
        }  # fmt: skip
        same_tensors(gpu_layer(W, settings), hqq_cpp.quantize(W, settings))


def test_quantize_bits_of_a_large_matrix():
    W = normal(2048, 4096, dtype=torch.float16)
    settings = {"nbits": 4, "group_size": 64}
    same_tensors(gpu_layer(W, settings), hqq_cpp.quantize(W, settings))


def test_quantize_bits_of_rows_apart():
    W = normal(64, 400)
    settings = {"group_size": 16, "balance": "none"}
    for part in (W[::2], W[:, 17:337], W.t()):
        same_tensors(gpu_layer(part, settings), hqq_cpp.quantize(part.contiguous(), settings))


def test_quantize_of_host_memory():
    """hqq_cpp.quantize(device='cuda') copies there and back."""
    W = normal(96, 640).numpy()
    q, stats = hqq_cpp.quantize(W, {"nbits": 3}, device="cuda", stats=True)
    cpu, cpu_stats = hqq_cpp.quantize(W, {"nbits": 3}, stats=True)
    for name, tensor in cpu.tensors().items():
        assert q.tensors()[name].numpy().tobytes() == tensor.numpy().tobytes(), name
    # The CPU adds up a row in float32.
    for name, value in cpu_stats.to_dict().items():
        assert stats.to_dict()[name] == pytest.approx(value, rel=640 * 2.0**-24), name


def test_quantize_refuses_what_the_cpu_refuses():
    W = normal(8, 64)
    W[3, 5] = float("nan")
    W[6, 0] = float("inf")
    with pytest.raises(ValueError) as cpu:
        hqq_cpp.quantize(W, {"group_size": 32}, name="a.layer")
    with pytest.raises(ValueError) as gpu:
        hqq_cpp.quantize_linear(W.to(DEVICE), {"group_size": 32}, name="a.layer")
    assert str(gpu.value) == str(cpu.value)


# ---- Dequantization ------------------------------------------------------------------------------


@pytest.mark.parametrize("axis", [1, 0])
@pytest.mark.parametrize("nbits", NBITS)
def test_dequantize_bits(nbits, axis):
    for (out, columns, group_size), balance in itertools.product(SHAPES, ("none", "sinkhorn")):
        settings = {"nbits": nbits, "axis": axis, "group_size": group_size, "balance": balance}
        q = hqq_cpp.quantize(normal(out, columns), settings)
        layer = hqq_cpp.HqqLinear(q).to(DEVICE)
        for dtype in ("float32", "float16", "bfloat16", "float64"):
            expected = torch.from_dlpack(hqq_cpp.dequantize(q, dtype))
            assert torch.equal(bits(layer.dequantize(dtype).cpu()), bits(expected)), dtype


@pytest.mark.parametrize("axis", [1, 0])
def test_embedding_bits(axis):
    for nbits, balance in itertools.product((8, 4, 3, 1.58), ("none", "sinkhorn")):
        settings = {"nbits": nbits, "axis": axis, "group_size": 32, "balance": balance}
        q = hqq_cpp.quantize(normal(96, 160), settings)
        table = hqq_cpp.HqqEmbedding(q, dtype=torch.float16).to(DEVICE)
        dense = torch.from_dlpack(hqq_cpp.dequantize(q, "float16")).to(DEVICE)
        for ids in (torch.tensor([[0, 95, 5], [5, 17, 31]]), torch.tensor(3), torch.arange(0)):
            for dtype in (torch.int64, torch.int32):
                ids = ids.to(DEVICE, dtype)
                assert torch.equal(table(ids), dense[ids.long()])


# ---- Products ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("axis", [1, 0])
@pytest.mark.parametrize("nbits", NBITS)
def test_product(nbits, axis, dtype):
    bias = normal(384, seed=2, dtype=dtype)
    for balance in ("none", "sinkhorn"):
        plain = make_layer(nbits, axis, balance=balance)
        with_bias = make_layer(nbits, axis, balance=balance, bias=bias)
        x = normal(max(ROWS), 512, seed=1, dtype=dtype).to(DEVICE)
        bounds = product_bound(plain, x), product_bound(plain, x, bias)
        assert has_kernel(plain, dtype)
        for rows in ROWS:
            check(x[:rows], product(plain, x[:rows]), bounds[0])
            check(x[:rows], product(with_bias, x[:rows]), bounds[1])
        with pytest.raises(AssertionError):
            check(x[:1], plain(x[:1]).roll(1, -1), bounds[0])


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("nbits", NBITS)
def test_product_of_few_rows_is_exact(nbits, dtype):
    """With axis 1 no weight is ever rounded to 16 bits, and there is a kernel for tiles."""
    layer = make_layer(nbits, 1)
    x = normal(16, 512, dtype=dtype).to(DEVICE)
    bounds = product_bound(layer, x, sixteen=False)
    assert max_rows(layer, dtype) >= 16
    for rows in (1, 8, 16):
        check(x[:rows], product(layer, x[:rows]), bounds)


ODD = [
    # out, in, group_size, axis
    (1, 32, 32, 1),
    (17, 100, 24, 1),
    (33, 200, 24, 1),
    (100, 1000, 40, 1),
    (130, 4160, 64, 1),
    (40, 300, None, 1),
    (64, 96, 16, 0),
    (96, 100, 32, 0),
    (257, 64, 40, 0),
    (30, 64, None, 0),
]


@pytest.mark.parametrize("shape", ODD, ids=str)
def test_product_of_odd_shapes(shape):
    out, columns, group_size, axis = shape
    for nbits, balance in itertools.product((4, 3, 1.58, 8), ("none", "sinkhorn")):
        layer = make_layer(nbits, axis, out, columns, group_size, balance)
        for dtype in HALVES:
            x = normal(33, columns, seed=1, dtype=dtype).to(DEVICE)
            bounds = product_bound(layer, x)
            for rows in (1, 5, 16, 33):
                check(x[:rows], product(layer, x[:rows]), bounds)


@pytest.mark.parametrize("meta_dtype", ["bfloat16", "float32"])
def test_product_with_other_metadata(meta_dtype):
    for quant, dtype in itertools.product((False, True), HALVES):
        settings = {
            "nbits": 4, "group_size": 32, "meta_dtype": meta_dtype, "quant_scale": quant,
            "quant_zero": quant, "balance": "none",
        }  # fmt: skip
        layer = gpu_layer(normal(96, 256), settings)
        for rows in (1, 16, 100):
            x = normal(rows, 256, seed=rows, dtype=dtype).to(DEVICE)
            check_product(layer, x, product(layer, x))


def test_product_of_large_layers():
    """Layers that are cut between many blocks, whose sums meet in memory."""
    for out, columns in ((64, 8192), (4096, 1024)):
        layer = make_layer(4, 1, out, columns)
        for rows in (1, 16, 128):
            x = normal(rows, columns, seed=rows, dtype=torch.float16).to(DEVICE)
            y = product(layer, x)
            check_product(layer, x, y)
            for _ in range(5):
                assert torch.equal(layer(x), y)  # always in the same order


def test_product_of_rows_apart():
    layer = make_layer(4, 1)
    large = normal(40, 1100, seed=3, dtype=torch.float16).to(DEVICE)
    whole = normal(512, 24, seed=4, dtype=torch.float16).to(DEVICE)
    for x in (large[:, 3:515], large[::2, 8:520], large[:1, 1:513], whole.t(), large[:0, :512]):
        y = product(layer, x)
        check_product(layer, x, y)
        assert torch.equal(y, layer(x.contiguous()))
    x = normal(2, 3, 512, seed=5, dtype=torch.float16).to(DEVICE)
    assert torch.equal(layer(x), layer(x.flatten(0, 1)).unflatten(0, (2, 3)))


def test_nan_stays_in_its_row():
    layer = make_layer(4, 1)
    for rows in (2, 80):
        x = torch.ones(rows, 512, dtype=torch.float16, device=DEVICE)
        x[1, 300] = float("nan")
        finite = layer(x).isfinite()
        assert not finite[1].any() and finite[0].all() and finite[2:].all()


def test_a_changed_weight_is_seen():
    layer = make_layer(4, 1)
    x = normal(2, 512, dtype=torch.float16).to(DEVICE)
    before = layer(x)
    layer.quantize_(normal(384, 512, seed=9).to(DEVICE))
    check_product(layer, x, product(layer, x))
    assert not torch.equal(layer(x), before)
    layer.W_q.data.copy_(make_layer(4, 1).tile_().W_q)
    check_product(layer, x, product(layer, x))


def test_a_layer_takes_its_own_size():
    """The codes are reordered in place: no copy is kept."""
    layer = make_layer(4, 1, 4096, 4096)
    x = normal(1, 4096, dtype=torch.float16).to(DEVICE)
    product(make_layer(4, 1, 4096, 4096), x)  # the workspaces, which stay
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    product(layer, x)
    torch.cuda.synchronize()
    assert layer.is_tiled and torch.cuda.memory_allocated() <= before + (1 << 20)


def test_parameters_moved_past_the_layer():
    """Tiled tensors, and a bias that is still on the CPU."""
    W, bias = normal(384, 512), normal(384, seed=2, dtype=torch.float16)
    x = normal(2, 512, dtype=torch.float16).to(DEVICE)
    layer = hqq_cpp.HqqLinear(hqq_cpp.quantize(W, {"nbits": 4})).tile_()
    assert layer.is_tiled
    replace_parameters(layer, {k: v for k, v in layer._parameters.items() if v is not None})
    assert layer.is_tiled and layer.device.type == DEVICE
    dense = torch.from_dlpack(hqq_cpp.dequantize(hqq_cpp.quantize(W, {"nbits": 4}), "float32"))
    assert torch.equal(layer.dequantize().cpu(), dense)
    y = layer(x)
    assert layer.packed_weight().packing == CUDA_TILES
    check_product(layer, x, y)
    biased = hqq_cpp.quantize_linear(W.to(DEVICE), {"nbits": 4}, bias=bias)
    assert biased.bias.device.type == DEVICE
    check_product(biased, x, product(biased, x), bias)


@pytest.mark.parametrize("rows", [1, 20, 300])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_backward(dtype, rows):
    for axis, balance in itertools.product((1, 0), ("none", "sinkhorn")):
        bias = normal(384, seed=2, dtype=dtype)
        layer = make_layer(4, axis, balance=balance, bias=bias)
        layer.bias.requires_grad_()
        x = normal(rows, 512, seed=rows, dtype=dtype).to(DEVICE).requires_grad_()
        grad_y = normal(rows, 384, seed=7, dtype=dtype).to(DEVICE)
        y = product(layer, x)
        check_product(layer, x, y, bias)
        y.backward(grad_y)
        codes, scale, zero, col_scale = parts_of(layer)
        W_r = scale * (codes - zero) * col_scale
        grad = grad_y.double().cpu().numpy()
        expected = grad @ W_r
        u, tiny = (2.0**-11, 2.0**-25) if dtype == torch.float16 else (2.0**-8, 2.0**-133)
        # The weight in 16 bits, float32 sums, the result in 16 bits.
        bound = np.abs(grad) @ ((u * 1.01 + STEP * (384 + 16)) * np.abs(W_r) + tiny)
        bound += 2 * u * np.abs(expected) + tiny
        assert (np.abs(x.grad.double().cpu().numpy() - expected) <= bound).all()
        # Rows are added in float32 or better and rounded.
        total = grad.sum(0)
        bound = 2.0**-23 * rows * np.abs(grad).sum(0) + u * np.abs(total) * 1.01 + tiny
        assert (np.abs(layer.bias.grad.double().cpu().numpy() - total) <= bound).all()


# ---- Experts -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_experts(dtype):
    for nbits, balance in itertools.product((4, 3), ("none", "sinkhorn")):
        settings = {"nbits": nbits, "group_size": 64, "balance": balance}
        quantized = [hqq_cpp.quantize(normal(96, 256, seed=e), settings) for e in range(5)]
        layers = [hqq_cpp.HqqLinear(q) for q in quantized]
        made = hqq_cpp.HqqExperts(quantized, dtype=dtype).to(DEVICE)
        assert has_kernel(made, dtype)
        bias = normal(5, 96, seed=8, dtype=dtype)
        for counts in ([1, 0, 1, 0, 0], [3, 0, 9, 1, 16], [70, 2, 0, 40, 130]):
            used = sum(counts)
            x = normal(used + 2, 256, seed=used, dtype=dtype).to(DEVICE)
            y = product(made, x, torch.tensor(counts, device=DEVICE))
            biased = product(made, x, torch.tensor(counts, device=DEVICE), bias.to(DEVICE))
            assert not y[used:].any()  # rows of no expert
            first = 0
            for e, count in enumerate(counts):
                rows = slice(first, first + count)
                check_product(layers[e], x[rows], y[rows])
                check_product(layers[e], x[rows], biased[rows], bias[e])
                first += count


# ---- Memory -------------------------------------------------------------------------------------


def test_out_of_memory():
    """An error that names itself; afterwards the process works on."""
    W = normal(4096, 16384)  # 256 MiB
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info()
    kept = torch.empty(max(0, free - (128 << 20)), dtype=torch.uint8, device=DEVICE)
    try:
        with pytest.raises(hqq_cpp.CudaError, match="memory"):
            hqq_cpp.quantize(W, {"solver": "minmax", "balance": "none"}, device="cuda")
    finally:
        del kept
        torch.cuda.empty_cache()
    small = normal(64, 256)
    q = hqq_cpp.quantize(small, {"nbits": 4}, device="cuda")
    same_tensors(hqq_cpp.HqqLinear(q), hqq_cpp.quantize(small, {"nbits": 4}))
    x = normal(1, 256, dtype=torch.float16).to(DEVICE)
    layer = gpu_layer(small, {"nbits": 4})
    check_product(layer, x, layer(x))


# ---- Models --------------------------------------------------------------------------------------


def load(model, **options):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    import hqq_cpp.transformers

    return transformers.AutoModelForCausalLM.from_pretrained(
        model, dtype=torch.float16, device_map=DEVICE, local_files_only=True,
        quantization_config=hqq_cpp.HqqConfig(nbits=4, group_size=64), **options,
    ).eval()  # fmt: skip


def test_transformers_generate(model):
    """Every quantized layer, with what generate() gives it."""
    loaded = load(model)
    layers = [m for m in loaded.modules() if isinstance(m, hqq_cpp.HqqLinear)]
    assert layers and all(layer.device.type == DEVICE for layer in layers)
    seen = []

    def check(layer, arguments, y):
        check_product(layer, arguments[0], y)
        seen.append(arguments[0].shape[-2])

    for layer in layers:
        layer.register_forward_hook(check)
    ids = torch.arange(1, 20, device=DEVICE).unsqueeze(0)
    out = loaded.generate(ids, min_new_tokens=3, max_new_tokens=3, do_sample=False)
    assert out.shape == (1, 22) and set(seen) == {19, 1}
    assert len(seen) == 3 * len(layers)


def test_transformers_generate_static_cache(model):
    """Compiled by generate() itself; the tokens do not change from call to call."""
    loaded = load(model)
    ids = torch.arange(1, 20, device=DEVICE).unsqueeze(0)

    def generate():
        return loaded.generate(
            ids, min_new_tokens=8, max_new_tokens=8, do_sample=False, cache_implementation="static"
        )

    torch._dynamo.reset()
    first = generate()
    assert first.shape == (1, 27)
    for _ in range(2):
        assert torch.equal(generate(), first)

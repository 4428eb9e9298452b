"""What runs on a GPU, on the SIMT shim instead: CPU tensors stand for device memory.

test_cuda.py runs this file in a process of its own, whose library is the shim's.
"""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from torch import nn

import hqq_cpp
from hqq_cpp import _core, backends
from hqq_cpp.backends import chooser, cuda, cuda_calls
from hqq_cpp.format import tensors_of
from hqq_cpp.models.quantize import quantize_model_
from hqq_cpp.nn.linear import quantized_on_device

ALL_NBITS = [8, 6, 5, 4, 3, 2, 1.58, 1]
HALVES = [torch.float16, torch.bfloat16]


@pytest.fixture
def on_gpu(monkeypatch):
    """CPU tensors count as tensors on a GPU. Gives the products of tiles that ran."""
    ran = []

    def counting(name):
        call = getattr(cuda, f"_tiles_{name}")

        def run(*arguments):
            y = call(*arguments)
            if y is not None:
                ran.append(name)
            return y

        return run

    for name in ("linear", "experts_linear"):
        monkeypatch.setattr(cuda, f"_tiles_{name}", counting(name))
    monkeypatch.setattr(cuda_calls, "DEVICE_TYPE", "cpu")
    monkeypatch.setitem(chooser._KERNELS, "cpu", chooser._KERNELS["cuda"])
    return ran


@pytest.fixture
def rng():
    return np.random.default_rng(7)


def same_bits(a, b):
    a, b = a.tensors(), b.tensors()
    return a.keys() == b.keys() and all(
        bytes(np.asarray(a[k]).view(np.uint8)) == bytes(np.asarray(b[k]).view(np.uint8)) for k in a
    )


def random_matrix(rng, shape, dtype=torch.float32):
    return torch.from_numpy(rng.standard_normal(shape, dtype=np.float32)).to(dtype)


# ---- quantize ----------------------------------------------------------------------------------


@pytest.mark.parametrize("nbits", ALL_NBITS)
@pytest.mark.parametrize(
    "settings",
    [
        {"group_size": 32},
        {"group_size": 8, "axis": 0, "solver": "hqq", "balance": "none"},
        {"group_size": None, "solver": "minmax", "quant_zero": True, "quant_scale": True},
        {"group_size": 64, "balance": "none", "meta_dtype": "float32"},
    ],
)
def test_quantize_gives_the_bits_of_the_cpu(rng, nbits, settings):
    W = rng.standard_normal((24, 104), dtype=np.float32)
    config = {"nbits": nbits, **settings}
    q, stats = hqq_cpp.quantize(W, config, stats=True)
    on_gpu, gpu_stats = hqq_cpp.quantize(W, config, stats=True, device="cuda")
    assert same_bits(q, on_gpu)
    for name, value in stats.to_dict().items():
        # Sums of a row in float32 on the CPU: at most 104 roundings of 2^-24 each.
        assert gpu_stats.to_dict()[name] == pytest.approx(value, rel=104 * 2**-24, abs=1e-12), name


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
def test_quantize_types_strides_and_importance(rng, dtype):
    wide = random_matrix(rng, (16, 96), getattr(torch, dtype))
    importance = rng.random(64, dtype=np.float32)
    for W in (wide[:, :64], wide[::2, 32:]):
        for weights in (None, importance):
            pair = [
                hqq_cpp.quantize(W, {"nbits": 3}, importance=weights, device=device)
                for device in ("cpu", "cuda:0")
            ]
            assert same_bits(*pair)


@pytest.mark.parametrize(
    "place, value, settings",
    [
        ((3, 5), np.nan, {}),
        ((0, 0), -np.inf, {}),
        ((2, 40), 1e30, {"balance": "none", "group_size": 32}),
        ((2, 40), 1e30, {"balance": "none", "group_size": 8, "axis": 0}),
    ],
)
def test_quantize_refuses_what_the_cpu_refuses(rng, place, value, settings):
    W = rng.standard_normal((8, 64), dtype=np.float32)
    W[place] = value
    texts = []
    for device in ("cpu", "cuda"):
        with pytest.raises(ValueError) as error:
            hqq_cpp.quantize(W, settings, device=device)
        texts.append(str(error.value))
    assert texts[0] == texts[1]


def test_quantize_refuses_a_device_that_is_not_there():
    W = np.eye(8, dtype=np.float32)
    with pytest.raises(hqq_cpp.CudaError, match=r"no device cuda:3; there is 1 GPU, cuda:0"):
        hqq_cpp.quantize(W, device="cuda:3")


def test_quantize_tensor_where_it_lies(rng, on_gpu):
    W = random_matrix(rng, (16, 96))
    importance = torch.from_numpy(rng.random(96, dtype=np.float32))
    config = hqq_cpp.HqqConfig(nbits=4, group_size=32, dynamic_config={"a": {"nbits": 2}})
    for name, vector, bits, balance in [
        ("", None, 4, "sinkhorn"),
        ("a", importance, 2, "none"),
    ]:
        expected = hqq_cpp.quantize(W, config, name=name, importance=vector)
        solved = backends.quantize(W[:, :96].t().contiguous().t(), config, name, vector)
        assert (solved.settings.nbits, solved.settings.balance) == (bits, balance)
        for key, tensor in expected.tensors().items():
            assert torch.equal(solved.tensors[key], torch.from_dlpack(tensor)), key
        assert solved.stats.relative_error > 0
    layer = quantized_on_device(W, config, "a", torch.zeros(16), importance, 0)
    assert same_bits(layer.quantized_tensor(), expected)
    with pytest.raises(ValueError, match=r"\[a\] W holds 1 values that are NaN"):
        backends.quantize(torch.full((1, 8), float("nan"))[:, :1], config, "a", None)
    with pytest.raises(ValueError, match="importance has 8 values; W has 96 columns"):
        backends.quantize(W, config, "a", torch.ones(8))
    with pytest.raises(ValueError, match="leaves this layer unquantized"):
        backends.quantize(W, {"skip_modules": ["a"]}, "a", None)


@pytest.mark.parametrize("axis", [0, 1])
def test_scales_that_are_too_small_for_float16(rng, on_gpu, axis):
    W = random_matrix(rng, (16, 96))
    for tiny in (W * 1e-8, (W * 1e-8).to(torch.float64)[:, :70]):
        for more in ({}, {"quant_zero": True}, {"balance": "none", "solver": "minmax"}):
            config = {"nbits": 4, "axis": axis, "group_size": 32} | more
            with pytest.raises(ValueError, match="too small for float16") as on_cpu:
                hqq_cpp.quantize(tiny, config, name="a", device="cpu")
            with pytest.raises(ValueError) as refusal:
                backends.quantize(tiny, config, "a", None)
            assert str(refusal.value) == str(on_cpu.value)
            with pytest.raises(ValueError) as refusal:
                hqq_cpp.quantize(tiny, config, name="a", device="cuda")
            assert str(refusal.value) == str(on_cpu.value)
    dead = W.clone()
    dead[3] *= 1e-9
    config = {"nbits": 4, "axis": axis, "group_size": 32}
    assert same_bits(hqq_cpp.quantize(dead, config, device="cuda"), hqq_cpp.quantize(dead, config))


def test_quantize_model_on_the_device(rng, on_gpu):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 32), nn.Linear(32, 8))
    expected = [hqq_cpp.quantize(m.weight.detach(), {"nbits": 4}) for m in model]
    quantize_model_(model, {"nbits": 4})
    for module, q in zip(model, expected):
        assert same_bits(module.quantized_tensor(), q)
        assert module.quantize_stats["relative_error"] > 0


# ---- the command and folders -------------------------------------------------------------------


@pytest.fixture
def source(tmp_path, rng):
    """A file with plain layers, experts and a tensor to copy, in no order of size."""
    tensors = {
        f"model.layers.{i}.mlp.up_proj.weight": rng.standard_normal((16 + 8 * (i % 3), 64))
        for i in range(6)
    }
    tensors["model.layers.0.mlp.experts.gate_up_proj"] = rng.standard_normal((3, 16, 64))
    tensors["model.norm.weight"] = np.ones(64)
    path = tmp_path / "model.safetensors"
    hqq_cpp.save_safetensors(path, {k: v.astype(np.float32) for k, v in tensors.items()})
    return path


def files_of(folder):
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.name != "hqq_cpp_manifest.json"}


def test_folders_have_the_bytes_of_the_cpu(tmp_path, source):
    reports = {}
    for device in ("cpu", "cuda"):
        seen = []
        reports[device] = hqq_cpp.quantize_checkpoint(
            source, tmp_path / device, {"nbits": 3}, device=device, progress=seen.append
        )
        assert seen[-1].done == seen[-1].total == reports[device].weights
    assert files_of(tmp_path / "cpu") == files_of(tmp_path / "cuda")
    assert hqq_cpp.verify_checkpoint(tmp_path / "cuda").ok
    for a, b in zip(reports["cpu"].layers, reports["cuda"].layers):
        assert a.name == b.name
        assert b.stats.rms_error == pytest.approx(a.stats.rms_error, rel=64 * 2**-24)


def test_the_command(tmp_path, source, capfd):
    for device in ("cpu", "cuda", "cuda:0"):
        code = _core.cli_main(
            [
                "hqq-cpp",
                "quantize",
                str(source),
                str(tmp_path / device),
                "--device",
                device,
                "--json",
            ]
        )
        assert code == 0, capfd.readouterr().err
        assert json.loads(capfd.readouterr().out)["weights"] > 0
    assert (
        files_of(tmp_path / "cpu") == files_of(tmp_path / "cuda") == files_of(tmp_path / "cuda:0")
    )


def test_the_command_leaves_nothing_without_the_device(tmp_path, source, capfd):
    code = _core.cli_main(
        ["hqq-cpp", "quantize", str(source), str(tmp_path / "out"), "--device", "cuda:1"]
    )
    assert code == 4
    assert "there is no device cuda:1" in capfd.readouterr().err
    assert not list(tmp_path.glob("*out*"))


def test_errors_of_both_solver_threads_stop_the_folder(tmp_path, rng):
    tensors = {f"a{i}.weight": np.ones((8, 64), np.float32) for i in range(8)}
    tensors["a5.weight"][2, 3] = np.nan
    path = tmp_path / "bad.safetensors"
    hqq_cpp.save_safetensors(path, tensors)
    with pytest.raises(ValueError, match=r"\[a5\] W holds 1 values that are NaN"):
        hqq_cpp.quantize_checkpoint(path, tmp_path / "out", {"skip_modules": []}, device="cuda")
    assert not (tmp_path / "out").exists()


def test_doctor(capfd):
    assert _core.cli_main(["hqq-cpp", "doctor", "--json"]) == 0
    report = json.loads(capfd.readouterr().out)
    assert report["cuda"] is True
    details = report["cuda_details"]
    assert details["problem"] is None and details["library"].endswith("libhqq_cuda_simt.so")
    assert [d["device"] for d in details["devices"]] == ["cuda:0"]
    assert _core.cli_main(["hqq-cpp", "doctor"]) == 0
    assert "CUDA         found" in capfd.readouterr().out


# ---- layers ------------------------------------------------------------------------------------


def make_layer(rng, out_features, in_features, bias=True, dtype=torch.float16, **settings):
    W = random_matrix(rng, (out_features, in_features))
    q = hqq_cpp.quantize(W, settings)
    bias = random_matrix(rng, (out_features,), dtype) if bias else None
    return hqq_cpp.HqqLinear(q, bias, dtype)


def tolerance(W_r, scale, x):
    """What roundings make of a product, for every element of x W_r^T.

    A term x w has at most four roundings to 16 bits, of x times col_scale, and of a weight's parts, which
    exceed it by a step of its code at most (docs/cuda-kernels.md). They are independent, so errors add as
    squares do: 8 standard deviations of errors that are evenly spread. Sums of codes up to 256 + 128 are
    in float32. y is rounded once.
    """
    unit = torch.finfo(x.dtype).eps / 2
    rows, W_r = x.reshape(-1, x.shape[-1]).double(), W_r.double()
    squares = (rows**2) @ ((W_r.abs() + scale) ** 2).t()
    rounding = 8 * 4 * unit / 3**0.5 * squares.sqrt()
    sums = rows.shape[1] * 2.0**-24 * rows.abs().sum(1, keepdim=True) * 384 * scale
    return rounding + sums + unit * (rows @ W_r.t()).abs()


def largest_scale(module):
    """An upper bound of scale times col_scale."""
    scale = module.scale.double().abs().amax()
    if module.scale_step is not None:
        scale = (255 * module.scale_step.double() + module.scale_offset.double().abs()).amax()
    return scale if module.col_scale is None else scale * module.col_scale.double().abs().amax()


def is_right_product(module, W_r, x, y):
    """Without bias."""
    error = (y.double() - x.double() @ W_r.double().t()).abs()
    return bool((error <= tolerance(W_r.double(), largest_scale(module), x)).all())


def is_right(layer, x, y):
    W_r = layer.dequantize(torch.float64)
    bias = 0 if layer.bias is None else layer.bias.double()
    error = (y.double() - (x.double() @ W_r.t() + bias)).abs().reshape(-1, layer.out_features)
    # Of y with its bias.
    more = torch.finfo(y.dtype).eps * (0 if layer.bias is None else bias.abs())
    return bool((error <= tolerance(W_r, largest_scale(layer), x) + more).all())


@pytest.mark.parametrize("nbits", ALL_NBITS)
@pytest.mark.parametrize("axis", [1, 0])
def test_linear(rng, on_gpu, nbits, axis):
    for dtype in HALVES:
        layer = make_layer(
            rng, 64, 128, dtype=dtype, nbits=nbits, axis=axis, group_size=32, quant_zero=nbits == 4
        )
        for shape in [(1, 128), (2, 3, 128), (17, 128)]:
            x = random_matrix(rng, shape, dtype)
            y = layer(x)
            assert y.shape == (*shape[:-1], 64) and y.dtype == dtype
            assert is_right(layer, x, y)
            assert not is_right(layer, x, torch.roll(y, 1, -1))
    assert len(on_gpu) == 6


def test_linear_of_few_and_no_rows_and_strides(rng, on_gpu):
    layer = make_layer(rng, 32, 64, bias=False, group_size=64)
    assert layer(torch.zeros(0, 64, dtype=torch.float16)).shape == (0, 32)
    wide = random_matrix(rng, (3, 100), torch.float16)
    for x in (wide[:, 3:67], wide[:, 36:].t().contiguous().t(), wide[0, 1:65]):
        assert is_right(layer, x, layer(x))
    assert len(on_gpu) == 4


def test_linear_without_a_kernel_is_dense(rng, on_gpu):
    """float32 and float64, and more rows than products of tiles win with."""
    layer = make_layer(rng, 16, 64)
    for dtype in (torch.float32, torch.float64):
        x = random_matrix(rng, (3, 64), dtype)
        hqq_cpp.set_backend("torch")
        expected = layer(x)
        hqq_cpp.set_backend("auto")
        assert torch.equal(layer(x), expected)
    rows = cuda.max_rows(layer._layout, torch.float16, 0) + 1
    x = random_matrix(rng, (rows, 64), torch.float16)
    hqq_cpp.set_backend("torch")
    expected = layer(x)
    hqq_cpp.set_backend("auto")
    assert torch.equal(layer(x), expected)
    assert on_gpu == []


@pytest.mark.parametrize("nbits", ALL_NBITS)
@pytest.mark.parametrize("axis", [1, 0])
def test_dequantize_and_embedding_give_the_bits_of_the_cpu(rng, on_gpu, nbits, axis):
    q = hqq_cpp.quantize(
        random_matrix(rng, (24, 104)), {"nbits": nbits, "axis": axis, "group_size": 8}
    )
    table = hqq_cpp.HqqEmbedding(q, dtype=torch.bfloat16)
    for dtype in (torch.float32, torch.float64, *HALVES):
        dense = torch.from_numpy(hqq_cpp.dequantize(q)).to(dtype)
        assert torch.equal(backends.dequantize(table.packed_weight(), dtype), dense)
    ids = torch.tensor([[0, 23, 5], [7, 7, 0]], dtype=torch.int32)
    assert torch.equal(table(ids), table.dequantize(torch.bfloat16)[ids])
    assert table(ids[:0]).shape == (0, 3, 104)
    for wrong in (-1, 24):
        with pytest.raises(RuntimeError, match=r"\[embedding\] an id is not in 0 to 23"):
            table(torch.tensor([3, wrong]))


def test_backward(rng, on_gpu):
    layer = make_layer(rng, 32, 64, group_size=32)
    layer.bias.requires_grad_()
    x = random_matrix(rng, (3, 64), torch.float16).requires_grad_()
    y = layer(x)
    assert len(on_gpu) == 1
    grad_y = random_matrix(rng, (3, 32), torch.float16)
    y.backward(grad_y)
    assert torch.equal(x.grad, grad_y @ layer.dequantize(torch.float16))
    assert torch.equal(layer.bias.grad, grad_y.sum(0))


def test_compiled_forward_is_one_graph(rng, on_gpu):
    layer = make_layer(rng, 32, 64, group_size=32)
    x = random_matrix(rng, (2, 64), torch.float16)
    expected = layer(x)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), expected)
    assert len(on_gpu) == 2


def test_a_compiler_asks_for_the_library_itself(monkeypatch):
    monkeypatch.setattr(cuda, "_available", None)

    def forward(x):
        return x + 1 if cuda.is_available() else x - 1

    assert torch.compile(forward, fullgraph=True, backend="eager")(torch.zeros(1)) == 1
    assert cuda._available is True


# ---- experts -----------------------------------------------------------------------------------


def make_experts(rng, experts, parts, rows, cols, **settings):
    config = hqq_cpp.HqqConfig(**settings).layer("x")
    config = config.replace(balance="none" if config.balance == "none" else "sinkhorn")
    module = hqq_cpp.HqqExperts.empty(
        config, (experts, parts * rows, cols), parts=parts, dtype=torch.float16
    )
    pieces = [
        [
            tensors_of(hqq_cpp.quantize(random_matrix(rng, (rows, cols)), config))
            for _ in range(parts)
        ]
        for _ in range(experts)
    ]
    for name in module._specs():
        tensor = torch.stack(
            [
                (torch.stack if name == "col_scale" and parts > 1 else torch.cat)(
                    [getattr(piece, name) for piece in expert]
                )
                for expert in pieces
            ]
        )
        module._parameters[name].data = tensor.reshape(module._parameters[name].shape)
    return module


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("settings", [{"nbits": 4}, {"nbits": 3, "quant_zero": True}])
@pytest.mark.parametrize("bias", [False, True])
def test_experts(rng, on_gpu, parts, settings, bias):
    module = make_experts(rng, 4, parts, 32, 64, group_size=32, **settings)
    counts = torch.tensor([2, 0, 5, 1])
    x = random_matrix(rng, (10, 64), torch.float16)  # two more rows than there are
    biases = random_matrix(rng, (4, 32 * parts), torch.float16) if bias else None
    y = module(x, counts, biases)
    assert on_gpu == ["experts_linear"]
    assert torch.equal(y[8:], torch.zeros(2, 32 * parts, dtype=torch.float16))
    start = 0
    for expert, count in enumerate(counts.tolist()):
        rows = slice(start, start + count)
        start += count
        W_r = module.dequantize(expert, torch.float64)
        expected = x[rows].double() @ W_r.t() + (0 if biases is None else biases[expert].double())
        error = (y[rows].double() - expected).abs()
        more = 0 if biases is None else 2.0**-10 * biases[expert].double().abs()
        assert (error <= tolerance(W_r, largest_scale(module), x[rows]) + more).all()


def test_experts_of_many_rows_and_gradients(rng, on_gpu):
    module = make_experts(rng, 2, 1, 16, 64)
    max_rows = cuda.max_rows(module._layout, torch.float16, 0)
    x = random_matrix(rng, (2 * max_rows + 1, 64), torch.float16).requires_grad_()
    counts = torch.tensor([1, 2 * max_rows])
    y = module(x, counts)
    assert on_gpu == []
    y.sum().backward()
    grad = torch.ones(1, 16, dtype=torch.float16) @ module.dequantize(0, torch.float16)
    assert torch.equal(x.grad[:1], grad)
    transposed = module(
        torch.ones(2, 16, dtype=torch.float16), torch.tensor([1, 1]), transposed=True
    )
    assert transposed.shape == (2, 64) and on_gpu == []


# ---- refusals ----------------------------------------------------------------------------------


def test_native_refuses_what_it_cannot_run(rng):
    config = hqq_cpp.HqqConfig(balance="none").layer("x")
    layer = hqq_cpp.HqqLinear.empty(config, 8, 64, device="meta")
    hqq_cpp.set_backend("native")
    try:
        with pytest.raises(ValueError, match="libhqq_cuda can use"):
            layer(torch.empty(1, 64, device="meta"))
        layer = make_layer(rng, 8, 64)
        with pytest.raises(ValueError, match="x is torch.float16 on meta"):
            layer(torch.empty(1, 64, dtype=torch.float16, device="meta"))
    finally:
        hqq_cpp.set_backend("auto")


def test_devices_are_checked():
    with pytest.raises(hqq_cpp.CudaError, match="there is no device cuda:7"):
        _core.cuda_require_device(7)
    _core.cuda_require_device(0)

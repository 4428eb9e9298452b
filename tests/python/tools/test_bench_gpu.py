"""The GPU benchmark where there is no GPU: what it says then, its arithmetic, its peers, its report, and
every case on a CPU with another clock."""

import importlib
import os
import subprocess
import sys
import time

import pytest

torch = pytest.importorskip("torch")

import hqq_cpp
from hqq_cpp.nn import HqqLinear

MODULES = [
    "bench_gpu",
    "conversion",
    "experts",
    "layers",
    "models",
    "peers",
    "report",
    "shapes",
    "timing",
]


@pytest.fixture(scope="module")
def gpu(repository):
    """The modules of benchmarks/gpu by name; their names stay out of other tests."""
    folder = str(repository / "benchmarks" / "gpu")
    path = list(sys.path)
    sys.path.insert(0, folder)
    before = {name: sys.modules.pop(name, None) for name in MODULES}
    yield {name: importlib.import_module(name) for name in MODULES}
    sys.path[:] = path
    for name, module in before.items():
        del sys.modules[name]
        if module is not None:
            sys.modules[name] = module


# ---- Without a GPU -------------------------------------------------------------------------------


def test_without_a_gpu_it_says_so(repository, tmp_path):
    command = [sys.executable, repository / "benchmarks" / "gpu" / "bench_gpu.py"]
    out = tmp_path / "gpu.md"
    # A GPU that is there is hidden.
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [*command, "--out", out], capture_output=True, text=True, timeout=300, env=environment
    )
    assert done.returncode == 2
    assert done.stdout == "" and not out.exists()
    assert len(done.stderr.strip().splitlines()) == 1
    assert "there is no GPU to measure" in done.stderr


def test_few_samples_are_refused(gpu, capsys):
    with pytest.raises(SystemExit):
        gpu["bench_gpu"].parse_args(["--samples", "11"])
    assert "at least 12" in capsys.readouterr().err


# ---- Arithmetic ----------------------------------------------------------------------------------


@pytest.mark.parametrize("nbits", [8, 6, 5, 4, 3, 2, 1.58, 1])
def test_bytes_are_those_of_the_format(gpu, nbits):
    config = hqq_cpp.LayerConfig(nbits=nbits, balance="none")
    for n, k in ((4096, 4096), (96, 1024), (3, 64)):
        layer = HqqLinear.empty(config, n, k, device="meta")
        assert gpu["shapes"].layer_bytes(n, k, nbits) == layer.packed_nbytes


def test_bytes_of_known_layers(gpu):
    shapes = gpu["shapes"]
    # 4 bits and 32 bits of metadata for 64 weights: 4.5 bits.
    assert shapes.layer_bytes(4096, 4096, 4) == 4096 * 4096 * 9 // 16 == 9437184
    assert shapes.layer_bytes(8192, 8192, 1) == 8192 * 8192 * 3 // 16
    # Llama-3-8B has 8.03 G parameters, of which the embedding has 0.525 G.
    llama = shapes.LLAMA_3_8B
    assert llama.linear_weights() == 7504658432
    assert llama.token_bytes(4) == 7504658432 * 9 // 16


def test_copies_overflow_the_cache(gpu):
    copies = gpu["shapes"].copies
    cache, memory = 50 << 20, 4 << 30
    for nbytes in (1 << 20, 9437184, 151 << 20, 512 << 20):
        count = copies(nbytes, cache, memory)
        assert count * nbytes >= 4 * cache and count * nbytes <= memory
        assert count == 2 or (count - 1) * nbytes < 4 * cache  # none more than it takes
    assert copies(1 << 40, cache, memory) == 2  # a walk needs two


def test_bus(gpu):
    # H100 SXM: 2619 MHz, 5120 bits, published as 3.35 TB/s.
    assert gpu["shapes"].bus_bytes_per_second(2619000, 5120) == pytest.approx(3.35e12, rel=0.01)


# ---- Peers ---------------------------------------------------------------------------------------


def test_missing_peers_are_named_with_the_reason(gpu):
    peers = gpu["peers"]
    names = [peer.name for peer in peers.PEERS]
    assert len(set(names)) == len(names)
    absent = peers.Peer("absent", (4,), peers.dense, "no_such_module_of_hqq")
    there, reasons = peers.available([*peers.PEERS, absent])
    assert {peer.name for peer in there} | set(reasons) == {*names, "absent"}
    assert {"hqq.cpp", "torch fp16", "tinygemm (torch)"} <= {peer.name for peer in there}
    assert reasons["absent"] == "ModuleNotFoundError: No module named 'no_such_module_of_hqq'"


def test_a_broken_peer_is_named_with_the_reason(gpu, tmp_path, monkeypatch):
    (tmp_path / "broken_peer_of_hqq.py").write_text("raise OSError('no\\n driver')\n")
    monkeypatch.syspath_prepend(tmp_path)
    peer = gpu["peers"].Peer("broken", (4,), gpu["peers"].dense, "broken_peer_of_hqq")
    assert peer.missing() == "OSError: no driver"


def test_rounding_of_peers(gpu):
    """No weight is off by more than half a step, plus the rounding of float32."""
    weight = torch.randn(16, 256, generator=torch.Generator().manual_seed(0))
    for nbits in (8, 4, 2, 1):
        codes, scale, zero = gpu["peers"].round_to_nearest(weight, nbits)
        assert codes.dtype == torch.uint8 and int(codes.max()) == 2**nbits - 1
        back = (codes.unflatten(1, (-1, 64)) - zero.unsqueeze(2)) * scale.unsqueeze(2)
        error = (back - weight.unflatten(1, (-1, 64))).abs()
        assert bool((error <= scale.unsqueeze(2) * (0.5 + 2.0**-14)).all())


def test_widths(gpu):
    assert gpu["layers"].all_widths("4,1.58,1") == [4, 1.58, 1]
    with pytest.raises(ValueError, match="no 7 bits"):
        gpu["layers"].all_widths("4,7")


# ---- The report ----------------------------------------------------------------------------------


def test_report(gpu):
    report = gpu["report"]
    made = report.Report(report.machine_text({"device": "made up"}))
    made.goals = [
        report.Goal("decode", 60, 61.25, " % of the bus"),
        report.Goal("sweep", 1, 0.96, "x"),
        report.Goal("llama", 500, None),
    ]
    rows = [
        {"name": "hqq.cpp 4-bit", "us": 12.341, "x_dense": 3.2, "extra": 1},
        {"name": "humming 4-bit", "us": 22.4, "x_dense": None},
    ]
    columns = [("us", "us", ".2f"), ("x fp16", "x_dense", ".2f"), ("GB/s", "gb_per_s", ".0f")]
    made.sections = [report.Section("Decode", rows, columns, "A note.")]
    made.failed = {"gemlite": "no triton", "torchao": "no triton", "marlin": "other"}
    text = made.markdown()
    assert "- device: made up" in text and "- date: 20" in text
    assert "| decode | >= 60 % of the bus | 61.2 % of the bus | yes |" in text
    assert "| sweep | >= 1x | 0.96x | no |" in text
    assert "| llama | >= 500 | not measured | |" in text
    table = text[text.index("**Decode**") :].split("\n\n")[1].splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in table]
    assert cells[0] == ["what", "us", "x fp16", "GB/s"]
    assert cells[2] == ["hqq.cpp 4-bit", "12.34", "3.20", ""]
    assert cells[3] == ["humming 4-bit", "22.40", "", ""]
    assert "A note." in text
    assert "Not measured: gemlite, torchao: no triton" in text
    assert "Not measured: marlin: other" in text


def test_table_of_ratios(gpu):
    def row(name, us, x):
        return {"name": name, "peer": name, "us": us, "x_dense": x}

    baseline = gpu["peers"].BASELINE
    results = {
        1: [row("ours", 5.0, 4.0), row(baseline, 20.0, 1.0)],
        16: [row(baseline, 21.0, 1.0)],  # ours failed
    }
    table = gpu["layers"].sweep_rows(results)
    assert table == [
        {"name": "ours", "1": 4.0, "16": None},
        {"name": f"{baseline}, us", "1": 20.0, "16": 21.0},
    ]


# ---- Every case, on the CPU ----------------------------------------------------------------------


def on_cpu(gpu, monkeypatch):
    """A Bench whose walks run in CPU memory, launched call by call."""
    timing, layers, peers = gpu["timing"], gpu["layers"], gpu["peers"]

    def record(walk):
        walk.graph = False
        walk.replay = lambda: timing.run_all(walk.calls)
        walk.replay()

    def sample(walk):
        start = time.perf_counter()
        walk.replay()
        return (time.perf_counter() - start) / len(walk.calls)

    monkeypatch.setattr(timing, "record", record)
    monkeypatch.setattr(timing, "sample", sample)
    monkeypatch.setattr(timing, "synchronize", lambda: None)
    wanted = (peers.OURS, peers.BASELINE)
    return layers.Bench(
        report=gpu["report"].Report("- device: this CPU"),
        peers=[peer for peer in peers.PEERS if peer.name in wanted],
        samples=2,
        sizes=[256, 128, 64],
        widths=[4, 1.58],
        bus=1e12,
        copy=1e11,
        cache_bytes=1 << 10,
        memory_bytes=1 << 30,
        quick=True,
        device="cpu",
    )


def test_products_on_cpu(gpu, monkeypatch):
    bench = on_cpu(gpu, monkeypatch)
    layers = gpu["layers"]
    with torch.no_grad():
        for case in (layers.decode, layers.few_rows, layers.sweep):
            case(bench)
    assert bench.report.failed == {}
    titles = [section.title for section in bench.report.sections]
    assert titles[:3] == [f"Decode: M = 1, {n} x {n}" for n in (256, 128, 64)]
    rows = bench.report.sections[0].rows
    assert [row["name"] for row in rows] == ["hqq.cpp 4-bit", "torch fp16", "hqq.cpp 1.58-bit"]
    for row in rows:
        assert row["gb_per_s"] * row["us"] == pytest.approx(256 * 256 * row["bits"] / 8 / 1e3)
        assert row["of_bus"] == pytest.approx(row["of_copy"] / 10)
    # Rounding to 16 bits; to 4 bits and to 1.58, uniformly in the range of 64 normal weights.
    assert rows[1]["error"] < 2**-10
    assert 0.02 < rows[0]["error"] < 0.2 < rows[2]["error"] < 0.8
    assert {goal.what for goal in bench.report.goals} == {
        "decode M=1, 4-bit g64, 256^2", "decode M=1, 4-bit g64, 128^2", "decode M=1, 4-bit g64, 64^2",
        "4-bit M=1, 128^2, against humming", "M=16, 128^2, against cuBLAS fp16",
        "any M, against cuBLAS fp16", "M up to 256, against cuBLAS fp16",
    }  # fmt: skip
    assert bench.report.markdown().count("| no |") + bench.report.markdown().count("| yes |") == 6


def test_conversion_and_experts_on_cpu(gpu, monkeypatch):
    bench = on_cpu(gpu, monkeypatch)
    experts = gpu["experts"]
    monkeypatch.setattr(experts, "SHAPES", [experts.Experts("4 experts, 2 a token", 4, 2, 64, 128)])
    with torch.no_grad():
        gpu["conversion"].solve(bench)
        gpu["conversion"].dequantize(bench)
        experts.experts(bench)
    assert bench.report.failed == {}
    solved, dense, mixed = bench.report.sections
    assert [row["name"] for row in solved.rows][:2] == ["joint 4-bit", "joint 1.58-bit"]
    assert [row["name"] for row in dense.rows][:2] == [
        "hqq.cpp 4-bit, axis 1", "hqq.cpp 4-bit, axis 0"
    ]  # fmt: skip
    for row in mixed.rows:
        assert row["error"] < (0.2 if "hqq.cpp" in row["name"] else 2**-6)


def test_routes(gpu):
    experts = gpu["experts"]
    for shape in experts.SHAPES:
        for tokens in experts.TOKENS:
            counts = experts.route(shape, tokens)
            assert counts.shape == (shape.count,) and int(counts.sum()) == tokens * shape.top
            assert int(counts.max()) <= tokens  # a token chooses different experts


def test_llama_on_cpu(gpu, monkeypatch):
    pytest.importorskip("transformers")
    bench = on_cpu(gpu, monkeypatch)
    models = gpu["models"]
    sizes = gpu["shapes"].Llama(
        hidden=64, intermediate=128, layers=1, heads=2, kv_heads=1, vocab=64
    )
    monkeypatch.setattr(models, "SMALL_LLAMA", sizes)
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    with torch.no_grad():
        model = models.random_llama(sizes, 4, "cpu")
        shapes = [
            tuple(module.dense_shape) for module in model.modules() if isinstance(module, HqqLinear)
        ]
        assert sorted(shapes) == sorted(sizes.linear_shapes())
        # Steps after a rewind repeat the tokens.
        step = models.DecodeStep(model, compiled=False)
        tokens = []
        for _ in range(2):
            step.ids.zero_()
            for _ in range(5):
                step()
                tokens.append(int(step.ids))
            step.rewind()
        assert tokens[:5] == tokens[5:]
        models.llama(bench)
    assert bench.report.failed == {}
    assert [row["name"] for row in bench.report.sections[0].rows][:3] == [
        "hqq.cpp 4-bit: step", "hqq.cpp 4-bit: compiled step",
        "hqq.cpp 4-bit: generate(), static cache",
    ]  # fmt: skip
    assert all(goal.value > 0 for goal in bench.report.goals)


def test_checkpoint_on_cpu(gpu, monkeypatch, tmp_path):
    bench = on_cpu(gpu, monkeypatch)
    models = gpu["models"]

    def tiny(folder, gigabytes):
        import numpy as np

        import model_maker

        rng = np.random.default_rng(0)
        model_maker.save_model(folder, [model_maker.llama_layer(rng, 0, 64, 128)])

    monkeypatch.setattr(models, "make_checkpoint", tiny)
    models.checkpoint(bench, 0.001, tmp_path)
    assert bench.report.failed == {}
    rows = bench.report.sections[0].rows
    assert len(rows) == 3 and rows[0]["x"] == 1
    assert list(tmp_path.iterdir()) == []  # nothing stays

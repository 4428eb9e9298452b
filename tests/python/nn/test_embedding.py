"""HqqEmbedding, and the three doors to it: quantize_model_, from_pretrained, quantize_checkpoint."""

import copy
import io
import itertools
import pickle

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="HqqEmbedding is a torch module")
transformers = pytest.importorskip("transformers", reason="models of Transformers are made")

import hqq_cpp
import hqq_cpp.transformers

NBITS = (8, 6, 5, 4, 3, 2, 1.58, 1)
# The last group of a row is short, and so is the last tile of rows.
ROWS, COLUMNS = 70, 88
IDS = torch.arange(3, 15)[None]


@pytest.fixture(autouse=True)
def restore_backend():
    transformers.logging.disable_progress_bar()
    yield
    hqq_cpp.set_backend("auto", mode="auto")


def matrix(rows=ROWS, columns=COLUMNS):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))


def table(padding_idx=None, dtype=None, **settings):
    settings = {"nbits": 4, "group_size": 16} | settings
    return hqq_cpp.HqqEmbedding(hqq_cpp.quantize(matrix(), settings), padding_idx, dtype)


# Lookups.


@pytest.mark.parametrize("backend", ["native", "torch"])
@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("nbits", NBITS)
def test_rows_are_those_of_the_dequantized_weight(nbits, axis, backend):
    ids = torch.randint(0, ROWS, (5, 11), generator=torch.Generator().manual_seed(1))
    ids[0, :3] = torch.tensor([0, ROWS - 1, 0])
    for quant, group, meta in itertools.product((False, True), (16, None), ("float16", "bfloat16")):
        q = hqq_cpp.quantize(
            matrix(),
            {
                "nbits": nbits, "axis": axis, "group_size": group, "meta_dtype": meta,
                "quant_scale": quant, "quant_zero": quant,
            },
        )  # fmt: skip
        dense = torch.from_numpy(hqq_cpp.dequantize(q))
        hqq_cpp.set_backend(backend)
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            rows = hqq_cpp.HqqEmbedding(q, dtype=dtype)(ids)
            assert rows.dtype == dtype
            assert torch.equal(rows, torch.nn.functional.embedding(ids, dense).to(dtype))


@pytest.mark.parametrize("backend", ["native", "torch"])
@pytest.mark.parametrize("quant", [False, True])
@pytest.mark.parametrize("nbits", NBITS)
def test_tiled_rows(nbits, quant, backend):
    layer = table(nbits=nbits, quant_scale=quant, quant_zero=quant)
    ids = torch.arange(ROWS - 1, -1, -1)
    expected = layer(ids)
    hqq_cpp.set_backend(backend)
    layer.tile_()
    assert layer.is_tiled and torch.equal(layer(ids), expected)
    assert layer.is_tiled


def test_a_lookup_does_not_tile():
    layer = table()
    layer(IDS)
    assert not layer.is_tiled


@pytest.mark.parametrize("backend", ["native", "torch"])
@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_ids_of_any_shape(dtype, axis, backend):
    layer = table(axis=axis)
    dense = layer.dequantize()
    hqq_cpp.set_backend(backend)
    strided = torch.arange(60, dtype=dtype).reshape(6, 10)[::2, 1::3].t()
    for ids in (
        torch.tensor(7, dtype=dtype),
        torch.zeros(0, dtype=dtype),
        torch.zeros(2, 0, 3, dtype=dtype),
        torch.arange(24, dtype=dtype).reshape(2, 3, 4),
        strided,
    ):
        rows = layer(ids)
        assert rows.shape == (*ids.shape, COLUMNS)
        assert torch.equal(rows, torch.nn.functional.embedding(ids, dense))


@pytest.mark.parametrize("backend", ["native", "torch"])
@pytest.mark.parametrize("tiled", [False, True])
@pytest.mark.parametrize("wrong", [ROWS, 2**40, -1, -ROWS])
def test_no_such_row(wrong, tiled, backend):
    layer = table()
    if tiled:
        layer.tile_()
    hqq_cpp.set_backend(backend)
    with pytest.raises(IndexError, match=rf"\[embedding\] index {wrong} is out of range.* 70 rows"):
        layer(torch.tensor([[0, wrong], [1, 2]]))
    with pytest.raises(IndexError):
        torch.nn.Embedding(ROWS, 8)(torch.tensor([wrong]))
    layer(torch.tensor([0, ROWS - 1]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.int16, torch.bool])
def test_ids_of_another_type_are_refused(dtype):
    with pytest.raises(ValueError, match=rf"ids are {dtype}; they must be torch.int32 or int64"):
        table()(torch.ones(2).to(dtype))


def test_padding_idx():
    assert table(5).padding_idx == 5 and table(-1).padding_idx == ROWS - 1
    assert table().padding_idx is None and "padding_idx=5" in repr(table(5))
    for wrong in (ROWS, -ROWS - 1):
        with pytest.raises(
            ValueError, match=rf"padding_idx is {wrong}; it must be a row, -70 to 69"
        ):
            table(wrong)
    # A row of zeros stays one.
    W = matrix()
    W[5] = 0
    for nbits in NBITS:
        layer = hqq_cpp.HqqEmbedding(hqq_cpp.quantize(W, {"nbits": nbits}), 5)
        assert not layer(torch.tensor(5)).any()


def test_it_is_an_embedding():
    layer = table(dtype=torch.bfloat16)
    assert isinstance(layer, torch.nn.Embedding)
    assert (layer.num_embeddings, layer.embedding_dim) == tuple(layer.weight.shape) == (70, 88)
    assert layer.weight.dtype == torch.bfloat16
    assert torch.equal(layer.weight + 0, layer.dequantize(torch.bfloat16))
    assert layer.max_norm is None and not layer.sparse and not layer.scale_grad_by_freq
    assert torch.equal(layer.float()(IDS), layer.dequantize()[IDS])
    again = layer.quantized_tensor()
    assert np.array_equal(hqq_cpp.dequantize(again), layer.dequantize().numpy())


def test_no_gradients():
    layer = table()
    assert not any(parameter.requires_grad for parameter in layer.parameters())
    rows = layer(IDS)
    assert not rows.requires_grad
    rows.requires_grad_().sum().backward()  # as fine-tuning with checkpoints asks for
    assert rows.grad.eq(1).all()


@pytest.mark.parametrize("backend", ["native", "torch"])
@pytest.mark.parametrize("settings", [{}, {"axis": 0}, {"nbits": 1.58, "quant_scale": True}])
def test_compile_and_export(settings, backend):
    layer = table(**settings)
    hqq_cpp.set_backend(backend)
    expected = layer(IDS)
    torch._dynamo.reset()  # it counts the variants of a function over all tests
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=True)
    assert torch.equal(compiled(IDS), expected)
    assert torch.equal(compiled(IDS[:, :5]), expected[:, :5])
    program = torch.export.export(layer, (IDS,))
    assert torch.equal(program.module()(IDS), expected)
    names = [str(node.target) for node in program.graph.nodes]
    assert ("hqq_cpp.embedding.default" in names) == (backend == "native")


def test_copies_and_state_dict():
    layer = table(5, quant_scale=True)
    expected = layer(IDS)
    layer.tile_()
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    empty = hqq_cpp.HqqEmbedding.empty(layer.layer_config, ROWS, COLUMNS, 5)
    empty.load_state_dict(torch.load(file))
    for copied in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), empty):
        assert type(copied) is hqq_cpp.HqqEmbedding and copied.padding_idx == 5
        assert torch.equal(copied(IDS), expected)
    with pytest.raises(RuntimeError, match=r"W_q is uint8 \[70, 44\]; it must be uint8 \[70, 88\]"):
        hqq_cpp.HqqEmbedding.empty(table(nbits=8).layer_config, ROWS, COLUMNS).load_state_dict(
            layer.state_dict()
        )


# quantize_model_.


class Net(torch.nn.Module):
    def __init__(self, tied=True, embedding=None):
        super().__init__()
        self.tokens = embedding or torch.nn.Embedding(96, 64, padding_idx=1)
        self.positions = torch.nn.Embedding(32, 64)
        self.mix = torch.nn.Linear(64, 64)
        self.head = torch.nn.Linear(64, 96)
        if tied:
            self.head.weight = self.tokens.weight

    def forward(self, ids):
        x = self.tokens(ids) + self.positions(torch.arange(ids.shape[-1]))
        return self.head(self.mix(x))


@pytest.mark.parametrize(
    "rules, selected",
    [
        ({}, []),
        ({"mix": {"nbits": 2}}, []),
        ({"tokens": {"nbits": 8}}, ["tokens"]),
        ({"tok*": {"nbits": 8}}, ["tokens"]),
        ({"re:.*s": {"nbits": 8}}, ["tokens", "positions"]),
        ({"positions": {"nbits": 8}, "tokens": None}, ["positions"]),
    ],
)
def test_only_a_rule_selects(rules, selected):
    net = hqq_cpp.quantize_model_(Net(), {"nbits": 4, "dynamic_config": rules})
    for name in ("tokens", "positions"):
        layer = net.get_submodule(name)
        assert isinstance(layer, hqq_cpp.HqqEmbedding) == (name in selected)
        if name in selected:
            assert layer.nbits == 8
    assert isinstance(net.mix, hqq_cpp.HqqLinear)
    # The tied head is never quantized alone, and never left behind.
    assert isinstance(net.head, hqq_cpp.HqqLinear) == ("tokens" in selected)


def test_skip_modules_win_over_patterns():
    config = {"dynamic_config": {"*": {"nbits": 8}}, "skip_modules": ["tokens"]}
    net = hqq_cpp.quantize_model_(Net(), config)
    assert type(net.tokens) is torch.nn.Embedding and type(net.head) is torch.nn.Linear
    assert isinstance(net.positions, hqq_cpp.HqqEmbedding)


def test_tied_layers_share_their_memory():
    net = Net()
    expected = hqq_cpp.quantize(net.tokens.weight, {"nbits": 8})
    bias = net.head.bias
    hqq_cpp.quantize_model_(net, {"dynamic_config": {"tokens": {"nbits": 8}}})
    assert net.tokens.padding_idx == 1 and net.head.bias is bias
    assert np.array_equal(net.tokens.dequantize().numpy(), hqq_cpp.dequantize(expected))
    rows = net.tokens(IDS)
    net(IDS)  # the head tiles what both read
    assert net.tokens.is_tiled and net.head.is_tiled
    for change in (lambda: net, net.float, lambda: copy.deepcopy(net), net.tokens.untile_):
        change()
        for a, b in zip(net.tokens.packed(), net.head.packed()):
            assert a is b
        assert torch.equal(net.tokens(IDS), rows)
    twin = copy.deepcopy(net)
    assert twin.head.W_q is twin.tokens.W_q and torch.equal(twin(IDS), net(IDS))
    report = hqq_cpp.hqq_report(net)
    assert [row.name for row in report.rows] == ["tokens", "mix"]
    assert report.weights == 96 * 64 + 64 * 64
    again = hqq_cpp.quantize_model_(Net(), {"dynamic_config": {"tokens": {"nbits": 8}}})
    again.load_state_dict(net.state_dict())
    assert torch.equal(again(IDS), net(IDS))


def test_weights_that_something_else_reads_stay():
    net = Net(tied=False)
    net.head = torch.nn.Module()
    net.head.anything = net.tokens.weight
    config = {"dynamic_config": {"tokens": {"nbits": 8}}}
    hqq_cpp.quantize_model_(net, config)
    assert type(net.tokens) is torch.nn.Embedding


@pytest.mark.parametrize(
    "options", [{"max_norm": 1.0}, {"scale_grad_by_freq": True}, {"sparse": True}]
)
def test_what_a_frozen_table_cannot_do_is_refused(options):
    net = Net(tied=False, embedding=torch.nn.Embedding(96, 64, **options))
    ((name, value),) = options.items()
    with pytest.raises(ValueError, match=rf"\[embedding\] {name} is {value}"):
        hqq_cpp.quantize_model_(net, {"dynamic_config": {"tokens": {"nbits": 8}}})
    hqq_cpp.quantize_model_(net, {"nbits": 4})


class Scaled(torch.nn.Embedding):
    """As models have them: a factor, in a buffer that is not saved."""

    def __init__(self, *arguments, factor):
        super().__init__(*arguments)
        self.offset = 2
        self.register_buffer("factor", torch.tensor(factor), persistent=False)

    def forward(self, ids):
        return super().forward(ids + self.offset) * self.factor


def test_subclasses_keep_what_they_do():
    net = Net(tied=False, embedding=Scaled(96, 64, factor=3.0))
    hqq_cpp.quantize_model_(net, {"dynamic_config": {"tokens": {"nbits": 8}}})
    expected = net.tokens.dequantize()[IDS + 2] * 3
    for layer in (net.tokens, copy.deepcopy(net.tokens), pickle.loads(pickle.dumps(net.tokens))):
        assert isinstance(layer, Scaled) and isinstance(layer, hqq_cpp.HqqEmbedding)
        assert torch.equal(layer(IDS), expected)
        assert set(layer.state_dict()) == {"W_q", "scale", "zero", "col_scale"}
    dense = net.tokens.to_dense(torch.nn.Parameter(net.tokens.dequantize()))
    assert type(dense) is Scaled and torch.equal(dense(IDS), expected)
    assert not hasattr(dense, "layer_config")

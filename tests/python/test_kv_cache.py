"""The quantized key-value cache: its errors, its bookkeeping, and generation with it."""

from __future__ import annotations

import statistics
import time

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from transformers import QuantizedCache, cache_utils

import hqq_cpp
from hqq_cpp.transformers import cache as kv_cache
from hqq_cpp.transformers.cache import HqqCacheLayer
from hqq_cpp.transformers.cache import states as kv_states

NBITS = [8, 6, 5, 4, 3, 2, 1.58, 1]
# What `register` replaces, with its own quantizer.
UPSTREAM = HqqCacheLayer.replaces


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    monkeypatch.setattr(cache_utils, "HQQQuantizedLayer", UPSTREAM)
    kv_cache.register()


@pytest.fixture(params=["auto", "torch"])
def backend(request):
    hqq_cpp.set_backend(request.param)
    yield request.param
    hqq_cpp.set_backend("auto")


@pytest.fixture
def no_hqq(monkeypatch):
    """As if the package hqq were not installed."""
    monkeypatch.setattr(cache_utils, "is_hqq_available", lambda: False)
    monkeypatch.delattr(cache_utils, "HQQQuantizer", raising=False)


@pytest.fixture(scope="module")
def llama(model):
    return transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()


def states(*shape, seed=0, dtype=torch.float32):
    """Random states whose channels differ in size and mean, as those of keys do."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(*shape, generator=generator)
    size = 3 * torch.rand(shape[-1], generator=generator) + 0.1
    return (x * size + torch.randn(shape[-1], generator=generator)).to(dtype)


def round_to_nearest(x, nbits, group, axis):
    """Min-max quantization by definition, one group at a time."""
    if axis == 0:
        return round_to_nearest(x.transpose(-1, -2), nbits, group, 1).transpose(-1, -2)
    levels = 2 if nbits == 1.58 else 2**nbits - 1
    parts = []
    for part in x.float().split(group, dim=-1):
        low, high = part.amin(-1, keepdim=True), part.amax(-1, keepdim=True)
        step = (high - low) / levels
        parts.append(((part - low) / step).round() * step + low)
    return torch.cat(parts, dim=-1)


def roundtrip(layer, x, axis):
    return layer._dequantize(layer._quantize(x, axis))


def relative(x, y):
    return ((x.double() - y.double()).norm() / y.double().norm()).item()


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("nbits", NBITS)
@pytest.mark.parametrize("head_dim, group", [(64, 64), (80, 64), (20, 8)])
def test_error_is_below_rounding_to_nearest(backend, nbits, axis, head_dim, group):
    x = states(2, 3, 2 * group, head_dim)
    y = roundtrip(HqqCacheLayer(nbits, axis, axis, group), x, axis)
    assert y.shape == x.shape and y.dtype == x.dtype
    error, reference = relative(y, x), relative(round_to_nearest(x, nbits, group, axis), x)
    # The last digits of float32 decide at 8 bits.
    assert error <= reference * (1.02 if nbits == 8 else 1.0)
    if nbits <= 2:
        assert error < 0.9 * reference


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("axis", [0, 1])
def test_other_types_lose_little(backend, dtype, axis):
    x = states(1, 2, 128, 64, dtype=dtype)
    layer = HqqCacheLayer(4, axis, axis)
    y = roundtrip(layer, x, axis)
    assert y.dtype == dtype
    assert relative(y, x) < 1.02 * relative(roundtrip(layer, x.float(), axis), x)


def test_bits_per_value():
    x = states(1, 2, 128, 64, dtype=torch.bfloat16)
    for nbits in NBITS:
        packed = kv_states.quantize(x, nbits, 64, 0)
        # Ternary codes take two bits here; scale and shift are two bfloat16 for 64 values.
        assert 8 * packed.nbytes / x.numel() == {1.58: 2}.get(nbits, nbits) + 32 / 64


@pytest.mark.parametrize("value", [0.0, 1.0, -3.5, 1e5, 1e-6])
def test_constant_states_are_kept(backend, value):
    x = torch.full((1, 1, 64, 64), value)
    for axis in (0, 1):
        torch.testing.assert_close(
            roundtrip(HqqCacheLayer(2, axis, axis), x, axis), x, rtol=1e-5, atol=1e-7
        )


def test_nan_and_inf_do_not_stop_a_model(backend):
    x = states(1, 2, 64, 64)
    x[0, 0, 3] = float("nan")
    x[0, 1, 5, 7] = float("inf")
    y = roundtrip(HqqCacheLayer(4, 1, 1), x, 1)
    assert y[0, 0, 3].isnan().all()
    assert not y[0, 1, 5].isfinite().all()
    y[0, 0, 3] = x[0, 0, 3] = y[0, 1, 5] = x[0, 1, 5] = 0
    assert relative(y, x) < 0.1


def test_nothing_waits_for_a_device():
    # Tensors on meta have no values that a program could look at.
    x = torch.empty(2, 4, 64, 64, dtype=torch.bfloat16, device="meta")
    for axis in (0, 1):
        y = roundtrip(HqqCacheLayer(3, axis, axis), x, axis)
        assert y.shape == x.shape and y.device.type == "meta"


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("nbits", [8, 4, 3, 2, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_against_upstream(monkeypatch, nbits, axis, dtype):
    pytest.importorskip("hqq")
    torch.manual_seed(0)
    x = torch.randn(1, 8, 512, 64, dtype=dtype)
    theirs, ours = UPSTREAM(nbits, axis, axis), HqqCacheLayer(nbits, axis, axis)
    theirs.lazy_initialization(x, x)
    if (nbits, axis) == (3, 1):
        with pytest.raises(
            RuntimeError
        ):  # upstream trims 3 bits by the first two of four dimensions
            roundtrip(theirs, x, axis)
    else:
        assert relative(roundtrip(ours, x, axis), x) <= 1.001 * relative(
            roundtrip(theirs, x, axis), x
        )

    def seconds(layer):
        start = time.perf_counter()
        layer._quantize(x, axis)
        return time.perf_counter() - start

    # Side by side, since other work may slow both.
    pairs = [(seconds(ours), seconds(theirs)) for _ in range(5)]
    assert statistics.median(a / b for a, b in pairs) < 0.5


@pytest.mark.parametrize("axis_key, axis_value", [(0, 0), (0, 1), (1, 1)])
def test_tokens_are_packed_once(axis_key, axis_value):
    layer = HqqCacheLayer(4, axis_key, axis_value, q_group_size=16, residual_length=24)
    keys, values = states(1, 2, 120, 32, seed=1), states(1, 2, 120, 40, seed=2)
    assert layer.get_seq_length() == 0
    k, v = layer.update(keys[:, :, :37], values[:, :, :37])
    assert torch.equal(k, keys[:, :, :37]) and torch.equal(v, values[:, :, :37])
    before = None
    for t in range(37, 120):
        k, v = layer.update(keys[:, :, t : t + 1], values[:, :, t : t + 1])
        assert k.shape == (1, 2, t + 1, 32) and v.shape == (1, 2, t + 1, 40)
        assert layer.get_seq_length() == t + 1
        # The newest tokens are exact, all others near.
        assert torch.equal(k[:, :, t:], keys[:, :, t : t + 1])
        assert relative(k, keys[:, :, : t + 1]) < 0.1 and relative(v, values[:, :, : t + 1]) < 0.1
        recent = layer.keys.shape[-2]
        assert recent < 24 + (0 if axis_key == axis_value == 1 else 16)
        assert torch.equal(layer.keys, keys[:, :, t + 1 - recent : t + 1])
        packed = layer._quantized_keys.tokens
        assert packed + recent == t + 1
        if before is not None:
            assert torch.equal(k[:, :, : before.shape[-2]], before)
        # What was packed keeps its bits for good.
        before = layer._dequantize(layer._quantized_keys)
    assert packed > 80
    layer.reset()
    assert layer.get_seq_length() == 0 and layer.packed_nbytes == 0
    k, _ = layer.update(keys[:, :, :5], values[:, :, :5])
    assert torch.equal(k, keys[:, :, :5])


def test_a_short_prompt_waits_for_a_group():
    layer = HqqCacheLayer(4, residual_length=0)
    layer.update(states(1, 1, 63, 64), states(1, 1, 63, 64))
    assert layer.packed_nbytes == 0
    layer.update(states(1, 1, 1, 64), states(1, 1, 1, 64))
    assert layer._quantized_keys.tokens == 64


def test_rows_of_the_batch_move_without_loss():
    layer = HqqCacheLayer(2, 0, 1, q_group_size=16, residual_length=16)
    x, new = states(3, 2, 40, 32), states(3, 2, 1, 32, seed=5)
    layer.reorder_cache(torch.tensor([0]))  # before the first token there is nothing to do
    layer.update(x, x)
    before, _ = layer._all(layer._quantized_keys, layer.keys, new), None
    beams = torch.tensor([2, 2, 0])
    layer.reorder_cache(beams)
    keys, values = layer.update(new, new)
    assert torch.equal(keys[:, :, :40], before[beams][:, :, :40])
    layer.batch_repeat_interleave(2)
    layer.batch_select_indices(torch.tensor([1, 4]))
    again, _ = layer.update(new[:2], new[:2])
    assert torch.equal(again[:, :, :40], keys[[0, 2]][:, :, :40])
    with pytest.raises(IndexError):
        layer.reorder_cache(torch.tensor([7]))


@pytest.mark.parametrize("installed", [True, False])
def test_generate(llama, installed, request, monkeypatch):
    if installed:
        monkeypatch.setattr(cache_utils, "is_hqq_available", lambda: True)
    else:
        request.getfixturevalue("no_hqq")
    ids = torch.tensor([[5, 17, 300, 42, 8, 99, 1024, 7]]).repeat(1, 10)
    options = {"max_new_tokens": 24, "do_sample": False}
    plain = llama.generate(ids, **options)
    config = {"backend": "hqq", "nbits": 8, "q_group_size": 16, "residual_length": 16}
    quantized = llama.generate(
        ids, cache_implementation="quantized", cache_config=config, **options
    )
    assert torch.equal(plain, quantized)

    cache = QuantizedCache("hqq", llama.config, nbits=8, q_group_size=16, residual_length=16)
    assert torch.equal(plain, llama.generate(ids, past_key_values=cache, **options))
    assert isinstance(cache.layers[0], HqqCacheLayer) and isinstance(cache.layers[0], UPSTREAM)
    # All but the last token went in, and most of them are packed.
    assert cache.get_seq_length() == plain.shape[1] - 1
    assert cache.layers[0]._quantized_keys.tokens >= plain.shape[1] - 1 - 32


def test_generate_with_beams(llama):
    ids = torch.tensor([[5, 17, 300, 42, 8, 99, 1024, 7]]).repeat(2, 4)
    options = {"max_new_tokens": 16, "do_sample": False, "num_beams": 3}
    config = {"backend": "hqq", "nbits": 8, "q_group_size": 8, "residual_length": 8}
    quantized = llama.generate(
        ids, cache_implementation="quantized", cache_config=config, **options
    )
    assert torch.equal(quantized, llama.generate(ids, **options))


@pytest.mark.parametrize("nbits, limit", [(8, 0.01), (4, 0.1), (3, 0.2), (2, 0.5)])
def test_logits_from_a_quantized_prompt(llama, repository, nbits, limit):
    tokenizer = transformers.AutoTokenizer.from_pretrained(repository / "examples" / "tiny-llama")
    text = (repository / "examples" / "text" / "valid.txt").read_text()[:4000]
    ids = tokenizer(text, return_tensors="pt").input_ids[:, :257]
    cache = QuantizedCache("hqq", llama.config, nbits=nbits)
    with torch.no_grad():
        llama(ids[:, :256], past_key_values=cache)
        logits = llama(ids[:, 256:], past_key_values=cache).logits[0, -1]
        expected = llama(ids).logits[0, -1]
    difference = relative(logits, expected)
    assert 0 < difference < limit


def test_registering_is_what_makes_it_work(llama, no_hqq, monkeypatch):
    monkeypatch.setattr(cache_utils, "HQQQuantizedLayer", UPSTREAM)
    with pytest.raises(ImportError, match="pip install hqq"):
        QuantizedCache("hqq", llama.config)
    kv_cache.register()
    kv_cache.register()
    assert isinstance(QuantizedCache("hqq", llama.config).layers[0], HqqCacheLayer)


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"nbits": 7}, r"\[kv_cache\] nbits is 7; it must be one of 8, 6, 5, 4, 3, 2, 1.58, 1"),
        ({"axis_key": 2}, r"\[kv_cache\] axis_key is 2; it must be 0"),
        ({"axis_value": -1}, r"\[kv_cache\] axis_value is -1; it must be 0"),
        ({"q_group_size": 12}, r"\[kv_cache\] q_group_size is 12; it must be a multiple of 8"),
        ({"q_group_size": 0}, r"q_group_size is 0"),
        ({"q_group_size": None}, r"q_group_size is None"),
        ({"residual_length": -1}, r"residual_length is -1; it must be an int, at least 0"),
    ],
)
def test_wrong_settings(llama, wrong, message):
    with pytest.raises(ValueError, match=message):
        HqqCacheLayer(**wrong)
    if None not in wrong.values():
        with pytest.raises(ValueError, match=message):
            llama.generate(
                torch.tensor([[1]]),
                max_new_tokens=1,
                cache_implementation="quantized",
                cache_config={"backend": "hqq", **wrong},
            )


def test_states_of_another_shape_are_refused():
    layer = HqqCacheLayer(4, 1, 1, residual_length=1)
    layer.update(states(1, 2, 8, 32), states(1, 2, 8, 32))
    with pytest.raises(RuntimeError):
        layer.update(states(1, 3, 1, 32), states(1, 3, 1, 32))

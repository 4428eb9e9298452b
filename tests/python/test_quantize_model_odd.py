"""quantize_model_ on what is not a plain layer: subclasses, hooks, odd weights, shared layers."""

import copy
import pickle
import warnings

import pytest

torch = pytest.importorskip("torch", reason="the layers need torch")

from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune, weight_norm

import hqq_cpp
from hqq_cpp.find.layers import find_layers, quantized_layers, survey

EIGHT = {"nbits": 8}


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def names(model):
    return [name for name, _ in quantized_layers(model)]


def close(a, b):
    assert a.shape == b.shape and (a - b).norm() <= 0.02 * b.norm()


def quietly(model, *args, **kwargs):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return hqq_cpp.quantize_model_(model, *args, **kwargs)


# Subclasses of nn.Linear.


class Scaled(nn.Linear):
    def forward(self, x):
        return super().forward(x) * 3


class Lora(nn.Linear):
    def __init__(self, rows, columns):
        super().__init__(rows, columns)
        self.down = nn.Linear(rows, 8, bias=False)

    def forward(self, x):
        return super().forward(x) + self.down(x).sum(-1, keepdim=True)


class NormHead(nn.Linear):
    def forward(self, x):
        return nn.functional.linear(x, nn.functional.normalize(self.weight))


class Counting(nn.Linear):
    calls = 0

    def forward(self, x):
        self.calls += 1
        return super().forward(x)


class Dropping(nn.Linear):
    def forward(self, x):
        return nn.functional.dropout(super().forward(x), 0.5, self.training)


class Widening(nn.Linear):
    def forward(self, x):
        return super().forward(x).float()


class Grouped(nn.Linear):
    groups = 2

    def forward(self, x):
        w = self.weight.view(self.groups, -1, x.shape[-1]).transpose(1, 2)
        return torch.bmm(x.transpose(0, 1), w).transpose(0, 1)


class Gated(nn.Linear):
    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.gate = nn.Parameter(torch.ones(1))


class Called(nn.Linear):
    def __call__(self, x):
        return 2 * super().__call__(x)


class Computed(nn.Linear):
    def __getattr__(self, name):
        return super().__getattr__(name)


OWN = (Scaled, NormHead, Counting, Dropping, Widening, Grouped, Gated, Called, Computed)


@pytest.mark.parametrize("cls", [*OWN, Lora], ids=lambda cls: cls.__name__)
def test_what_computes_something_else_stays_with_a_warning(cls):
    model = nn.ModuleDict({"plain": nn.Linear(64, 64), "odd": cls(64, 64)})
    before = torch.random.get_rng_state()
    with pytest.warns(UserWarning, match=rf"1 layer stays as it is: odd \({cls.__name__} has") as w:
        hqq_cpp.quantize_model_(model, EIGHT)
    assert len(w) == 1 and w[0].filename == __file__
    assert type(model["odd"]) is cls and isinstance(model["plain"], hqq_cpp.HqqLinear)
    assert torch.equal(torch.random.get_rng_state(), before)
    with pytest.raises(ValueError, match=f"this {cls.__name__} cannot be replaced: "):
        hqq_cpp.quantize_linear(cls(64, 64), EIGHT)


class Named(nn.Linear):
    """Other names, and a start of its own."""

    unit = "meters"

    def __init__(self, rows, columns, label):
        super().__init__(rows, columns)
        self.label = label
        self.reset_parameters()

    def reset_parameters(self):
        nn.init.normal_(self.weight)

    def norm(self):
        return self.weight.norm()


class Written(nn.Linear):
    """As Falcon's: the same product, written otherwise."""

    def forward(self, input):
        hidden = input @ self.weight.T
        return hidden if self.bias is None else hidden + self.bias


@pytest.mark.parametrize("make", [lambda: Named(64, 32, "x"), lambda: Written(64, 32)])
def test_what_computes_the_same_is_quantized(make, tmp_path):
    model, x = nn.Sequential(make()), torch.randn(3, 64)
    expected, cls = model(x), type(model[0])
    layer = quietly(model, EIGHT)[0]
    assert isinstance(layer, hqq_cpp.HqqLinear) and isinstance(layer, cls)
    close(model(x), expected)
    torch.save(model, tmp_path / "model.pt")
    loaded = torch.load(tmp_path / "model.pt", weights_only=False)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), loaded):
        assert type(other[0]) is type(layer) and torch.equal(other(x), model(x))
    if cls is Named:
        assert layer.label == "x" and layer.unit == "meters"
        torch.testing.assert_close(layer.norm(), layer.dequantize().norm())


def test_replaced_and_computed_weights_stay():
    odd = {
        "weight_norm": weight_norm(nn.Linear(64, 64)),
        "new_weight_norm": parametrizations.weight_norm(nn.Linear(64, 64)),
        "spectral": parametrizations.spectral_norm(nn.Linear(64, 64)),
        "pruned": prune.l1_unstructured(nn.Linear(64, 64), "weight", 0.5),
        "bias": nn.Linear(64, 64),
        "bound": nn.Linear(64, 64),
        "scale": nn.Linear(64, 64),
    }
    parametrize.register_parametrization(odd["bias"], "bias", nn.Identity())
    odd["bound"].forward = lambda x: x
    odd["scale"].register_buffer("scale", torch.ones(1))
    model = nn.ModuleDict({"plain": nn.Linear(64, 64)} | odd)
    with pytest.warns(UserWarning, match="7 layers stay as they are") as w:
        hqq_cpp.quantize_model_(model, EIGHT)
    text = str(w[0].message)
    assert names(model) == ["plain"] and all(model[name] is odd[name] for name in odd)
    assert "weight_norm, new_weight_norm, spectral, pruned (the weight is computed" in text
    assert "bound (its forward was replaced)" in text and "scale (its attribute 'scale'" in text
    prune.remove(odd["pruned"], "weight")
    assert "pruned" in [layer.name for layer in find_layers(model)]


def test_only_what_the_settings_take_is_named():
    model = nn.ModuleDict({"a": nn.Linear(64, 64), "odd": Scaled(64, 64), "c": nn.Conv1d(4, 4, 3)})
    config = EIGHT | {"skip_modules": ["odd", "c"]}
    quietly(copy.deepcopy(model), config)
    with pytest.warns(UserWarning, match=r"1 layer stays as it is: c \(convolution other than 1x1"):
        hqq_cpp.quantize_model_(copy.deepcopy(model), EIGHT, filter=lambda name, m: name == "a")
    # Nothing can be quantized, and nothing is wrong with the settings.
    with pytest.warns(UserWarning, match="nothing to quantize below Sequential: 1 layer stays"):
        hqq_cpp.quantize_model_(nn.Sequential(Scaled(64, 64)), EIGHT)


def test_convolutions_are_counted():
    convolutions = (
        nn.Conv1d(8, 8, 1), nn.Conv3d(8, 8, 1), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 1, stride=2),
        nn.Conv2d(8, 8, 1, groups=2), nn.Conv2d(8, 8, 1, padding=1), nn.ConvTranspose2d(8, 8, 1),
    )  # fmt: skip
    model = nn.Sequential(*convolutions, nn.Conv2d(8, 8, 1))
    with pytest.warns(UserWarning) as w:
        hqq_cpp.quantize_model_(model, EIGHT)
    assert names(model) == ["7"] and len(w) == 1
    assert "7 layers stay as they are: 0, 1, 2, 3 and 3 more (convolution" in str(w[0].message)


def test_embeddings_keep_their_parts():
    class Decoupled(nn.Embedding):
        def __init__(self):
            super().__init__(20, 32)
            self.more = nn.Embedding(4, 32)
            self.shift = nn.Parameter(torch.ones(32))
            self.act = torch.tanh

        def forward(self, ids):
            return self.act(super().forward(ids)) + self.more(ids % 4) + self.shift

    model, ids = nn.ModuleDict({"t": Decoupled()}), torch.arange(6)
    expected, shift = model["t"](ids), model["t"].shift
    quietly(model, EIGHT | {"dynamic_config": {"t": {"nbits": 8}}})
    close(model["t"](ids), expected)
    dense = hqq_cpp.dequantize_model_(model)["t"]
    assert type(dense) is Decoupled and dense.shift is shift
    close(dense(ids), expected)


# Hooks and attributes.


def test_hooks_move_and_their_handles_remove_them():
    layer = nn.Linear(64, 64)
    model, x, seen = nn.Sequential(layer), torch.randn(4, 64, requires_grad=True), []
    handles = [
        layer.register_forward_pre_hook(lambda m, a: seen.append("pre")),
        layer.register_forward_pre_hook(lambda m, a, k: seen.append("kw"), with_kwargs=True),
        layer.register_forward_hook(lambda m, a, y: y * 2),
        layer.register_full_backward_hook(lambda m, i, o: seen.append("back")),
        layer.register_full_backward_pre_hook(lambda m, o: seen.append("pre back")),
        layer.register_state_dict_post_hook(lambda m, d, p, l: seen.append("saved")),
        layer.register_load_state_dict_pre_hook(lambda m, *a: seen.append(type(m).__name__)),
        layer.register_load_state_dict_post_hook(lambda m, k: seen.append("loaded")),
    ]
    expected = model(x)
    seen.clear()
    quietly(model, EIGHT)
    y = model(x)
    close(y, expected)
    y.sum().backward()
    model.load_state_dict(model.state_dict())
    assert seen == ["pre", "kw", "pre back", "back", "saved", "HqqLinear", "loaded"]
    seen.clear()
    for handle in handles:
        handle.remove()
    model(x).sum().backward()
    model.load_state_dict(model.state_dict())
    close(2 * model(x), expected)
    assert seen == []


def test_attributes_flags_and_bias_move():
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64), nn.Conv2d(4, 8, 1)).train()
    layer = model[0].eval()
    layer.tag, layer.act = "first", torch.tanh
    layer.register_buffer("steps", torch.ones(1), persistent=False)
    layer.bias.requires_grad_(False)
    bias = layer.bias
    quietly(model, EIGHT)
    assert (model[0].training, model[1].training, model[2].training) == (False, True, True)
    assert (model[0].tag, model[0].act) == ("first", torch.tanh)
    assert model[0].bias is bias and model[1].bias.requires_grad and not bias.requires_grad
    assert model[0].steps == 1 and "0.steps" not in model.state_dict()
    assert (model[2].in_channels, model[2].kernel_size) == (4, (1, 1))


def test_hooks_of_accelerate_move():
    hooks = pytest.importorskip("accelerate.hooks", reason="hooks of accelerate")
    cases = []

    class Doubling(hooks.ModelHook):
        def pre_forward(self, module, *args, **kwargs):
            cases.append(type(module).__name__)
            return (2 * args[0],), kwargs

    model, x = nn.Sequential(nn.Linear(64, 64, bias=False)), torch.randn(3, 64)
    hooks.add_hook_to_module(model[0], Doubling())
    hooks.add_hook_to_module(model[0], hooks.AlignDevicesHook("cpu"), append=True)
    expected = model(x)
    quietly(model, EIGHT)
    close(model(x), expected)
    assert cases == ["Linear", "HqqLinear"]
    hqq_cpp.dequantize_model_(model)
    close(model(x), expected)
    hooks.remove_hook_from_module(model[0])
    close(2 * model(x), expected)


def test_offloaded_layers_stay():
    accelerate = pytest.importorskip("accelerate", reason="it offloads")
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    x = torch.randn(3, 64)
    expected = model(x)
    accelerate.cpu_offload(model[1], "cpu")
    with pytest.warns(UserWarning, match=r"1 layer stays as it is: 1 \(the weight is on"):
        hqq_cpp.quantize_model_(model, EIGHT)
    close(model(x), expected)


# Weights that cannot be quantized.


def odd_layers():
    fp8 = nn.Linear(64, 64)
    fp8.weight = nn.Parameter(fp8.weight.data.to(torch.float8_e4m3fn), requires_grad=False)
    integer = nn.Linear(64, 64)
    integer.weight = nn.Parameter(torch.ones(64, 64, dtype=torch.int8), requires_grad=False)
    flat = nn.Linear(64, 64)
    flat.weight = nn.Parameter(torch.empty(0))

    class Wrapped(nn.Parameter):
        pass

    bias = nn.Linear(64, 64)
    bias.bias = nn.Parameter(torch.ones(1))
    wrapped = nn.Linear(64, 64)
    wrapped.weight = Wrapped(wrapped.weight.data)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        empty = {"out": nn.Linear(64, 0), "in": nn.Linear(0, 64), "conv": nn.Conv2d(4, 0, 1)}
    return empty | {
        "lazy": nn.LazyLinear(8),
        "meta": nn.Linear(64, 64, device="meta"),
        "complex": nn.Linear(64, 64, dtype=torch.complex64),
        "fp8": fp8, "integer": integer, "flat": flat, "wrapped": wrapped,
        "bias": bias,
    }  # fmt: skip


@pytest.mark.parametrize("name", odd_layers())
def test_odd_weights_stay(name):
    odd = odd_layers()[name]
    model = nn.ModuleDict({"a": nn.Linear(64, 64), "odd": odd, "b": nn.Linear(64, 64)})
    with pytest.warns(UserWarning, match=r"1 layer stays as it is: odd \(the (weight|bias) "):
        hqq_cpp.quantize_model_(model, EIGHT)
    assert names(model) == ["a", "b"] and model["odd"] is odd


def test_a_model_on_meta_is_refused():
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(64, 64), nn.Conv2d(4, 4, 3))
    with pytest.raises(ValueError, match="the weights are on device meta; load them first"):
        hqq_cpp.quantize_model_(model)


def test_what_is_quantized_already_says_so():
    model = quietly(nn.Sequential(nn.Linear(64, 64)), EIGHT)
    with pytest.raises(ValueError, match="0 is quantized already; start from the dense model"):
        hqq_cpp.quantize_model_(model, {"nbits": 3})
    assert model[0].nbits == 8
    with pytest.raises(ValueError, match="the layer is quantized already .HqqLinear"):
        hqq_cpp.quantize_linear(model[0], EIGHT)
    model.append(nn.Linear(64, 64))
    assert names(quietly(model, {"nbits": 3})) == ["0", "1"]
    with pytest.raises(ValueError, match="the config is the class HqqConfig; make an object of it"):
        hqq_cpp.quantize_model_(nn.Sequential(nn.Linear(64, 64)), hqq_cpp.HqqConfig)


def test_layers_of_upstream_are_named():
    upstream = pytest.importorskip("hqq.core.quantize", reason="needs the package hqq")
    settings = upstream.BaseQuantizeConfig(nbits=4, group_size=64, axis=1)
    layer = upstream.HQQLinear(nn.Linear(64, 64), settings, torch.float32, device="cpu")
    with pytest.raises(ValueError, match="0 is quantized already, by the package hqq"):
        hqq_cpp.quantize_model_(nn.Sequential(layer), EIGHT)
    with pytest.warns(UserWarning, match=r"0 \(quantized by the package hqq"):
        hqq_cpp.quantize_model_(nn.Sequential(layer, nn.Linear(64, 64)), EIGHT)


# Checks before the first change.


@pytest.mark.parametrize(
    "value, message",
    [(float("nan"), "b.*NaN"), (float("-inf"), "b.*Inf"), (3e38, "b.*does not fit float16")],
)
def test_nothing_is_changed_before_all_is_checked(value, message):
    model = nn.ModuleDict({"a": nn.Linear(64, 64), "b": nn.Linear(64, 64)})
    with torch.no_grad():
        model["b"].weight[5, 7] = value
    with pytest.raises(ValueError, match=message):
        hqq_cpp.quantize_model_(model, EIGHT)
    assert names(model) == []
    with torch.no_grad():
        model["b"].weight[5, 7] = 1
    assert names(quietly(model, EIGHT)) == ["a", "b"]


@pytest.mark.parametrize(
    "vector, message",
    [
        (torch.ones(63), r"\[b\] importance has the shape \[63\]"),
        (torch.full((64,), -1.0), r"\[b\] importance must be finite and >= 0"),
        (torch.full((64,), float("nan")), r"\[b\] importance must be finite and >= 0"),
        (torch.zeros(64), r"\[b\] importance is all zeros"),
    ],
)
def test_importance_is_checked_first(vector, message):
    model = nn.ModuleDict({"a": nn.Linear(64, 64), "b": nn.Linear(64, 64)})
    with pytest.raises(ValueError, match=message):
        hqq_cpp.quantize_model_(model, EIGHT, importance={"b": vector})
    assert names(model) == []


def test_a_refusal_half_way_says_how_far_it_came(monkeypatch):
    from hqq_cpp import backends

    original = backends.quantize

    def refuse(W, config, name, *args):
        if name == "2":
            raise ValueError("[2] W is odd")
        return original(W, config, name, *args)

    monkeypatch.setattr(backends, "quantize", refuse)
    model = nn.Sequential(*(nn.Linear(64, 64) for _ in range(4)))
    message = r"\[2\] W is odd \(2 layers are quantized already: 0, 1\)"
    with pytest.raises(ValueError, match=message):
        hqq_cpp.quantize_model_(model, EIGHT)


# Shared layers.


def test_a_shared_module_is_one_layer():
    layer = nn.Linear(64, 64)
    block = nn.Sequential(nn.Linear(64, 64))
    model = nn.ModuleDict({"list": nn.ModuleList([layer, nn.ReLU(), layer]), "again": layer})
    model["blocks"] = nn.ModuleList([block, block])
    x = torch.randn(3, 64)
    expected, inner = layer(x), block(x)
    seen = []
    quietly(model, EIGHT, progress=lambda *a: seen.append(a))
    assert seen == [("list.0", 1, 2), ("blocks.0.0", 2, 2)]
    assert model["list"][0] is model["list"][2] is model["again"]
    assert model["blocks"][0] is model["blocks"][1] is block
    close(model["again"](x), expected)
    close(model["blocks"][1](x), inner)
    assert len(hqq_cpp.hqq_report(model).rows) == 2
    hqq_cpp.dequantize_model_(model)
    assert type(model["again"]) is nn.Linear and model["list"][0] is model["again"]
    assert model["list"][2] is model["again"]


def test_a_shared_weight_is_one_layer():
    model = nn.ModuleDict({"a": nn.Linear(64, 32), "b": nn.Linear(64, 32, bias=False)})
    model["b"].weight = model["a"].weight
    model["c"] = nn.ModuleList([model["b"]])
    (layer,) = find_layers(model)
    assert (layer.name, layer.tied, layer.aliases) == ("a", ("b",), ("c.0",))
    bias = model["a"].bias
    quietly(model, EIGHT)
    assert model["a"].W_q is model["b"].W_q and model["c"][0] is model["b"]
    assert model["a"].bias is bias and model["b"].bias is None
    x = torch.randn(3, 64)
    torch.testing.assert_close(model["a"](x), model["b"](x) + bias)
    hqq_cpp.dequantize_model_(model)
    assert model["a"].weight is model["b"].weight and model["c"][0] is model["b"]


def test_all_names_of_a_shared_layer_count():
    layer = nn.Linear(64, 64)

    def model():
        return nn.ModuleDict({"a": layer, "b": layer, "c": nn.Linear(64, 64)})

    four = quietly(model(), {"nbits": 8, "dynamic_config": {"b": {"nbits": 4}}})
    assert four["a"] is four["b"] and (four["a"].nbits, four["c"].nbits) == (4, 8)
    assert names(quietly(model(), EIGHT | {"skip_modules": ["b"]})) == ["c"]
    assert names(quietly(model(), EIGHT | {"dynamic_config": {"b": None}})) == ["c"]
    importance = {"b": torch.rand(64) + 0.1}
    assert quietly(model(), EIGHT, importance=importance)["a"].layer_config.balance == "none"


def test_what_cannot_be_shared_stays():
    model = nn.ModuleDict({"a": nn.Linear(64, 64), "odd": Scaled(64, 64), "c": nn.Linear(64, 64)})
    model["odd"].weight = model["a"].weight
    with pytest.warns(UserWarning, match=r"a \(its weight is shared with odd\); odd \(Scaled has"):
        hqq_cpp.quantize_model_(model, EIGHT)
    assert names(model) == ["c"] and model["odd"].weight is model["a"].weight


def test_modules_that_hold_each_other():
    class Child(nn.Module):
        def __init__(self, parent):
            super().__init__()
            self.parent, self.layer = parent, nn.Linear(64, 64)

    model = nn.Module()
    model.child = Child(model)
    assert [layer.name for layer in survey(quietly(model, EIGHT))] == []
    assert isinstance(model.child.layer, hqq_cpp.HqqLinear)


# Adapters.


def test_adapters_by_name_stay():
    block = nn.ModuleDict(
        {
            "base_layer": nn.Linear(64, 64),
            "lora_A": nn.ModuleDict({"default": nn.Linear(64, 8)}),
            "lora_B": nn.Linear(8, 64),
        }
    )
    assert names(quietly(nn.Sequential(block), EIGHT)) == ["0.base_layer"]


def test_adapters_of_peft_stay_and_train(tmp_path):
    peft = pytest.importorskip("peft", reason="adapters")
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.Linear(64, 8))
    config = peft.LoraConfig(target_modules=["0", "2"], modules_to_save=["3"], use_dora=True)
    model = peft.get_peft_model(model, config)
    x = torch.randn(5, 64)
    expected = model(x)
    quietly(model, EIGHT)
    start = "base_model.model."
    assert names(model) == [f"{start}0.base_layer", f"{start}2.base_layer"]
    close(model(x), expected)
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trainable, 0.1)
    losses = []
    for _ in range(5):
        loss = model(x).square().mean()
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < losses[0]
    trained = model(x)
    model.merge_adapter()
    assert torch.allclose(model(x), trained, atol=0.02 * float(trained.detach().abs().max()))
    model.unmerge_adapter()
    torch.testing.assert_close(model(x), trained)
    hqq_cpp.dequantize_model_(model)
    assert type(model.base_model.model[0]) is peft.tuners.lora.layer.Linear
    close(model(x), trained)
    model.merge_adapter()
    close(model(x), trained)


@pytest.mark.parametrize("tuner, merges", [("VeraConfig", True), ("IA3Config", False)])
def test_other_adapters_merge_as_on_a_model_that_was_quantized_first(tuner, merges):
    peft = pytest.importorskip("peft", reason="adapters")
    config = getattr(peft, tuner)(target_modules=["0", "1"])
    if tuner == "IA3Config":
        config.feedforward_modules = []
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    model = quietly(peft.get_peft_model(model, config), EIGHT)
    base, x = model.base_model.model[0].get_base_layer(), torch.randn(3, 64)
    before, expected = base.dequantize(), model(x)
    if not merges:
        with pytest.raises(ValueError, match="cannot be merged into a quantized layer"):
            model.merge_adapter()
        return
    model.merge_adapter()
    close(model(x), expected)
    model.unmerge_adapter()
    assert torch.equal(base.dequantize(), before)


def test_a_merged_adapter_keeps_its_layer_dense():
    peft = pytest.importorskip("peft", reason="adapters")
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    model = peft.get_peft_model(model, peft.LoraConfig(target_modules=["0"]))
    model.merge_adapter()
    with pytest.warns(UserWarning, match="0.base_layer .an adapter is merged into it"):
        hqq_cpp.quantize_model_(model, EIGHT)
    assert names(model) == ["base_model.model.1"]


def test_prompts_of_peft_stay():
    peft = pytest.importorskip("peft", reason="adapters")
    transformers = pytest.importorskip("transformers", reason="a model with prompts")
    config = transformers.GPT2Config(vocab_size=64, n_embd=32, n_layer=1, n_head=2, n_positions=32)
    model = transformers.GPT2LMHeadModel(config)
    prompts = peft.PrefixTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=3, prefix_projection=True, encoder_hidden_size=16
    )
    model = peft.get_peft_model(model, prompts)
    hqq_cpp.quantize_model_(model, EIGHT | {"dynamic_config": {"*.wte": {"nbits": 8}}})
    assert all(name.startswith("base_model.") for name in names(model))
    assert model.word_embeddings is model.base_model.transformer.wte
    assert isinstance(model.word_embeddings, hqq_cpp.HqqEmbedding)
    assert model(torch.arange(4)[None]).logits.isfinite().all()

"""Every other tuner of the package peft on quantized layers, dense models, and the order of imports."""

from __future__ import annotations

import copy

import pytest

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")


import hqq_cpp
import hqq_cpp.peft
from adapter_maker import (  # noqa: F401
    LINEAR,
    assert_same,
    dense_twin,
    disturb,
    ids,
    lora,
    packed,
    quantize,
    quantized,
    small,
)
from hqq_cpp.peft.lora import HqqLoraLinear

TUNERS = {
    "vera": lambda: peft.VeraConfig(r=4, target_modules=["q_proj", "o_proj"], d_initial=0.5),
    "oft": lambda: peft.OFTConfig(oft_block_size=8, target_modules="all-linear"),
    "boft": lambda: peft.BOFTConfig(boft_block_size=8, target_modules=["q_proj"]),
    "miss": lambda: peft.MissConfig(r=4, target_modules="all-linear"),
    "shira": lambda: peft.ShiraConfig(r=4, target_modules=["q_proj"]),
}
UNMERGEABLE = {
    "ia3": lambda: peft.IA3Config(
        target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"]
    ),
    "loha": lambda: peft.LoHaConfig(r=4, target_modules=["q_proj"]),
    "lokr": lambda: peft.LoKrConfig(r=4, target_modules=["q_proj"]),
}
PREFIX = {"loha": "hada_"}  # of parameters, where it is not the name


@pytest.mark.parametrize("tuner", [*TUNERS, *UNMERGEABLE])
def test_other_tuners(quantized, ids, tuner):
    config = {**TUNERS, **UNMERGEABLE}[tuner]
    twin = peft.get_peft_model(dense_twin(quantized), config())
    model = peft.get_peft_model(quantized, config())
    base = model(ids).logits
    disturb(model, 0.1)
    state = {k: v for k, v in model.state_dict().items() if PREFIX.get(tuner, tuner) in k}
    state = {k: v for k, v in state.items() if ".base_layer." not in k}
    assert state
    twin.load_state_dict(state, strict=False)
    adapted = model(ids).logits
    assert not torch.allclose(adapted, base, atol=1e-4)
    torch.testing.assert_close(adapted, twin.eval()(ids).logits, rtol=1e-3, atol=1e-3)
    model.train()(ids, labels=ids).loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    model.eval()
    before = packed(model)
    if tuner in UNMERGEABLE:
        with pytest.raises(ValueError, match="cannot be merged into a quantized layer"):
            model.merge_adapter()
        assert torch.equal(model(ids).logits, adapted)
        assert_same(packed(model), before)
    else:
        model.merge_adapter()
        assert any(not torch.equal(v, before[k]) for k, v in packed(model).items())
        model.unmerge_adapter()
        assert_same(packed(model), before)
        assert torch.equal(model(ids).logits, adapted)
        model.merge_adapter(safe_merge=True)
        merged = model(ids).logits
        assert torch.equal(model.merge_and_unload()(ids).logits, merged)
        return
    assert type(model.unload().model.layers[0].self_attn.q_proj) is hqq_cpp.HqqLinear


def test_dense_models_are_untouched(small, ids):
    dense = copy.deepcopy(small[0])
    model = disturb(peft.get_peft_model(dense, lora()))
    assert not any(isinstance(m, HqqLoraLinear) for m in model.modules())
    expected = model(ids).logits
    torch.testing.assert_close(model.merge_and_unload()(ids).logits, expected, rtol=1e-3, atol=1e-3)
    with pytest.raises(ValueError, match="not supported"):
        peft.get_peft_model(copy.deepcopy(small[0]), lora(target_modules=["input_layernorm"]))


def test_layers_of_upstream_are_left_to_peft():
    quantize_module = pytest.importorskip("hqq.core.quantize")
    layer = quantize_module.HQQLinear(
        torch.nn.Linear(64, 16),
        quantize_module.BaseQuantizeConfig(nbits=4, group_size=64),
        compute_dtype=torch.float32,
        device="cpu",
    )
    for config in (peft.LoraConfig(target_modules=["0"]), peft.OFTConfig(target_modules=["0"])):
        model = peft.get_peft_model(torch.nn.Sequential(layer), config)
        assert not isinstance(model.base_model.model[0], HqqLoraLinear)
        assert type(model.base_model.model[0].get_base_layer()) is quantize_module.HQQLinear
        backend = getattr(model.base_model.model[0], "quantization_backend", None)
        assert backend is None or backend.backend_name == "hqq"


ORDERS = {
    "theirs first": "import peft, hqq_cpp.peft; hqq_cpp.peft.register()",
    "ours first": "import hqq_cpp.peft, importlib.util; hqq_cpp.peft.register(); "
    "hqq_cpp.peft.register();assert importlib.util.find_spec('peft') and 'peft' not in sys.modules;"
    "from peft.tuners import lora; import peft; hqq_cpp.peft.register()",
    "without hqq": "sys.modules['hqq'] = None; import importlib.util as u; f = u.find_spec;"
    "u.find_spec = lambda n, *a: None if n == 'hqq' else f(n, *a);"
    "import hqq_cpp.peft; hqq_cpp.peft.register(); import peft; import peft.import_utils;"
    "assert not peft.import_utils.is_hqq_available()",
    "not registered": "import hqq_cpp, peft",
}


@pytest.mark.parametrize("order", ORDERS)
def test_order_of_imports(run_python, order):
    done = run_python(
        "import sys;"
        + ORDERS[order]
        + """
import hqq_cpp, torch
layer = torch.nn.Sequential(hqq_cpp.quantize_linear(torch.nn.Linear(64, 16), {"nbits": 4}))
model = peft.get_peft_model(layer, peft.LoraConfig(target_modules=["0"]))
print(type(model.base_model.model[0]).__name__)
"""
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["Linear" if order == "not registered" else "HqqLoraLinear"]


def test_registering_without_peft(run_python):
    done = run_python(
        "import sys, hqq_cpp.peft; hqq_cpp.peft.register(); sys.path_hooks.clear(); "
        "sys.path.clear();sys.path_importer_cache.clear()\n"
        "try:\n    import peft\nexcept ModuleNotFoundError as error:\n    print(error)\n"
        "assert 'torch' not in sys.modules"
    )
    assert done.stdout.strip() == "No module named 'peft'", done.stderr

"""Which loader reads a checkpoint, and what a loader that takes no dense weights refuses."""

import copy

import pytest

import hqq_cpp

transformers = pytest.importorskip("transformers", reason="loaders are for Transformers")

import hqq_cpp.transformers
from hqq_cpp.transformers import HqqQuantizationConfig, HqqQuantizer
from hqq_cpp.transformers.loaders import choose_loader
from hqq_cpp.transformers.loaders.dense import DenseLoader
from hqq_cpp.transformers.loaders.format1 import Format1Loader
from hqq_cpp.transformers.loaders.upstream import UpstreamLoader
from hqq_cpp.transformers.upstream_folder import UpstreamSource


@pytest.mark.parametrize("pre_quantized", [False, True])
@pytest.mark.parametrize(
    "config",
    [None, {"nbits": 3}, hqq_cpp.HqqConfig(nbits=3), HqqQuantizationConfig({"nbits": 3})],
    ids=["none", "dict", "ours", "wrapped"],
)
def test_our_settings(config, pre_quantized):
    loader = choose_loader(config, pre_quantized)
    assert type(loader) is (Format1Loader if pre_quantized else DenseLoader)
    assert loader.reads_packed is pre_quantized
    assert isinstance(loader.quantization_config, HqqQuantizationConfig)


def test_settings_of_transformers():
    config = transformers.HqqConfig(nbits=3, group_size=64)
    dense, quantized = choose_loader(config, False), choose_loader(config, True)
    assert type(dense) is DenseLoader and type(quantized) is UpstreamLoader
    assert dense.quantization_config.config.nbits == 3
    assert quantized.quantization_config.config.nbits == 3


def test_a_folder_of_upstream_is_quantized_in_any_case():
    loader = choose_loader(UpstreamSource(None), False)
    assert type(loader) is UpstreamLoader and loader.reads_packed


def test_settings_that_cannot_be_read():
    """The files of an old checkpoint say the same; nothing else says what to do with a dense one."""
    config = transformers.HqqConfig(nbits=4, group_size=64)
    config.quant_config["weight_quant_params"]["nbits"] = 7
    assert type(choose_loader(config, True)) is UpstreamLoader
    with pytest.raises(ValueError, match="nbits"):
        choose_loader(config, False)


@pytest.mark.parametrize("config", [HqqQuantizationConfig(), UpstreamSource(None)])
def test_quantized_checkpoints_give_no_dense_weights(config):
    loader = choose_loader(config, True)
    assert not loader.takes("model.embed_tokens.weight")
    assert loader.bits_per_weight("model.embed_tokens.weight") is None
    with pytest.raises(NotImplementedError, match="takes no dense weights"):
        loader.operation(lambda name: False)


def test_a_checkpoint_without_files():
    loader = choose_loader(HqqQuantizationConfig(), True)
    assert loader.conversions(["not prepared"]) == ["not prepared"]
    loader.prepare(None, None)
    with pytest.raises(ValueError, match="state_dict alone does not"):
        loader.conversions([])


@pytest.mark.parametrize("pre_quantized", [False, True])
def test_quantizers_can_be_copied(pre_quantized):
    """A model is copied with its quantizer."""
    copied = copy.deepcopy(HqqQuantizer({"nbits": 3}, pre_quantized=pre_quantized))
    assert copied.quantization_config.config.nbits == 3
    assert copied.pre_quantized is pre_quantized

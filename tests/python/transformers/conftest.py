"""What the tests of the integration in Transformers share."""

import logging

import pytest

import hqq_cpp


@pytest.fixture
def log(caplog, monkeypatch):
    """The log of Transformers, without progress bars."""
    import transformers

    transformers.logging.disable_progress_bar()
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    return caplog


@pytest.fixture(scope="session")
def quantized_llama(model, tmp_path_factory):
    """A folder with the bundled model in 4 bits. Read only."""
    folder = tmp_path_factory.mktemp("quantized") / "q"
    hqq_cpp.quantize_checkpoint(model, folder, {"nbits": 4, "quant_scale": True})
    return folder

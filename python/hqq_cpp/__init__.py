"""Half-Quadratic Quantization of neural network weights to 8..1 bits.

    >>> import numpy as np
    >>> W = np.random.default_rng(0).standard_normal((256, 256), dtype=np.float32)
    >>> q = hqq_cpp.quantize(W, hqq_cpp.HqqConfig(nbits=4))
    >>> W_r = hqq_cpp.dequantize(q)

The whole interface is in docs/python.md. Importing this package imports neither NumPy nor torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ._interpreter import refuse_sub_interpreter

refuse_sub_interpreter()

from . import _diffusers_hook, _transformers_hook
from ._after_import import after_import
from ._core import (
    FORMAT_VERSION,
    Checkpoint,
    HqqConfig,
    LayerConfig,
    LayerReport,
    Progress,
    QuantizedTensor,
    QuantizeReport,
    QuantizeStats,
    Tensor,
    TensorDiff,
    TiledTensor,
    VerifyReport,
    __version__,
    cpu_target,
    cpu_targets,
    cuda_is_available,
    default_threads,
    layer_tag,
)
from .api import dequantize, linear, quantize
from .checkpoints import (
    convert_checkpoint,
    dequantize_checkpoint,
    diff_checkpoints,
    load_safetensors,
    quantize_checkpoint,
    safetensors_metadata,
    save_safetensors,
    verify_checkpoint,
)
from .errors import CudaError, FormatError, Interrupted
from .models import listeners
from .numpy_linear import QuantizedLinear, quantize_linear

__all__ = [
    "FORMAT_VERSION",
    "Checkpoint",
    "CudaError",
    "Explanation",
    "FormatError",
    "HqqConfig",
    "HqqEmbedding",
    "HqqExperts",
    "HqqLinear",
    "Interrupted",
    "LayerConfig",
    "LayerReport",
    "Progress",
    "QuantizeReport",
    "QuantizeStats",
    "QuantizedLinear",
    "QuantizedTensor",
    "Tensor",
    "TensorDiff",
    "TiledTensor",
    "VerifyReport",
    "__version__",
    "collect_importance",
    "collect_importance_folder",
    "convert_checkpoint",
    "cpu_target",
    "cpu_targets",
    "cuda_is_available",
    "default_threads",
    "dequantize",
    "dequantize_checkpoint",
    "dequantize_model_",
    "diff_checkpoints",
    "explain",
    "from_upstream",
    "get_backend",
    "hqq_report",
    "layer_tag",
    "linear",
    "load_model",
    "load_safetensors",
    "quantize",
    "quantize_checkpoint",
    "quantize_linear",
    "quantize_model_",
    "safetensors_metadata",
    "save_model",
    "save_safetensors",
    "set_backend",
    "take_over_",
    "verify_checkpoint",
]


if TYPE_CHECKING:
    from .importance.collect import collect_importance
    from .importance.folder import collect_importance_folder
    from .models.dequantize import dequantize_model_
    from .models.loading import load_model
    from .models.quantize import quantize_model_
    from .models.report import hqq_report
    from .models.saving import save_model
    from .models.take_over import from_upstream, take_over_
    from .nn import (
        Explanation,
        HqqEmbedding,
        HqqExperts,
        HqqLinear,
        explain,
        get_backend,
        set_backend,
    )
else:
    # The names that need torch, and their modules.
    _TORCH_NAMES = {
        "Explanation": "nn.explanation",
        "HqqEmbedding": "nn.embedding",
        "HqqExperts": "nn.experts",
        "HqqLinear": "nn.linear",
        "collect_importance": "importance.collect",
        "collect_importance_folder": "importance.folder",
        "dequantize_model_": "models.dequantize",
        "explain": "nn.explanation",
        "from_upstream": "models.take_over",
        "get_backend": "backends",
        "hqq_report": "models.report",
        "load_model": "models.loading",
        "quantize_model_": "models.quantize",
        "save_model": "models.saving",
        "set_backend": "backends",
        "take_over_": "models.take_over",
    }

    def __getattr__(name):
        if name in _TORCH_NAMES:
            import importlib

            return getattr(importlib.import_module(f"{__name__}.{_TORCH_NAMES[name]}"), name)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)


def _register_operators() -> None:
    """What torch saved of models (torch.export, AOTInductor, torch.jit) names our operators."""
    from .nn import ops  # noqa: F401


def _join_listeners() -> None:
    """In the order in which they are told of a model."""
    for library, package in (
        ("peft", "peft"),
        ("transformers", "transformers"),
        ("diffusers.models.modeling_utils", "diffusers"),
    ):
        listeners.join(library, f"{__name__}.{package}.listener")


_join_listeners()
_transformers_hook.install()
_diffusers_hook.install()
after_import("torch", _register_operators)

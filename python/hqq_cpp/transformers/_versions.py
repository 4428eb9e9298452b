"""Which versions of Transformers work, and what differs between them: the parts of its loader that
are no public interface are imported here and nowhere else in this package."""

from __future__ import annotations

import functools
import re

import torch
import transformers
from transformers import PreTrainedModel
from transformers.utils import logging

logger = logging.get_logger("transformers.hqq_cpp")

_MARK = "_hqq_cpp"

# The oldest and the newest that the tests run with (scripts/test-versions.sh).
OLDEST = (5, 17)
NEWEST = (5, 24)


def _range() -> str:
    return f"Transformers {'.'.join(map(str, OLDEST))} to {'.'.join(map(str, NEWEST))}"


def _install() -> str:
    after = f"{NEWEST[0]}.{NEWEST[1] + 1}"
    return f"pip install 'transformers>={'.'.join(map(str, OLDEST))},<{after}'"


def _parse(text: str) -> tuple[int, int]:
    numbers = re.match(r"(\d+)\.(\d+)", text)
    return (int(numbers[1]), int(numbers[2])) if numbers else NEWEST


def check(installed: str) -> None:
    """Whether hqq_cpp.transformers works with a version of Transformers.

    Raises:
        ImportError: For one that is too old. One that is newer than tested is a warning.
    """
    version = _parse(installed)
    if version < OLDEST:
        raise ImportError(
            f"hqq_cpp.transformers needs {_range()}; {installed} is installed: {_install()}"
        )
    if version > NEWEST:
        logger.warning(
            f"[hqq_cpp] tested with {_range()}; {installed} is installed and may differ: if "
            f"something fails, {_install()}"
        )


check(transformers.__version__)
try:
    from transformers import core_model_loading
    from transformers.core_model_loading import (
        Concatenate,
        ConversionOps,
        MergeModulelist,
        SplitModulelist,
        WeightConverter,
        WeightRenaming,
        build_glob_alternation,
        dot_natural_key,
        rename_source_key,
    )
    from transformers.integrations.accelerate import get_device
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
    from transformers.quantizers.base import HfQuantizer
except ImportError as error:
    raise ImportError(
        f"hqq_cpp.transformers works with {_range()}; {transformers.__version__} is installed and "
        f"differs ({error}): {_install()}"
    ) from error

__all__ = [
    "ALL_EXPERTS_FUNCTIONS",
    "KEEPS_FLOAT_CODES",
    "Concatenate",
    "ConversionOps",
    "MergeModulelist",
    "SplitModulelist",
    "WeightConverter",
    "WeightRenaming",
    "apply_renamings",
    "compare_shapes",
    "copy_converter",
    "dot_natural_key",
    "get_device",
    "planned_dtype",
    "rename_source_key",
]


# Before 5.21 the loader gives W_q the type of our parameter, uint8, before we see it: codes that
# upstream stored as float16 (view_as_float) would be rounded.
KEEPS_FLOAT_CODES = hasattr(HfQuantizer, "get_new_dtype")


def apply_renamings(name: str, renamings: list[WeightRenaming]) -> str:
    """The name after all renamings, one after the other."""
    for renaming in renamings:
        name, _ = renaming.rename_source_key(name)
    return name


def copy_converter(
    converter: WeightConverter,
    sources: list[str],
    targets: list[str],
    operations: list[ConversionOps],
) -> WeightConverter:
    """A converter like another, in its part of the model, with other patterns and operations."""
    copy = type(converter)(sources, targets, operations, force_cpu=converter.force_cpu)
    copy.scope_prefix = converter.scope_prefix
    copy.base_model_prefix = converter.base_model_prefix
    return copy


def planned_dtype(model: PreTrainedModel, name: str) -> torch.dtype:
    """The type in which the loader would put a dense weight into the model, which it tells the
    quantizer from 5.21 on."""
    dtype = model.get_parameter(name).dtype
    plan = model._get_dtype_plan(dtype)
    if not plan:
        return dtype
    pattern, by_group, _ = build_glob_alternation(list(plan))
    match = pattern.search(name)
    return dtype if match is None else plan[by_group[match.lastgroup]]


def compare_shapes(quantizer: type) -> None:
    """Has the loader compare shapes of files and model where a quantizer leaves a weight alone.

    Before 5.23 it does so without a quantizer only, and puts any shape into the model.
    """
    original = core_model_loading.set_param_for_module
    if _parse(transformers.__version__) >= (5, 23) or hasattr(original, _MARK):
        return

    @functools.wraps(original)
    def set_param_for_module(model, name, value, loading_info, hf_quantizer):
        if isinstance(hf_quantizer, quantizer):
            if not hf_quantizer.param_needs_quantization(model, name):
                hf_quantizer = None
        return original(model, name, value, loading_info, hf_quantizer)

    setattr(set_param_for_module, _MARK, True)
    core_model_loading.set_param_for_module = set_param_for_module

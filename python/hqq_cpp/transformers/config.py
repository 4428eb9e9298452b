"""Configurations: ours as Transformers wants it, and transformers.HqqConfig without the package
hqq."""

from __future__ import annotations

from typing import Any

from transformers.utils import quantization_config as _transformers
from transformers.utils.quantization_config import QuantizationConfigMixin, QuantizationMethod

from .. import _core
from .._transformers_hook import METHOD
from ..models import described


class HqqQuantizationConfig(QuantizationConfigMixin):
    """How a model is quantized, as ``model.config.quantization_config`` holds it.

    Args:
        config: An hqq_cpp.HqqConfig, or anything that HqqConfig.from_dict reads.
        not_quantized: Weights of two and more dimensions that were left as they are.
    """

    def __init__(self, config: Any = None, *, not_quantized: list[str] | None = None):
        self.quant_method = METHOD
        self.config = _core.HqqConfig.from_dict(config)
        self.not_quantized = not_quantized

    @classmethod
    def from_dict(cls, config: dict[str, Any], return_unused_kwargs: bool = False, **kwargs):
        """Reads the quantization_config of a config.json."""
        read = cls(config, not_quantized=config.get("not_quantized"))
        return (read, kwargs) if return_unused_kwargs else read

    def to_dict(self) -> dict[str, Any]:
        """The dict that config.json gets."""
        return described.quantization_config(self.config, self.not_quantized)

    def to_diff_dict(self) -> dict[str, Any]:
        """As to_dict(): a reader must not depend on our defaults."""
        return self.to_dict()

    def __repr__(self) -> str:
        return f"{self.config!r}"


def is_hqq(quantization_config: Any) -> bool:
    """Whether a quantization_config (dict or object) is that of upstream or Transformers 4."""
    if isinstance(quantization_config, dict):
        method = quantization_config.get("quant_method")
    else:
        method = getattr(quantization_config, "quant_method", None)
    return method == QuantizationMethod.HQQ


def _upstream_settings(where: str, **settings: Any) -> dict[str, Any]:
    """BaseQuantizeConfig's dict for its keywords."""
    quant_zero = settings.pop("quant_zero", False)
    quant_scale = settings.pop("quant_scale", False)
    settings.pop("offload_meta", None)
    axis = settings.get("axis")
    axis = 1 if axis is None else axis
    settings |= {"axis": axis}
    # Checks the values, and names the nearest of a wrong keyword.
    try:
        read = _core.HqqConfig(**settings)
    except ValueError as error:
        raise ValueError(str(error).replace("[config]", f"[{where}]", 1)) from None
    eight_bits = {"nbits": 8, "channel_wise": True, "group_size": 128, "optimize": False}
    return {
        "weight_quant_params": {
            "nbits": read.nbits,
            "channel_wise": True,
            "group_size": read.group_size,
            "optimize": True,
            "round_zero": read.nbits == 4,
            "axis": read.axis,
            "view_as_float": False,
        },
        "scale_quant_params": dict(eight_bits) if quant_scale else None,
        "zero_quant_params": dict(eight_bits) if quant_zero else None,
        "offload_meta": False,
    }


def _init(
    self,
    nbits: int = 4,
    group_size: int = 64,
    view_as_float: bool = False,
    axis: int | None = None,
    dynamic_config: dict | None = None,
    skip_modules: list[str] | tuple[str, ...] = ("lm_head",),
    **kwargs: Any,
):
    where = "HqqConfig"
    if dynamic_config is not None:
        self.quant_config = {
            tag: _upstream_settings(f"{where}, {tag}", **settings)
            for tag, settings in dynamic_config.items()
        }
    else:
        self.quant_config = _upstream_settings(
            where,
            nbits=nbits,
            group_size=group_size,
            view_as_float=view_as_float,
            axis=axis,
            **kwargs,
        )
    self.quant_method = QuantizationMethod.HQQ
    self.skip_modules = list(skip_modules) if isinstance(skip_modules, tuple) else skip_modules
    self.post_init()


def _read(cls: type, config: dict[str, Any]) -> Any:
    """HqqConfig.from_dict of Transformers, also for files of its first versions, which lack keys.

    A dict that a user writes has the arguments of HqqConfig instead of quant_config.
    """
    settings = {
        k: v
        for k, v in config.items()
        if k not in ("quant_method", "quant_config", "show_progress")
    }
    if "quant_config" not in config:
        return cls(**settings)
    read = cls()
    read.quant_config = config["quant_config"]
    read.skip_modules = config.get("skip_modules", read.skip_modules)
    return read


def take_over() -> None:
    """Lets transformers.HqqConfig, whoever imported it already, do without the package hqq."""
    _transformers.HqqConfig.__init__ = _init
    _transformers.HqqConfig.from_dict = classmethod(_read)

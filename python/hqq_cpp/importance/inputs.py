"""Random input for models of Transformers."""

from __future__ import annotations

import inspect
import math
import sys
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

# Longer windows teach nothing more about mean squares, and attention takes long.
MAX_WINDOW = 512


def run_random(
    model: nn.Module, tokens: Any, n: int, seed: int, *, one_batch: bool = False
) -> None:
    """Runs a model on random input.

    Args:
        model: A model of Transformers, or a module that contains some; these are run then.
        tokens: 'random', or token ids [T] or [B, T].
        n: Random tokens (positions of an image or a recording).
        seed: Of the random numbers, which are drawn on the CPU.
        one_batch: All windows in one call, not one after the other.

    Raises:
        ValueError: If there is no such model.
    """
    for part in _pretrained_models(model):
        inputs = RandomInputs(part, n, torch.Generator().manual_seed(seed))
        calls = list(inputs.main(tokens))
        if one_batch:
            calls = [{key: torch.cat([call[key] for call in calls]) for key in calls[0]}]
        extra = {"use_cache": False} if inputs.takes("use_cache") else {}
        for call in calls:
            part(**{key: value.to(inputs.device) for key, value in call.items()}, **extra)
        _run_towers(part, inputs)


def _pretrained_models(model: nn.Module) -> list[Any]:
    found: list[Any] = []
    if "transformers" in sys.modules:
        from transformers import PreTrainedModel

        def visit(module: nn.Module) -> None:
            if isinstance(module, PreTrainedModel):
                found.append(module)
            else:
                for child in module.children():
                    visit(child)

        visit(model)
    if not found:
        raise ValueError(
            "[importance] random input is known for models of Transformers only, and "
            f"{type(model).__name__} "
            f"contains none; give batches= of its input"
        )
    return found


def _run_towers(model: Any, inputs: RandomInputs) -> None:
    """Encoders of a multimodal language model, which random text does not reach."""
    for method, make in (
        ("get_image_features", inputs.tower_images),
        ("get_audio_features", inputs.tower_sounds),
    ):
        if not inputs.has_placeholders or not hasattr(model, method):
            continue
        try:
            getattr(model, method)(**make(getattr(model, method)))
        except Exception as error:  # every tower has its own conventions
            warnings.warn(
                f"[importance] random input does not fit {type(model).__name__}.{method} "
                f"({type(error).__name__}: {error}); layers that only it reaches get no "
                "importance, give batches= "
                f"to include them",
                stacklevel=2,
            )


class RandomInputs:
    """The input that one model takes."""

    def __init__(self, model: Any, n: int, generator: torch.Generator):
        self.model, self.n, self.generator = model, n, generator
        self.config = model.config
        self.text = self.config.get_text_config()
        self.device = next(
            (p.device for p in model.parameters() if not p.is_meta), torch.device("cpu")
        )
        self._parameters = inspect.signature(model.forward).parameters
        # "<image>" and the like in the text stand for features of a tower.
        self.has_placeholders = any(
            getattr(self.config, f"{kind}_token_{end}", None) is not None
            for kind in ("image", "audio")
            for end in ("id", "index")
        )

    def takes(self, name: str) -> bool:
        """Whether forward has this argument."""
        if name in self._parameters:
            return True
        # Models hand it on in **kwargs.
        kinds = [p.kind for p in self._parameters.values()]
        return hasattr(self.text, name) and inspect.Parameter.VAR_KEYWORD in kinds

    def main(self, tokens: Any) -> Iterator[dict[str, torch.Tensor]]:
        """The keyword arguments of every forward pass."""
        main = self.model.main_input_name
        if "input_ids" in self._parameters:
            windows = self._windows(tokens)
        elif not isinstance(tokens, str):
            raise ValueError(
                f"[importance] {type(self.model).__name__} takes {main}, not token ids; give "
                "batches="
            )
        elif main == "pixel_values":
            windows = ({main: self._image()} for _ in range(self._count(self._image_positions())))
        elif main == "input_features":
            positions = getattr(self.config, "max_source_positions", None) or MAX_WINDOW
            windows = ({main: self._spectrogram()} for _ in range(self._count(positions)))
        elif main == "input_values":
            windows = iter([{main: self._noise(1, 16000)}])
        else:
            raise ValueError(
                f"[importance] random {main} is not known for {type(self.model).__name__}; give "
                "batches= of its "
                f"input"
            )
        for call in windows:
            # CLIP and its like take both; a language model gets its images through a tower.
            if "pixel_values" in self._parameters and not self.has_placeholders:
                call.setdefault("pixel_values", self._image())
            if getattr(self.config, "is_encoder_decoder", False):
                if "decoder_input_ids" in self._parameters:
                    call["decoder_input_ids"] = self._ids(1, min(self.n, self._window()))
            yield call

    def _windows(self, tokens: Any) -> Iterator[dict[str, torch.Tensor]]:
        if not isinstance(tokens, str):
            tokens = torch.as_tensor(tokens)
            if tokens.is_floating_point() or tokens.ndim not in (1, 2) or tokens.numel() == 0:
                raise ValueError(
                    f"[importance] tokens is {tokens.dtype} {list(tokens.shape)}; it must be "
                    "integers [T] or [B, T]"
                )
            for row in tokens.reshape(-1, tokens.shape[-1]):
                for window in row.split(self._window()):
                    yield {"input_ids": window[None]}
            return
        count = self._count(self._window())
        for window in self._ids(count, math.ceil(self.n / count)):
            yield {"input_ids": window[None]}

    def _count(self, positions: int) -> int:
        return math.ceil(self.n / positions)

    def _window(self) -> int:
        """Tokens that fit the position embeddings."""
        names = ("max_target_positions", "max_position_embeddings", "n_positions")
        limits = [getattr(self.text, name, None) for name in names]
        limit = min([MAX_WINDOW, *(v for v in limits if isinstance(v, int) and v > 0)])
        for name, module in self.model.named_modules():
            # RoBERTa numbers its positions from padding_idx + 1.
            if isinstance(module, nn.Embedding) and name.endswith("position_embeddings"):
                if module.padding_idx is not None:
                    limit = min(limit, module.num_embeddings - module.padding_idx - 1)
        return max(limit, 1)

    def _ids(self, rows: int, length: int) -> torch.Tensor:
        """Uniform over the vocabulary, without special tokens, which are rare and often odd."""
        size = self.text.vocab_size
        special = set()
        for config in (self.config, self.text):
            for key, value in vars(config).items():
                if key.endswith(("_token_id", "_token_index")):
                    special |= set(value if isinstance(value, (list, tuple)) else [value])
        allowed = torch.ones(size, dtype=torch.bool)
        for token in special:
            if isinstance(token, int) and 0 <= token < size and size > 2 * len(special):
                allowed[token] = False
        allowed = allowed.nonzero().flatten()
        return allowed[torch.randint(len(allowed), (rows, length), generator=self.generator)]

    def _noise(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=self.generator).to(self.model.dtype)

    @property
    def _vision(self) -> Any:
        return getattr(self.config, "vision_config", None) or self.config

    def _image_size(self) -> tuple[int, int]:
        size = getattr(self._vision, "image_size", None) or 224
        return (size, size) if isinstance(size, int) else tuple(size)[-2:]

    def _image_positions(self) -> int:
        patch = getattr(self._vision, "patch_size", None) or 32
        patch = patch if isinstance(patch, int) else max(patch)
        height, width = self._image_size()
        return max((height // patch) * (width // patch), 1)

    def _image(self) -> torch.Tensor:
        return self._noise(1, getattr(self._vision, "num_channels", 3), *self._image_size())

    def _spectrogram(self) -> torch.Tensor:
        audio = getattr(self.config, "audio_config", None) or self.config
        bins = getattr(audio, "num_mel_bins", None) or 80
        frames = 2 * (getattr(audio, "max_source_positions", None) or MAX_WINDOW)
        return self._noise(1, bins, frames)

    def tower_images(self, method: Any) -> dict[str, torch.Tensor]:
        """Arguments of get_image_features."""
        if "image_grid_thw" not in inspect.signature(method).parameters:
            return {"pixel_values": self._image().to(self.device)}
        # Qwen-VL: rows are flattened patches, and a grid says how they lie.
        config: Any = self._vision
        channels = getattr(config, "in_channels", 0) or getattr(config, "in_chans", 3)
        length = channels * getattr(config, "temporal_patch_size", 1) * config.patch_size**2
        return {
            "pixel_values": self._noise(16 * 16, length).to(self.device),
            "image_grid_thw": torch.tensor([[1, 16, 16]], device=self.device),
        }

    def tower_sounds(self, method: Any) -> dict[str, torch.Tensor]:
        """Arguments of get_audio_features."""
        return {"input_features": self._spectrogram().to(self.device)}

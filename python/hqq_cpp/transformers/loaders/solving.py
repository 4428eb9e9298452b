"""Quantization while from_pretrained reads: weights go to the C++ solver one by one, off the
loader's thread."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial

import torch

from ..._core import LayerConfig
from ...find.layers import Layer
from ...format import nbytes_of, tensor_specs
from ...importance.source import ImportanceSource
from ...models.replace import empty_module, put_module, share_parameters
from ...models.solve import Quantized, quantize_layer
from .._versions import ConversionOps
from ..ties import tie_packed
from .marks import leave_bias_to_model, mark_read


class Plan:
    """The layer, settings and importance of a weight that is to be quantized."""

    def __init__(self, layer: Layer, settings: LayerConfig, importance: ImportanceSource):
        self.layer = layer
        self.settings = importance.resolve(layer, settings)
        self._importance = importance
        self.done = False

    def quantize(self, weight: torch.Tensor) -> Quantized:
        """Solves for the packed tensors."""
        self.done = True
        return quantize_layer(self.layer, weight, self.settings, self._importance.get(self.layer))

    def fits(self, weight: torch.Tensor) -> bool:
        """Whether a weight of the checkpoint has the shape of the model's."""
        parameter = self.layer.module._parameters[self.layer.parameter.rpartition(".")[2]]
        return parameter is not None and weight.shape == parameter.shape

    @property
    def bits_per_weight(self) -> float:
        """The size of the packed tensors, before they exist."""
        rows, cols = self.layer.shape[-2:]
        return 8 * nbytes_of(tensor_specs(self.settings, rows, cols)) / (rows * cols)


class SolverThread:
    """One thread that solves while the loader reads the next weights.

    submit() waits until what is waiting is small, so that no more than two large dense weights are
    in memory. The solver itself uses all cores. The first error is kept for join(): Transformers
    would bury it in a report about another weight.
    """

    # Bytes of dense weights that may wait; of larger ones none does while another is solved.
    MAX_WAITING = 64 << 20

    def __init__(self) -> None:
        self._pool: ThreadPoolExecutor | None = None
        self._pending: deque[tuple[Future, int]] = deque()
        self._error: Exception | None = None
        # Names that the loader is going to convert.
        self.expected: set[str] = set()

    def submit(self, work: Callable[[], None], nbytes: int) -> None:
        """Runs work(), which holds nbytes, in the thread."""
        while self._pending and nbytes + sum(n for _, n in self._pending) > self.MAX_WAITING:
            self._pending.popleft()[0].result()
        if self._pool is None:
            self._pool = ThreadPoolExecutor(1, thread_name_prefix="hqq-cpp-solver")
        self._pending.append((self._pool.submit(self.run, work), nbytes))

    def run(self, work: Callable[[], None]) -> None:
        """Runs work() here, unless an error made it pointless."""
        if self._error is None:
            try:
                work()
            except Exception as error:
                self._error = error

    def wait(self) -> None:
        """Returns when nothing runs."""
        while self._pending:
            self._pending.popleft()[0].result()

    def join(self) -> None:
        """Ends the thread and raises the first error."""
        self.wait()
        if self._pool is not None:
            self._pool.shutdown()
            self._pool = None
        if self._error is not None:
            raise self._error


class QuantizeOnLoad(ConversionOps):
    """Takes dense weights from the loader; the tensors that replace them are set by the solver's
    thread."""

    def __init__(
        self,
        plans: dict[str, Plan],
        solver: SolverThread,
        is_offloaded: Callable[[str], bool],
    ):
        self._plans = plans
        self._solver = solver
        self._is_offloaded = is_offloaded

    @torch.no_grad()
    def convert(self, input_dict, *, model=None, full_layer_name=None, missing_keys=None, **kwargs):
        dense = {}
        for name, tensors in input_dict.items():
            tensor = tensors[0] if isinstance(tensors, list) else tensors
            plan = self._plans.get(name)
            if plan is None or not plan.fits(tensor):
                self._leave_dense(plan)
                dense[name] = tensors
                continue
            missing_keys.discard(name)
            if name != plan.layer.parameter:
                self._solver.run(partial(_refuse_second, name, plan.layer))
                continue
            missing_keys -= {f"{other}.weight" for other in plan.layer.others}
            dense |= self._start(model, plan, tensor)
        self._solver.expected.discard(full_layer_name)
        if not self._solver.expected:
            self._solver.wait()
        return dense

    def _leave_dense(self, plan: Plan | None) -> None:
        """Drops the plan for a weight of another shape. Transformers refuses such a weight, or
        initializes it with ignore_mismatched_sizes."""
        for name in [name for name, other in self._plans.items() if other is plan]:
            del self._plans[name]

    def _start(self, model, plan: Plan, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        layer = plan.layer
        target = weight.device
        module = empty_module(layer, plan.settings)
        leave_bias_to_model(module)
        put_module(model, layer, module)
        if layer.others:
            tie_packed(model)
        if self._is_offloaded(layer.name):
            # The loader writes what it gets to disk.
            quantized = plan.quantize(weight)
            module.quantize_stats = quantized.stats
            names = (layer.name, *layer.tied)
            return {f"{n}.{key}": t for n in names for key, t in quantized.tensors.items()}

        def work():
            quantized = plan.quantize(weight)
            module.set_packed(quantized.tensors, target)
            mark_read(module)
            share_parameters(model, layer, module)
            module.quantize_stats = quantized.stats

        if layer.kind == "experts":
            # The loader merges experts in memory: it must not start the next before this one is
            # gone.
            self._solver.wait()
            self._solver.run(work)
        else:
            self._solver.submit(work, weight.nbytes)
        return {}


def _refuse_second(name: str, layer: Layer) -> None:
    raise ValueError(
        f"[quantize] {name} is tied to {layer.parameter}, which a rule quantizes, but the checkpoint "
        f"has a weight of its own for it: load the model dense and use quantize_model_, or leave "
        f"the rule for {layer.name} out"
    )

"""Which weights of a model can be quantized, and under which names."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import nn

from .. import _core
from ..nn.embedding import HqqEmbedding
from ..nn.experts import HqqExperts
from ..nn.linear import HqqLinear
from .adapters import is_adapter_part, is_merged
from .kinds import kind_of, weight_obstacle

# Kinds whose settings are not those of a linear layer.
_ROLES = {"embedding": "embedding", "experts": "experts"}
_EXPERT_PARAMETERS = ("gate_up_proj", "down_proj", "gate_proj", "up_proj")


class Layer(NamedTuple):
    """A weight that can be quantized, or that something keeps dense."""

    # The name of the layer, as the rules of an HqqConfig see it: "model.layers.0.mlp.experts.down_proj".
    name: str
    # The name of its parameter: name + ".weight", or the name itself for fused experts.
    parameter: str
    module: nn.Module
    # "linear", "conv1d", "conv2d", "embedding" or "experts"; see Kind for those that stay dense.
    kind: str
    # [experts,] out, in. As stored: experts that keep their matrices transposed are taken as they
    # are.
    shape: tuple[int, ...]
    dtype: torch.dtype
    # Names of the other layers with the same weight, which become quantized with it.
    tied: tuple[str, ...] = ()
    # Further places of the module, and of those tied to it.
    aliases: tuple[str, ...] = ()
    # All names by which rules know the layer: `name` first. Not those of linear layers that are
    # tied to an embedding, which alone decides.
    names: tuple[str, ...] = ()
    # The role on which settings depend: "linear", "head", "embedding" or "experts" (_core.Roles).
    role: str = "linear"
    # Why it has to stay dense; empty if it can be quantized.
    obstacle: str = ""

    @property
    def others(self) -> tuple[str, ...]:
        """All places but the first whose weight this is."""
        return self.tied + self.aliases


def find_layers(model: nn.Module) -> Iterator[Layer]:
    """All weights of a model that can be quantized, in its order.

    nn.Linear and subclasses of it that compute the same; Transformers' Conv1D, which keeps its
    weight transposed; convolutions 1x1; fused experts [experts, out, in] of Transformers;
    embeddings. What shares a module or a weight is one layer. Routers, adapters and what is
    quantized already are left out.
    """
    return (layer for layer in survey(model) if not layer.obstacle)


def survey(model: nn.Module) -> Iterator[Layer]:
    """Like find_layers(), and also the layers that cannot be quantized: they have an obstacle."""
    places = places_of(model)
    roles = find_roles(places)
    found: dict[_Slot, Layer] = {}
    for key, place in places.items():
        for last, layer in _layers_of(place):
            role = _role_of(layer, roles)
            if role != "router":
                found[key, last] = layer._replace(role=role)
    groups = _groups(model, places)
    order = {slot: number for number, slot in enumerate(found)}
    for slot, layer in found.items():
        group = groups.get(slot, [slot])
        if len(group) == 1:
            yield layer
            continue
        slots = sorted((other for other in group if other in found), key=order.__getitem__)
        members = [found[other] for other in slots]
        if len(members) == len(group) and _can_share(members):
            first = next((m for m in members if m.kind == "embedding"), members[0])
            if layer is first:
                yield _joined(first, members)
        elif layer.obstacle:
            yield layer
        else:
            others = (_name_of(places, other) for other in group if other != slot)
            yield layer._replace(obstacle=f"its weight is shared with {next(others)}")


def find_roles(places: dict[int, Place]) -> _core.Roles:
    """The roles of a model's parameters by their names, shapes and types: the rule of
    `hqq-cpp quantize`."""
    return _core.Roles(
        (f"{path}.{last}" if path else last, tuple(parameter.shape), str(parameter.dtype))
        for place in places.values()
        for path in place.paths
        for last, parameter in place.module._parameters.items()
        if parameter is not None and not nn.parameter.is_lazy(parameter)
    )


def _role_of(layer: Layer, roles: _core.Roles) -> str:
    """The module tells what a layer is; its names tell what it is for."""
    suffix = "" if layer.kind == "experts" else ".weight"
    given = {roles.role(f"{name}{suffix}" if name else "weight") for name in layer.names}
    if "router" in given:
        return "router"
    if layer.kind == "linear" and "head" in given:
        return "head"
    return _ROLES.get(layer.kind, "linear")


# A parameter by the id of its module and its name there.
_Slot = tuple[int, str]


@dataclasses.dataclass
class Place:
    """Where a module is in a model."""

    module: nn.Module
    # All names that lead to it, and those of them that are not below an adapter.
    paths: list[str] = dataclasses.field(default_factory=list)
    names: list[str] = dataclasses.field(default_factory=list)
    # Whether an adapter is merged into it.
    is_merged: bool = False


def places_of(model: nn.Module) -> dict[int, Place]:
    """Every module of a model by its id, in the order of named_modules()."""
    places: dict[int, Place] = {}

    def visit(module: nn.Module, name: str, is_adapter: bool, above: tuple[int, ...]) -> None:
        place = places.setdefault(id(module), Place(module))
        place.paths.append(name)
        if not is_adapter:
            place.names.append(name)
        merged = is_merged(module)
        for key, child in module._modules.items():
            if child is None or id(child) in above:
                continue
            path = f"{name}.{key}" if name else key
            visit(child, path, is_adapter or is_adapter_part(module, key), (*above, id(child)))
            places[id(child)].is_merged |= merged

    visit(model, "", False, (id(model),))
    return places


def _groups(model: nn.Module, places: dict[int, Place]) -> dict[_Slot, list[_Slot]]:
    """Every parameter -> all with the same memory."""
    sharers: dict[int, list[_Slot]] = {}
    for key, place in places.items():
        for name, parameter in place.module._parameters.items():
            if parameter is not None:
                sharers.setdefault(id(parameter), []).append((key, name))
    groups = {slot: slots for slots in sharers.values() for slot in slots}
    # Transformers ties at the end of from_pretrained.
    for target, source in (getattr(model, "all_tied_weights_keys", None) or {}).items():
        slots, others = (_slots_of(model, name, groups) for name in (source, target))
        if slots is not None and others is not None and slots is not others:
            slots += others
            groups |= dict.fromkeys(others, slots)
    return groups


def _slots_of(
    model: nn.Module, parameter: str, groups: dict[_Slot, list[_Slot]]
) -> list[_Slot] | None:
    """The group of a parameter; None if the model has no such parameter."""
    try:
        owner, last = parent_of(model, parameter)
    except AttributeError:
        return None
    return groups.get((id(owner), last))


def _name_of(places: dict[int, Place], slot: _Slot) -> str:
    key, last = slot
    path = places[key].paths[0]
    return path if last == "weight" else f"{path}.{last}"


def _can_share(members: list[Layer]) -> bool:
    """Whether one packed weight serves all."""
    if any(layer.obstacle for layer in members):
        return False
    kinds = {layer.kind for layer in members}
    alike = kinds <= {"linear", "embedding"} or kinds in ({"conv1d"}, {"conv2d"})
    return alike and len({layer.shape for layer in members}) == 1


def _joined(first: Layer, members: list[Layer]) -> Layer:
    """The layer that stands for all with its weight."""
    others = [layer for layer in members if layer is not first]
    named = [m for m in others if first.kind != "embedding" or m.kind == "embedding"]
    return first._replace(
        tied=tuple(layer.name for layer in others),
        aliases=first.aliases + tuple(alias for layer in others for alias in layer.aliases),
        names=first.names + tuple(name for layer in named for name in layer.names),
    )


def _layers_of(place: Place) -> Iterator[tuple[str, Layer]]:
    """(name of the parameter in the module, layer) of what a module has."""
    if not place.names:
        return
    module, name = place.module, place.names[0]
    merged = "an adapter is merged into it" if place.is_merged else ""
    kind = kind_of(module)
    if kind is not None:
        weight = module._parameters.get("weight")
        dtype = torch.float32 if weight is None else weight.dtype
        aliases = tuple(path for path in place.paths if path != name)
        yield "weight", Layer(
            name, f"{name}.weight" if name else "weight", module, kind.name, kind.shape, dtype,
            aliases=aliases, names=tuple(place.names), obstacle=kind.obstacle or merged,
        )  # fmt: skip
    elif is_experts(module):
        for key in _EXPERT_PARAMETERS:
            weight = module._parameters.get(key)
            if weight is not None and weight.ndim == 3:
                names = tuple(f"{path}.{key}" for path in place.names)
                yield key, Layer(
                    names[0], names[0], module, "experts", tuple(weight.shape), weight.dtype,
                    names=names, obstacle=weight_obstacle(weight, 3) or merged,
                )  # fmt: skip


def is_experts(module: nn.Module) -> bool:
    """Whether Transformers' experts interface runs this module, and its parameters can be
    replaced."""
    return all(hasattr(module, name) for name in ("_apply_gate", "is_transposed", "has_gate"))


def dense_matrix(kind: str, weight: torch.Tensor) -> torch.Tensor:
    """The matrix [out, in] (or [experts, out, in]) of a layer's parameter."""
    if kind == "conv1d":
        return weight.t()
    return weight.flatten(1) if kind == "conv2d" else weight


def dense_weight(kind: str, matrix: torch.Tensor) -> torch.Tensor:
    """The way back from dense_matrix()."""
    if kind == "conv1d":
        return matrix.t().contiguous()
    return matrix[..., None, None] if kind == "conv2d" else matrix


def quantized_layers(
    model: nn.Module,
) -> Iterator[tuple[str, HqqLinear | HqqEmbedding | HqqExperts]]:
    """(name, module) of all quantized layers of a model."""
    for name, module in model.named_modules():
        if isinstance(module, (HqqLinear, HqqEmbedding, HqqExperts)):
            yield name, module


def parent_of(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    """The module that holds `name`, and the last component of the name."""
    path, _, last = name.rpartition(".")
    return model.get_submodule(path), last

"""Turns dense models into mixtures of experts and back: `convert`, `revert`, and `aux_loss` for the training loop.

`find_ffns` finds the FFNs, `weights` makes a `MoELayer` of each; the host's forwards keep their signatures.
Transformers and timm need not be installed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from numbers import Integral
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..gates import gate_config
from ..layer import MoELayer
from ..validation import flag, positive_int, warn_once
from .find_ffns import DenseFFN, find_ffns, why_not
from .padding_mask import forget_padding_of, mask_padding_of
from .weights import MODULES, Conversion, Origin, dense_weights, layer_of

RECIPES = ("gmoe", "emoe")
SPLITS = ("kmeans", "random", "contiguous")
LAYERS = ("all", "every_other", "last_two")
_NO_FFN = (
    "an FFN is down(act(up(x))) or down(act(gate(x)) * up(x)) with nn.Linear (or Conv1D) maps, without hooks, and "
    "nn.Dropout in front of down or behind it alone"
)


def convert(
    model: nn.Module,
    layers: str | int | Sequence[int | str] = "every_other",
    recipe: str = "gmoe",
    *,
    gate_type: str | Mapping[str, Any] = "top_any",
    num_experts: int = 8,
    split: str = "kmeans",
    expert_repeat: int = 1,
    key_gate: bool | None = None,
    moe_dropout: float | None = None,
    mask_padding: bool = True,
    seed: int = 0,
    experts: str | Mapping[str, Any] | None = None,
    **layer_options: Any,
) -> nn.Module:
    """Replace FFNs of `model` by MoE layers, in place; returns `model`.

    Args:
        layers: which FFNs, counted in the model's order from 0: indices (negative from the end), names (of an FFN or of
            a block that holds one), "all", "every_other" (1, 3, 5, ...) or "last_two" (GMoE's: n - 4 and n - 2).
        recipe: "gmoe": every slot is a copy of the FFN. Right after conversion, each routed token gets the dense
            model's output up to rounding (not with a fixed-k gate of k = 1, which multiplies by its score, as in
            Tutel). "emoe": the slots divide the neurons; a token that activates all slots with equal weights (top-any
            gates, `one_score_gate`) gets the dense output. To that end, if a token's weights sum to 1 (all gates but
            `one_score_gate`), the second weights are multiplied by slots / expert_repeat, and every expert has the
            whole second bias; with `one_score_gate` they are divided by expert_repeat and the bias by k.
        gate_type: as for `MoELayer`: a name, or a dict such as ``{"type": "top_any", "max_expert_num": 16}``.
        num_experts: number of experts active at start.
        split: how emoe divides neurons: "kmeans" (balanced clusters of the first weights' unit rows; extra ``[emoe]``),
            "random", "contiguous".
        expert_repeat: emoe: number of experts for each neuron; slot e takes the clusters e, e + 1, ... (mod slots).
        key_gate: start the router from the mean of each expert's first weights; default: emoe with a gate "top".
        moe_dropout: dropout after the activation, instead of the host's.
        mask_padding: tokens whose ``attention_mask`` in the host's call is 0 reach no expert, record or loss.
        seed: for the random split and k-means.
        experts: a dict of `recompute` and `engine` of the expert networks; or "modules": each slot keeps nn.Linear
            maps, which tools that replace such maps (quantizers, adapters) reach. Kernels take stacked weights alone.
        layer_options: further arguments of `MoELayer` (capacity, aux_losses, one_score_gate, ...).

    Activation, dropout, dtype, device and mode are the host's. Raises ValueError, and leaves the model unchanged, if a
    chosen layer has no FFN (the message says what is there) or options do not fit.
    """
    refuse_no_module(model)
    recipe = _one_of("recipe", recipe, RECIPES)
    _one_of("split", split, SPLITS)
    if isinstance(layer_options.get("seeds"), int):
        raise ValueError("seeds: give (gates, experts)")
    if type(seed) is not int or not 0 <= seed < 2**32:
        raise ValueError(f"seed = {seed!r}: give an integer from 0 to 2**32 - 1")
    if not isinstance(experts, Mapping | None) and experts != MODULES:
        raise ValueError(f"experts = {experts!r}: give a dict of recompute and engine, {MODULES!r}, or None")
    if "model_dim" in layer_options:
        raise ValueError("model_dim is that of the FFN: leave it out")
    chosen = _chosen(model, layers)
    built = []
    for ffn in chosen:
        options = Conversion(
            recipe=recipe,
            gate=gate_config(gate_type),
            num_experts=positive_int("num_experts", num_experts),
            split=split,
            repeat=positive_int("expert_repeat", expert_repeat),
            key_gate=key_gate,
            dropout=moe_dropout,
            seed=seed,
            experts=dict(experts) if isinstance(experts, Mapping) else {},
            layer=layer_options,
            kind=MODULES if experts == MODULES else None,
        )
        built.append(layer_of(ffn, options))
    for ffn, layer in zip(chosen, built, strict=True):
        _install(model, ffn, layer)
    if flag("mask_padding", mask_padding):
        mask_padding_of(model, built)
    return model


def revert(model: nn.Module, expert: int | str | None = None) -> nn.Module:
    """Replace every layer that `convert` made by a dense FFN, in place; returns `model`.

    emoe: each neuron returns to its place (the mean of its copies), bit for bit if nothing was trained; ValueError if
    experts were grown or pruned. gmoe: the FFN that all active experts equal, bit for bit; if they differ, ValueError
    unless `expert` chooses: a slot, or "mean" (of the active experts: a dense model near the MoE's).
    """
    refuse_no_module(model)
    layers = [(name, m) for name, m in model.named_modules() if isinstance(m, MoELayer) and hasattr(m, "_origin")]
    if not layers:
        raise ValueError(f"model ({type(model).__name__}) has no layer that convert() made")
    if not (expert is None or expert == "mean" or type(expert) is int):
        raise ValueError(f'expert = {expert!r}: give a slot, "mean" or None')
    dense = [dense_weights(name, layer, expert) for name, layer in layers]
    for (_, layer), weights in zip(layers, dense, strict=True):
        _restore(model, layer, weights)
    forget_padding_of(model)
    return model


def aux_loss(model: nn.Module, weight: float = 1.0) -> Tensor:
    """`weight` times the sum of the MoE layers' weighted auxiliary losses in their last forward: 0-dim fp32.

    Add it once a step to the task's loss. It finds the layers of any model, converted or not, also behind wrappers that
    drop `y.l_aux`. Only the last run of a layer in a step counts; recomputes of gradient checkpointing are no runs.
    Warns once if a layer in training kept no gradient of its loss. Raises ValueError if the model has no MoE layer or
    none has run.
    """
    refuse_no_module(model, wrapped=True)
    layers = [m for m in model.modules() if isinstance(m, MoELayer)]
    terms = [layer.l_aux for layer in layers if layer.l_aux is not None]
    if not terms:
        what = f"none of its {len(layers)} MoE layers has run" if layers else "has no MoE layer"
        raise ValueError(
            f"aux_loss: model ({type(model).__name__}): {what}; call it after a forward of a model with MoE layers"
        )
    if torch.is_grad_enabled() and any(_lost_gradient(layer) for layer in layers):
        warn_once(
            "aux_loss: a layer in training kept no gradient of its l_aux, as under torch.no_grad or "
            "torch.utils.checkpoint with use_reentrant=True: give use_reentrant=False"
        )
    total = terms[0]
    for term in terms[1:]:
        total = total + term.to(total.device)
    return weight * total


def _lost_gradient(layer: MoELayer) -> bool:
    """Whether the layer ran in training, learns from its auxiliary loss, and has that loss without a graph."""
    if not (layer.training and layer.aux_terms and layer.l_aux is not None) or layer.l_aux.requires_grad:
        return False
    return any(parameter.requires_grad for parameter in layer.gates.parameters())


def refuse_no_module(model: object, wrapped: bool = False) -> None:
    """ValueError unless `model` is a module; `wrapped` allows DistributedDataParallel around it."""
    if not isinstance(model, nn.Module):
        raise ValueError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if not wrapped and any(isinstance(module, nn.parallel.DistributedDataParallel) for module in model.modules()):
        raise ValueError(
            "model is wrapped by DistributedDataParallel, which does not average gradients of parameters added later: "
            "convert or revert the model before wrapping it"
        )


def _one_of(name: str, value: str, allowed: Sequence[str]) -> str:
    if value not in allowed:
        raise ValueError(f"{name} = {value!r}: allowed are {', '.join(map(repr, allowed))}")
    return value


def _chosen(model: nn.Module, layers: str | int | Sequence[int | str]) -> list[DenseFFN]:
    found = find_ffns(model)
    if not found:
        raise ValueError(f"model ({type(model).__name__}) has no FFN that could be found: {_NO_FFN}")
    n = len(found)
    if isinstance(layers, str) and layers in LAYERS:
        if layers == "last_two" and n < 4:
            raise ValueError(f"layers = 'last_two' (n - 4 and n - 2) needs 4 FFNs, and the model has {n}")
        picked = {"all": range(n), "every_other": range(1, n, 2), "last_two": (n - 4, n - 2)}[layers]
        if not picked:
            raise ValueError(f"layers = {layers!r} takes none of the {n} FFN(s) of the model: give indices, or 'all'")
        return _unshared(model, [found[i] for i in picked])
    if not isinstance(layers, int | str | Sequence):
        raise ValueError(f"layers = {layers!r}: give indices or names, or one of {', '.join(map(repr, LAYERS))}")
    wanted = [layers] if isinstance(layers, int | str) else list(layers)
    if not wanted:
        raise ValueError("layers = []: give at least one index or name")
    chosen = [_find(model, found, each) for each in wanted]
    if len({ffn.name for ffn in chosen}) < len(chosen):
        raise ValueError(f"layers = {wanted!r} names an FFN twice")
    return _unshared(model, chosen)


def _unshared(model: nn.Module, chosen: list[DenseFFN]) -> list[DenseFFN]:
    """Return `chosen`; ValueError if a linear map of an FFN is also used outside it and would be lost there."""
    for ffn in chosen:
        own = {id(module) for module in ffn.module.modules()}
        if ffn.down_owner is not None:
            neighbour, _ = ffn.down_owner
            own |= {id(parent.get_submodule(neighbour)) for parent, _ in _places(model, ffn.module)}
        for linear in ffn.linears:
            others = [(parent, key) for parent, key in _places(model, linear) if id(parent) not in own]
            if others:
                holder, key = others[0]
                raise ValueError(
                    f"{ffn.name!r}: one of its linear maps is also {key!r} of a {type(holder).__name__} outside it: "
                    "give each a map of its own first"
                )
    return chosen


def _find(model: nn.Module, found: list[DenseFFN], wanted: int | str) -> DenseFFN:
    names = [ffn.name for ffn in found]
    if isinstance(wanted, Integral) and not isinstance(wanted, bool):
        if not -len(found) <= wanted < len(found):
            shown = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
            raise ValueError(f"layers: FFN {wanted} of {len(found)}: give 0 to {len(found) - 1} ({shown})")
        return found[wanted]
    if not isinstance(wanted, str):
        raise ValueError(f"layers: {wanted!r}: give indices or names, or one of {', '.join(map(repr, LAYERS))}")
    under = [ffn for ffn in found if ffn.name == wanted or ffn.name.startswith(f"{wanted}.")]
    if len(under) != 1:
        what = f"holds {len(under)} FFNs: name one" if under else f"is no FFN: {why_not(model, wanted)}; {_NO_FFN}"
        raise ValueError(f"layers: {wanted!r} {what}. FFNs found: {', '.join(names[:8])}{', ...' * (len(names) > 8)}")
    return under[0]


def _install(model: nn.Module, ffn: DenseFFN, layer: MoELayer) -> None:
    """Put the layer in the FFN's place; the linear maps that `revert` may need go to the meta device."""
    placed: nn.Module = layer
    if ffn.last_dropout:
        placed = nn.Sequential()
        placed.add_module("moe", layer)
        placed.add_module("dropout", nn.Dropout(ffn.last_dropout).train(ffn.module.training))
    for parent in _replaced(model, ffn.module, placed):
        if ffn.down_owner is not None:
            neighbour, attribute = ffn.down_owner
            setattr(parent.get_submodule(neighbour), attribute, nn.Identity())
    for linear in ffn.linears:
        for key, parameter in list(linear.named_parameters()):
            empty = torch.empty_like(parameter, device="meta")
            linear.register_parameter(key, nn.Parameter(empty, requires_grad=parameter.requires_grad))


def _replaced(model: nn.Module, old: nn.Module, new: nn.Module) -> list[nn.Module]:
    """Replace `old` by `new` everywhere; returns the modules that hold it."""
    places = _places(model, old)
    if not places:
        raise ValueError("the model itself is an FFN, which cannot be replaced in place: wrap it in a module")
    for parent, key in places:
        setattr(parent, key, new)
    return [parent for parent, _ in places]


def _places(model: nn.Module, wanted: nn.Module) -> list[tuple[nn.Module, str]]:
    """Every (parent, key) that holds a module."""
    return [(parent, key) for parent in model.modules() for key, child in parent._modules.items() if child is wanted]


def _restore(model: nn.Module, layer: MoELayer, weights: list[list[Tensor | None]]) -> None:
    ffn = replace(cast(Origin, layer._origin).ffn)
    for linear, (weight, bias) in zip(ffn.linears, weights, strict=True):
        value = cast(Tensor, weight if isinstance(linear, nn.Linear) else cast(Tensor, weight).t())
        for key, tensor in (("weight", value), ("bias", bias)):
            if tensor is not None:
                learns = cast(nn.Parameter, getattr(linear, key)).requires_grad
                linear.register_parameter(key, nn.Parameter(tensor.contiguous(), requires_grad=learns))
    ffn.module.train(layer.training)
    placed = layer if not ffn.last_dropout else next(m for m in model.modules() if m._modules.get("moe") is layer)
    for parent in _replaced(model, placed, ffn.module):
        if ffn.down_owner is not None:
            neighbour, attribute = ffn.down_owner
            setattr(parent.get_submodule(neighbour), attribute, ffn.down.train(layer.training))

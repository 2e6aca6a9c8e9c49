"""Moves weights of a dense FFN to a layer's experts and back: copies ("gmoe") or shares of the neurons ("emoe").

`layer_of` makes the layer, `dense_weights` reads an FFN out of one. The layer keeps an `Origin`, for the way back.
No model is touched.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..gates import max_experts
from ..gates.top_k import TopKGate
from ..layer import MoELayer
from ..validation import flag, number, refuse_unknown
from .find_ffns import DenseFFN, DropoutAfter, fused_name, weight_of

_EXPERT_OPTIONS = ("recompute", "engine")
MODULES = "modules"  # the kind of experts that stay nn.Linear maps
_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes per element


@dataclass
class Origin:
    """What `revert` needs: the replaced modules, with linear maps on the meta device, and where each neuron went.

    Kept outside the module tree, so that it is in no state dict or parameter count.
    """

    ffn: DenseFFN
    neurons_EH: Tensor | None  # emoe: each hidden unit's neuron in the dense FFN
    scale: float  # factor on the second weights
    bias_scale: float
    undo: list[Tensor | None]  # corrections to `down`'s weight and bias, in units of the last place of their dtype
    active: tuple[int, ...]  # emoe: slots active right after conversion


@dataclass
class Conversion:
    """The arguments of `convert` that decide how an FFN becomes a layer."""

    recipe: str
    gate: dict[str, Any]
    num_experts: int
    split: str
    repeat: int
    key_gate: bool | None
    dropout: float | None
    seed: int
    experts: dict[str, Any]
    layer: dict[str, Any]
    kind: str | None = None  # of experts; None: ffn or llama_ffn, as the FFN is

    @property
    def slots(self) -> int:
        return max_experts(self.gate, self.num_experts)


def layer_of(ffn: DenseFFN, options: Conversion) -> MoELayer:
    """A layer with the FFN's weights in its slots; ValueError if options do not fit the FFN."""
    as_modules = options.kind == MODULES
    refuse_unknown(
        "experts of type 'modules'" if as_modules else "experts", options.experts, () if as_modules else _EXPERT_OPTIONS
    )
    up, down = weight_of(ffn.up), weight_of(ffn.down)
    gated = ffn.gate is not None
    if gated and not as_modules and any(linear.bias is not None for linear in ffn.linears):
        raise ValueError(
            f"{ffn.name!r} is a gated FFN with biases, and llama_ffn experts have none: give experts='modules'"
        )
    neurons_EH = _neurons(ffn, options) if options.recipe == "emoe" else None
    config: dict[str, Any] = {
        "type": options.kind or ("llama_ffn" if gated else "ffn"),
        "num_experts_per_device": options.num_experts,
        "hidden_size_per_expert": ffn.hidden if neurons_EH is None else neurons_EH.shape[1],
        "activation_fn": _activation(ffn, options),
        **options.experts,
    }
    if as_modules:
        config["gated"] = gated
    if as_modules or not gated:
        config["has_fc1_bias"], config["has_fc2_bias"] = (m.bias is not None for m in (ffn.up, ffn.down))
    layer = MoELayer(gate_type=options.gate, model_dim=ffn.model_dim, experts=config, **options.layer)
    if layer.world_size > 1:
        raise ValueError(f"group has {layer.world_size} ranks, but convert makes layers with all experts: leave it out")
    layer.to(up.device, up.dtype).train(ffn.module.training)
    if layer.one_score_gate and options.recipe == "gmoe":
        raise ValueError("one_score_gate adds the experts up, and with recipe 'gmoe' each is a whole FFN: use 'emoe'")
    scale, bias_scale = 1.0, 1.0
    if neurons_EH is not None:
        scale = layer.slots / options.repeat
        if layer.one_score_gate:
            scale, bias_scale = 1 / options.repeat, 1 / cast(TopKGate, layer.gates[0]).top_k
    bias = bias_of(ffn.down)
    undo = [_undo(down, scale), None if bias is None else _undo(bias, bias_scale)]
    _fill(layer, ffn, neurons_EH, scale, bias_scale)
    _freeze(layer, ffn)
    _key_gate(layer, options)
    active = tuple(layer._used_slots().nonzero().flatten().tolist())
    layer._origin = Origin(ffn, neurons_EH, scale, bias_scale, undo, active)  # type: ignore[assignment]
    return layer


def bias_of(linear: nn.Module) -> Tensor | None:
    """The bias [out], or None."""
    return cast("Tensor | None", linear.bias)


def _activation(ffn: DenseFFN, options: Conversion) -> Callable[[Tensor], Tensor] | str:
    p = ffn.dropout if options.dropout is None else number("moe_dropout", options.dropout, 0, 1)
    return DropoutAfter(ffn.activation, p) if p else fused_name(ffn.activation) or ffn.activation


def _neurons(ffn: DenseFFN, options: Conversion) -> Tensor:
    """The dense FFN's neuron for each hidden unit of each slot, [E, H repeat / E]."""
    E, H, repeat = options.slots, ffn.hidden, options.repeat
    if H % E:
        raise ValueError(
            f"{ffn.name!r} has {H} neurons, which cannot be divided among {E} slots: give a divisor of {H}"
        )
    if repeat > E:
        raise ValueError(f"expert_repeat = {repeat}: there are {E} slots, so 1 to {E}")
    if options.split == "contiguous":
        cluster_H = torch.arange(H) // (H // E)
    elif options.split == "random":
        cluster_H = torch.randperm(H, generator=torch.Generator().manual_seed(options.seed)) % E
    else:
        rows = weight_of(ffn.up if ffn.gate is None else ffn.gate)
        cluster_H = _balanced_clusters(F.normalize(rows.detach().float().cpu(), dim=1), E, options.seed)
    slots = []
    for e in range(E):
        held_H = ((cluster_H - e) % E) < repeat
        slots.append(held_H.nonzero().flatten())
    return torch.stack(slots).to(weight_of(ffn.up).device)


def _balanced_clusters(rows_HD: Tensor, clusters: int, seed: int) -> Tensor:
    """The cluster of each row, [H]; all clusters have the same size."""
    try:
        from k_means_constrained import KMeansConstrained
    except ImportError as error:
        raise ImportError(
            "split = 'kmeans' needs k-means-constrained: pip install 'dynmoe_tutel[emoe]', or give split = 'random'"
        ) from error
    size = rows_HD.shape[0] // clusters
    means = KMeansConstrained(clusters, size_min=size, size_max=size, n_init=1, max_iter=30, random_state=seed)
    return torch.as_tensor(means.fit_predict(rows_HD.numpy()), dtype=torch.int64)


def _undo(weight: Tensor, scale: float) -> Tensor | None:
    """The rounding error of `weight * scale / scale`, in units of the last place, int8; None if there is none."""
    if math.frexp(scale)[0] == 0.5:
        return None
    bits = _BITS[weight.dtype.itemsize]
    weight = weight.detach().contiguous()
    missed = weight.view(bits) - (weight * scale / scale).view(bits)
    return missed.to(torch.int8) if bool(missed.any()) else None


def _unscaled(weight: Tensor, scale: float, undo: Tensor | None) -> Tensor:
    weight = (weight / scale).contiguous()
    if undo is None:
        return weight
    bits = _BITS[weight.dtype.itemsize]
    return (weight.view(bits) + undo.to(weight.device, bits)).view(weight.dtype)


def _parts(ffn: DenseFFN) -> dict[str, Tensor | None]:
    """The FFN's tensors by role, weights as [out, in]."""
    return {
        "gate": None if ffn.gate is None else weight_of(ffn.gate),
        "gate_bias": None if ffn.gate is None else bias_of(ffn.gate),
        "up": weight_of(ffn.up),
        "up_bias": bias_of(ffn.up),
        "down": weight_of(ffn.down),
        "down_bias": bias_of(ffn.down),
    }


@torch.no_grad()
def _fill(layer: MoELayer, ffn: DenseFFN, neurons_EH: Tensor | None, scale: float, bias_scale: float) -> None:
    every = torch.arange(ffn.hidden, device=weight_of(ffn.up).device).expand(layer.slots, -1)
    units_EH = every if neurons_EH is None else neurons_EH
    for role, source in _parts(ffn).items():
        view = layer.experts.dense_view(role)
        if view is None or source is None:
            continue
        if role == "down_bias":
            for e in range(layer.slots):
                view[e].copy_(source * bias_scale)
            continue
        rows = source.t() * scale if role == "down" else source
        for e, units in enumerate(units_EH):
            view[e].copy_(rows[units])


def _freeze(layer: MoELayer, ffn: DenseFFN) -> None:
    """Give the experts the requires_grad of the FFN's parameters."""
    for role, source in _parts(ffn).items():
        for parameter in layer.experts.dense_parameters(role):
            if source is not None:
                parameter.requires_grad_(source.requires_grad)


@torch.no_grad()
def _key_gate(layer: MoELayer, options: Conversion) -> None:
    """Start the router as EMoE does: from the mean of each expert's first weights."""
    kind = options.gate.get("type")
    wanted = (options.recipe == "emoe" and kind == "top") if options.key_gate is None else options.key_gate
    if not flag("key_gate", wanted):
        return
    if options.recipe != "emoe":
        raise ValueError("key_gate = True with recipe 'gmoe' gives equal experts equal keys: use recipe 'emoe'")
    first = layer.experts.dense_view("gate" if "gate" in layer.experts.dense_names else "up")
    keys_ED = _stacked(first).mean(dim=1)
    if layer.normalize_one_score_gate:
        keys_ED = F.normalize(keys_ED, dim=1)
    gate = cast(Any, layer.gates[0])
    if kind == "top":
        gate.wg.weight.copy_(keys_ED)
    elif gate.adaptive:
        gate.sim_matrix.copy_(keys_ED.t())
    else:
        raise ValueError(f"key_gate = True is for gates of type top and top-any gates, not for {kind!r}")


@torch.no_grad()
def dense_weights(name: str, layer: MoELayer, expert: int | str | None) -> list[list[Tensor | None]]:
    """[weight, bias] of up, gate (if the FFN is gated) and down, weights as [out, in]."""
    origin: Origin = layer._origin  # type: ignore[assignment]
    layer.refuse_wrapped(f"{name!r} as a dense FFN")
    experts = layer.held_experts
    active = layer._used_slots().nonzero().flatten().tolist()
    gated = ("gate", "gate_bias") if "gate" in experts.dense_names else ()
    first = [_stacked(experts.dense_view(role)) for role in ("up", "up_bias", *gated)]
    second_w, second_b = _stacked(experts.dense_view("down")), _stacked(experts.dense_view("down_bias"))
    if origin.neurons_EH is None:
        pick = _expert_of(name, [*first, second_w, second_b], active, expert)
        rows, down_HD, bias = [pick(t) for t in first], cast(Tensor, pick(second_w)), pick(second_b)
    else:
        if expert is not None:
            raise ValueError("expert is for layers of recipe 'gmoe': neurons of recipe 'emoe' go back to their places")
        if tuple(active) != origin.active:
            raise ValueError(
                f"{name!r}: slots {list(origin.active)} were active after conversion, {active} are now: experts of "
                "recipe 'emoe' that were grown or pruned do not add up to a dense FFN"
            )
        units = origin.neurons_EH.to(second_w.device)
        rows, down_HD = [_gathered(t, units) for t in first], cast(Tensor, _gathered(second_w, units))
        bias = None if second_b is None else _mean(second_b[torch.tensor(origin.active, device=second_b.device)])
    same = second_w.dtype == weight_of(origin.ffn.down).dtype
    undo_w, undo_b = origin.undo if same else (None, None)  # units of the last place hold for one dtype
    down_w = _unscaled(down_HD.t(), origin.scale, undo_w)
    down_b = None if bias is None else _unscaled(bias, origin.bias_scale, undo_b)
    pairs = [[rows[i], rows[i + 1]] for i in range(0, len(rows), 2)]
    return [*pairs, [down_w, down_b]]


def _stacked(view: Any) -> Any:
    """The slots of a `dense_view` as one tensor, [E, ...]; None if there is none."""
    return torch.stack(view) if isinstance(view, list) else view


def _expert_of(
    name: str, tensors: list[Tensor | None], active: list[int], expert: int | str | None
) -> Callable[[Tensor | None], Tensor | None]:
    """A function that takes the chosen expert, or the mean, from [E, ...]."""
    if expert == "mean":
        return lambda t: None if t is None else _mean(t[active])
    if expert is not None and expert not in active:
        raise ValueError(f"expert = {expert!r}: the active slots of {name!r} are {active}")
    slot = active[0] if expert is None else expert
    if expert is None and any(t is not None and not torch.equal(t[e], t[slot]) for t in tensors for e in active):
        raise ValueError(
            f"{name!r}: its {len(active)} active experts are not one FFN any more: give expert=<slot>, one of "
            f'{active}, or expert="mean"'
        )
    return lambda t: None if t is None else t[slot].clone()


def _mean(copies: Tensor) -> Tensor:
    """The mean over the first dimension; the copy itself, bitwise, if all copies are equal."""
    if all(torch.equal(copy, copies[0]) for copy in copies):
        return copies[0].clone()
    return copies.float().mean(dim=0).to(copies.dtype)


def _gathered(t: Tensor | None, units_EH: Tensor) -> Tensor | None:
    """[E, H', ...] back to [H, ...]: each neuron's copies, or their mean."""
    if t is None:
        return None
    order = units_EH.flatten().argsort(stable=True)
    H = int(units_EH.max()) + 1
    copies = t.flatten(0, 1)[order].unflatten(0, (H, -1))
    first = copies[:, 0]
    same = (copies == first.unsqueeze(1)).flatten(1).all(dim=1)
    mean = copies.float().mean(dim=1).to(t.dtype)
    return torch.where(same.view(-1, *[1] * (first.dim() - 1)), first, mean)

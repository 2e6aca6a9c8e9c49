"""Dense models to mixtures of experts and back: `convert`, `revert`, and `aux_loss` for the training loop.

An FFN that `dense_ffn` finds is replaced by a `MoELayer`; the host's forwards keep their signatures. Depends on the
layer alone; transformers and timm need not be there.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .dense_ffn import DenseFFN, DropoutAfter, find_ffns, fused_name, weight_of, why_not
from .experts.ffn import FFNExperts
from .experts.llama_ffn import LlamaFFNExperts
from .gates import gate_config, max_experts
from .gates.top_k import TopKGate
from .layer import MoELayer
from .options import flag, number, positive_int, refuse_unknown
from .padding import forget_padding_of, mask_padding_of

RECIPES = ("gmoe", "emoe")
SPLITS = ("kmeans", "random", "contiguous")
LAYERS = ("all", "every_other", "last_two")
_EXPERT_OPTIONS = ("recompute", "engine")
_NO_FFN = "an FFN is down(act(up(x))) or down(act(gate(x)) * up(x)) with nn.Linear (or Conv1D) maps"


@dataclass
class _Origin:
    """What `revert` needs: the replaced modules with their linear maps on the meta device, and which neuron went where.

    Kept beside the module tree, so that neither state dicts nor parameter counts know it.
    """

    ffn: DenseFFN
    recipe: str
    neurons_EH: Tensor | None  # emoe: the dense neuron of each hidden unit
    scale: float  # of the second weights
    bias_scale: float
    undo: list[Tensor | None]  # corrections in units of the last place, of `down`'s weight and bias
    active: tuple[int, ...]  # emoe: slots active right after conversion


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
    experts: Mapping[str, Any] | None = None,
    **layer_options: Any,
) -> nn.Module:
    """Replace FFNs of `model` by MoE layers, in place; returns `model`.

    Args:
        layers: which FFNs, counted in the model's order from 0: indices (negative from the end), names (of an FFN or of
            a block that holds one), "all", "every_other" (1, 3, 5, ...) or "last_two" (GMoE's: n - 4 and n - 2).
        recipe: "gmoe": every slot is a copy of the FFN. Right after, each routed token gets what the dense model gave
            it, to rounding (not with a fixed-k gate of k = 1, which multiplies by its score, as Tutel's). "emoe": the
            neurons are divided among the slots; a token that activates all of them with equal weights (top-any gates,
            `one_score_gate`) gets what the dense model gave it. Where a token's weights sum to 1 (all gates but
            `one_score_gate`), the second weights are multiplied by slots / expert_repeat for that, and every expert has
            the whole second bias; with `one_score_gate` they are divided by expert_repeat and the bias by k.
        gate_type: of `MoELayer`; a name, or a dict such as ``{"type": "top_any", "max_expert_num": 16}``.
        num_experts: active at start.
        split: how emoe divides neurons: "kmeans" (balanced clusters of the first weights' unit rows; extra ``[emoe]``),
            "random", "contiguous".
        expert_repeat: emoe: experts that each neuron belongs to; slot e takes the clusters e, e + 1, ... (mod slots).
        key_gate: start the router from the mean of each expert's first weights; default: emoe with a gate "top".
        moe_dropout: dropout behind the activation instead of the host's.
        mask_padding: tokens where the host is given ``attention_mask`` 0 reach no expert, record or loss.
        seed: of the random split and of k-means.
        experts: `recompute` and `engine` of the expert networks.
        layer_options: further arguments of `MoELayer` (capacity, aux_losses, one_score_gate, ...).

    Activation, dropout, dtype, device and mode are the host's. ValueError where a layer has no FFN, with what is there
    instead, and for options that do not fit; the model is then as it was.
    """
    recipe = _one_of("recipe", recipe, RECIPES)
    _one_of("split", split, SPLITS)
    if isinstance(layer_options.get("seeds"), int):
        raise ValueError("seeds: give (gates, experts)")
    chosen = _chosen(model, layers)
    built = []
    for ffn in chosen:
        options = _Options(
            recipe,
            gate_config(gate_type),
            positive_int("num_experts", num_experts),
            split,
            positive_int("expert_repeat", expert_repeat),
            key_gate,
            moe_dropout,
            seed,
            dict(experts or {}),
            layer_options,
        )
        built.append(_moe_of(ffn, options))
    for ffn, layer in zip(chosen, built, strict=True):
        _install(model, ffn, layer)
    if flag("mask_padding", mask_padding):
        mask_padding_of(model, built)
    return model


@dataclass
class _Options:
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

    @property
    def slots(self) -> int:
        return max_experts(self.gate, self.num_experts)


def revert(model: nn.Module, expert: int | str | None = None) -> nn.Module:
    """Put dense FFNs back in the place of every layer that `convert` made, in place; returns `model`.

    emoe: each neuron goes back to its place (the mean of its copies), bit for bit where nothing was trained; ValueError
    where experts were grown or pruned. gmoe: the one FFN that all active experts are, bit for bit; where they differ,
    ValueError unless `expert` says which: a slot, or "mean" (of the active experts; a dense model near the MoE's).
    """
    layers = [(name, m) for name, m in model.named_modules() if isinstance(m, MoELayer) and hasattr(m, "_origin")]
    if not layers:
        raise ValueError(f"model ({type(model).__name__}) has no layer that convert() made")
    if not (expert is None or expert == "mean" or type(expert) is int):
        raise ValueError(f'expert = {expert!r}: give a slot, "mean" or None')
    dense = [_dense_weights(name, layer, expert) for name, layer in layers]
    for (_, layer), weights in zip(layers, dense, strict=True):
        _restore(model, layer, weights)
    forget_padding_of(model)
    return model


def aux_loss(model: nn.Module, weight: float = 1.0) -> Tensor:
    """`weight` times the sum of the MoE layers' weighted auxiliary losses of their last forward: 0-dim fp32.

    Add it once a step to the task's loss. A layer that ran several times in a step counts with its last run; recomputes
    of gradient checkpointing are no runs. ValueError where the model has no MoE layer or none has run.
    """
    layers = [m for m in model.modules() if isinstance(m, MoELayer)]
    terms = [layer.l_aux for layer in layers if layer.l_aux is not None]
    if not terms:
        what = f"none of its {len(layers)} MoE layers has run" if layers else "has no MoE layer"
        raise ValueError(
            f"aux_loss: model ({type(model).__name__}): {what}; call it after a forward of a converted model"
        )
    total = terms[0]
    for term in terms[1:]:
        total = total + term.to(total.device)
    return weight * total


# Which


def _one_of(name: str, value: str, allowed: Sequence[str]) -> str:
    if value not in allowed:
        raise ValueError(f"{name} = {value!r}: allowed are {', '.join(map(repr, allowed))}")
    return value


def _chosen(model: nn.Module, layers: str | int | Sequence[int | str]) -> list[DenseFFN]:
    if not isinstance(model, nn.Module):
        raise ValueError(f"model must be a torch.nn.Module, got {type(model).__name__}")
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
        return [found[i] for i in picked]
    if not isinstance(layers, int | str | Sequence):
        raise ValueError(f"layers = {layers!r}: give indices or names, or one of {', '.join(map(repr, LAYERS))}")
    wanted = [layers] if isinstance(layers, int | str) else list(layers)
    if not wanted:
        raise ValueError("layers = []: give at least one index or name")
    chosen = [_find(model, found, each) for each in wanted]
    if len({ffn.name for ffn in chosen}) < len(chosen):
        raise ValueError(f"layers = {wanted!r} names an FFN twice")
    return chosen


def _find(model: nn.Module, found: list[DenseFFN], wanted: int | str) -> DenseFFN:
    names = [ffn.name for ffn in found]
    if type(wanted) is int:
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


# From dense


def _moe_of(ffn: DenseFFN, options: _Options) -> MoELayer:
    """The layer with the FFN's weights in its slots."""
    refuse_unknown("experts", options.experts, _EXPERT_OPTIONS)
    up, down = weight_of(ffn.up), weight_of(ffn.down)
    gated = ffn.gate is not None
    if gated and any(linear.bias is not None for linear in ffn.linears):
        raise ValueError(f"{ffn.name!r} is a gated FFN with biases, and llama_ffn experts have none")
    neurons_EH = _neurons(ffn, options) if options.recipe == "emoe" else None
    config: dict[str, Any] = {
        "type": "llama_ffn" if gated else "ffn",
        "num_experts_per_device": options.num_experts,
        "hidden_size_per_expert": ffn.hidden if neurons_EH is None else neurons_EH.shape[1],
        "activation_fn": _activation(ffn, options),
        **options.experts,
    }
    if not gated:
        config["has_fc1_bias"], config["has_fc2_bias"] = (m.bias is not None for m in (ffn.up, ffn.down))
    layer = MoELayer(options.gate, ffn.model_dim, config, **options.layer)
    layer.to(up.device, up.dtype).train(ffn.module.training)
    if layer.one_score_gate and options.recipe == "gmoe":
        raise ValueError("one_score_gate adds the experts up, and those of recipe 'gmoe' are whole FFNs: use 'emoe'")
    scale, bias_scale = 1.0, 1.0
    if neurons_EH is not None:
        scale = layer.slots / options.repeat
        if layer.one_score_gate:
            scale, bias_scale = 1 / options.repeat, 1 / cast(TopKGate, layer.gates[0]).top_k
    undo = [_undo(down, scale), None if down_bias(ffn) is None else _undo(cast(Tensor, down_bias(ffn)), bias_scale)]
    _fill(layer, ffn, neurons_EH, scale, bias_scale)
    _key_gate(layer, options)
    layer.experts.requires_grad_(all(weight_of(linear).requires_grad for linear in ffn.linears))
    active = tuple(layer._used_slots().nonzero().flatten().tolist())
    layer._origin = _Origin(ffn, options.recipe, neurons_EH, scale, bias_scale, undo, active)  # type: ignore[assignment]
    return layer


def down_bias(ffn: DenseFFN) -> Tensor | None:
    """[D] or None."""
    return cast("Tensor | None", ffn.down.bias)


def _activation(ffn: DenseFFN, options: _Options) -> Callable[[Tensor], Tensor] | str:
    p = ffn.dropout if options.dropout is None else number("moe_dropout", options.dropout, 0, 1)
    return DropoutAfter(ffn.activation, p) if p else fused_name(ffn.activation) or ffn.activation


def _neurons(ffn: DenseFFN, options: _Options) -> Tensor:
    """The dense neuron of each hidden unit of each slot, [E, H repeat / E]."""
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
    return torch.stack(slots).to(rows_device(ffn))


def rows_device(ffn: DenseFFN) -> torch.device:
    """Where the FFN is."""
    return weight_of(ffn.up).device


def _balanced_clusters(rows_HD: Tensor, clusters: int, seed: int) -> Tensor:
    """The cluster of each row, all of one size, [H]."""
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
    """What dividing `weight * scale` by `scale` misses, in units of the last place, int8; None where nothing."""
    if math.frexp(scale)[0] == 0.5:
        return None
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[weight.dtype.itemsize]
    weight = weight.detach().contiguous()
    missed = weight.view(bits) - (weight * scale / scale).view(bits)
    return missed.to(torch.int8) if bool(missed.any()) else None


def _unscaled(weight: Tensor, scale: float, undo: Tensor | None) -> Tensor:
    weight = (weight / scale).contiguous()
    if undo is None:
        return weight
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[weight.dtype.itemsize]
    return (weight.view(bits) + undo.to(weight.device, bits)).view(weight.dtype)


@torch.no_grad()
def _fill(layer: MoELayer, ffn: DenseFFN, neurons_EH: Tensor | None, scale: float, bias_scale: float) -> None:
    every = torch.arange(ffn.hidden, device=rows_device(ffn)).expand(layer.slots, -1)
    units_EH = every if neurons_EH is None else neurons_EH
    up_HD, down_HD = weight_of(ffn.up), weight_of(ffn.down).t() * scale
    experts = layer.experts
    for e, units in enumerate(units_EH):
        if isinstance(experts, LlamaFFNExperts):
            assert ffn.gate is not None
            experts.W_fc1[e], experts.W_fc2[e] = weight_of(ffn.gate)[units].t(), up_HD[units].t()
            experts.W_fc3[e] = down_HD[units]
            continue
        assert isinstance(experts, FFNExperts)
        experts.batched_fc1_w[e], experts.batched_fc2_w[e] = up_HD[units], down_HD[units]
        if experts.batched_fc1_bias is not None:
            experts.batched_fc1_bias[e] = cast(Tensor, ffn.up.bias)[units]
        if experts.batched_fc2_bias is not None:
            experts.batched_fc2_bias[e] = cast(Tensor, down_bias(ffn)) * bias_scale


@torch.no_grad()
def _key_gate(layer: MoELayer, options: _Options) -> None:
    """EMoE's start of the router: the mean of each expert's first weights."""
    kind = options.gate.get("type")
    wanted = (options.recipe == "emoe" and kind == "top") if options.key_gate is None else options.key_gate
    if not flag("key_gate", wanted):
        return
    if options.recipe != "emoe":
        raise ValueError("key_gate = True with recipe 'gmoe': the experts are equal, and so would be their keys")
    first = layer.experts.W_fc1.mean(dim=2) if isinstance(layer.experts, LlamaFFNExperts) else None
    keys_ED = cast(FFNExperts, layer.experts).batched_fc1_w.mean(dim=1) if first is None else first
    if layer.normalize_one_score_gate:
        keys_ED = F.normalize(keys_ED, dim=1)
    gate = cast(Any, layer.gates[0])
    if kind == "top":
        gate.wg.weight.copy_(keys_ED)
    elif gate.adaptive:
        gate.sim_matrix.copy_(keys_ED.t())
    else:
        raise ValueError(f"key_gate = True is for gates of type top and top-any gates, not for {kind!r}")


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
    """Put `new` in every place of `old`; returns the modules that hold it."""
    places = [(parent, key) for parent in model.modules() for key, child in parent._modules.items() if child is old]
    if not places:
        raise ValueError("the model itself is one FFN: put it into a module that holds it")
    for parent, key in places:
        setattr(parent, key, new)
    return [parent for parent, _ in places]


# To dense


@torch.no_grad()
def _dense_weights(name: str, layer: MoELayer, expert: int | str | None) -> list[list[Tensor | None]]:
    """[weight, bias] of up, gate (of a gated FFN) and down, weights as [out, in]."""
    origin: _Origin = layer._origin  # type: ignore[assignment]
    experts = layer.experts
    active = layer._used_slots().nonzero().flatten().tolist()
    if isinstance(experts, LlamaFFNExperts):
        first = [experts.W_fc2.transpose(1, 2), None, experts.W_fc1.transpose(1, 2), None]
        second_w, second_b = experts.W_fc3, None
    else:
        assert isinstance(experts, FFNExperts)
        first = [experts.batched_fc1_w, experts.batched_fc1_bias]
        second_w, second_b = experts.batched_fc2_w, experts.batched_fc2_bias
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
    undo_w, undo_b = origin.undo
    down_w = _unscaled(down_HD.t(), origin.scale, undo_w)
    down_b = None if bias is None else _unscaled(bias, origin.bias_scale, undo_b)
    pairs = [[rows[i], rows[i + 1]] for i in range(0, len(rows), 2)]
    return [*pairs, [down_w, down_b]]


def _expert_of(
    name: str, tensors: list[Tensor | None], active: list[int], expert: int | str | None
) -> Callable[[Tensor | None], Tensor | None]:
    """What takes from [E, ...] the expert that is meant."""
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
    """The mean over the first dimension; of equal copies, the copy itself."""
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


def _restore(model: nn.Module, layer: MoELayer, weights: list[list[Tensor | None]]) -> None:
    ffn = replace(cast(_Origin, layer._origin).ffn)
    for linear, (weight, bias) in zip(ffn.linears, weights, strict=True):
        value = cast(Tensor, weight if isinstance(linear, nn.Linear) else cast(Tensor, weight).t()).contiguous()
        learns = cast(nn.Parameter, linear.weight).requires_grad
        linear.register_parameter("weight", nn.Parameter(value, requires_grad=learns))
        if bias is not None:
            linear.register_parameter("bias", nn.Parameter(bias.contiguous(), requires_grad=learns))
    ffn.module.train(layer.training)
    placed = layer if not ffn.last_dropout else next(m for m in model.modules() if m._modules.get("moe") is layer)
    for parent in _replaced(model, placed, ffn.module):
        if ffn.down_owner is not None:
            neighbour, attribute = ffn.down_owner
            setattr(parent.get_submodule(neighbour), attribute, ffn.down.train(layer.training))

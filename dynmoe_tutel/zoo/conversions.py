"""How a checkpoint's keys become the model's and back, as weight transforms of transformers.

A gate's tensors are renamed; temperature, which is 0, is dropped and written back; the mask also gives the layer's
counts. Grouped experts are stacked, `modules` stay nn.Linear maps. Qwen's c_attn is cut in thirds.

Transforms of the text model are scoped to it: CLIP has maps of the same names.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .families import Family
from .hugging_face import needed

_loading: Any = needed("transformers.core_model_loading")

GROUPED, MODULES = "grouped", "modules"
KINDS = (GROUPED, MODULES)
_TEXT = "language_model"
_EXPERTS = "mlp.deepspeed_moe.experts.deepspeed_experts"
WG = "mlp.deepspeed_moe.gate.wg"
TEMPERATURE = f"{WG}.temperature"
MASK = f"{WG}.experts_mask"
_GATE = "mlp.gates.0"
# the maps of an FFN in the checkpoint: as (gate, up, down), or (up, down)
MAPS = {
    "stablelm": ("gate_proj", "up_proj", "down_proj"),
    "phi": ("fc1", "fc2"),
    "qwen": ("w2", "w1", "c_proj"),
}


class DropTemperature(_loading.ConversionOps):
    """Thresholds without their temperature, which is checked before; the other way, temperature 0 beside them."""

    def __init__(self, back: bool = False) -> None:
        self.back = back

    def convert(self, input_dict: dict[str, Any], source_patterns: Any, target_patterns: Any, **_: Any) -> Any:
        """By name of the target."""
        if not self.back:
            return {target_patterns[0]: _only(input_dict[source_patterns[0]])}
        gates = _only(next(iter(input_dict.values())))
        return {target_patterns[0]: gates, target_patterns[1]: gates.new_zeros(1)}

    @property
    def reverse_op(self) -> Any:
        return DropTemperature(not self.back)


class CountExperts(_loading.ConversionOps):
    """The mask and the two counts of a layer that follow from it; the other way, the mask alone."""

    def __init__(self, back: bool = False) -> None:
        self.back = back

    def convert(self, input_dict: dict[str, Any], source_patterns: Any, target_patterns: Any, **_: Any) -> Any:
        """By name of the target."""
        if self.back:
            return {target_patterns[0]: _only(input_dict[source_patterns[0]])}
        mask = _only(next(iter(input_dict.values())))
        active, slots = (mask > 0.5).sum(), torch.tensor(mask.numel(), device=mask.device)
        return dict(zip(target_patterns, (mask, active, slots), strict=True))

    @property
    def reverse_op(self) -> Any:
        return CountExperts(not self.back)


class StackExperts(_loading.ConversionOps):
    """One tensor of each expert to a stack [E, ...], their matrices transposed on request; the other way, each its own.

    Each is copied to its place: a stack that is transposed later would hold the experts twice.
    """

    def __init__(self, transposed: bool, back: bool = False) -> None:
        self.transposed, self.back = transposed, back

    @torch.no_grad()
    def convert(self, input_dict: dict[str, Any], source_patterns: Any, target_patterns: Any, **_: Any) -> Any:
        """By name of the target."""
        tensors = next(iter(input_dict.values()))
        if self.back:
            each = [self._turned(tensor).contiguous() for tensor in _only(tensors)]
            return {target_patterns[0].replace("*", str(i)): tensor for i, tensor in enumerate(each)}
        first = self._turned(tensors[0])
        stack = first.new_empty((len(tensors), *first.shape))
        for place, tensor in zip(stack, tensors, strict=True):
            place.copy_(self._turned(tensor))
        return {target_patterns[0]: stack}

    def _turned(self, tensor: Tensor) -> Tensor:
        return tensor.t() if self.transposed else tensor

    @property
    def reverse_op(self) -> Any:
        return StackExperts(self.transposed, not self.back)


def _only(tensors: Any) -> Tensor:
    found: Tensor = tensors[0] if isinstance(tensors, list) else tensors
    return found


def conversions(family: Family, kind: str) -> list[Any]:
    """The transforms of a family with `kind` of experts, from the checkpoint's keys to the model's."""
    root = family.root
    renamed = [
        _renaming(rf"^{root}\.image_tower\.image_tower\.vision_model\.", "model.vision_tower."),
        _renaming(rf"^{root}\.mm_projector\.image_spatial_proj\.0\.", "model.multi_modal_projector.linear_1."),
        _renaming(rf"^{root}\.mm_projector\.image_spatial_proj\.2\.", "model.multi_modal_projector.linear_2."),
        *(_qwen_names() if family.name == "qwen" else _names(root)),
        _scoped(_renaming(r"mlp\.deepspeed_moe\.gate\.wg\.sim_matrix", f"{_GATE}.sim_matrix")),
    ]
    gate = [
        _scoped(_converter([f"{WG}.gates", TEMPERATURE], f"{_GATE}.gates", [DropTemperature()])),
        _scoped(
            _converter(
                MASK,
                [f"{_GATE}.experts_mask", "mlp._num_global_experts", "mlp._max_num_global_experts"],
                [CountExperts()],
            )
        ),
    ]
    experts = _modules(family) if kind == MODULES else _grouped(family)
    return [*renamed, *gate, *experts, *(_qwen_attention() if family.name == "qwen" else ())]


def _names(root: str) -> list[Any]:
    names = "(layers|embed_tokens|norm|final_layernorm)"
    return [_renaming(rf"^{root}\.{names}\.", r"model.language_model.\1.")]


def _qwen_names() -> list[Any]:
    whole = {r"^transformer\.h\.": "layers", r"^transformer\.wte\.": "embed_tokens", r"^transformer\.ln_f\.": "norm"}
    inner = {
        r"\.ln_1\.": ".input_layernorm.",
        r"\.ln_2\.": ".post_attention_layernorm.",
        r"\.attn\.c_proj\.": ".self_attn.o_proj.",
        r"\.mlp\.w2\.": ".mlp.gate_proj.",
        r"\.mlp\.w1\.": ".mlp.up_proj.",
        r"\.mlp\.c_proj\.": ".mlp.down_proj.",
    }
    return [
        *(_renaming(old, f"model.language_model.{new}.") for old, new in whole.items()),
        *(_scoped(_renaming(old, new)) for old, new in inner.items()),
    ]


def _qwen_attention() -> list[Any]:
    maps = [f"self_attn.{name}_proj" for name in "qkv"]
    return [_scoped(_converter("attn.c_attn", maps, [_loading.Chunk(dim=0)]))]


def _modules(family: Family) -> list[Any]:
    roles = ("gate", "up", "down") if family.gated else ("up", "down")
    old = _EXPERTS.replace(".", r"\.")
    return [
        _scoped(_renaming(rf"{old}\.(\d+)\.{name}\.", rf"mlp.experts.module.\1.{role}."))
        for name, role in zip(MAPS[family.name], roles, strict=True)
    ]


def _grouped(family: Family) -> list[Any]:
    if family.gated:
        names = ("W_fc1", "W_fc2", "W_fc3")
        return [
            _scoped(_converter(f"{_EXPERTS}.*.{name}.weight", f"mlp.experts.{ours}", [StackExperts(transposed=True)]))
            for name, ours in zip(MAPS[family.name], names, strict=True)
        ]
    up, down = MAPS[family.name]
    ways = (
        (f"{up}.weight", "batched_fc1_w", False),
        (f"{up}.bias", "batched_fc1_bias", False),
        (f"{down}.weight", "batched_fc2_w", True),
        (f"{down}.bias", "batched_fc2_bias", False),
    )
    return [
        _scoped(_converter(f"{_EXPERTS}.*.{old}", f"mlp.experts.{new}", [StackExperts(transposed)]))
        for old, new, transposed in ways
    ]


def _renaming(old: str, new: str) -> Any:
    return _loading.WeightRenaming(source_patterns=old, target_patterns=new)


def _converter(old: Any, new: Any, steps: list[Any]) -> Any:
    return _loading.WeightConverter(source_patterns=old, target_patterns=new, operations=steps)


def _scoped(transform: Any) -> Any:
    """Only for keys of the text model."""
    transform.scope_prefix, transform.base_model_prefix = _TEXT, "model"
    return transform

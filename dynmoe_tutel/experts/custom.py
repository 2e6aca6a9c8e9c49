"""User-defined experts: one module a slot on its ragged rows, or Tutel's batched module on padded rows."""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import type_before_parametrizations

from ..initialization import drawn_from, reset_modules, seeded
from ..parts import own_tensors
from ..routing import PaddedRows, Routing
from ..validation import describe, has_no_data, warn_once
from .base import Experts, SlotParameter, SlotTensor, expert_kind


@dataclass(frozen=True, kw_only=True)
class ExpertContext:
    """What modules of Tutel's kind read from their layer in a forward; its expert counts are slot counts."""

    model_dim: int
    num_global_experts: int
    num_local_experts: int
    group: Any = None
    world_size: int = 1
    sharded_count: int = 1  # ranks that share an expert
    adaptive_degree: int = 1  # Tutel's r
    megablocks_size: int = 0
    dispatch_count: Tensor | None = None  # [E], rows of each expert


@expert_kind("custom", keys=None)
class CustomExperts(Experts):
    """`module` is one of:

    * a list of E modules, one a slot, each called with its rows [n_e, D];
    * a class or function that makes one such module (called E times with the remaining options);
    * Tutel's kind, a class or module whose forward takes (x, ctx): called once with all rows padded to [E, C, D]. A
      class gets (model_dim, num_experts_per_device, sharded_count, its options). `ctx` is an `ExpertContext`. The
      attribute `slot_names` of the module names the tensors that hold the slots, [E, ...]; without it, they are its
      parameters and buffers whose first axis is E, those of torch.nn's layers (slopes, statistics) excepted.

    With a seed for experts, a class draws from it on a forked random state, slot by slot if it makes one module a slot.

    State dicts have the module's own names, as in Tutel: `experts.W`, or `experts.0.weight` for a list.
    Not for `torch.compile(fullgraph=True)`: row counts go to the host. Same results as the built-in kinds.
    """

    def __init__(
        self,
        model_dim: int,
        local_slots: int,
        *,
        module: Any = None,
        generator: torch.Generator | None = None,
        **options: Any,
    ) -> None:
        super().__init__(model_dim, local_slots)
        if module is None:
            raise ValueError("experts of type 'custom' need 'module': a list of modules, or a class that makes one")
        self.padded = takes_context(module)
        built_already = isinstance(module, nn.Module | Iterable) and not isinstance(module, type)
        if built_already and options:
            raise ValueError(f"experts of type 'custom': {sorted(options)} are for a class, but 'module' is built")
        if self.padded:
            if isinstance(module, nn.Module):
                self.module = module
            else:
                with drawn_from(generator):
                    self.module = make_batched(module, model_dim, local_slots, options)
            if not self.slot_parameters(0):
                warn_once(
                    f"experts['module']: {type(self.module).__name__} has no parameter [{local_slots}, ...]: "
                    "a grown expert cannot be initialised"
                )
            return
        if isinstance(module, nn.Module) and not isinstance(module, nn.ModuleList):
            raise ValueError(
                "experts['module'] is one module: give a list of one a slot, a class that makes one, or a module whose "
                "forward takes (x, ctx) with x [E, C, D]"
            )
        built = list(module) if isinstance(module, Iterable) else _make_each(module, local_slots, options, generator)
        if len(built) != local_slots or not all(isinstance(m, nn.Module) for m in built):
            kinds = ", ".join(sorted({type(m).__name__ for m in built}))
            raise ValueError(
                f"experts['module'] holds {len(built)} entries ({kinds}): give one nn.Module for each of {local_slots} "
                "slots"
            )
        self.module = nn.ModuleList(built)

    def forward(
        self, x_TD: Tensor, routing: Routing, gate_A: Tensor, token_shape: tuple[int, ...] | None = None
    ) -> Tensor:
        """Expert rows [rows, output_dim] times their gate values."""
        dtype = self.compute_dtype(x_TD)
        rows = routing.dispatch(x_TD.to(dtype))
        if not has_no_data(rows):
            rows = rows[: int(routing.num_assignments)]
        if self.skip_expert:
            out = rows
        elif self.padded:
            out = self._padded(rows, routing, token_shape or (self.model_dim,))
        else:
            experts = list(cast(nn.ModuleList, self.module))  # one module may serve several slots
            parts = rows.tensor_split(len(experts)) if has_no_data(rows) else rows.split(routing.counts.tolist())
            outs = [self._expert_rows(expert, part) for expert, part in zip(experts, parts, strict=True)]
            for slot, (part, result) in enumerate(zip(parts, outs, strict=True)):
                if not isinstance(result, Tensor) or result.dim() != 2 or result.shape[0] != part.shape[0]:
                    raise ValueError(
                        f"custom expert {slot} returned {describe(result)} for {list(part.shape)}: return [n, D_out]"
                    )
            if len({result.shape[1] for result in outs}) > 1:
                raise ValueError(
                    f"custom experts returned widths {[result.shape[1] for result in outs]}: return one D_out"
                )
            out = torch.cat(outs)
        out = out * gate_A[: out.shape[0]].unsqueeze(1).to(out.dtype)
        behind = gate_A.shape[0] - out.shape[0]
        return out if behind == 0 else torch.cat([out, out.new_zeros(behind, out.shape[1])])

    def _expert_rows(self, expert: nn.Module, rows: Tensor) -> Any:
        """expert(rows), for no rows too: its parameters then get gradients of zero."""
        return expert(rows)

    def _padded(self, rows_AD: Tensor, routing: Routing, token_shape: tuple[int, ...]) -> Tensor:
        """Run the module on zero-padded rows [E, C, D], C the largest load."""
        if has_no_data(rows_AD):
            raise NotImplementedError(
                f"experts['module'] = {type(self.module).__name__}, of Tutel's kind, takes as many rows as its most "
                "loaded expert has, and tokens without values (meta device, FakeTensorMode) have no loads"
            )
        places = PaddedRows(routing)
        E, C = places.num_experts, places.capacity
        context = ExpertContext(
            model_dim=self.model_dim, num_global_experts=E, num_local_experts=E, dispatch_count=routing.counts
        )
        out = self.module(places.pad(rows_AD).view(E, C, *token_shape), context)
        if not isinstance(out, Tensor) or out.dim() < 3 or out.shape[:2] != (E, C):
            raise ValueError(
                f"the custom expert returned {describe(out)} for {[E, C, *token_shape]}: return [{E}, {C}, D_out]"
            )
        return places.unpad(out.flatten(2))

    def state_dict(self, *arguments: Any, **options: Any) -> Any:
        """The module's state dict, without the prefix "module."."""
        return self.module.state_dict(*arguments, **options)

    def _load_from_state_dict(self, state_dict, prefix, *arguments):  # type: ignore[no-untyped-def]
        self.name_module(state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *arguments)

    @staticmethod
    def name_module(state_dict: dict[str, Any], prefix: str) -> None:
        """Put "module." into the keys under `prefix` that lack it, in place: torch loads children by name."""
        for key in [key for key in state_dict if key.startswith(prefix)]:
            if not key.startswith(f"{prefix}module."):
                state_dict[f"{prefix}module.{key.removeprefix(prefix)}"] = state_dict.pop(key)

    def keep_slots(self, first: int, count: int) -> None:
        """Keep only the `count` slots from `first` on: modules of a list, or new parameters of a batched module."""
        if isinstance(self.module, nn.ModuleList) and not self.padded:
            self.module = self.module[first : first + count]
            self.local_slots = count
            self.first_slot += first
        else:
            super().keep_slots(first, count)

    def slot_parameters(self, slot: int) -> list[SlotParameter]:
        """All parameters of the slot's module in a list; the slot's entries in a batched module."""
        if isinstance(self.module, nn.ModuleList) and not self.padded:
            shared = self._shared()
            return [(p, (...,)) for p in self.module[slot].parameters() if id(p) not in shared]
        return super().slot_parameters(slot)

    def slot_buffers(self, slot: int) -> list[SlotTensor]:
        """All buffers of the slot's module in a list; the slot's entries in a batched module."""
        if isinstance(self.module, nn.ModuleList) and not self.padded:
            shared = self._shared()
            return [(b, (...,)) for b in self.module[slot].buffers() if id(b) not in shared]
        return super().slot_buffers(slot)

    def _shared(self) -> set[int]:
        """The ids of tensors that several modules of the list hold (tied weights): no slot's own."""
        assert isinstance(self.module, nn.ModuleList)
        held = [id(t) for expert in self.module for t in (*expert.parameters(), *expert.buffers())]
        return {key for key, count in Counter(held).items() if count > 1}

    def slot_places(self) -> list[tuple[nn.Module, str]]:
        """The stacked tensors of a batched module; none of a list, whose modules belong to one slot each."""
        return stacked_tensors(self.module, self.local_slots) if self.padded else []

    def check_written(self, init: str = "nearest") -> None:
        """ValueError, by name, if a write to a slot would be lost, or would reach experts that are tied to it."""
        super().check_written(init)
        if self.padded or not (shared := self._shared()):
            return
        assert isinstance(self.module, nn.ModuleList)
        held = [{id(t) for t in (*m.parameters(), *m.buffers())} & shared for m in self.module]
        if any(each != held[0] for each in held):
            slot = next(slot for slot, each in enumerate(held) if each != held[0])
            raise ValueError(
                f"experts['module']: the modules of slots 0 and {slot} are tied to different others (shared "
                "parameters), so one slot cannot be set alone: experts cannot grow. Tie all modules or none"
            )

    def reset_slot(self, slot: int, generator: torch.Generator | None) -> None:
        """Call the module's `reset_parameters()` on a forked random state; ValueError if it has none."""
        expert = self.module[slot] if isinstance(self.module, nn.ModuleList) else None
        modules = list(expert.modules()) if expert else []
        learns = [m for m in modules if next(m.parameters(recurse=False), None) is not None]
        if not learns or not all(callable(getattr(m, "reset_parameters", None)) for m in learns):
            raise ValueError(
                "init = 'fresh' cannot draw this custom expert anew (no reset_parameters): use 'nearest' or 'mean'"
            )
        with drawn_from(generator):
            for module in modules:
                if module in learns or (callable(getattr(module, "reset_parameters", None)) and _has_buffers(module)):
                    module.reset_parameters()  # type: ignore[operator]

    def reset_parameters(self) -> None:
        """Call `reset_parameters()` of all modules that hold tensors, drawn as at construction; ValueError without."""
        generator = seeded(self.seed)
        for _ in range(self.first_slot if generator is not None else 0):  # pass the slots of lower ranks
            torch.randint(2**62, (1,), generator=generator, device="cpu")
        if not isinstance(self.module, nn.ModuleList) or self.padded:
            with drawn_from(generator):
                reset_modules("custom experts", self.module.modules())
            return
        for expert in self.module:
            with drawn_from(generator):
                reset_modules("a custom expert", expert.modules())


def stacked_tensors(module: nn.Module, slots: int) -> list[tuple[nn.Module, str]]:
    """The tensors [slots, ...] of a module of Tutel's kind that hold slots, each as (owner, name).

    Those that the module's attribute `slot_names` names; without it, those of its shape, except in layers of torch.nn.
    """
    named = next((m for m in module.modules() if hasattr(m, "slot_names")), None)  # an adapter may wrap the module
    if named is not None:
        module, names = named, cast(tuple[str, ...], named.slot_names)
        places = [(module.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]) for name in names]
        wrong = [name for name, (owner, key) in zip(names, places, strict=True) if _count(owner, key) != slots]
        if wrong:
            raise ValueError(
                f"experts['module']: slot_names of {type(module).__name__} has {wrong[0]!r}, which is no tensor "
                f"[{slots}, ...] of it"
            )
        return places
    return [
        (owner, name)
        for owner, name, tensor in own_tensors(module)
        if tensor.shape[:1] == (slots,) and may_stack(owner)
    ]


def may_stack(owner: nn.Module) -> bool:
    """Whether tensors of `owner` itself may hold slots: torch.nn's layers know of none, its containers hold any."""
    kind = type_before_parametrizations(owner)
    return issubclass(kind, nn.ParameterList | nn.ParameterDict) or not kind.__module__.startswith("torch.nn.")


def _count(owner: nn.Module, name: str) -> int | None:
    tensor = getattr(owner, name, None)
    return tensor.shape[0] if isinstance(tensor, Tensor) and tensor.dim() else None


def _has_buffers(module: nn.Module) -> bool:
    return next(module.buffers(recurse=False), None) is not None


def takes_context(module: Any) -> bool:
    """Whether forward is Tutel's forward(x, ctx): its second argument is required and named ctx."""
    cls = module if isinstance(module, type) else type(module)
    forward = getattr(cls, "forward", None)
    if forward is None or not issubclass(cls, nn.Module) or issubclass(cls, nn.ModuleList):
        return False
    arguments = list(inspect.signature(forward).parameters.values())[2:]  # after self and x
    return bool(arguments) and arguments[0].name == "ctx" and arguments[0].default is inspect.Parameter.empty


def _make_each(cls: Any, local_slots: int, options: dict[str, Any], generator: torch.Generator | None) -> list[Any]:
    """One module a slot, made by `cls` from `options`."""
    if not callable(cls):
        raise ValueError(f"experts['module'] = {cls!r}: give a list of modules, or a class that makes one")
    try:
        inspect.signature(cls).bind(**options)
    except TypeError as error:
        raise ValueError(f"experts of type 'custom': {sorted(options)} do not fit 'module': {error}") from None
    made = []
    for _ in range(local_slots):
        with drawn_from(generator):
            made.append(cls(**options))
    return made


def make_batched(
    cls: Any, model_dim: int, local_slots: int, options: dict[str, Any], sharded_count: int = 1
) -> nn.Module:
    """Build a module of Tutel's kind from the arguments that it takes; local_experts is an old name for one."""
    given = {
        "model_dim": model_dim,
        "num_experts_per_device": local_slots,
        "sharded_count": sharded_count,
        **options,
    }
    parameters = inspect.signature(cls).parameters
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return cls(**given)
    given["local_experts"] = local_slots
    missing = [key for key in options if key not in parameters]
    if missing:
        raise ValueError(f"unknown key {missing[0]!r} in experts: {cls.__name__} takes {', '.join(parameters)}")
    given = {key: value for key, value in given.items() if key in parameters}
    try:
        inspect.signature(cls).bind(**given)
    except TypeError as error:
        raise ValueError(
            f"experts of type 'custom': {cls.__name__} needs more than {', '.join(given)}: {error}"
        ) from None
    return cls(**given)

"""Finds the dense FFNs of a host model by structure: down(act(up(x))), or down(act(gate(x)) * up(x)).

A candidate is a module whose direct children include two or three linear maps (nn.Linear, or Conv1D of transformers)
of fitting shapes, or, as in BERT, a module with the first linear map next to one with the second. A trial on a few
random tokens, in eval and in training, checks that it computes just that: a module that also normalises, scales,
routes or drops out elsewhere is no FFN.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..kernels import ACTIVATIONS, activation_name
from ..kernels.activations import has_hooks

TRIED_TOKENS = 6
_REFUSALS = (TypeError, ValueError, RuntimeError, AttributeError, IndexError, KeyError, NotImplementedError)


@dataclass
class DenseFFN:
    """One FFN of a model; weights are read as [out, in], however the module stores them."""

    name: str  # of the module that an MoE layer replaces
    module: nn.Module
    up: nn.Module
    down: nn.Module
    gate: nn.Module | None  # gated FFNs: the linear map before the activation
    activation: Callable[[Tensor], Tensor]
    dropout: float  # between the activation and `down`
    last_dropout: float  # after `down`, if `module` has one
    down_owner: tuple[str, str] | None = (
        None  # (name under the same parent, attribute) if `down` is in a neighbour of `module`
    )

    @property
    def linears(self) -> list[nn.Module]:
        """The linear maps, in the order up, gate, down."""
        return [m for m in (self.up, self.gate, self.down) if m is not None]

    @property
    def model_dim(self) -> int:
        """D."""
        return weight_of(self.up).shape[1]

    @property
    def hidden(self) -> int:
        """H."""
        return weight_of(self.up).shape[0]


def is_linear(module: object) -> bool:
    """nn.Linear, or the transposed linear map that transformers calls Conv1D."""
    return type(module) is nn.Linear or (type(module).__name__ == "Conv1D" and hasattr(module, "nf"))


def is_altered(module: nn.Module) -> bool:
    """Whether replacing the module would lose something: hooks (old weight_norm, pruning, offloading), an instance's
    own forward, or a weight that is not a plain parameter (sharded, quantised)."""
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    weight = getattr(module, "weight", None) if is_linear(module) else None
    return any(hooks) or "forward" in vars(module) or (weight is not None and type(weight) is not nn.Parameter)


def weight_of(linear: nn.Module) -> Tensor:
    """The weight as [out, in]; for a Conv1D a view."""
    weight = linear.weight
    assert isinstance(weight, Tensor)
    return weight if isinstance(linear, nn.Linear) else weight.t()


def find_ffns(model: nn.Module) -> list[DenseFFN]:
    """The FFNs of `model` in module order, without altered modules and subclasses of the linear maps."""
    found: list[DenseFFN] = []
    taken: set[int] = set()
    for name, module in model.named_modules():
        if id(module) in taken:
            continue
        ffn = _inside(name, module) or _beside(model, name, module)
        if ffn is not None:
            found.append(ffn)
            taken.update(id(m) for m in [*ffn.module.modules(), *ffn.linears])
    return found


def why_not(model: nn.Module, name: str) -> str:
    """Describe what `name` is instead of an FFN, for a message."""
    try:
        module = model.get_submodule(name)
    except AttributeError:
        near = [n for n, _ in model.named_modules() if n.endswith(name.rsplit(".", 1)[-1])][:3]
        return f"there is no module {name!r}" + (f" (there is {', '.join(map(repr, near))})" if near else "")
    altered = {True: " (with hooks, or a weight that is no plain parameter)", False: ""}
    linears = [
        f"{n or '.'} {list(weight_of(m).shape)}{altered[is_altered(m)]}"
        for n, m in module.named_modules()
        if is_linear(m)
    ]
    shown = ", ".join(linears[:6]) + (", ..." if len(linears) > 6 else "")
    hooked = " with hooks," * (is_altered(module) and not is_linear(module))
    return f"{name!r} is a {type(module).__name__}{hooked} with the linear maps [out, in]: {shown or 'none'}"


def _children(module: nn.Module) -> list[nn.Module]:
    return [child for _, child in module.named_children()]


def _kept(module: nn.Module) -> list[nn.Module]:
    """The module with its linear maps and dropouts: what a layer replaces."""
    return [module, *(child for child in _children(module) if is_linear(child) or isinstance(child, nn.Dropout))]


def _inside(name: str, module: nn.Module) -> DenseFFN | None:
    """The FFN inside `module`, if there is one."""
    linears = [child for child in _children(module) if is_linear(child)]
    if any(map(is_altered, _kept(module))):
        return None
    for up, gate, down in _orders(linears):
        for activation in _activations(module):
            ffn = DenseFFN(name, module, up, down, gate, activation, 0.0, 0.0)
            if _computes(ffn, partial(_value, ffn)):
                return ffn
    return None


def _beside(model: nn.Module, name: str, module: nn.Module) -> DenseFFN | None:
    """The FFN whose first linear map is in `module` and whose second is in a neighbour, as in BERT."""
    linears = [child for child in _children(module) if is_linear(child)]
    if len(linears) != 1 or not name or any(map(is_altered, _kept(module))):
        return None
    H, D = weight_of(linears[0]).shape
    for key, neighbour in model.get_submodule(name.rpartition(".")[0]).named_children():
        places = [(n, child) for n, child in neighbour.named_children() if is_linear(child)]
        if neighbour is module or len(places) != 1 or weight_of(places[0][1]).shape != (D, H):
            continue
        attribute, down = places[0]
        if is_altered(down):
            continue
        for activation in _activations(module):
            ffn = DenseFFN(name, module, linears[0], down, None, activation, 0.0, 0.0, (key, attribute))
            if _computes(ffn, partial(_hidden, ffn)) and _starts_with(neighbour, attribute, H, D):
                return ffn
    return None


def _orders(linears: list[nn.Module]) -> Iterator[tuple[nn.Module, nn.Module | None, nn.Module]]:
    """Every (up, gate, down) with fitting shapes."""
    if len(linears) == 2:
        up, down = linears
        if weight_of(up).shape == weight_of(down).shape[::-1]:
            yield up, None, down
    if len(linears) == 3:
        for i in range(3):
            one, two, down = linears[i - 2], linears[i - 1], linears[i]
            if weight_of(one).shape == weight_of(two).shape == weight_of(down).shape[::-1]:
                yield two, one, down
                yield one, two, down


def _activations(module: nn.Module) -> list[Callable[[Tensor], Tensor]]:
    """Candidates for the activation: children that are neither linear nor dropout, functions in attributes "act..."."""
    passed = (nn.Dropout, nn.Identity, nn.LayerNorm)
    found: list[Callable[[Tensor], Tensor]] = [
        child for child in _children(module) if not is_linear(child) and not isinstance(child, passed)
    ]
    functions = [value for key, value in vars(module).items() if "act" in key.lower()]
    found += [value for value in functions if callable(value) and not isinstance(value, type)]
    return found


def _dropouts(ffn: DenseFFN) -> tuple[float, float]:
    """p of the dropouts before and after `down`, in order of execution."""
    called: list[nn.Module] = []
    hooks = [child.register_forward_pre_hook(lambda m, _: called.append(m)) for child in _children(ffn.module)]
    try:
        with _mode(ffn.module, training=False):
            ffn.module(_tokens(ffn.up, ffn.model_dim))
    finally:
        for hook in hooks:
            hook.remove()
    before, behind, seen = 0.0, 0.0, False
    for child in called:
        seen |= child is ffn.down
        if isinstance(child, nn.Dropout):
            before, behind = (before, child.p) if seen else (child.p, behind)
    return before, behind


def _hidden(ffn: DenseFFN, x: Tensor) -> Tensor:
    """The input of `down`."""
    h = ffn.activation(ffn.up(x)) if ffn.gate is None else ffn.activation(ffn.gate(x)) * ffn.up(x)
    return F.dropout(h, ffn.dropout, ffn.module.training)


def _value(ffn: DenseFFN, x: Tensor) -> Tensor:
    return F.dropout(ffn.down(_hidden(ffn, x)), ffn.last_dropout, ffn.module.training)


@contextlib.contextmanager
def _mode(module: nn.Module, training: bool) -> Iterator[None]:
    """Run the block in the given mode without gradients, then restore every module's mode."""
    modes = [(m, m.training) for m in module.modules()]
    module.train(training)
    try:
        with torch.no_grad():
            yield
    finally:
        for m, before in modes:
            m.training = before


def _tokens(like: nn.Module, size: int) -> Tensor:
    weight = weight_of(like)
    drawn = torch.randn((2, TRIED_TOKENS // 2, size), generator=torch.Generator().manual_seed(0))
    return drawn.to(weight.device, weight.dtype)


def _computes(ffn: DenseFFN, expected: Callable[[Tensor], Tensor]) -> bool:
    """Whether the module computes `expected` on a few random tokens, also in training; sets the FFN's dropouts."""
    if weight_of(ffn.up).is_meta:
        raise ValueError(f"{ffn.name!r} has its weights on the meta device: load the model before converting it")
    x = _tokens(ffn.up, ffn.model_dim)
    try:
        with _mode(ffn.module, training=False):
            if not _same(ffn.module(x.clone()), expected(x)):
                return False
        ffn.dropout, ffn.last_dropout = _dropouts(ffn)
        if x.device.type not in ("cpu", "cuda"):
            return True  # other devices cannot always restore their random state
        with _mode(ffn.module, training=True):  # other dropouts give other numbers
            return _same(_drawn(lambda: ffn.module(x.clone()), x.device), _drawn(lambda: expected(x), x.device))
    except _REFUSALS:  # another signature, other shapes: not an FFN
        return False


def _drawn(compute: Callable[[], Tensor], device: torch.device) -> Tensor:
    """The result under a fixed seed; the caller's random state is restored."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.default_generator.manual_seed(0)
        if device.type == "cuda":
            torch.cuda.default_generators[device.index or 0].manual_seed(0)
        return compute()


def _starts_with(neighbour: nn.Module, attribute: str, H: int, D: int) -> bool:
    """Whether `neighbour` applies its linear map first, before residual and normalisation."""
    linear = getattr(neighbour, attribute)
    h, residual = _tokens(linear, H), _tokens(linear, D)
    try:
        with _mode(neighbour, training=False):
            whole = neighbour(h, residual)
            setattr(neighbour, attribute, nn.Identity())
            return _same(neighbour(linear(h), residual), whole)
    except _REFUSALS:
        return False
    finally:
        setattr(neighbour, attribute, linear)


def _same(got: object, expected: Tensor) -> bool:
    if not isinstance(got, Tensor) or got.shape != expected.shape or not got.is_floating_point():
        return False
    limit = 1e-2 if got.dtype in (torch.float16, torch.bfloat16) else 1e-5
    return bool((got - expected).float().norm() <= limit * expected.float().norm())


def fused_name(activation: Callable[[Tensor], Tensor]) -> str | None:
    """The name in `kernels.ACTIVATIONS` of the same scalar function, to 1e-6 on [-9, 9]; None if there is none."""
    known = activation_name(activation)
    if known is not None:
        return known
    if isinstance(activation, nn.Module) and (has_hooks(activation) or any(True for _ in activation.parameters())):
        return None
    h = torch.linspace(-9, 9, 2001)
    try:
        with torch.no_grad():
            a = activation(h.clone())
    except _REFUSALS:
        return None
    for name, known_activation in ACTIVATIONS.items():
        if isinstance(a, Tensor) and a.shape == h.shape and torch.allclose(a, known_activation.value(h), 0, 1e-6):
            return name
    return None


class DropoutAfter(nn.Module):
    """An activation followed by dropout, as in a host's FFN between its linear maps."""

    def __init__(self, activation: Callable[[Tensor], Tensor], p: float) -> None:
        super().__init__()
        self.activation, self.p = activation, p

    def forward(self, h: Tensor) -> Tensor:
        """[rows, H] to [rows, H]."""
        return F.dropout(self.activation(h), self.p, self.training)

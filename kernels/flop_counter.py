"""What torch's FLOP counter (`torch.utils.flop_counter.FlopCounterMode`) counts for each operation.

As in torch: 2 M N K for a product of [M, K] and [K, N], nothing for what is no matrix product. A count follows from the
shapes: a row is an assignment or, with a bounded or full capacity, a row of memory.

The counter takes an operation without a formula for free, and its module imports Triton where that is installed. So the
formulas are registered as soon as somebody imports that module.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from .operands import ExpertWeights, Index
from .operation import OPERATIONS, Operation

COUNTER = "torch.utils.flop_counter"


def _up(rows: int, weights: ExpertWeights) -> int:
    """x @ w1, and x @ w3 of gated experts."""
    _, D, H = weights.w1_EDH.shape
    return 2 * rows * D * H * (1 if weights.w3_EDH is None else 2)


def _down(rows: int, weights: ExpertWeights) -> int:
    _, H, O = weights.w2_EHO.shape
    return 2 * rows * H * O


def _experts(_x: Tensor, _router: Any, index: Index, weights: ExpertWeights, *_: Any) -> int:
    return _up(index.rows, weights) + _down(index.rows, weights)


def _experts_backward(
    _d: Tensor, h_AH: Tensor, _u: Tensor, _x: Tensor, _router: Any, index: Index, weights: ExpertWeights, *options: Any
) -> int:
    """Two products for each of the forward's, one if the weights' gradients are not wanted, and what is recomputed."""
    *_, wanted, _engine = options
    rows = index.rows
    up, down = _up(rows, weights), _down(rows, weights)
    return (up + down) * (2 if wanted else 1) + (0 if h_AH.shape[0] == rows else up)


def _top_any_backward(
    d_y_TO: Tensor, h_AH: Tensor, u_AH: Tensor, x_TD: Tensor, router: Any, index: Index, *rest: Any
) -> int:
    of_scores = 4 * router.score_TE.numel() * x_TD.shape[1]
    return of_scores + _experts_backward(d_y_TO, h_AH, u_AH, x_TD, router, index, *rest)


def _nothing(*_: Any) -> int:
    return 0


FORMULAS: dict[str, Callable[..., int]] = {  # each is called with the operation's arguments, groups as NamedTuples
    "threshold_gate": lambda x_TD, w_DE, *_: 2 * x_TD.numel() * w_DE.shape[1],
    "threshold_gate_backward": lambda d_score_TE, _score_TE, x_TD, *_: 4 * d_score_TE.numel() * x_TD.shape[1],
    "vector_losses": lambda w_DE, *_: 2 * w_DE.numel() * w_DE.shape[1],
    "vector_losses_backward": lambda *arguments: 2 * arguments[-1].numel() * arguments[-1].shape[1],
    "grouped_ffn": _experts,
    "grouped_ffn_backward": _experts_backward,
    "grouped_linear": lambda rows_AD, _offsets, w_EDO, *_: 2 * rows_AD.numel() * w_EDO.shape[2],
    "grouped_linear_backward": lambda d_out_AO, rows_AD, *_: 4 * d_out_AO.numel() * rows_AD.shape[1],
    "top_any_ffn": _experts,
    "top_any_ffn_backward": _top_any_backward,
    **dict.fromkeys(("dispatch", "combine", "combine_backward", "row_gates", "row_gates_backward"), _nothing),
    **dict.fromkeys(("ragged_index", "bound_assignments", "keep_strided"), _nothing),
}


def counted(declared: Operation) -> Callable[..., int]:
    """The operation's formula as the counter calls it: with the arguments of torch's schema and the result."""
    formula = FORMULAS[declared.name]

    def count(*args: Any, out_val: Any = None, **named: Any) -> int:
        given = declared.signature.bind(*args, **named)
        given.apply_defaults()
        return formula(*declared.grouped(given.args))

    return count


def register(counter: ModuleType) -> None:
    """Give the module `torch.utils.flop_counter` the formula of every operation that it does not know."""
    for name, declared in OPERATIONS.items():
        operation = getattr(torch.ops.dynmoe_tutel, name)
        if operation not in counter.flop_registry:
            counter.register_flop_formula(operation, get_raw=True)(counted(declared))


class _Loader(SourceFileLoader):
    def exec_module(self, module: ModuleType) -> None:
        super().exec_module(module)
        register(module)


class _Finder(MetaPathFinder):
    """Finds the counter's module where python does, and has the formulas registered after it was imported."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        spec = PathFinder.find_spec(fullname, path, target) if fullname == COUNTER else None
        if spec is None or not isinstance(spec.loader, SourceFileLoader):
            return None
        spec.loader = _Loader(spec.loader.name, spec.loader.path)
        return spec


def register_when_imported() -> None:
    """`register` now if the counter's module was imported, else as soon as it is."""
    if COUNTER in sys.modules:
        register(sys.modules[COUNTER])
    else:
        sys.meta_path.insert(0, _Finder())

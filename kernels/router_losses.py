"""The two auxiliary losses of a top-any gate that depend only on its routing vectors, in one operation.

    diversity  = ||M||_F,  M = (U^T U - I) o m m^T over unit columns u_e of active slots (its diagonal is zero)
    simplicity = mean over active slots of ||w_e||

Source: arXiv 2405.14297, section 3. With u^ = 2 / ||M|| * U M the gradient of a column is
(u^_e - u_e <u_e, u^_e>) / ||w_e|| for diversity, where <u_e, u^_e> = 2 / ||M|| * sum_f M[e, f]^2, and u_e / (number of
active slots) for simplicity. In torch operations this takes sixty launches with a microsecond of work each.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .norms import scaled
from .operands import active_slots, expect_active
from .operation import expect_matrix, operation
from .threshold_gate import gate_dtype

MODULES = {"triton": "gpu.router_losses"}


def _check(w_DE: Tensor, active_E: Tensor) -> None:
    expect_matrix("w_DE", w_DE, "[D, E]")
    expect_active(active_E, w_DE.shape[1])


def _shapes(w_DE: Tensor, active_E: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    D, E = w_DE.shape
    shapes = ((), (), (E, D), (E,), (E, E), ())
    loss, other, unit, inverse, gram, count = (w_DE.new_empty(shape, dtype=gate_dtype(w_DE)) for shape in shapes)
    return loss, other, unit, inverse, gram, count


def _context(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.set_materialize_grads(False)
    diversity, _, *saved = output
    ctx.mark_non_differentiable(*saved)
    ctx.save_for_backward(diversity, *saved, inputs[0])


def _backward(ctx: Any, d_diversity: Tensor | None, d_simplicity: Tensor | None, *_: Any) -> tuple[Any, ...] | None:
    if d_diversity is None and d_simplicity is None:
        return None
    diversity, *saved = ctx.saved_tensors
    return (vector_losses_backward(diversity, d_diversity, d_simplicity, *saved),)


@operation(check=_check, fake=_shapes, engines=MODULES, autocast=False, context=_context, backward=_backward)
def vector_losses(w_DE: Tensor, active_E: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Diversity [] and simplicity [] of routing vectors [D, E]; both 0 if no slot is active.

    Also returns, for the backward, the unit vectors [E, D], their inverse norms [E], and M [E, E], zero for inactive
    slots, and the number of active slots (at least 1).
    """
    active_E = active_slots(active_E)
    w = w_DE.to(gate_dtype(w_DE)).masked_fill(~active_E, 0)  # not a product: an inactive slot may hold NaN
    vectors = scaled(w, 0)
    inverse_E = vectors.inverse()
    unit_ED = (vectors.vectors * inverse_E).t().contiguous()
    gram_EE = unit_ED @ unit_ED.t()
    gram_EE.fill_diagonal_(0)
    diversity = torch.linalg.vector_norm(gram_EE)
    count = active_E.sum().clamp(min=1).to(w.dtype)
    simplicity = vectors.own_norm().sum() / count
    return diversity, simplicity, unit_ED, vectors.own(inverse_E), gram_EE, count


def _backward_shape(*args: Tensor) -> Tensor:
    *_, w_DE = args
    return torch.empty_like(w_DE, memory_format=torch.contiguous_format)


@operation(fake=_backward_shape, engines=MODULES, autocast=False)
def vector_losses_backward(
    diversity: Tensor, d_diversity: Tensor | None, d_simplicity: Tensor | None, unit_ED: Tensor, inv_norm_E: Tensor,
    gram_EE: Tensor, count: Tensor, w_DE: Tensor,
) -> Tensor:  # fmt: skip
    """Gradient of the routing vectors, [D, E], in their dtype; a loss without gradient has None."""
    d_w_ED = torch.zeros_like(unit_ED)
    if d_diversity is not None:
        factor = torch.where(diversity > 0, 2 * d_diversity / diversity, torch.zeros_like(diversity))
        tangent_ED = gram_EE @ unit_ED - unit_ED * gram_EE.square().sum(dim=1, keepdim=True)
        d_w_ED += tangent_ED * (factor * inv_norm_E).unsqueeze(1)
    if d_simplicity is not None:
        d_w_ED += unit_ED * (d_simplicity / count)
    return d_w_ED.t().to(w_DE.dtype).contiguous()

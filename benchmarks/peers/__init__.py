"""Packages that do the same job, for `benchmarks.layer` on a GPU: one adapter per file, for those that are installed.

Peers take a fixed number of experts per token, so all of them, and ours beside them, get the same fixed-k routing: k
distinct experts per token, drawn at random, weights 1 / k, experts without biases. The time covers everything from that
routing to the gradients: index or sort, dispatch, experts, combine, and their backward, but not the routing. A peer is
compared with plain torch before it is timed; one that is not measured is named with the reason.

An adapter has `PACKAGE`, `unfit(case)` (why it cannot take a case, or None; may import nothing) and `build(case)`.
`transformers` and `tutel.build_layer` are for `benchmarks.layer --peers` on a CPU: see `benchmarks.layer_peers`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..common.shapes import Shape

# name in the table -> module in this package
ADAPTERS = {
    "scattermoe": "scattermoe",
    "sonicmoe": "sonicmoe",
    "megablocks": "megablocks",
    "tutel": "tutel",
    "moe-ops": "moe_ops",
    "liger-kernel": "liger",
}
TUNING = ("moe-ops", "liger-kernel")  # compile and time dozens of tiles for every shape: a minute or more


class PeerCase:
    """Tokens, a fixed-k routing of them, and experts without biases: act(x w1) w2, or act(x w1) (x w3) w2 if gated."""

    def __init__(self, shape: Shape, dtype: torch.dtype, device: torch.device, seed: int = 0) -> None:
        generator = torch.Generator(device).manual_seed(seed)  # on the device: a CPU would take many seconds
        T, D, H, E = shape.T, shape.D, shape.H, shape.E
        self.shape, self.dtype, self.device = shape, dtype, device
        self.k = min(max(1, round(shape.k)), E)

        def draw(*size: int, scale: float = 1.0) -> Tensor:
            return (torch.randn(size, generator=generator, device=device) * scale).to(dtype)

        self.x_TD, self.d_y_TD = draw(T, D).requires_grad_(), draw(T, D)
        self.w1_EDH = draw(E, D, H, scale=D**-0.5)
        self.w3_EDH = draw(E, D, H, scale=D**-0.5) if shape.gated else None
        self.w2_EHD = draw(E, H, D, scale=H**-0.5)
        order_TE = torch.rand(T, E, generator=generator, device=device)
        self.index_TK = order_TE.topk(self.k, dim=1).indices.sort(dim=1).values
        self.weight_TK = torch.full((T, self.k), 1 / self.k, device=device)
        self.activation = F.silu if shape.gated else F.gelu

    def expected(self, index_TK: Tensor | None = None, weight_TK: Tensor | None = None) -> Tensor:
        """The output in fp32 by a loop over the experts; with arguments, for a peer's own routing."""
        index_TK = self.index_TK if index_TK is None else index_TK
        weight_TK = self.weight_TK if weight_TK is None else weight_TK
        x_TD = self.x_TD.detach().float()
        y_TD = torch.zeros_like(x_TD)
        for e in range(self.shape.E):
            token, slot = (index_TK == e).nonzero(as_tuple=True)
            x = x_TD[token]
            a = self.activation(x @ self.w1_EDH[e].float())
            if self.w3_EDH is not None:
                a = a * (x @ self.w3_EDH[e].float())
            y_TD[token] += (a @ self.w2_EHD[e].float()) * weight_TK[token, slot].float().unsqueeze(1)
        return y_TD


@dataclass
class Peer:
    """A peer on a case: its forward, the parameters that get gradients, and its routing if it uses its own."""

    forward: Callable[[Tensor], Tensor]
    parameters: Sequence[Tensor]
    routing: tuple[Tensor, Tensor] | None = None
    note: str = ""


@dataclass
class LayerPeer:
    """A peer in the place of a whole top-any layer, for `benchmarks.layer --peers`."""

    forward: Callable[[], Tensor]
    up: Tensor  # [E, H, D]
    down: Tensor  # [E, H, D], or [E, D, H] if down_transposed
    down_transposed: bool = False
    normalized: bool = False  # the router's gradient is that of combine_gradient="normalized", not "mean"


def leaf(tensor: Tensor) -> Tensor:
    """A contiguous copy that requires a gradient."""
    return tensor.detach().clone(memory_format=torch.contiguous_format).requires_grad_()


def ours(case: PeerCase) -> Peer:
    """Our operations on the same routing, from its bitmask."""
    from dynmoe_tutel import kernels

    assigned_TE = torch.zeros((case.shape.T, case.shape.E), dtype=torch.bool, device=case.device)
    bits_TW = kernels.pack_bits(assigned_TE.scatter_(1, case.index_TK, True))
    rows = case.index_TK.numel()
    gate_A = torch.ones(rows, device=case.device)
    w1, w2 = leaf(case.w1_EDH), leaf(case.w2_EHD)
    w3 = None if case.w3_EDH is None else leaf(case.w3_EDH)
    name = kernels.activation_name(case.activation)
    assert name is not None

    def forward(x_TD: Tensor) -> Tensor:
        index = kernels.Index(*kernels.ragged_index(bits_TW, case.shape.E, rows))
        weights = kernels.ExpertWeights(w1, None, w3, None, w2, None)
        out, _, _ = kernels.grouped_ffn(x_TD, gate_A, index, weights, name, False, True)
        return kernels.combine(out, *index[1:], True)

    return Peer(forward, [w for w in (w1, w2, w3) if w is not None])


def step(peer: Peer, case: PeerCase) -> Callable[[], Any]:
    """Forward and backward."""
    wanted = [case.x_TD, *peer.parameters]
    return lambda: torch.autograd.grad(peer.forward(case.x_TD), wanted, case.d_y_TD)


def checked(peer: Peer, case: PeerCase) -> float:
    """Relative RMS error of its output against plain torch; raises RuntimeError if it is large."""
    with torch.no_grad():
        found = peer.forward(case.x_TD).float()
    expected = case.expected(*peer.routing) if peer.routing else case.expected()
    error = float((found - expected).norm() / expected.norm())
    if not error < (1e-5 if case.dtype == torch.float32 else 1.5e-2):
        raise RuntimeError(f"its output differs from plain torch by {error:.1e}")
    return error


def unavailable(name: str, case: PeerCase) -> str | None:
    """The reason why a peer is not measured on a case, or None."""
    adapter = import_module(f".{ADAPTERS[name]}", __package__)
    if find_spec(adapter.PACKAGE) is None:
        return "not installed"
    return adapter.unfit(case)


def build(name: str, case: PeerCase) -> Peer:
    """Build the peer on a case; passes on any exception of its import or construction."""
    return import_module(f".{ADAPTERS[name]}", __package__).build(case)

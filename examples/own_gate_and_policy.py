"""A gate and a policy of one's own, without touching the package.

Run: python examples/own_gate_and_policy.py
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dynmoe_tutel import Decision, ExpertController, Routing, RoutingRecord, moe


class TopPGate(nn.Module):
    """Each token takes its most probable experts until they hold the share `p` of the probability."""

    def __init__(self, model_dim: int, num_global_experts: int, p: float = 0.6) -> None:
        super().__init__()
        self.linear, self.p = nn.Linear(model_dim, num_global_experts, bias=False), p

    def forward(self, x_TD: Tensor) -> Routing:
        prob_TE = self.linear(x_TD).softmax(dim=1)
        sorted_TE, order_TE = prob_TE.sort(dim=1, descending=True)
        before_TE = sorted_TE.cumsum(dim=1) - sorted_TE  # share held by the better experts
        assigned_TE = torch.zeros_like(prob_TE, dtype=torch.bool).scatter(1, order_TE, before_TE < self.p)
        weight_TE = prob_TE * assigned_TE
        weight_TE = weight_TE / weight_TE.sum(dim=1, keepdim=True)  # the router learns through these
        return Routing.from_assignments(assigned_TE, prob_TE, weights=weight_TE)


def make_room(record: RoutingRecord, active: Tensor, free_slots: int, silent_windows: list[int]) -> Decision:
    """Grow for unrouted tokens, as DynMoE does; without a free slot, the expert of fewest assignments makes room."""
    norm = torch.linalg.vector_norm(record.unrouted_sum)
    if not norm:
        return Decision()
    grow = [(record.unrouted_sum / norm, f"{int(record.unrouted_tokens)} tokens unrouted")]
    if free_slots:
        return Decision(grow=grow)
    fewest = int(record.counts.masked_fill(~active, record.counts.max() + 1).argmin())
    return Decision([(fewest, f"fewest assignments: {int(record.counts[fewest])}")], grow)


experts = {"type": "ffn", "num_experts_per_device": 4, "hidden_size_per_expert": 32}
model = nn.Sequential(
    moe.moe_layer({"type": "custom", "module": TopPGate, "p": 0.6}, 16, experts, seeds=(0, 1)),
    moe.moe_layer("top_any", 16, experts, seeds=(2, 3)),  # 4 slots, all taken; the controller adapts this layer alone
)
optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
controller = ExpertController(model, optimizer, schedule={"every": 10}, policy=make_room)
generator = torch.Generator().manual_seed(0)
for _ in range(60):
    x = torch.randn(256, 16, generator=generator)
    loss = (x + model(x) - x.roll(1, dims=1)).square().mean() + 0.01 * sum(layer.l_aux for layer in model)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    for event in controller.step():
        print(event)
k_T = model[0].route(x).k_per_token
print(f"top-p: from {int(k_T.min())} to {int(k_T.max())} experts a token, {k_T.float().mean():.2f} on average")

"""Train one layer on tokens of six kinds: experts grow, and every token chooses how many it activates.

Run: python examples/train_a_layer.py
"""

from __future__ import annotations

import torch

from dynmoe_tutel import ExpertController, moe

STEPS, KINDS, DIM = 200, 6, 32
generator = torch.Generator().manual_seed(0)
centre_KD = torch.randn(KINDS, DIM, generator=generator)
map_KDD = torch.randn(KINDS, DIM, DIM, generator=generator) / DIM**0.5


def batch(tokens: int = 512) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens near the centre of their kind, and what the map of their kind makes of them."""
    kind_T = torch.randint(KINDS, (tokens,), generator=generator)
    x_TD = centre_KD[kind_T] + 0.3 * torch.randn(tokens, DIM, generator=generator)
    return x_TD, torch.einsum("td,tdo->to", x_TD, map_KDD[kind_T])


layer = moe.moe_layer(
    gate_type={"type": "top_any", "max_expert_num": 8},
    experts={"type": "ffn", "num_experts_per_device": 2, "hidden_size_per_expert": 64, "activation_fn": "gelu"},
    model_dim=DIM,
    seeds=(0, 0),
)
optimizer = torch.optim.AdamW(layer.parameters(), lr=5e-3)
controller = ExpertController(layer, optimizer, schedule={"every": 20})
for step in range(1, STEPS + 1):
    x_TD, target_TD = batch()
    y_TD = layer(x_TD)
    loss = (y_TD - target_TD).square().mean()
    optimizer.zero_grad()
    (loss + 0.01 * y_TD.l_aux).backward()
    optimizer.step()
    for event in controller.step():
        print(event)
    if step == 1 or step % 50 == 0:
        k = layer.route(x_TD).k_per_token.float().mean()
        print(f"step {step}: loss {loss:.3f}, {layer.num_global_experts} experts, {k:.2f} a token")

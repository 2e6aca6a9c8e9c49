"""Train a small vision transformer on handwritten digits with DeepSpeed: every second block has a DynMoE.

Run: python examples/deepspeed_vit.py, or on several processes torchrun --nproc_per_node=2 examples/deepspeed_vit.py
It needs the extras [deepspeed] and [experiments] (scikit-learn, for the digits).
"""

from __future__ import annotations

import os

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

import dynmoe_tutel.deepspeed as deepspeed

STEPS, BATCH, DIM, DEPTH, PATCH = 120, 128, 32, 4, 2
CONFIG = {
    "train_batch_size": BATCH,
    "optimizer": {"type": "Adam", "params": {"lr": 5e-3, "torch_adam": True}},
    "zero_optimization": {"stage": 1},
    "steps_per_print": 10**9,
    "dynmoe": {"schedule": {"every": 20, "stop": 80}},  # grow and prune after steps 20, 40, 60, 80
}


class FeedForward(nn.Sequential):
    """The FFN of a block, and of each expert."""

    def __init__(self) -> None:
        super().__init__(nn.LayerNorm(DIM), nn.Linear(DIM, 2 * DIM), nn.GELU(), nn.Linear(2 * DIM, DIM))


class Block(nn.Module):
    """Attention, and an FFN or a mixture of them; returns the auxiliary loss too."""

    def __init__(self, mixture: bool) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(DIM)
        self.attention = nn.MultiheadAttention(DIM, 4, batch_first=True)
        self.feed_forward: nn.Module = FeedForward()
        if mixture:
            self.feed_forward = deepspeed.moe.layer.MoE(
                hidden_size=DIM, expert=FeedForward(), num_experts=2, ep_size=1, k=-1, max_expert_num=6
            )

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | float]:
        normed = self.norm(x)
        x = x + self.attention(normed, normed, normed, need_weights=False)[0]
        if isinstance(self.feed_forward, FeedForward):
            return x + self.feed_forward(x), 0.0
        output, l_aux, _ = self.feed_forward(x)
        return x + output, l_aux


class ViT(nn.Module):
    """Images [B, 8, 8] to logits [B, 10] and the sum of the auxiliary losses."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(PATCH * PATCH, DIM)
        self.position = nn.Parameter(0.02 * torch.randn((8 // PATCH) ** 2, DIM))
        self.blocks = nn.ModuleList(Block(mixture=i % 2 == 1) for i in range(DEPTH))
        self.head = nn.Sequential(nn.LayerNorm(DIM), nn.Linear(DIM, 10))

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor | float]:
        patches = images.unfold(1, PATCH, PATCH).unfold(2, PATCH, PATCH).flatten(3).flatten(1, 2)
        x, l_aux = self.embed(patches) + self.position, torch.zeros((), device=images.device)
        for block in self.blocks:
            x, of_block = block(x)
            l_aux = l_aux + of_block
        return self.head(x.mean(dim=1)), l_aux


def main() -> None:
    for name, value in {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "127.0.0.1"}.items():
        os.environ.setdefault(name, str(value))  # started without a launcher
    os.environ.setdefault("MASTER_PORT", "29512")
    if not torch.cuda.is_available():
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # else DeepSpeed compiles it for minutes
    deepspeed.init_distributed()
    rank, ranks = deepspeed.comm.get_rank(), deepspeed.comm.get_world_size()

    digits = load_digits()
    images, labels = torch.tensor(digits.images / 16.0).float(), torch.tensor(digits.target)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    train, test = order[:1500], order[1500:]

    torch.manual_seed(0)
    model = ViT()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    engine, *_ = deepspeed.initialize(model=model, model_parameters=trained, config=CONFIG)
    generator = torch.Generator().manual_seed(rank)  # every rank has images of its own
    for step in range(1, STEPS + 1):
        chosen = train[torch.randint(len(train), (BATCH // ranks,), generator=generator)]
        logits, l_aux = engine(images[chosen].to(engine.device))
        loss = F.cross_entropy(logits, labels[chosen].to(engine.device)) + 0.01 * l_aux
        engine.backward(loss)
        engine.step()
        if rank == 0 and (step == 1 or step % 40 == 0):
            print(f"step {step}: loss {loss.item():.3f}")
    engine.eval()
    with torch.no_grad():
        right = engine(images[test].to(engine.device))[0].argmax(dim=1).cpu() == labels[test]
    if rank == 0:
        for event in engine.events:
            print(event)
        experts = [block.feed_forward.deepspeed_moe.num_global_experts for block in model.blocks[1::2]]
        print(f"accuracy {right.float().mean():.1%} on {len(test)} other digits; experts by layer: {experts}")


main()

"""A small vision transformer whose alternate blocks hold a mixture of experts in place of the MLP, as GMoE's do.

The blocks are pre-norm. Every part draws its initial weights from an own stream of the seed, so that models which
differ in their feed-forward parts start with equal attention, embedding and head. The caller builds the MoE
layers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TypeVar, cast

import torch
from torch import Tensor, nn

T = TypeVar("T")


@dataclass(frozen=True)
class ViTConfig:
    """Sizes. Patches overlap where `stride` < `patch`. Blocks 1, 3, ... hold MoE layers; `hidden` is the width of the
    MLP and of each expert."""

    side: int = 8
    patch: int = 4
    stride: int = 2
    dim: int = 64
    hidden: int = 256
    heads: int = 4
    depth: int = 4
    classes: int = 10

    def __post_init__(self) -> None:
        if self.patch > self.side or (self.side - self.patch) % self.stride:
            raise ValueError(
                f"patches of {self.patch} at a stride of {self.stride} do not cover a side of {self.side}: "
                "side - patch must be a multiple of stride"
            )
        if self.dim % self.heads:
            raise ValueError(f"dim must be a multiple of heads, got {self.dim} and {self.heads}")

    @property
    def tokens(self) -> int:
        """Tokens of one image."""
        return ((self.side - self.patch) // self.stride + 1) ** 2

    @property
    def moe_blocks(self) -> tuple[int, ...]:
        return tuple(range(1, self.depth, 2))


class MLP(nn.Sequential):
    """The dense feed-forward part: two linear maps with a GELU between."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__(nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, dim))


class Attention(nn.Module):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.out = nn.Linear(dim, dim)

    def forward(self, x_BND: Tensor) -> Tensor:
        B, N, D = x_BND.shape
        qkv = self.qkv(x_BND).view(B, N, 3, self.heads, D // self.heads).permute(2, 0, 3, 1, 4)
        y = nn.functional.scaled_dot_product_attention(qkv[0], qkv[1], qkv[2])
        return cast(Tensor, self.out(y.transpose(1, 2).reshape(B, N, D)))


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)); `mlp` is dense or a MoE layer."""

    def __init__(self, attention: Attention, mlp: nn.Module, dim: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attention = attention
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = mlp

    def forward(self, x_BND: Tensor) -> Tensor:
        x_BND = x_BND + self.attention(self.norm1(x_BND))
        return x_BND + self.mlp(self.norm2(x_BND))


class ViT(nn.Module):
    """Images [B, 1, side, side] to logits [B, classes]: patches, blocks, mean over tokens, linear head."""

    def __init__(self, config: ViTConfig, seed: int, moe: Callable[[int], nn.Module] | None = None) -> None:
        """`moe(block)` builds the layer of a MoE block; None makes every block dense."""
        super().__init__()
        self.config = config
        self.embed = seeded(seed, 0, lambda: nn.Linear(config.patch**2, config.dim))
        self.position = nn.Parameter(seeded(seed, 1, lambda: 0.1 * torch.randn(config.tokens, config.dim)))
        self.head = seeded(seed, 2, lambda: nn.Linear(config.dim, config.classes))
        self.norm = nn.LayerNorm(config.dim)
        blocks = []
        for block in range(config.depth):
            attention = seeded(seed, 10 + 2 * block, lambda: Attention(config.dim, config.heads))
            mlp: nn.Module
            if moe is not None and block in config.moe_blocks:
                mlp = seeded(seed, 11 + 2 * block, partial(moe, block))
            else:
                mlp = seeded(seed, 11 + 2 * block, lambda: MLP(config.dim, config.hidden))
            blocks.append(Block(attention, mlp, config.dim))
        self.blocks = nn.ModuleList(blocks)

    def forward(self, image: Tensor) -> Tensor:
        config = self.config
        patches = nn.functional.unfold(image, config.patch, stride=config.stride).transpose(1, 2)
        x_BND = self.embed(patches) + self.position
        for block in self.blocks:
            x_BND = block(x_BND)
        return cast(Tensor, self.head(self.norm(x_BND).mean(1)))


def seeded(seed: int, stream: int, build: Callable[[], T]) -> T:
    """What `build` returns when the CPU generator stands at that stream of the seed; the generator is put back."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed * 1_000 + stream)
        return build()

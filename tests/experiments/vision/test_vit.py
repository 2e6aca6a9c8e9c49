"""The model: sizes, positions of the MoE layers, and seeds that touch no global state."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from dynmoe_tutel.experiments.vision.vit import ViT, ViTConfig, seeded


def test_alternate_blocks_hold_the_moe_layer() -> None:
    built = []

    def moe(block: int) -> nn.Module:
        built.append(block)
        return nn.Identity()

    model = ViT(ViTConfig(depth=5), 0, moe)
    assert built == [1, 3]
    assert [isinstance(block.mlp, nn.Identity) for block in model.blocks] == [False, True, False, True, False]


def test_forward_has_a_logit_a_class_and_a_gradient_everywhere() -> None:
    config = ViTConfig(dim=16, hidden=8)
    model = ViT(config, 0)
    logits = model(torch.rand(3, 1, 8, 8))
    assert logits.shape == (3, 10)
    logits.square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())
    assert config.tokens == model.position.shape[0] == 9


def test_tokens_are_the_patches_in_reading_order() -> None:
    config = ViTConfig(patch=4, stride=4, dim=16, heads=2)
    model = ViT(config, 0)
    image = torch.zeros(1, 1, 8, 8)
    image[0, 0, 0:4, 4:8] = torch.arange(16.0).view(4, 4)
    seen = []
    model.embed.register_forward_pre_hook(lambda _module, args: seen.append(args[0]))
    model(image)
    assert torch.equal(seen[0][0, 1], torch.arange(16.0))
    assert seen[0][0, [0, 2, 3]].abs().sum() == 0


def test_building_leaves_the_random_state_alone_and_depends_on_the_seed_only() -> None:
    torch.manual_seed(5)
    state = torch.get_rng_state()
    first = ViT(ViTConfig(), 3)
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(7)
    again, other = ViT(ViTConfig(), 3), ViT(ViTConfig(), 4)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))
    assert not torch.equal(first.head.weight, other.head.weight)
    assert not torch.equal(first.blocks[0].attention.qkv.weight, first.blocks[2].attention.qkv.weight)


def test_the_random_state_comes_back_after_an_error() -> None:
    state = torch.get_rng_state()

    def fail() -> None:
        torch.rand(3)
        raise RuntimeError("building failed")

    with pytest.raises(RuntimeError):
        seeded(0, 0, fail)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(("change", "message"), [({"patch": 3}, "do not cover"), ({"heads": 5}, "multiple of heads")])
def test_sizes_that_do_not_fit_are_refused(change: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ViTConfig(**change)

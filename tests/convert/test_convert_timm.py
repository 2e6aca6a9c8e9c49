"""`convert` on timm's vision transformers: random weights, no download."""

from __future__ import annotations

import copy
import sys
from functools import partial
from typing import Any

import pytest
import torch
from helpers import relative_rms
from torch import Tensor, nn
from torchvision_stand_in import import_timm

from dynmoe_tutel.convert import aux_loss, convert, revert
from dynmoe_tutel.layer import MoELayer

timm = import_timm()

EXACT = 1e-6  # relative RMS of one fp32 model against another


def vit(**options: Any) -> nn.Module:
    """A ViT of 4 blocks, hidden size 32 and 16 patches, with random weights and biases."""
    options = {"depth": 4, "embed_dim": 32, "num_heads": 2, "img_size": 32, "patch_size": 8, "num_classes": 5} | options
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", pretrained=False, **options).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn(parameter.shape) * 0.2)
    return model


def images(count: int = 3, size: int = 32) -> Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(1))


def moe_layers(model: nn.Module) -> dict[str, MoELayer]:
    return {name: m for name, m in model.named_modules() if isinstance(m, MoELayer)}


def dense_keys(model: nn.Module) -> set[str]:
    return {key for key in model.state_dict() if ".fc1." in key or ".fc2." in key}


def test_the_stand_in_leaves_no_trace() -> None:
    """No other package may believe torchvision is installed: transformers would import it."""
    left = [
        name
        for name, m in sys.modules.items()
        if name.partition(".")[0] == "torchvision" and "stand_in" in type(m).__module__
    ]
    assert not left
    assert not any("stand_in" in type(finder).__module__ for finder in sys.meta_path)


@pytest.mark.parametrize(("layers", "blocks"), [("every_other", [1, 3]), ("last_two", [0, 2]), ([-1], [3])])
def test_gmoe_gives_every_token_what_the_dense_model_gave(layers: Any, blocks: list[int]) -> None:
    model, x = vit(), images()
    expected = model(x)
    assert convert(model, layers=layers, recipe="gmoe", num_experts=4) is model
    assert list(moe_layers(model)) == [f"blocks.{i}.mlp" for i in blocks]
    assert relative_rms(model(x), expected) < EXACT


@pytest.mark.parametrize("gate", [{"type": "top", "k": 2}, {"type": "cosine_top", "k": 2}])
def test_gmoe_rows_of_fixed_k_start_as_the_dense_model(gate: dict[str, Any]) -> None:
    model, x = vit(), images()
    expected = model(x)
    convert(model, layers="last_two", gate_type=gate, num_experts=4)
    assert relative_rms(model(x), expected) < EXACT
    assert relative_rms(model.train()(x), expected) < EXACT  # every token is routed


@pytest.mark.parametrize("split", ["kmeans", "random", "contiguous"])
@pytest.mark.parametrize("repeat", [1, 2])
def test_emoe_with_all_experts_active_is_the_dense_model_and_reverts(split: str, repeat: int) -> None:
    model, x = vit(), images()
    expected, before = model(x), copy.deepcopy(model.state_dict())
    convert(model, layers="last_two", recipe="emoe", split=split, num_experts=8, expert_repeat=repeat, seed=3)
    for layer in moe_layers(model).values():
        with torch.no_grad():
            layer.gates[0].gates.fill_(-2.0)  # below every cosine
    assert relative_rms(model(x), expected) < EXACT
    revert(model)
    assert_equal_states(model, before)


def assert_equal_states(model: nn.Module, before: dict[str, Tensor]) -> None:
    after = model.state_dict()
    assert after.keys() == before.keys()
    differ = [key for key, value in before.items() if not torch.equal(after[key], value)]
    assert not differ


def test_dense_leftovers_are_gone_and_revert_brings_them_back() -> None:
    model, x = vit(), images()
    before, expected, count = copy.deepcopy(model.state_dict()), model(x), sum(p.numel() for p in model.parameters())
    ffn = sum(p.numel() for p in model.blocks[0].mlp.parameters())
    convert(model, layers=[0, 2], num_experts=4)
    assert {key.split(".")[1] for key in dense_keys(model)} == {"1", "3"}
    experts = sum(p.numel() for layer in moe_layers(model).values() for p in layer.experts.parameters())
    gates = sum(p.numel() for layer in moe_layers(model).values() for p in layer.gates.parameters())
    slots = {layer.slots for layer in moe_layers(model).values()}.pop()
    assert experts == 2 * slots * ffn
    assert sum(p.numel() for p in model.parameters()) == count - 2 * ffn + experts + gates
    assert revert(model) is model
    assert_equal_states(model, before)
    assert torch.equal(model(x), expected)


def test_both_dropouts_stay_where_they_were() -> None:
    model = convert(vit(proj_drop_rate=0.25), layers=[1], num_experts=4)
    (layer,) = moe_layers(model).values()
    assert layer.experts.activation_fn.p == 0.25
    assert model.blocks[1].mlp.dropout.p == 0.25
    model = convert(vit(proj_drop_rate=0.25), layers=[1], num_experts=4, moe_dropout=0.0)
    (layer,) = moe_layers(model).values()
    assert layer.experts.activation == "gelu"
    assert model.blocks[1].mlp.dropout.p == 0.25


def test_gradients_reach_every_expert_and_gate() -> None:
    model = convert(vit(), layers="every_other", num_experts=4).train()
    loss = model(images()).square().mean() + aux_loss(model, weight=0.1)
    loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
    for layer in moe_layers(model).values():
        assert layer.experts.batched_fc1_w.grad.any()
        assert layer.gates[0].sim_matrix.grad.any()


def test_checkpointed_blocks_count_the_loss_once() -> None:
    """timm recomputes blocks in the backward: same loss and gradients as without checkpointing."""
    results = []
    for checkpointing in (False, True):
        model = convert(vit(), layers="every_other", num_experts=4).train()
        with torch.no_grad():
            for layer in moe_layers(model).values():
                layer.gates[0].sim_matrix.normal_(generator=torch.Generator().manual_seed(2))
                layer.gates[0].gates.fill_(0.1)
        model.set_grad_checkpointing(checkpointing)
        for layer in moe_layers(model).values():
            layer.begin_record_routing()
        loss = model(images()).square().mean() + aux_loss(model)
        loss.backward()
        tokens = [int(layer.record.tokens) for layer in moe_layers(model).values()]
        results.append((loss.detach(), {n: p.grad for n, p in model.named_parameters()}, tokens))
    (loss, gradients, tokens), (loss_again, gradients_again, tokens_again) = results
    assert torch.equal(loss, loss_again)
    assert tokens == tokens_again == [3 * 17, 3 * 17]
    for name, gradient in gradients.items():
        assert torch.equal(gradient, gradients_again[name]), name


def test_bfloat16_host_keeps_its_dtype() -> None:
    model, x = vit().to(torch.bfloat16), images().to(torch.bfloat16)
    expected, before = model(x), copy.deepcopy(model.state_dict())
    convert(model, layers="all", num_experts=4)
    assert {p.dtype for layer in moe_layers(model).values() for p in layer.experts.parameters()} == {torch.bfloat16}
    assert model(x).dtype == torch.bfloat16
    assert relative_rms(model(x), expected) < 1e-2
    assert_equal_states(revert(model), before)


@pytest.mark.parametrize(
    ("name", "options", "count"),
    [
        ("vit_base_patch16_clip_quickgelu_224", {"depth": 4, "num_heads": 2, "patch_size": 8}, 4),
        ("beit_base_patch16_224", {"depth": 4, "num_heads": 2, "patch_size": 8}, 4),
        ("swin_tiny_patch4_window7_224", {"depths": (1, 1), "num_heads": (2, 2), "window_size": 4}, 2),
        ("mlp_mixer", {"patch_size": 8, "num_blocks": 2}, 4),  # FFNs over tokens and over channels
    ],
)
def test_other_models_of_timm(name: str, options: dict[str, Any], count: int) -> None:
    torch.manual_seed(0)
    make = timm.models.MlpMixer if name == "mlp_mixer" else partial(timm.create_model, name, pretrained=False)
    model = make(embed_dim=32, img_size=32, num_classes=5, **options).eval()
    x = images()
    expected, before = model(x), copy.deepcopy(model.state_dict())
    convert(model, layers="all", num_experts=4)
    assert len(moe_layers(model)) == count
    assert relative_rms(model(x), expected) < EXACT
    assert_equal_states(revert(model), before)


def test_an_ffn_with_a_normalisation_inside_is_named_with_what_is_there() -> None:
    model = timm.create_model("vit_tiny_patch16_224", pretrained=False, depth=2, embed_dim=32, num_heads=2)
    model.blocks[0].mlp.norm = nn.LayerNorm(128)
    with pytest.raises(ValueError, match=r"blocks\.0\.mlp.*Mlp.*fc1 \[128, 32\], fc2 \[32, 128\]"):
        convert(model, layers=["blocks.0.mlp"])

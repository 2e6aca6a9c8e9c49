"""timm models with local weights: the loaded weights compute, and another model's files are refused."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torchvision_stand_in import import_timm

from dynmoe_tutel.experiments.vision.timm_models import build_timm, moe_blocks, read_weights

ARCH = "vit_tiny_patch16_224"


def build(weights: dict[str, Tensor] | None, seed: int = 0, classes: int = 3, size: int = 32) -> nn.Module:
    import_timm()
    return build_timm(ARCH, classes, size, 0.1, weights, seed)


@pytest.fixture(scope="module")
def pretrained() -> dict[str, Tensor]:
    return dict(build(None, 7, 1000).state_dict())


@pytest.mark.parametrize("kind", ["weights.safetensors", "weights.pth"])
def test_all_but_the_head_is_the_files(pretrained: dict[str, Tensor], tmp_path: Path, kind: str) -> None:
    path = tmp_path / kind
    save_file(pretrained, path) if kind.endswith("safetensors") else torch.save({"model": pretrained}, path)
    state = build(read_weights(path)).state_dict()
    assert state["head.weight"].shape == (3, 192)
    assert all(torch.equal(state[name], tensor) for name, tensor in pretrained.items() if not name.startswith("head."))


def test_the_head_and_a_model_without_weights_are_of_the_seed(pretrained: dict[str, Tensor]) -> None:
    state = torch.get_rng_state()
    first, again, other = (build(pretrained, seed) for seed in (0, 0, 1))
    assert torch.equal(first.head.weight, again.head.weight)
    assert not torch.equal(first.head.weight, other.head.weight)
    assert torch.equal(build(None).blocks[3].mlp.fc1.weight, build(None).blocks[3].mlp.fc1.weight)
    assert torch.equal(torch.get_rng_state(), state)


def test_positions_are_resampled_for_another_image_size(pretrained: dict[str, Tensor]) -> None:
    model = build(pretrained, size=64)
    assert model.pos_embed.shape == (1, 17, 192)
    assert torch.equal(model.pos_embed[:, :1], pretrained["pos_embed"][:, :1])


def test_weights_of_another_model_are_refused(pretrained: dict[str, Tensor]) -> None:
    lacking = {name: tensor for name, tensor in pretrained.items() if "blocks.11." not in name}
    with pytest.raises(ValueError, match=r"lack 12 of the 150 of the model, first blocks\.11\.norm1\.weight"):
        build(lacking)
    with pytest.raises(ValueError, match=r"have, beyond it, 1 of .* first blocks\.12\.norm1\.weight"):
        build({**pretrained, "blocks.12.norm1.weight": torch.ones(192)})
    with pytest.raises(
        ValueError, match=r"differ in shape in 1 of .* blocks\.3\.mlp\.fc1\.bias \(\[5\] instead of \[768\]"
    ):
        build({**pretrained, "blocks.3.mlp.fc1.bias": torch.ones(5)})
    with pytest.raises(ValueError, match="lack 150 of the 150"):
        build({"encoder.weight": torch.ones(2)})


def test_a_file_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"weights: .*nowhere\.pth is not a file"):
        read_weights(tmp_path / "nowhere.pth")
    (tmp_path / "broken.safetensors").write_bytes(b"no weights")
    with pytest.raises(ValueError, match=r"weights: .*broken\.safetensors is not a readable"):
        read_weights(tmp_path / "broken.safetensors")


@pytest.mark.parametrize(
    ("arch", "message"),
    [
        ("vit_tiny_patch15", r"must be a model of timm, got 'vit_tiny_patch15'; .*vit_"),
        ("resnet18", "resnet18.*must be a vision transformer"),
    ],
)
def test_other_models_are_refused(arch: str, message: str) -> None:
    import_timm()
    with pytest.raises(ValueError, match=message):
        build_timm(arch, 3, 32, 0.0, None, 0)


def test_a_missing_library_is_named_with_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ImportError, match=r"needs timm, which .*pip install 'dynmoe_tutel\[vision\]'"):
        build_timm(ARCH, 3, 32, 0.0, None, 0)


def test_experts_are_in_gmoes_blocks() -> None:
    assert moe_blocks(12) == (8, 10)
    assert moe_blocks(24) == (20, 22)
    assert moe_blocks(2) == (0,)

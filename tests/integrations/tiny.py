"""A tiny model with MoE layers, and data, for the callbacks' tests."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from helpers import MARGIN, assert_margin
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import Dataset

from dynmoe_tutel import MoELayer

D, TOKENS, ITEMS = 8, 5, 16


def moe_layer(gate: str = "top_any", **gate_options: Any) -> nn.Module:
    slots = {"max_expert_num": 12} if gate == "top_any" else {}
    experts = {"num_experts_per_device": 3, "hidden_size_per_expert": 12, "activation_fn": F.gelu}
    layer = MoELayer({"type": gate, **slots, **gate_options}, D, experts, seeds=(0, 1))
    if gate == "top_any":
        with torch.no_grad():
            layer.gates[0].gates.fill_(0.5)  # some tokens pass no threshold, so experts grow
    return layer


class Net(nn.Module):
    """Maps x [B, TOKENS, D] and labels [B] to loss and logits; two MoE layers with residuals."""

    def __init__(self, gate: str = "top_any", checkpointing: bool | None = None, **gate_options: Any) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.first, self.second = moe_layer(gate, **gate_options), moe_layer(gate, **gate_options)
        self.head = nn.Linear(D, 2)
        with torch.no_grad():
            self.head.weight.normal_(generator=generator)
            self.head.bias.zero_()
        self.reentrant = checkpointing  # None: no checkpointing

    def logits(self, x: Tensor) -> Tensor:
        for layer in (self.first, self.second):
            if self.reentrant is None or not self.training:
                x = x + layer(x)
            else:
                x = x.requires_grad_() if x.is_leaf else x
                x = x + checkpoint(layer, x, use_reentrant=self.reentrant)
        return self.head(x.mean(dim=1))

    def forward(self, x: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        logits = self.logits(x)
        if labels is None:
            return {"logits": logits}
        return {"loss": F.cross_entropy(logits, labels), "logits": logits}


class CountedNet(Net):
    """Divides the summed loss by `num_items_in_batch`, as transformers' models do."""

    def forward(self, x: Tensor, labels: Tensor | None = None, **kwargs: Any) -> dict[str, Tensor]:
        logits = self.logits(x)
        items = kwargs.get("num_items_in_batch")
        if labels is None:
            return {"logits": logits}
        total = F.cross_entropy(logits, labels, reduction="sum")
        return {"loss": total / (len(labels) if items is None else items), "logits": logits}


class Items(Dataset):  # type: ignore[type-arg]
    def __init__(self, items: int = ITEMS, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.x = torch.randn(items, TOKENS, D, generator=generator)
        self.labels = (self.x.mean(dim=(1, 2)) > 0).long()

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"x": self.x[index], "labels": self.labels[index]}


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def expected_gradients(model: nn.Module, weight: float, items: Dataset[Any]) -> dict[str, Tensor]:
    """Gradients of the loss of all items in one batch, plus `weight` times the sum of the layers' l_aux.

    Asserts the margin of every top-any decision, since the callbacks' runs split the batch and round differently.
    """
    model.train().zero_grad()
    watches = [layer.register_forward_pre_hook(_assert_margin) for layer in (model.first, model.second)]
    loss = model(x=items.x, labels=items.labels)["loss"]  # type: ignore[attr-defined]
    (loss + weight * (model.first.l_aux + model.second.l_aux)).backward()  # type: ignore[operator,union-attr]
    for watch in watches:
        watch.remove()
    return gradients(model)


def _assert_margin(layer: nn.Module, arguments: tuple[Tensor]) -> None:
    assert_margin(layer, arguments[0], least=10 * MARGIN)  # the second layer's tokens are rounded too


def assert_same_tensors(found: dict[str, Tensor], expected: dict[str, Tensor], **tolerance: float) -> None:
    """Assert equality, bitwise or within `tolerance`."""
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        if tolerance:
            torch.testing.assert_close(found[name], value, msg=name, **tolerance)
        else:
            assert torch.equal(found[name], value), name

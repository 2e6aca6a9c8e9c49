"""A host with an attention mask, whose blocks run under gradient checkpointing of any kind."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from test_find_ffns import FFN, D
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dynmoe_tutel import MoELayer
from dynmoe_tutel.convert import convert


class Repeat(torch.autograd.Function):
    """Reentrant checkpointing of one's own, as DeepSpeed and Megatron have it."""

    @staticmethod
    def forward(ctx: Any, function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        ctx.function = function
        ctx.save_for_backward(x)
        return function(x)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[None, Tensor | None]:  # type: ignore[override]
        x = ctx.saved_tensors[0].detach().requires_grad_()
        with torch.enable_grad():
            y = ctx.function(x)
        y.backward(dy)
        return None, x.grad


class Block(nn.Module):
    """Mixes the tokens, so that what padding does is seen by all."""

    def __init__(self) -> None:
        super().__init__()
        self.mix, self.norm, self.ffn = nn.Linear(D, D), nn.LayerNorm(D), FFN()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.mix(x).mean(dim=1, keepdim=True).tanh()
        return x + self.ffn(self.norm(x)).sin()  # what is saved last comes after the layer


class Host(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, D)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.reentrant: bool | str | None = None
        self.regions, self.pack, self.fail = "each", lambda y: y, False  # type: ignore[var-annotated]

    def region(self, function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        if self.reentrant is None:
            return function(x)
        if self.reentrant == "own":
            return Repeat.apply(function, x)  # type: ignore[no-any-return,no-untyped-call]
        return checkpoint(function, x, use_reentrant=self.reentrant)  # type: ignore[return-value]

    def run(self, x: Tensor, inner: bool) -> Tensor:
        for block in self.blocks:
            x = self.region(block, x) if inner else block(x)
        return x

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Any:
        x = self.embed(input_ids)
        if self.regions == "each":
            x = self.run(x, True)
        else:
            x = self.region(lambda x: self.run(x, self.regions == "nested"), x)
        if self.fail:
            raise RuntimeError("out of memory")
        return self.pack(x)


def host(reentrant: bool | str | None = None, regions: str = "each") -> Host:
    torch.manual_seed(0)
    model = convert(Host(), "all", num_experts=4, seeds=(1, 2), aux_losses={"load_balance": 1.0})
    assert isinstance(model, Host)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for layer in layers(model):
            for parameter in layer.experts.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.3)
    model.reentrant, model.regions = reentrant, regions
    return model


def layers(model: nn.Module) -> list[MoELayer]:
    return [module for module in model.modules() if isinstance(module, MoELayer)]


def batch(seed: int, B: int = 2, L: int = 6) -> Tensor:
    return torch.randint(50, (B, L), generator=torch.Generator().manual_seed(seed))


def mask(*lengths: int, L: int = 6) -> Tensor:
    return (torch.arange(L) < torch.tensor(lengths).unsqueeze(1)).long()


def gradients(model: nn.Module, loss: Tensor) -> list[Tensor]:
    model.zero_grad()
    loss.backward()
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]

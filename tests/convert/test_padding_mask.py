"""A converted model's MoE layers read every kind of attention mask correctly."""

from __future__ import annotations

import pytest
import torch
from test_find_ffns import FFN, D
from torch import Tensor, nn

from dynmoe_tutel import MoELayer
from dynmoe_tutel.convert import convert

KEPT = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
LOWEST = torch.finfo(torch.float32).min


class Host(nn.Module):
    def __init__(self, flat: bool = False) -> None:
        super().__init__()
        self.ffn, self.flat = FFN(), flat

    def forward(self, inputs_embeds: Tensor, attention_mask: Tensor | None = None, fail: bool = False) -> Tensor:
        y = self.ffn(inputs_embeds.reshape(-1, D) if self.flat else inputs_embeds).view_as(inputs_embeds)
        if fail:
            raise RuntimeError("out of memory")
        return inputs_embeds + y


def tokens(B: int = 2, L: int = 5) -> Tensor:
    return torch.randn(B, L, D, generator=torch.Generator().manual_seed(0))


def converted(flat: bool = False) -> tuple[Host, MoELayer]:
    model = Host(flat)
    convert(model, "all", num_experts=4)
    layer = model.get_submodule("ffn")
    assert isinstance(layer, MoELayer)
    layer.begin_record_routing()
    return model, layer


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize(
    ("mask", "real"),
    [
        *[(KEPT.to(dtype), 8) for dtype in (torch.bool, torch.uint8, torch.int32, torch.float16, torch.float64)],
        (torch.where(KEPT == 1, 0.0, -torch.inf), 8),  # added to the scores
        (torch.where(KEPT == 1, 0.0, LOWEST).bfloat16(), 8),
        (torch.zeros(2, 5), 10),  # added to the scores, and nothing is padding
        (torch.zeros(2, 5, dtype=torch.long), 0),
        (KEPT[:1], 6),  # one row for all
        (torch.ones(2, 1, 5, 5), 10),  # tells which token sees which
    ],
)
def test_a_mask_is_read_as_what_it_is(mask: Tensor, real: int, flat: bool) -> None:
    model, layer = converted(flat)
    model(tokens(), mask)
    assert int(layer.record.tokens) == real


@pytest.mark.parametrize("shape", [(0, 5), (2, 0)])
def test_batches_without_tokens(shape: tuple[int, int]) -> None:
    model, layer = converted()
    model(tokens(*shape), torch.ones(shape))
    assert int(layer.record.tokens) == 0


def test_a_forward_that_failed_leaves_no_mask() -> None:
    model, layer = converted()
    with pytest.raises(RuntimeError, match="out of memory"):
        model(tokens(), KEPT, fail=True)
    before = int(layer.record.tokens)
    layer(tokens())
    assert int(layer.record.tokens) - before == 10

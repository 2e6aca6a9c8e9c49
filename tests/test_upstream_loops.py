"""Training loops in the style of upstream's experiments, on BERT and ViT of `transformers` with random weights.

Upstream's constructor call turns the model's FFN into an MoE layer. A window covers a part of each epoch, and
`adaptive_update_experts()` ends it; growth and pruning match the oracle on the window's tokens.
"""

from __future__ import annotations

import types
from importlib.util import find_spec
from typing import Any

import oracle
import pytest
import torch
from helpers import MARGIN, oracle_gate
from torch import Tensor, nn

transformers = pytest.importorskip("transformers", reason="transformers is not installed: pip install '.[test]'")

SLOTS, ACTIVE, D, H = 6, 2, 32, 64
TUTEL = pytest.param("tutel", marks=pytest.mark.skipif(find_spec("tutel") is None, reason="Tutel is not installed"))


@pytest.fixture(params=["dynmoe_tutel", TUTEL])
def tutel_moe(request: pytest.FixtureRequest) -> Any:
    """The module to import as `tutel_moe`: this package's, or Tutel's with the gates registered."""
    if request.param == "dynmoe_tutel":
        from dynmoe_tutel import moe

        yield moe
        return
    from dynmoe_tutel import tutel_backend

    tutel_backend.register()
    from tutel import moe

    yield moe
    tutel_backend.unregister()


class DropoutGelu(nn.Module):
    """Upstream's activation of the language experiments."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self.dropout = nn.Dropout(p)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.gelu(self.dropout(x))


def moe_of(moe: Any, fc1: nn.Linear, fc2: nn.Linear, gate: str) -> Any:
    """A layer of full copies as in `bert_to_MoE` (without its divided bias)."""
    layer = moe.moe_layer(
        gate_type={"type": gate, "max_expert_num": SLOTS, "fp32_gate": True, "adaptive_experts": True},
        experts={
            "type": "ffn",
            "count_per_node": ACTIVE,
            "hidden_size_per_expert": H,
            "activation_fn": DropoutGelu(0.1),
        },
        model_dim=D,
        batch_prioritized_routing=True,
        is_gshard_loss=False,
        one_score_gate=False,
        normalize_one_score_gate=False,
        update_momentum=0.0,
    )
    for slot in range(SLOTS):
        layer.experts.batched_fc1_w.data[slot].copy_(fc1.weight.data)
        layer.experts.batched_fc1_bias.data[slot].copy_(fc1.bias.data)
        layer.experts.batched_fc2_w.data[slot].copy_(fc2.weight.data.t())
        layer.experts.batched_fc2_bias.data[slot].copy_(fc2.bias.data)
    return layer


def bert(moe: Any, gate: str) -> tuple[nn.Module, list[Any], list[dict[str, Tensor]]]:
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=D, num_hidden_layers=3, num_attention_heads=2, intermediate_size=H, num_labels=2
    )
    model = transformers.BertForSequenceClassification(config)

    def feed_forward_chunk(self: Any, attention_output: Tensor) -> Tensor:
        y = self.output.dropout(self.mlp(attention_output))
        return self.output.LayerNorm(y + attention_output)

    layers = []
    for i in (1, 2):
        block = model.bert.encoder.layer[i]
        block.mlp = moe_of(moe, block.intermediate.dense, block.output.dense, gate)
        block.feed_forward_chunk = types.MethodType(feed_forward_chunk, block)
        layers.append(block.mlp)
    generator = torch.Generator().manual_seed(0)
    batches = []
    for _ in range(16):
        tokens = torch.randint(2, 50, (8, 10), generator=generator)
        batches.append({"input_ids": tokens, "labels": (tokens[:, 0] > 25).long()})
    return model, layers, batches


def vit(moe: Any, gate: str) -> tuple[nn.Module, list[Any], list[dict[str, Tensor]]]:
    config = transformers.ViTConfig(
        image_size=8, patch_size=4, hidden_size=D, num_hidden_layers=3, num_attention_heads=2, intermediate_size=H
    )
    model = transformers.ViTForImageClassification(config)
    layers = []
    for i in (0, 2):
        block = model.vit.layers[i]
        block.mlp = moe_of(moe, block.mlp.fc1, block.mlp.fc2, gate)
        layers.append(block.mlp)
    generator = torch.Generator().manual_seed(0)
    batches = []
    for _ in range(16):
        pixels = torch.randn(8, 3, 8, 8, generator=generator)
        batches.append({"pixel_values": pixels, "labels": (pixels.mean(dim=(1, 2, 3)) > 0).long()})
    return model, layers, batches


@pytest.mark.parametrize("gate", ["gated_multi_gate", "gated_multi_gate_t"])
@pytest.mark.parametrize("build", [bert, vit], ids=["BERT", "ViT"])
def test_experts_change_as_the_oracle_says(build: Any, gate: str, tutel_moe: Any) -> None:
    """Upstream's schedule of the language experiments, for two epochs: the window opens in the middle, the update comes
    after the optimizer's step at three quarters; an evaluation in between is not recorded."""
    torch.manual_seed(0)
    model, layers, batches = build(tutel_moe, gate)
    seen: dict[int, list[tuple[Tensor, oracle.Gate]]] = {i: [] for i in range(len(layers))}

    def watch(i: int) -> Any:
        def hook(module: Any, arguments: tuple[Tensor]) -> None:
            if module.record_routing and module.training:
                seen[i].append((arguments[0].detach().reshape(-1, D).double(), oracle_gate(module.gates[0])))

        return hook

    for i, layer in enumerate(layers):
        layer.register_forward_pre_hook(watch(i))
        with torch.no_grad():  # so that some tokens pass no threshold
            layer.gates[0].gates.fill_(0.12)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    counts, losses = [[layer.num_global_experts for layer in layers]], []
    for _ in range(2):
        model.train()
        for step, batch in enumerate(batches):
            if step == len(batches) // 2:
                for i, layer in enumerate(layers):
                    layer.begin_record_routing()
                    seen[i].clear()
                model.eval()
                model(**batches[0])  # the window does not record this
                model.train()
            loss = model(**batch).loss
            l_aux = sum(layer.l_aux for layer in layers)
            optimizer.zero_grad()
            (loss + 0.01 * l_aux).backward()
            assert all(p.grad is not None for layer in layers for p in layer.parameters())
            optimizer.step()
            losses.append(float(loss.detach()))
            if step == 3 * len(batches) // 4:
                for i, layer in enumerate(layers):
                    check_update(layer, seen[i])
                counts.append([layer.num_global_experts for layer in layers])
                for layer in layers:
                    layer.end_record_routing()
    assert counts[1] != counts[0]
    assert all(torch.tensor(losses).isfinite())
    state = model.state_dict()
    name = next(key for key in state if key.endswith("_num_global_experts") and "_max" not in key)
    assert int(state[name]) == counts[-1][0]


def check_update(layer: Any, window: list[tuple[Tensor, oracle.Gate]]) -> None:
    """One update against the rule in the design, section 3, on the oracle's assignments of the window's tokens.

    The window follows many training steps, which no other processor repeats exactly: for a decision within the design's
    margin, the layer's own is taken."""
    before, experts = oracle_gate(layer.gates[0]), layer.experts.batched_fc1_w.detach().clone()
    count_E, lost_D, lost = torch.zeros(SLOTS, dtype=torch.int64), torch.zeros(D, dtype=torch.float64), 0
    doubt_E = torch.zeros(SLOTS, dtype=torch.int64)
    for x_TD, gate in window:
        assigned_TE = oracle.assignments(x_TD, gate)
        doubt_E += ((oracle.cosines(x_TD, gate) - gate.G_E).abs() < MARGIN).sum(dim=0)
        count_E += assigned_TE.sum(dim=0)
        lost_D += x_TD[~assigned_TE.any(dim=1)].sum(dim=0)
        lost += int((~assigned_TE.any(dim=1)).sum())
    assert int(layer.record.tokens) == sum(len(x_TD) for x_TD, _ in window) > 0
    recorded_E = layer.get_routing_records()
    assert ((recorded_E - count_E).abs() <= doubt_E).all()
    if doubt_E.any():
        count_E, lost_D = recorded_E, layer.record.unrouted_sum.double()
        lost = int(lost_D.any())

    changes = layer.adaptive_update_experts()
    kept = [e for e in before.active if count_E[e] > 0] or [before.active[0]]
    free = [e for e in range(SLOTS) if e not in kept]
    grown = free[:1] if lost else []
    assert [c.slot for c in changes if c.action == "pruned"] == [e for e in before.active if e not in kept]
    assert [c.slot for c in changes if c.action == "grown"] == grown
    after = oracle_gate(layer.gates[0])
    assert list(after.active) == sorted([*kept, *grown])
    for slot in grown:
        assert torch.allclose(after.w_DE[:, slot], oracle.unit(lost_D), atol=1e-5)
        assert float(after.G_E[slot]) == 0
        nearest = max(kept, key=lambda e: float(oracle.unit(before.w_DE[:, e]) @ lost_D))
        assert torch.equal(layer.experts.batched_fc1_w[slot], experts[nearest])

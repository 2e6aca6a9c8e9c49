"""PEFT around a model with MoE layers: LoRA on the router's maps and on stacked tensors, merged, saved and grown."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import FP32, relative_rms
from torch import Tensor, nn

from dynmoe_tutel import ExpertController, MoELayer
from dynmoe_tutel.adaptive.policy import Decision

peft = pytest.importorskip("peft")

D, H, E, START, RANK = 8, 6, 8, 4, 2
STACKED = {"ffn": ("batched_fc1_w", "batched_fc2_w"), "llama_ffn": ("W_fc1", "W_fc3")}
kinds = pytest.mark.parametrize("kind", list(STACKED))


class Net(nn.Module):
    def __init__(self, kind: str = "ffn", gate: str = "top_any") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner = nn.Linear(D, D)
        slots = {"max_expert_num": E} if gate == "top_any" else {}
        experts = {"type": kind, "num_experts_per_device": START, "hidden_size_per_expert": H}
        self.moe = MoELayer({"type": gate, **slots}, D, experts, seeds=(0, 0))

    def forward(self, x: Tensor) -> Any:
        return self.moe(self.inner(x))


class Batched(nn.Module):
    """Tutel's kind."""

    def __init__(self, num_experts_per_device: int) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(num_experts_per_device, D, D))

    def forward(self, x: Tensor, ctx: Any) -> Tensor:
        return torch.bmm(x, self.w)


def tokens() -> Tensor:
    return torch.randn(64, D, generator=torch.Generator().manual_seed(0))


def adapted(net: Net, *names: str, **options: Any) -> Any:
    torch.manual_seed(1)
    parameters = [f"moe.{name}" for name in names]
    return peft.get_peft_model(net, peft.LoraConfig(r=RANK, target_parameters=parameters, **options))


def of_experts(kind: str) -> list[str]:
    return [f"experts.{name}" for name in STACKED[kind]]


def trained(model: Any) -> Any:
    """After two steps, so that A and B have left their start."""
    optimizer = torch.optim.Adam((p for p in model.parameters() if p.requires_grad), lr=0.05)
    for _ in range(2):
        model(tokens()).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def layer_of(model: Any) -> MoELayer:
    return next(m for m in model.modules() if isinstance(m, MoELayer))


def values(layer: MoELayer, *slots: int) -> list[list[Tensor]]:
    """Each slot's entries in weights and adapters."""
    return [[p.detach()[i].clone() for p, i in layer.expert_slots.slot_parameters(slot)] for slot in slots]


@pytest.mark.parametrize(
    "case",
    [("ffn", *of_experts("ffn")), ("llama_ffn", *of_experts("llama_ffn")), ("ffn", "gates.0.sim_matrix")],
    ids=str,
)
class TestStackedTensors:
    def test_the_output_stays_adapters_learn_and_merge(self, case: tuple[str, ...]) -> None:
        kind, *names = case
        net, x_TD = Net(kind), tokens()
        before, base = net(x_TD).detach(), net.eval()(x_TD).detach()
        model = adapted(net.train(), *names)
        assert relative_rms(model(x_TD), before) < FP32
        model(x_TD).square().sum().backward()
        learns = {n: p for n, p in model.named_parameters() if p.requires_grad}
        assert len(learns) == 2 * len(names)
        assert all(p.grad is not None and (p.grad.any() or "lora_A" in n) for n, p in learns.items())
        model = trained(model).eval()
        after = model(x_TD)
        assert relative_rms(after, before) > 0.05
        with model.disable_adapter():
            assert relative_rms(model(x_TD), base) < FP32
        merged = model.merge_and_unload()
        assert type(merged.moe.experts).__name__ in ("FFNExperts", "LlamaFFNExperts")
        assert relative_rms(merged(x_TD), after) < 1e-5

    def test_an_adapter_is_saved_and_loaded(self, case: tuple[str, ...], tmp_path: Path) -> None:
        kind, *names = case
        model = trained(adapted(Net(kind), *names)).eval()
        model.save_pretrained(tmp_path)
        again = peft.PeftModel.from_pretrained(Net(kind), tmp_path).eval()
        assert torch.equal(again(tokens()), model(tokens()))


@pytest.mark.parametrize(("gate", "name"), [("top", "wg"), ("cosine_top", "cosine_projector")])
def test_lora_on_a_router(gate: str, name: str) -> None:
    net, x_TD = Net(gate=gate), tokens()
    before = net(x_TD).detach()
    model = peft.get_peft_model(net, peft.LoraConfig(r=RANK, target_modules=[name]))
    assert torch.equal(model(x_TD), before)
    model = trained(model).eval()
    after = model(x_TD)
    assert not torch.equal(after, before)
    assert relative_rms(model.merge_and_unload()(x_TD), after) < 1e-5


class TestGrowth:
    """LoRA on the experts, and the gate trained whole: what growth writes besides the weights."""

    def model(self, kind: str = "ffn") -> Any:
        return adapted(Net(kind), *of_experts(kind), modules_to_save=["moe.gates.0"])

    @kinds
    def test_a_grown_slot_is_its_source_with_its_adapters(self, kind: str) -> None:
        model = trained(self.model(kind))
        layer = layer_of(model)
        w_D = layer.held_gates[0].sim_matrix.detach()[:, 1] + 0.01
        others = [slot for slot in range(E) if slot != START]
        before, (source,) = values(layer, *others), values(layer, 1)
        assert layer.update_experts(Decision(grow=((w_D, "test"),)))[0].slot == START
        (grown,) = values(layer, START)
        assert len(grown) == len(source) == (4 if kind == "ffn" else 3) + 2 * len(STACKED[kind])
        assert all(map(torch.equal, grown, source))
        for was, now in zip(before, values(layer, *others), strict=True):
            assert all(map(torch.equal, was, now))

    @kinds
    def test_the_merged_weights_of_a_grown_slot_are_its_source_s(self, kind: str) -> None:
        """An independent check of which rows are a slot's: by PEFT's own product."""
        model = trained(self.model(kind))
        layer = layer_of(model)
        layer.update_experts(Decision(grow=((layer.held_gates[0].sim_matrix.detach()[:, 1] + 0.01, "test"),)))
        merged = model.merge_and_unload().moe
        for name in STACKED[kind]:
            weight = getattr(merged.experts, name)
            assert torch.equal(weight[START], weight[1])
            assert not torch.equal(weight[0], weight[1])

    def test_fresh_starts_like_peft(self) -> None:
        layer = layer_of(trained(self.model()))
        w_D = torch.ones(D)
        layer.update_experts(Decision(grow=((w_D, "test"),)), init="fresh", generator=torch.Generator().manual_seed(0))
        adapters = values(layer, START)[0][4:]
        assert all(a.any() and a.abs().max() <= a.shape[1] ** -0.5 for a in adapters[::2])
        assert not any(b.any() for b in adapters[1::2])

    def test_the_controller_grows_the_trained_gate_and_resets_moments(self) -> None:
        model = self.model()
        layer = layer_of(model)
        gate = layer.gates[0].modules_to_save["default"]
        optimizer = torch.optim.Adam((p for p in model.parameters() if p.requires_grad), lr=0.01)
        controller = ExpertController(model, optimizer, schedule=2)
        for _ in range(2):
            model(tokens()).square().sum().backward()
            optimizer.step()
            events = controller.step()
        grown = [event.slot for event in events if event.action == "grown"]
        assert len(grown) == 1
        assert gate.experts_mask[grown[0]] == 1
        assert layer.gates[0].original_module.experts_mask[grown[0]] == 0
        entries = [(p, i) for p, i in layer.slot_parameters(grown[0]) if p in optimizer.state]
        assert len(entries) == 2 + 4
        for parameter, index in entries:
            moments = optimizer.state[parameter]["exp_avg"]
            assert not moments[index].any()
            assert moments.any()
        assert model(tokens()).isfinite().all()

    def test_a_batched_module_inside(self) -> None:
        net = Net()
        net.moe = MoELayer(
            {"type": "top_any", "max_expert_num": E},
            D,
            {"type": "custom", "module": Batched, "num_experts_per_device": START},
        )
        model = trained(adapted(net, "experts.module.w"))
        layer = layer_of(model)
        slot = layer.update_experts(Decision(grow=((layer.gates[0].sim_matrix.detach()[:, 1] + 0.01, "test"),)))[0].slot
        source, grown = values(layer, 1, slot)
        assert len(grown) == 3
        assert all(map(torch.equal, source, grown))
        weight = model.merge_and_unload().moe.experts.module.w
        assert torch.equal(weight[slot], weight[1])

    def test_the_mean_of_adapters_is_refused(self) -> None:
        with pytest.raises(ValueError, match="init = 'mean' with LoRA on the experts"):
            ExpertController(self.model(), torch.optim.SGD([torch.zeros(1)], lr=0.1), init="mean")

    @pytest.mark.parametrize("name", ["gates.0.sim_matrix", "experts.batched_fc1_bias"])
    def test_lora_on_what_has_no_rows_of_a_slot_is_refused(self, name: str) -> None:
        model = adapted(Net(), name)
        with pytest.raises(ValueError, match=r"wrapped by a ParamWrapper with the parameter lora_A"):
            ExpertController(model, torch.optim.SGD([torch.zeros(1)], lr=0.1))
        assert model(tokens()).isfinite().all()

"""Every feature of Tutel in the registered layer, packed and padded, and custom experts."""

from __future__ import annotations

import copy
import logging
from typing import Any

import helpers
import pytest
import torch
from helpers import FP32, TRAINED_MARGIN, assert_margin, make_case, relative_rms
from torch import Tensor, nn
from tutel_twin import LAYOUTS, D, E, H, tutel_twin

from dynmoe_tutel import ExpertController
from dynmoe_tutel.adaptive import Budgets

tutel = pytest.importorskip("tutel", reason="stock Tutel is not installed: its README says how")
pytestmark = pytest.mark.usefixtures("registered")


@pytest.mark.parametrize("layout", LAYOUTS)
class TestFeatures:
    def test_result_and_scan_functions(self, layout: str) -> None:
        case, seen = make_case(), []

        def scan(name: str, parameter: nn.Parameter) -> None:
            seen.append(name)
            parameter.skip_allreduce = True  # type: ignore[attr-defined]

        def result(y: Tensor) -> tuple[Tensor, Tensor]:
            return y * 2, y.l_aux  # type: ignore[attr-defined]

        layer = tutel_twin(case.layer, layout=layout, scan_expert_func=scan, result_func=result)
        y, l_aux = layer(case.x)
        assert torch.equal(y, tutel_twin(case.layer, layout=layout)(case.x) * 2)
        assert torch.equal(l_aux, layer.l_aux)
        assert sorted(seen) == sorted(name for name, _ in layer.experts.named_parameters())
        assert all(p.skip_allreduce and p._tutel_expert for p in layer.experts.parameters())

    def test_reserve_dims(self, layout: str) -> None:
        case = make_case()
        layer = tutel_twin(case.layer, layout=layout)
        x = case.x.view(4, 6, 2, D // 2)
        expected = layer(case.x).view(4, 6, 2, D // 2)
        if layout == "packed":
            assert torch.equal(layer(x, reserve_dims=2), expected)
            return
        inner = layer.experts
        layer.experts = _Flat(inner)
        assert torch.equal(layer(x, reserve_dims=2), expected)

    def test_autocast(self, layout: str) -> None:
        case = make_case()
        layer = tutel_twin(case.layer, layout=layout)
        with torch.autocast("cpu", torch.bfloat16):
            y = layer(case.x)
            routing = layer.route(case.x)
        assert y.dtype == torch.float32
        assert torch.equal(routing.bits, layer.route(case.x).bits)
        assert 1e-4 < relative_rms(y, case.expected_output(True)) < 1e-2

    def test_environment(self, layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
        case = make_case(T=40)
        monkeypatch.setenv("CAP_FACTOR", "0.5")
        layer = tutel_twin(case.layer, layout=layout)
        layer(case.x)
        assert int(layer.dropped_assignments) > 0
        monkeypatch.delenv("CAP_FACTOR")
        monkeypatch.setenv("SKIP_EXPERT", "1")
        layer = tutel_twin(case.layer, layout=layout)
        routed_T1 = (layer.route(case.x).k_per_token > 0).unsqueeze(1)
        assert torch.allclose(layer(case.x), case.x * routed_T1, atol=1e-6)
        monkeypatch.delenv("SKIP_EXPERT")
        monkeypatch.setenv("SKIP_MOE", "1")
        y = tutel_twin(case.layer, layout=layout)(case.x)
        assert torch.equal(y, case.x)
        assert y.l_aux is None

    def test_parameters_and_counts(self, layout: str) -> None:
        layer = tutel_twin(make_case(E=7, active=[0, 1, 2]).layer, layout=layout)
        gate = dict(layer.get_parameter_iterator("gate"))
        experts = dict(layer.get_parameter_iterator("local_experts"))
        assert set(gate) == {"0.sim_matrix", "0.gates"}
        assert set(experts) == set(helpers.FFN)
        assert (layer.num_global_experts, layer.max_num_global_experts) == (3, 7)
        assert (layer.num_local_experts, layer.max_num_local_experts, layer.world_size) == (3, 7, 1)
        cls = tutel.moe.moe_layer
        assert [cls.global_expert_count(n) for n in (3, 1, -1)] == [3, 1, 1]

    def test_seeds(self, layout: str) -> None:
        """Seeds alone determine gates and experts; only the third seed sets the global state."""
        from tutel import moe

        def build(seeds: Any) -> Any:
            return moe.moe_layer(
                gate_type={"type": "top_any", "max_expert_num": 4},
                experts={"num_experts_per_device": 2, "hidden_size_per_expert": H, "type": "ffn"},
                model_dim=D,
                seeds=seeds,
                layout=layout,
            )

        torch.manual_seed(0)
        first = build((1, 2))
        state = torch.get_rng_state()
        torch.manual_seed(99)
        second, third = build((1, 2)), build((1, 3, 7))
        after = torch.randn(3)
        torch.manual_seed(7)
        assert torch.equal(after, torch.randn(3))
        torch.manual_seed(0)
        assert torch.equal(torch.get_rng_state(), state)
        for name, value in first.state_dict().items():
            assert torch.equal(value, second.state_dict()[name]), name
        assert torch.equal(first.gates[0].sim_matrix, third.gates[0].sim_matrix)
        assert not torch.equal(first.experts.batched_fc1_w, third.experts.batched_fc1_w)

    def test_growing_and_pruning(self, layout: str) -> None:
        """The same record, events and grown copy as in the native layer."""
        case = make_case(T=60, E=6, active=[0, 1, 3], G=0.2)
        with torch.no_grad():
            case.layer.gates[0].gates[3] = 5.0  # never activated
        layers = [case.layer, tutel_twin(case.layer, layout=layout)]
        for layer in layers:
            layer.begin_record_routing()
            layer(case.x)
        assert torch.equal(layers[0].get_routing_records(), layers[1].get_routing_records())
        events = [[str(change) for change in layer.adaptive_update_experts()] for layer in layers]
        assert events[0] == events[1]
        assert [text.split()[-1] for text in events[0]] != []
        native = layers[0].state_dict()
        for name, value in layers[1].state_dict().items():
            assert torch.equal(value.reshape(native[name].shape), native[name]), name
        assert layers[1].num_global_experts == layers[0].num_global_experts

    @pytest.mark.parametrize("init", ["nearest", "mean", "fresh", "keep"])
    def test_the_controller(self, layout: str, init: str) -> None:
        case = make_case(T=60, E=4, active=[0, 1], G=0.2)
        layer = tutel_twin(case.layer, layout=layout)
        optimizer = torch.optim.AdamW(layer.parameters(), lr=1e-3)
        controller = ExpertController(layer, optimizer, 2, init=init)
        events = []
        for _ in range(4):
            optimizer.zero_grad()
            (layer(case.x) * case.dy).sum().backward()
            optimizer.step()
            moments = optimizer.state[layer.experts.batched_fc1_w]["exp_avg"]
            for event in controller.step():
                assert not moments[event.slot].any()
                assert moments[0].any()
                events.append(event.action)
        assert "grown" in events

    def test_twenty_steps_follow_the_native_layer(self, layout: str) -> None:
        """No decision of any step is in doubt: one differently routed token would make the trainings diverge."""
        case = make_case(T=60, seed=57)
        losses = []
        for layer in (copy.deepcopy(case.layer), tutel_twin(case.layer, layout=layout)):
            optimizer = torch.optim.AdamW(layer.parameters(), lr=1e-2)
            curve = []
            for _ in range(20):
                optimizer.zero_grad()
                assert_margin(layer, case.x, least=TRAINED_MARGIN)
                y = layer(case.x)
                loss = (y - case.dy).square().mean() + 0.01 * y.l_aux
                loss.backward()
                optimizer.step()
                curve.append(loss.item())
            losses.append(curve)
        assert losses[0][-1] < 0.9 * losses[0][0]
        assert losses[1] == pytest.approx(losses[0], rel=2e-5)

    def test_deepcopy_and_state_dict(self, layout: str) -> None:
        case = make_case()
        layer = tutel_twin(case.layer, layout=layout)
        twin = copy.deepcopy(layer)
        assert torch.equal(twin(case.x), layer(case.x))
        assert list(layer.state_dict()) == [
            "_num_global_experts",
            "_max_num_global_experts",
            "gates.0.sim_matrix",
            "gates.0.gates",
            "gates.0.experts_mask",
            *(f"experts.{name}" for name in ("batched_fc1_w", "batched_fc2_w", "batched_fc1_bias", "batched_fc2_bias")),
        ]


class _Flat(nn.Module):
    """Experts that see the reserved dimensions."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor, ctx: Any) -> Tensor:
        assert x.shape[2:] == (2, D // 2)
        return self.inner(x.flatten(2), ctx).view(x.shape)


class OptionsExpert(nn.Module):
    """Tutel's custom expert with any options, as in its example."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        assert set(options) == {"model_dim", "num_experts_per_device", "sharded_count", "scale"}
        self.W = nn.Parameter(torch.randn(options["num_experts_per_device"], D, D) * options["scale"])

    def forward(self, x: Tensor, ctx: Any) -> Tensor:
        assert (ctx.sharded_count, ctx.megablocks_size, ctx.num_global_experts) == (1, 0, E)
        return torch.relu(x @ self.W)


class OldExpert(nn.Module):
    """Uses the argument's old name, and a flat parameter as in Tutel's sharded example."""

    def __init__(self, model_dim: int, local_experts: int, sharded_count: int, my_config: str) -> None:
        super().__init__()
        assert my_config == "mine"
        self.shape = (local_experts, model_dim, model_dim)
        self.W = nn.Parameter(torch.randn(local_experts * model_dim * model_dim // sharded_count) * 0.3)

    def forward(self, x: Tensor, ctx: Any) -> Tensor:
        return torch.relu(x @ self.W.view(self.shape))


@pytest.mark.parametrize(
    ("module", "extra"), [(OptionsExpert, {"scale": 0.3}), (OldExpert, {"my_config": "mine"})], ids=["options", "old"]
)
def test_custom_experts(module: Any, extra: dict) -> None:
    from tutel import moe

    torch.manual_seed(0)
    case = make_case()
    layer = moe.moe_layer(
        gate_type={"type": "top_any", "max_expert_num": E},
        experts={"type": "custom", "module": module, "num_experts_per_device": 3, **extra},
        model_dim=D,
    )
    assert layer.layout == "padded"
    assert "experts.W" in layer.state_dict()
    layer.gates[0].load_state_dict(case.layer.gates[0].state_dict())
    W = layer.experts.W.view(E, D, D)
    routing = layer.route(case.x)
    share_TE = routing.assigned / routing.k_per_token.clamp(min=1).unsqueeze(1)
    expected = torch.einsum("te,ted->td", share_TE, torch.relu(torch.einsum("td,edf->tef", case.x, W)))
    assert relative_rms(layer(case.x), expected) < FP32
    layer.gates[0].experts_mask[4] = 0
    layer.begin_record_routing()
    layer(-10 * case.x[:2].sum(0, keepdim=True).repeat(8, 1))
    changes = layer.adaptive_update_experts()
    if [change.action for change in changes].count("grown"):
        slot = next(change.slot for change in changes if change.action == "grown")
        assert any(torch.equal(W[slot], W[e]) for e in range(E) if e != slot)


def test_nothing_is_printed(capsys: pytest.CaptureFixture, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    for layout in LAYOUTS:
        layer = tutel_twin(make_case(T=60, E=6, active=[0, 1, 3], G=0.2).layer, layout=layout)
        layer.begin_record_routing()
        layer(torch.randn(9, D))
        layer.adaptive_update_experts()
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("k", [{"max_k": 2}, {"shift": 0.1}, {"shift": 0.1, "max_k": 2}], ids=str)
def test_a_budget(layout: str, k: dict[str, Any]) -> None:
    """The layer has the numbers of this package's own, its own `max_k` in a call, and is moved by the same steps."""
    case = make_case(**k)
    given = {**({"target_k": 1.0} if "shift" in k else {}), **({"max_k": 2} if "max_k" in k else {})}
    gate = {"type": "top_any", "max_expert_num": E, "budget": given}
    experts = {
        "type": "ffn",
        "num_experts_per_device": E,
        "hidden_size_per_expert": H,
        "activation_fn": torch.nn.functional.gelu,
    }
    layer = tutel.moe.moe_layer(gate, D, experts, layout=layout)
    layer.load_state_dict(case.layer.state_dict())
    assert layer.layout == layout
    for max_k in (None, 1):
        assert relative_rms(layer(case.x, max_k=max_k), case.layer(case.x, max_k=max_k)) < FP32
    if "shift" in k:
        for each in (layer, case.layer):
            Budgets(each).step()
        assert torch.equal(layer.gates[0].budget_shift, case.layer.gates[0].budget_shift)
        assert float(layer.gates[0].budget_shift) != pytest.approx(0.1)


def test_tutels_own_gates_have_no_budget() -> None:
    experts = {"type": "ffn", "num_experts_per_device": E, "hidden_size_per_expert": H}
    layer = tutel.moe.moe_layer({"type": "top", "k": 2}, D, experts)
    with pytest.raises(TypeError, match="max_k"):
        layer(torch.randn(4, D), max_k=1)

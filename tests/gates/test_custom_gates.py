"""Gates of one's own: modules that give logits or any assignment, against the gate of type top and plain torch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from gate_case import D, check_against, layer_with, tokens
from torch import Tensor, nn

from dynmoe_tutel import Routing


class Logits(nn.Module):
    """A linear gate like Tutel's custom gates."""

    def __init__(self, model_dim: int, num_global_experts: int, **given: Any) -> None:
        super().__init__()
        self.wg = nn.Linear(model_dim, num_global_experts, bias=False)
        self.given = given

    def forward(self, x_TD: Tensor) -> Tensor:
        return self.wg(x_TD)


class Chosen(nn.Module):
    """Routes by a map [T, E]; learns the weights, if given."""

    def __init__(self, assigned_TE: Tensor, weights_TE: Tensor | None = None) -> None:
        super().__init__()
        self.assigned_TE = assigned_TE
        self.weights_TE = None if weights_TE is None else nn.Parameter(weights_TE)

    def forward(self, x_TD: Tensor) -> Routing:
        return Routing.from_assignments(self.assigned_TE[: x_TD.shape[0]], weights=self.weights_TE)


class TestCustom:
    @pytest.mark.parametrize("build", ["class", "instance", "function", "attribute"])
    def test_logits_equal_the_gate_of_type_top(self, build: str) -> None:
        built = Logits(D, 4)
        if build == "attribute":
            built.top_k = 2
        module: Any = {"class": Logits, "function": lambda **given: Logits(**given)}.get(build, built)
        config = {"type": "custom", "module": module, **({} if build == "attribute" else {"k": 2})}
        layer, reference = layer_with(config), layer_with({"type": "top", "k": 2})
        with torch.no_grad():
            layer.gates[0].module.wg.weight.copy_(reference.gates[0].wg.weight)
        layer.experts.load_state_dict(reference.experts.state_dict())
        x_TD, d_y = tokens(), tokens(seed=3)
        found = []
        for one in (layer, reference):
            y = one(x_TD)
            ((y * d_y).sum() + y.l_aux).backward()
            found.append([y, y.l_aux, *(p.grad for p in one.parameters())])
        for mine, expected in zip(*found, strict=True):
            assert torch.equal(mine, expected)

    def test_the_terms_of_a_routing(self) -> None:
        """If the gate gave no GShard term, it comes from the routing's scores; the gate's object does not change."""
        given = Routing.from_assignments(torch.eye(4).bool().repeat(3, 1), torch.rand(12, 4, dtype=torch.float64))

        class Fixed(nn.Module):
            def forward(self, x_TD: Tensor) -> Routing:
                return given

        layer = layer_with({"type": "custom", "module": Fixed()})
        assert float(layer(tokens(12)).l_aux) == pytest.approx(float(given.scores.sum() * 3 * 4 / 144), rel=1e-5)
        assert given.aux == {}

    def test_an_fp32_module_in_autocast_and_with_bf16_tokens(self) -> None:
        layer = layer_with({"type": "custom", "module": nn.Linear(D, 4)}, dtype=torch.float32)
        with torch.autocast("cpu", torch.bfloat16):
            assert layer(tokens(5, torch.bfloat16)).isfinite().all()

    def test_options_go_to_the_class(self) -> None:
        layer = layer_with({"type": "custom", "module": Logits, "k": 2, "width": 3})
        assert layer.gates[0].module.given == {"k": 2, "width": 3}

    def test_half_precision_logits_are_routed_in_fp32(self) -> None:
        layer = layer_with({"type": "custom", "module": Logits, "k": 2}, dtype=torch.bfloat16)
        routing = layer.route(tokens(5, torch.bfloat16))
        assert routing.scores.dtype == torch.float32

    @pytest.mark.parametrize("weighted", [False, True])
    def test_any_assignment(self, weighted: bool) -> None:
        generator = torch.Generator().manual_seed(0)
        assigned_TE = torch.rand(9, 4, generator=generator) > 0.5
        assigned_TE[3] = False
        given_TE = torch.rand(9, 4, generator=generator, dtype=torch.float64) if weighted else None
        layer = layer_with({"type": "custom", "module": Chosen(assigned_TE, given_TE)}, aux_losses={})

        def naive(t: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
            if weighted:
                return t["gates.0.module.weights_TE"] * assigned_TE, torch.zeros(())
            return assigned_TE / assigned_TE.sum(1, keepdim=True).clamp(min=1).double(), torch.zeros(())

        check_against(layer, tokens(), naive)
        assert (layer(tokens())[3] == 0).all()
        layer.begin_record_routing()
        layer(tokens())
        assert torch.equal(layer.record.counts, assigned_TE.sum(0))
        assert int(layer.record.unrouted_tokens) == int((assigned_TE.sum(1) == 0).sum())

    @pytest.mark.parametrize(("capacity", "rows"), [("exact", 20), (0.5, 5), ("full", 40)])
    def test_a_routing_keeps_to_the_capacity_of_the_layer(self, capacity: Any, rows: int) -> None:
        """The user's bound on the layer's memory holds for every gate."""
        assigned_TE = torch.arange(40).view(10, 4) % 2 == 0
        layer = layer_with({"type": "custom", "module": Chosen(assigned_TE)}, capacity=capacity)
        assert layer.route(tokens(10)).token_of_row.shape == (rows,)
        layer(tokens(10))
        assert int(layer.dropped_assignments) == max(20 - rows, 0)

    def test_a_gate_learns_through_weights_it_computes(self) -> None:
        class Soft(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.w = nn.Parameter(torch.randn(D, 4, dtype=torch.float64))

            def forward(self, x_TD: Tensor) -> Routing:
                weights_TE = torch.sigmoid(x_TD @ self.w)
                return Routing.from_assignments(weights_TE > 0.5, weights=weights_TE)

        layer = layer_with({"type": "custom", "module": Soft()}, aux_losses={})

        def naive(t: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
            weights_TE = torch.sigmoid(t["x"] @ t["gates.0.module.w"])
            return weights_TE * (weights_TE > 0.5), torch.zeros(())

        check_against(layer, tokens(), naive)

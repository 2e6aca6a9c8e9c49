"""torch's FLOP counter counts the layer as the same work in plain products."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from dynmoe_tutel import MoELayer
from dynmoe_tutel.kernels.flop_counter import FORMULAS
from dynmoe_tutel.kernels.operation import OPERATIONS

T, D, H, O, E = 12, 8, 6, 5, 4


def flops(run: Callable[[], Any]) -> int:
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def tokens(grad: bool = True) -> Tensor:
    return torch.randn(T, D, generator=torch.Generator().manual_seed(3)).requires_grad_(grad)


def step(module: Callable[[Tensor], Tensor], x: Tensor) -> None:
    module(x).square().sum().backward()


def layer_of_all(gate: Any = "top_any", kind: str = "ffn", **options: Any) -> MoELayer:
    """Every token activates every expert, so that all have T rows; no auxiliary loss."""
    experts = {"type": kind, "num_experts_per_device": E, "hidden_size_per_expert": H, **options.pop("experts", {})}
    layer = MoELayer(gate, D, experts, seeds=(0, 0), aux_losses={}, **options)
    if gate == "top_any":
        nn.init.constant_(layer.gates[0].gates, -1.0)  # type: ignore[union-attr,arg-type]
    return layer


class Dense(nn.Module):
    """E dense FFNs on all tokens; `gated` ones are GLU."""

    def __init__(self, gated: bool = False, output_dim: int = D) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(D, E * H), nn.ModuleList(nn.Linear(H, output_dim) for _ in range(E))
        self.gate = nn.Linear(D, E * H) if gated else None

    def forward(self, x: Tensor) -> Tensor:
        a = F.gelu(self.up(x)) if self.gate is None else self.up(x) * F.silu(self.gate(x))
        return torch.stack([down(part) for down, part in zip(self.down, a.chunk(E, 1), strict=True)]).mean(dim=0)


class Router(nn.Module):
    """Cosine scores as one product."""

    def __init__(self) -> None:
        super().__init__()
        self.w_DE = nn.Parameter(torch.randn(D, E))

    def forward(self, x: Tensor) -> Tensor:
        return (F.normalize(x, dim=1) @ F.normalize(self.w_DE, dim=0)).sigmoid()


def dense_step(gated: bool = False, output_dim: int = D) -> int:
    return flops(lambda: step(Dense(gated, output_dim), tokens())) + flops(lambda: step(Router(), tokens()))


@pytest.mark.parametrize(
    ("kind", "options", "output_dim"),
    [
        ("ffn", {"activation_fn": F.gelu}, D),
        ("ffn", {"activation_fn": lambda h: h.sin()}, D),  # does not run fused
        ("ffn", {"activation_fn": F.gelu, "output_dim": O, "has_fc1_bias": False}, O),
        ("llama_ffn", {}, D),
        ("llama_ffn", {"activation_fn": lambda h: h.sin()}, D),
    ],
)
def test_a_step_counts_as_dense_networks_and_a_router(kind: str, options: dict[str, Any], output_dim: int) -> None:
    layer = layer_of_all(kind=kind, experts=options)
    assert flops(lambda: step(layer, tokens())) == dense_step(kind == "llama_ffn", output_dim)


def test_a_forward_counts_as_dense_networks_and_a_router() -> None:
    expected = flops(lambda: Dense()(tokens())) + flops(lambda: Router()(tokens()))
    layer = layer_of_all()
    assert flops(lambda: layer(tokens())) == expected
    with torch.no_grad():
        assert flops(lambda: layer.eval()(tokens(False))) == expected
    with torch.inference_mode():
        assert flops(lambda: layer(tokens(False))) == expected
    assert expected == 2 * T * E * 2 * D * H + 2 * T * D * E


def test_a_fixed_k_gate() -> None:
    router = nn.Linear(D, E, bias=False)
    expected = flops(lambda: step(Dense(), tokens())) + flops(lambda: step(router, tokens()))
    layer = layer_of_all({"type": "top", "k": E})
    assert flops(lambda: step(layer, tokens())) == expected


def test_custom_experts() -> None:
    experts = {"type": "custom", "module": [nn.Linear(D, D) for _ in range(E)], "num_experts_per_device": E}
    layer = MoELayer({"type": "top", "k": E}, D, experts, aux_losses={})
    router, dense = nn.Linear(D, E, bias=False), nn.Linear(D, E * D)
    expected = flops(lambda: step(router, tokens())) + flops(lambda: step(dense, tokens()))
    assert flops(lambda: step(layer, tokens())) == expected


def test_frozen_experts_and_what_is_recomputed() -> None:
    frozen, dense = layer_of_all(experts={"activation_fn": F.gelu}), Dense()
    frozen.experts.requires_grad_(False)
    dense.requires_grad_(False)
    expected = flops(lambda: step(dense, tokens())) + flops(lambda: step(Router(), tokens()))
    assert flops(lambda: step(frozen, tokens())) == expected
    again = layer_of_all(experts={"activation_fn": F.gelu, "recompute": "up"})
    assert flops(lambda: step(again, tokens())) == dense_step() + 2 * T * E * D * H


def test_losses_of_the_routing_vectors() -> None:
    layer, w = layer_of_all(), torch.randn(D, E, requires_grad=True)
    expected = flops(lambda: layer(tokens())) + flops(lambda: w.t() @ w)
    with_losses = MoELayer("top_any", D, {"num_experts_per_device": E, "hidden_size_per_expert": H}, seeds=(0, 0))
    nn.init.constant_(with_losses.gates[0].gates, -1.0)  # type: ignore[union-attr,arg-type]
    assert flops(lambda: with_losses(tokens())) == expected


@pytest.mark.parametrize("gate", ["top_any", "top"])
def test_only_rows_count(gate: str) -> None:
    layer = MoELayer(gate, D, {"num_experts_per_device": E, "hidden_size_per_expert": H}, seeds=(0, 0), aux_losses={})
    rows = int(layer.route(tokens()).num_assignments)
    assert 0 < rows < T * E
    assert flops(lambda: layer(tokens())) == 2 * T * D * E + rows * 4 * D * H
    assert flops(lambda: layer(tokens()[:0])) == 0


def test_the_table_of_modules_names_the_layer() -> None:
    model = nn.Sequential(nn.Linear(D, D), layer_of_all())
    with FlopCounterMode(display=False) as counter:
        model(tokens())
    counts = {name: sum(of_module.values()) for name, of_module in counter.get_flop_counts().items()}
    assert counts["Sequential.1"] == 2 * T * D * E + T * E * 4 * D * H
    assert counts["Sequential"] == counts["Sequential.1"] + 2 * T * D * D


def test_every_operation_has_a_formula() -> None:
    assert FORMULAS.keys() == OPERATIONS.keys()
    assert {getattr(torch.ops.dynmoe_tutel, name) for name in OPERATIONS} <= flop_registry.keys()


ORDERS = {
    "before": "import torch.utils.flop_counter as counter, dynmoe_tutel",
    "after": "import dynmoe_tutel, sys; assert 'torch.utils.flop_counter' not in sys.modules and 'triton' not in "
    "sys.modules; import torch.utils.flop_counter as counter",
}


@pytest.mark.parametrize("order", ORDERS)
def test_the_counter_may_be_imported_before_or_after(order: str) -> None:
    script = (
        f"import torch; {ORDERS[order]}; from dynmoe_tutel.kernels.operation import OPERATIONS; import inspect; "
        "assert {getattr(torch.ops.dynmoe_tutel, name) for name in OPERATIONS} <= counter.flop_registry.keys(); "
        "assert 'FlopCounterMode' in inspect.getsource(counter)"
    )
    subprocess.run([sys.executable, "-c", script], check=True)

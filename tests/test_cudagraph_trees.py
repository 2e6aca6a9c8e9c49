"""`torch.compile(mode="reduce-overhead")` as far as a CPU tells, by the checks after which Inductor skips CUDA graphs.

It skips them where an input is mutated that is not static, or a size depends on the data.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func
from torch._inductor.cudagraph_utils import check_for_mutation_ignore_cuda_graph_managed_tensor
from torch._inductor.utils import get_first_incompatible_cudagraph_node
from torch.utils._ordered_set import OrderedSet

from dynmoe_tutel import MoELayer

D, T = 16, 24


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def mutated(gm: torch.fx.GraphModule) -> list[int]:
    """The inputs that a graph writes to in place."""
    inputs = gm.graph.find_nodes(op="placeholder")
    writes = [node for node in gm.graph.nodes if node.target is torch.ops.aten.copy_.default]
    return [inputs.index(node.args[0]) for node in writes]


def reasons_to_skip(layer: MoELayer) -> tuple[list[Any], int]:
    """Why Inductor would run a step of the layer without a CUDA graph; the number of tensors that it mutates."""
    found: list[Any] = []
    written = 0

    def forward_graph(gm: torch.fx.GraphModule, _: Any) -> Any:
        nonlocal written
        indices = mutated(gm)
        written = len(indices)
        static = torch._guards.TracingContext.get().fw_metadata.static_input_indices
        names = OrderedSet(str(i) for i in indices)
        found.append(check_for_mutation_ignore_cuda_graph_managed_tensor(gm, names, OrderedSet(indices), static))
        return backward_graph(gm, _)

    def backward_graph(gm: torch.fx.GraphModule, _: Any) -> Any:
        found.append(get_first_incompatible_cudagraph_node(gm))
        return make_boxed_func(gm)

    backend = aot_autograd(fw_compiler=forward_graph, bw_compiler=backward_graph, keep_inference_input_mutations=True)
    y = torch.compile(layer, fullgraph=True, backend=backend)(torch.randn(T, D))
    (y.sum() + y.l_aux).backward()
    assert all(p.grad is not None for p in layer.parameters())
    return [reason for reason in found if reason is not None], written


def layer_with(capacity: Any, gate: dict[str, Any] | None = None) -> MoELayer:
    """A layer with an open record window."""
    gate = {"type": "top_any", "max_expert_num": 6, **(gate or {})}
    layer = MoELayer(gate, D, {"num_experts_per_device": 4, "hidden_size_per_expert": 12}, capacity=capacity)
    layer.begin_record_routing()
    return layer


@pytest.mark.parametrize(
    ("capacity", "gate", "writes"),
    [
        (0.5, {"budget": {"target_k": 2.0}}, 9),  # the count of dropped assignments, the record, the budget's sample
        (None, {"budget": {"max_k": 2}}, 6),
        ("full", None, 6),
    ],
)
def test_static_memory_keeps_cuda_graphs(capacity: Any, gate: dict[str, Any] | None, writes: int) -> None:
    """All that a step writes in place belongs to the layer and has a static address."""
    layer = layer_with(capacity, gate)
    assert reasons_to_skip(layer) == ([], writes)
    assert int(layer.record.tokens) == T


def test_the_checks_see_what_keeps_graphs_away() -> None:
    """The exact capacity has sizes that depend on the data; a tensor that is no module's is not static."""
    reasons, _ = reasons_to_skip(layer_with("exact"))
    assert reasons
    outside = torch.zeros(())

    class Counting(MoELayer):
        def forward(self, x: Tensor) -> Any:  # type: ignore[override]
            outside.add_(1)
            return super().forward(x)

    layer = Counting({"type": "top_any", "max_expert_num": 6}, D, {"hidden_size_per_expert": 12}, capacity="full")
    reasons, written = reasons_to_skip(layer)
    assert written == 1
    assert "mutated inputs" in reasons[0]

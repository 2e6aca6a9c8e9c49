"""The layer under torch's machinery: hooks, pruning, forward mode, inference mode, and state that stays in place."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import prune

from dynmoe_tutel import MoELayer, RoutingRecord

T, D, H, E = 10, 8, 6, 4


def layer_with(gate: str = "top_any", experts: dict[str, Any] | None = None, **options: Any) -> MoELayer:
    ffn = {"num_experts_per_device": E, "hidden_size_per_expert": H, "activation_fn": F.gelu, **(experts or {})}
    return MoELayer(gate, D, ffn, seeds=(0, 0), **options)


def tokens() -> Tensor:
    return torch.randn(T, D, generator=torch.Generator().manual_seed(32))  # no cosine is near the thresholds, 0


@pytest.mark.parametrize("gate", ["top_any", "top"])
class TestHooks:
    def test_of_the_experts_run(self, gate: str) -> None:
        layer, calls = layer_with(gate), []
        expected = layer(tokens())
        layer.experts.register_forward_hook(lambda *_: calls.append(1))
        assert torch.allclose(layer(tokens()), expected, atol=1e-6)
        assert calls == [1]

    def test_pruned_weights_are_computed_anew(self, gate: str) -> None:
        """torch.nn.utils.prune masks in a forward pre-hook: without the hook, the first masked copy would stay."""
        layer = layer_with(gate)
        prune.l1_unstructured(layer.experts, "batched_fc2_w", 0.5)
        optimizer = torch.optim.SGD(layer.parameters(), lr=1.0)
        layer(tokens()).sum().backward()
        optimizer.step()
        layer(tokens())
        experts: Any = layer.experts
        assert torch.equal(experts.batched_fc2_w, experts.batched_fc2_w_orig * experts.batched_fc2_w_mask)

    @pytest.mark.parametrize("of", ["backward pre-hook", "own forward"])
    def test_of_the_activation_run(self, gate: str, of: str) -> None:
        activation, calls = nn.GELU(), []
        layer = layer_with(gate, {"activation_fn": activation})
        if of == "own forward":
            activation.forward = lambda h: calls.append(1) or h * 0  # type: ignore[method-assign,assignment,func-returns-value]
        else:
            activation.register_full_backward_pre_hook(lambda *_: calls.append(1))
        layer(tokens()).sum().backward()
        assert calls == [1]


@pytest.mark.parametrize("made", [None, (torch.zeros(3), 1)])
def test_an_activation_that_makes_no_tensor(made: Any) -> None:
    with pytest.raises(ValueError, match="activation_fn returned"):
        layer_with(experts={"activation_fn": lambda h: made})(tokens())


@pytest.mark.parametrize("gate", ["top_any", "top"])
def test_forward_mode_is_refused(gate: str) -> None:
    """The operations have no forward derivative, and torch would silently use zero."""
    layer, x = layer_with(gate).requires_grad_(False), tokens()
    with pytest.raises(NotImplementedError, match="no forward-mode"):
        torch.func.jvp(layer, (x,), (x,))
    with torch.autograd.forward_ad.dual_level(), pytest.raises(NotImplementedError, match="no forward-mode"):
        layer(torch.autograd.forward_ad.make_dual(x, x))
    layer(x)


def test_transforms_without_a_rule_are_refused_by_name() -> None:
    layer, x = layer_with(), torch.stack([tokens(), 2 * tokens()])
    with pytest.raises(NotImplementedError, match=r"torch\.func's transforms"):
        torch.vmap(layer)(x)
    with pytest.raises(NotImplementedError, match=r"torch\.func's transforms"):
        torch.func.grad(lambda each: layer(each).sum())(x)
    with pytest.raises(NotImplementedError, match=r"torch\.jit\.trace"):
        torch.jit.trace(layer, x)
    assert layer(x).shape == x.shape


@pytest.mark.parametrize("keep_tokens", [0, 3])
def test_a_window_opened_in_inference_mode(keep_tokens: int) -> None:
    layer = layer_with()
    layer.record.keep_tokens = keep_tokens
    with torch.inference_mode():
        layer.begin_record_routing()
    layer(tokens())
    assert int(layer.record.tokens) == T


def test_records_stay_where_they_are() -> None:
    """A captured CUDA graph writes to their addresses."""

    def addresses(record: RoutingRecord) -> list[int]:
        return [value.data_ptr() for value in vars(record).values() if isinstance(value, Tensor)]

    layer = layer_with()
    layer.record.keep_tokens = 5
    layer.begin_record_routing()
    before = addresses(layer.record), layer.dropped_assignments.data_ptr()
    layer(tokens())
    state = layer.record.state_dict()
    layer.begin_record_routing()
    assert int(layer.record.tokens) == 0
    layer.record.load_state_dict(state)
    assert int(layer.record.tokens) == T
    assert torch.equal(layer.record.unrouted_sample, state["unrouted_sample"])
    layer.adaptive_update_experts()
    layer.load_state_dict(layer.state_dict())
    assert (addresses(layer.record), layer.dropped_assignments.data_ptr()) == before


@pytest.mark.parametrize("capacity", [1e5, 1e308, numpy.float32(300.0), numpy.int64(70)])
def test_no_more_rows_than_assignments_can_be(capacity: Any) -> None:
    routing = layer_with(capacity=capacity).route(tokens())
    assert routing.token_of_row.shape == (T * E,)
    assert int(routing.dropped) == 0


@pytest.mark.parametrize(
    "make",
    [
        lambda v: layer_with(is_gshard_loss=v),
        lambda v: layer_with(normalize_gate=v),
        lambda v: layer_with(value_norm_weighted=v),
        lambda v: layer_with(check_finite=v),
        lambda v: layer_with(experts={"has_fc1_bias": v}),
    ],
)
def test_flags_are_flags(make: Callable[[Any], MoELayer]) -> None:
    for value in ("False", "no", 2, 0.5):
        with pytest.raises(ValueError, match="give True or False"):
            make(value)
    for value in (True, 0, numpy.bool_(True)):
        make(value)


def test_a_group_is_a_process_group() -> None:
    with pytest.raises(ValueError, match="group = 'abc'"):
        layer_with(group="abc")


def test_the_masks_say_how_many_experts_there_are() -> None:
    layer = layer_with()
    state = layer.state_dict() | {"_num_global_experts": torch.tensor(3)}
    layer.load_state_dict(state)
    assert layer.num_global_experts == E

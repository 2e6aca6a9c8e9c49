"""Padding in a batch: a layer with `token_mask` computes the same as on the real tokens alone."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import TERMS, relative_rms
from torch import Tensor, nn

from dynmoe_tutel import Routing, moe

D, E, T = 12, 5, 26
SUMS = ("counts", "k_histogram", "tokens", "unrouted_tokens", "unrouted_sum", "unrouted_norm")


class Assigns(nn.Module):
    """A custom gate that returns a routing: the experts with positive logits; some tokens have none."""

    def __init__(self, weighted: bool, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        self.weighted = weighted
        self.projection = nn.Parameter(torch.randn(D, E, generator=torch.Generator().manual_seed(3)).to(dtype) / 3)

    def forward(self, x_TD: Tensor) -> Routing:
        logits_TE = x_TD @ self.projection - 1
        return Routing.from_assignments(logits_TE > 0, logits_TE.sigmoid() if self.weighted else None)


class Logits(nn.Linear):
    """A custom gate that returns logits."""

    def __init__(self, model_dim: int, num_global_experts: int, k: int) -> None:
        super().__init__(model_dim, num_global_experts)
        self.top_k = k


GATES: dict[str, tuple[Any, dict[str, Any]]] = {
    "top_any": ({"type": "top_any", "max_expert_num": E, "init_t": 0.7}, {}),
    "top_any normalized": ({"type": "top_any", "max_expert_num": E}, {"combine_gradient": "normalized"}),
    "top": ({"type": "top", "k": 2}, {}),
    "cosine_top": ({"type": "cosine_top", "k": 2, "proj_dim": 7}, {}),
    "custom logits": ({"type": "custom", "module": Logits, "k": 2}, {}),
    "custom routing": ({"type": "custom", "module": lambda **_: Assigns(False)}, {}),
    "custom weighted": ({"type": "custom", "module": lambda **_: Assigns(True)}, {}),
}


def layer_with(gate: str = "top_any", dtype: torch.dtype = torch.float64, **given: Any) -> Any:
    """A layer that records; slot 3 of a top-any gate is inactive, and some tokens are unrouted."""
    config, options = GATES[gate]
    if gate.startswith("top_any"):
        options = {"aux_losses": dict.fromkeys(TERMS, 1.0), **options}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        experts = {"num_experts_per_device": E, "hidden_size_per_expert": 10, "activation_fn": F.gelu}
        layer = moe.moe_layer(config, D, experts, seeds=(1, 2), **{**options, **given}).to(dtype)
    if gate.startswith("top_any"):
        with torch.no_grad():
            layer.gates[0].gates.copy_(torch.tensor([0.2, 0.4, 0.3, 0.1, 0.25]))
            layer.gates[0].experts_mask[3] = 0
    layer.begin_record_routing(record_eval=True)
    return layer


def tokens(n: int = T, seed: int = 0) -> Tensor:
    return torch.randn(n, D, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def some_mask() -> Tensor:
    """10 real tokens of 26; the first and the last are padding."""
    mask_T = torch.arange(T) % 5 % 2 == 1
    mask_T[-1] = False
    assert 0 < int(mask_T.sum()) < T / 2
    assert not mask_T[0]
    return mask_T


def run(layer: Any, x: Tensor, d_y: Tensor, mask: Tensor | None = None, **given: Any) -> tuple[Tensor, dict, dict]:
    """Output, auxiliary terms, and the gradients of both in x and every parameter."""
    x = x.clone().requires_grad_()
    layer.zero_grad()
    y = layer(x, token_mask=mask, **given)
    terms = layer.aux_terms
    weighted = [(i + 1) * term for i, term in enumerate(terms.values())]
    ((y * d_y).sum() + sum(weighted)).backward()
    named = {"x": x, **dict(layer.named_parameters())}
    gradients = {name: None if t.grad is None else t.grad.clone() for name, t in named.items()}
    return y.detach(), {name: term.detach() for name, term in terms.items()}, gradients


def assert_same(found: dict[str, Tensor | None], expected: dict[str, Tensor | None], limit: float = 1e-11) -> None:
    assert found.keys() == expected.keys()
    for name, value in found.items():
        reference = expected[name]
        assert (value is None) == (reference is None), name
        if value is not None and reference is not None:
            assert relative_rms(value, reference, 1e-3) < limit, name


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("capacity", ["exact", "full"])
@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("held", [50.0, math.nan], ids=["large", "nan"])
def test_padding_changes_nothing(held: float, gate: str, capacity: str, training: bool) -> None:
    """Output, gradients, auxiliary terms and the record equal those of the real tokens alone."""
    x, d_y, mask = tokens(), tokens(seed=1), some_mask()
    x[~mask] *= held
    padded, alone = (layer_with(gate, capacity=capacity).train(training) for _ in range(2))
    y, terms, gradients = run(padded, x, d_y, mask)
    own_y, own_terms, own_gradients = run(alone, x[mask], d_y[mask])
    assert not y[~mask].any()
    assert relative_rms(y[mask], own_y) < 1e-12
    assert list(terms) == list(TERMS if gate.startswith("top_any") else ["gshard"])
    assert_same(terms, own_terms)
    assert padded.l_aux.item() == pytest.approx(alone.l_aux.item(), rel=1e-6)
    assert gradients["x"] is not None
    assert not gradients["x"][~mask].any()
    gradients["x"] = gradients["x"][mask]
    assert_same(gradients, own_gradients)
    for name in SUMS:
        found, expected = (getattr(layer.records[0], name) for layer in (padded, alone))
        if name.endswith(("sum", "norm")):
            assert relative_rms(found, expected) < 1e-6, name
        else:
            assert found.tolist() == expected.tolist(), name
    assert int(padded.records[0].tokens) == int(mask.sum())
    assert int(padded.records[0].k_histogram.sum()) == int(mask.sum())

    with_padding, _, _ = run(layer_with(gate).train(training), x, d_y)  # and padding would have had experts
    assert math.isnan(held) or with_padding[~mask].any()


@pytest.mark.parametrize("gate", ["top", "cosine_top", "custom logits"])
def test_load_and_importance_count_real_tokens(gate: str) -> None:
    x, d_y, mask = tokens(), tokens(seed=1), some_mask()
    config, _ = GATES[gate]
    experts = {"num_experts_per_device": E, "hidden_size_per_expert": 10, "activation_fn": F.gelu}
    torch.manual_seed(0)
    layer = moe.moe_layer({**config, "gate_noise": 2.0}, D, experts, seeds=(1, 2), is_gshard_loss=False).double()
    layer.eval()  # no noise, which is drawn for padding too
    _, terms, gradients = run(layer, x, d_y, mask)
    _, own_terms, own_gradients = run(layer, x[mask], d_y[mask])
    assert list(terms) == ["load_importance"]
    assert float(terms["load_importance"]) > 0
    gradients["x"] = gradients["x"][mask]
    assert_same(terms, own_terms, 1e-9)
    assert_same(gradients, own_gradients, 1e-9)


@pytest.mark.parametrize("gate", ["top_any", "top"])
@pytest.mark.parametrize("shape", [(2, 13), (2, 1, 13), (26, 1)], ids=str)
def test_batches_of_any_shape(gate: str, shape: tuple[int, ...]) -> None:
    x, d_y, mask = tokens(), tokens(seed=1), some_mask()
    y, terms, gradients = run(layer_with(gate), x, d_y, mask)
    layer = layer_with(gate)
    own_y, own_terms, own_gradients = run(layer, x.view(*shape, D), d_y.view(*shape, D), mask.view(shape))
    assert torch.equal(own_y.view(T, D), y)
    own_gradients["x"] = own_gradients["x"].view(T, D)
    assert_same(own_terms, terms)
    assert_same(own_gradients, gradients)
    two_dims = layer(x.view(*shape, 3, D // 3), reserve_dims=2, token_mask=mask.view(shape))
    assert torch.equal(two_dims.view(T, D), y)
    transposed = mask.view(2, 13).t().contiguous().t()  # a mask of other strides
    assert torch.equal(layer(x.view(2, 13, D), token_mask=transposed).view(T, D), y)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("gate", GATES)
def test_a_mask_that_masks_nothing_is_none(gate: str, training: bool) -> None:
    x, d_y = tokens(), tokens(seed=1)
    y, terms, gradients = run(layer_with(gate).train(training), x, d_y, torch.ones(T, dtype=torch.bool))
    own_y, own_terms, own_gradients = run(layer_with(gate).train(training), x, d_y)
    assert torch.equal(y, own_y)
    assert_same(terms, own_terms)
    assert_same(gradients, own_gradients)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("capacity", ["exact", "full", 1.5])
@pytest.mark.parametrize("gate", GATES)
def test_padding_alone(gate: str, capacity: str | float, training: bool) -> None:
    """Outputs 0, terms and gradients finite, an empty record."""
    layer = layer_with(gate, capacity=capacity).train(training)
    y, terms, gradients = run(layer, tokens(), tokens(seed=1), torch.zeros(T, dtype=torch.bool))
    assert not y.any()
    assert all(t.isfinite().all() for t in (*terms.values(), *gradients.values()) if t is not None)
    record = layer.records[0]
    for name in SUMS:
        assert not getattr(record, name).any(), name
    assert int(layer.dropped_assignments) == 0


@pytest.mark.parametrize("capacity", ["exact", 1.0])
def test_in_eval_padding_gets_no_fallback(capacity: str | float) -> None:
    layer, x, mask = layer_with(capacity=capacity).eval(), tokens(), some_mask()
    with torch.no_grad():
        layer.gates[0].gates.fill_(2.0)  # nobody passes
    routing = layer.route(x, token_mask=mask)
    assert routing.k_per_token.tolist() == mask.int().tolist()
    assert torch.equal(routing.unrouted, mask)
    y = layer(x, token_mask=mask)
    assert not y[~mask].any()
    assert y[mask].any(dim=1).all()
    record = layer.records[0]
    assert (int(record.tokens), int(record.unrouted_tokens)) == (int(mask.sum()),) * 2
    assert record.k_histogram.tolist() == [int(mask.sum()), *[0] * E]
    assert int(record.counts.sum()) == int(mask.sum())


def test_kept_unrouted_tokens_are_real_ones() -> None:
    layer, x, mask = layer_with(), tokens(), some_mask()
    for record in layer.records:
        record.keep_tokens = 100
    with torch.no_grad():
        layer.gates[0].gates.fill_(2.0)
    layer(x, token_mask=mask)
    assert torch.equal(layer.records[0].unrouted_sample, x[mask].float())


@pytest.mark.parametrize("gate", GATES)
def test_a_bounded_capacity_is_for_real_tokens(gate: str) -> None:
    """The rows are a factor of all tokens including padding, since the shape is static; but padding takes no row: the
    layer drops the same assignments as from the real tokens alone with as many rows."""
    x, d_y, mask = tokens(), tokens(seed=1), some_mask()
    n, rows = int(mask.sum()), 4
    padded = layer_with(gate, capacity=(rows - 0.5) / T)
    alone = layer_with(gate, capacity=(rows - 0.5) / n)
    assert math.ceil(padded.capacity * T) == math.ceil(alone.capacity * n) == rows
    y, terms, gradients = run(padded, x, d_y, mask)
    own_y, own_terms, own_gradients = run(alone, x[mask], d_y[mask])
    assert int(padded.dropped_assignments) == int(alone.dropped_assignments) > 0
    assert not y[~mask].any()
    assert relative_rms(y[mask], own_y) < 1e-12
    assert_same(terms, own_terms)
    gradients["x"] = gradients["x"][mask]
    assert_same(gradients, own_gradients)
    assert padded.records[0].counts.tolist() == alone.records[0].counts.tolist()
    assert int(padded.records[0].counts.sum()) == rows

    enough = layer_with(gate, capacity=4.9 * n / T)  # for all experts of the real tokens, not for those of padding
    y, *_ = run(enough, x, d_y, mask)
    exact, *_ = run(layer_with(gate), x, d_y, mask)
    assert int(enough.dropped_assignments) == 0
    assert relative_rms(y, exact) < 1e-12


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("capacity", ["exact", "full", 1.5])
@pytest.mark.parametrize("gate", GATES)
def test_route(gate: str, capacity: str | float, training: bool) -> None:
    layer, x, mask = layer_with(gate, capacity=capacity).train(training), tokens(), some_mask()
    for shape in ((T,), (2, 13)):
        routing = layer.route(x.view(*shape, D), token_mask=mask.view(shape))
        own = layer_with(gate).train(training).route(x[mask])
        assert torch.equal(routing.token_mask, mask)
        assert int(routing.real_tokens) == int(mask.sum())
        assert routing.num_tokens == T
        assert torch.equal(routing.assigned[mask], own.assigned)
        assert not routing.assigned[~mask].any()
        assert torch.equal(routing.unrouted[mask], own.unrouted)
        assert not routing.unrouted[~mask].any()
        assert torch.equal(routing.k_per_token[mask], own.k_per_token)
        assert torch.equal(routing.expert_offsets, own.expert_offsets)
        A = int(own.num_assignments)
        assert routing.token_of_row[:A].tolist() == mask.nonzero()[:, 0][own.token_of_row.long()].tolist()
        assert torch.equal(routing.row_of_assignment[:A], own.row_of_assignment)
        assert (routing.token_of_row[A:] == -1).all()
    assert layer.route(x).token_mask is None
    assert layer.route(x).real_tokens == T


def test_padding_may_hold_what_check_finite_refuses() -> None:
    layer, x, mask = layer_with(check_finite=True), tokens(), some_mask()
    x[~mask] = math.inf
    assert layer(x, token_mask=mask).isfinite().all()
    x[mask.nonzero()[2]] = math.nan
    with pytest.raises(ValueError, match=f"1 of {T} tokens"):
        layer(x, token_mask=mask)


def test_nothing_is_recorded_of_a_route() -> None:
    layer = layer_with()
    layer.route(tokens(), token_mask=some_mask())
    assert int(layer.records[0].tokens) == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_other_dtypes(dtype: torch.dtype) -> None:
    layer, x, mask = layer_with(dtype=dtype), tokens().to(dtype), some_mask()
    y = layer(x, token_mask=mask)
    assert y.dtype == dtype
    assert not y[~mask].any()
    assert relative_rms(y[mask], layer(x[mask])) < (1e-6 if dtype == torch.float32 else 8e-3)


def test_a_batch_without_tokens() -> None:
    y = layer_with()(torch.zeros(0, 3, D, dtype=torch.float64), token_mask=torch.zeros(0, 3, dtype=torch.bool))
    assert y.shape == (0, 3, D)


BAD: dict[str, tuple[Any, str]] = {
    "float": (torch.ones(2, 13), "float32 [2, 13] on cpu"),
    "integers": (torch.ones(2, 13, dtype=torch.int64), "int64 [2, 13] on cpu"),
    "flat": (torch.ones(T, dtype=torch.bool), "bool [26] on cpu"),
    "with D": (torch.ones(2, 13, D, dtype=torch.bool), "bool [2, 13, 12] on cpu"),
    "transposed": (torch.ones(13, 2, dtype=torch.bool), "bool [13, 2] on cpu"),
    "one sequence": (torch.ones(1, 13, dtype=torch.bool), "bool [1, 13] on cpu"),
    "no dimension": (torch.tensor(True), "bool [] on cpu"),
    "device": (torch.ones(2, 13, dtype=torch.bool, device="meta"), "bool [2, 13] on meta"),
    "list": ([[True] * 13] * 2, "list [[True, True"),
    "True": (True, "bool True"),
    "text": ("causal", "str 'causal'"),
}


@pytest.mark.parametrize(("mask", "got"), BAD.values(), ids=BAD)
def test_bad_masks(mask: Any, got: str) -> None:
    """The message names the value and what is allowed, and nothing is recorded."""
    layer, x = layer_with(), tokens().view(2, 13, D)
    for call in (layer, layer.route):
        with pytest.raises(ValueError, match="token_mask must be bool") as error:
            call(x, token_mask=mask)
        for part in ("token_mask", "bool [2, 13] on cpu", "True for real tokens", f"got {got}"):
            assert part in str(error.value)
    assert int(layer.records[0].tokens) == 0

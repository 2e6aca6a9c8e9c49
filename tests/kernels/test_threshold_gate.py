"""The threshold gate against its formula in float64: scores, decisions, score gradients."""

from __future__ import annotations

import pytest
import torch
from gate_cases import DTYPES, ONE, SHAPES, cosine, gate_inputs, naive_decision
from helpers import relative_rms

from dynmoe_tutel.kernels import threshold_gate, unpack_bits
from dynmoe_tutel.kernels.ragged_index import block_tokens
from dynmoe_tutel.kernels.threshold_gate import threshold_gate_backward


class TestForward:
    @pytest.mark.parametrize("fallback", [False, True])
    @pytest.mark.parametrize("tau", [1.0, 10.0])
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize(("T", "D", "E"), SHAPES)
    def test_equals_the_formula(self, T: int, D: int, E: int, dtype: torch.dtype, tau: float, fallback: bool) -> None:
        x_TD, w_DE, threshold_E, active_E = gate_inputs(T, D, E, dtype)
        score_TE, bits, unrouted_T, inv_norm_T, *_ = threshold_gate(
            x_TD, w_DE, threshold_E, active_E, torch.tensor(tau), fallback
        )
        cos_TE = cosine(x_TD, w_DE)
        gate_dtype = torch.float64 if dtype == torch.float64 else torch.float32
        assert score_TE.dtype == inv_norm_T.dtype == gate_dtype
        assert bits.shape == (T, -(-E // 64))
        assert relative_rms(score_TE, torch.sigmoid(tau * cos_TE)) < 1e-6
        assert relative_rms(inv_norm_T * x_TD.double().norm(dim=1), torch.ones(T)) < 1e-5
        assigned_TE, lost_T = naive_decision(cos_TE, threshold_E, active_E, fallback)
        assert torch.equal(unpack_bits(bits, E), assigned_TE)
        assert torch.equal(unrouted_T, lost_T)
        if E < 10 <= T:
            assert 0 < int(lost_T.sum()) < T

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_weights_of_half_precision(self, dtype: torch.dtype) -> None:
        x_TD, w_DE, threshold_E, active_E = gate_inputs(31, 97, 65, dtype)
        half = (w_DE.to(dtype), threshold_E.to(dtype))
        score_TE, bits, _, *_ = threshold_gate(x_TD, *half, active_E, ONE.to(dtype), True)
        assert score_TE.dtype == torch.float32
        assert relative_rms(score_TE, torch.sigmoid(cosine(x_TD, half[0]))) < 1e-6
        assert torch.equal(
            unpack_bits(bits, 65), naive_decision(cosine(x_TD, half[0]), half[1].double(), active_E, True)[0]
        )

    def test_fp16_tokens_whose_squares_overflow(self) -> None:
        x_TD = torch.full((2, 97), 60000.0, dtype=torch.float16)
        score_TE, _, _, inv_norm_T, *_ = threshold_gate(
            x_TD, torch.ones(97, 3), torch.zeros(3), torch.ones(3).bool(), ONE, False
        )
        assert relative_rms(score_TE, torch.full((2, 3), 1.0).sigmoid()) < 1e-6
        assert (inv_norm_T > 0).all()

    def test_the_decision_is_taken_before_the_sigmoid_which_saturates(self) -> None:
        """Regression for upstream: at tau = 100, sigmoid(100) = sigmoid(40) = 1 in fp32, and 1 > 1 is false."""
        x_TD, w_DE = torch.eye(4)[:1], torch.eye(4)
        _, bits, _, *_ = threshold_gate(x_TD, w_DE, torch.full((4,), 0.4), torch.ones(4).bool(), 100 * ONE, False)
        assert unpack_bits(bits, 4).tolist() == [[True, False, False, False]]

    @pytest.mark.parametrize(("threshold", "passes"), [(0.0, 0), (1.0, 0), (-1e-6, 1)])
    def test_equality_does_not_pass(self, threshold: float, passes: int) -> None:
        """cos = G = 0 for a token at right angles, cos = G = 1 for a parallel one."""
        x_TD = torch.eye(4)[:1]
        w_DE = torch.eye(4)[:, :1] if threshold == 1 else torch.eye(4)[:, 1:2]
        _, bits, unrouted_T, *_ = threshold_gate(
            x_TD, w_DE, torch.tensor([threshold]), torch.ones(1).bool(), ONE, False
        )
        assert unpack_bits(bits, 1).sum() == passes
        assert unrouted_T.tolist() == [passes == 0]

    def test_all_experts_and_none(self) -> None:
        x_TD, w_DE, _, _ = gate_inputs(7, 16, 65)
        for threshold, k in ((-2.0, 65), (2.0, 0)):
            _, bits, unrouted_T, *_ = threshold_gate(
                x_TD, w_DE, torch.full((65,), threshold), torch.ones(65).bool(), ONE, False
            )
            assert (unpack_bits(bits, 65).sum(1) == k).all()
            assert (unrouted_T == (k == 0)).all()

    def test_an_inactive_slot_is_never_taken_not_even_as_the_best(self) -> None:
        x_TD, w_DE = torch.eye(4)[:1], torch.tensor([[1.0, 0.5, 0.6], [0, 1, 1], [0, 0, 0], [0, 0, 0]])
        active_E = torch.tensor([False, True, True])
        for threshold, taken in ((-2.0, [False, True, True]), (2.0, [False, False, True])):
            _, bits, unrouted_T, *_ = threshold_gate(x_TD, w_DE, torch.full((3,), threshold), active_E, ONE, True)
            assert unpack_bits(bits, 3).tolist() == [taken]
            assert unrouted_T.tolist() == [threshold == 2.0]

    def test_the_best_of_experts_that_all_point_away(self) -> None:
        """Cosines -1 and -0.6 of active slots lose to no inactive slot, even at right angles or closer."""
        w_DE = torch.tensor([[0.0, -1.0, -0.6, 1.0], [1.0, 0.0, 0.8, 0.0]])
        active_E = torch.tensor([False, True, True, False])
        _, bits, unrouted_T, *_ = threshold_gate(torch.eye(2)[:1], w_DE, torch.zeros(4), active_E, ONE, True)
        assert unpack_bits(bits, 4).tolist() == [[False, False, True, False]]
        assert unrouted_T.tolist() == [True]

    def test_among_equally_good_experts_the_lowest_slot_is_the_best(self) -> None:
        w_DE = torch.eye(4)[:, [1, 0, 0, 0]]
        _, bits, _, *_ = threshold_gate(
            torch.eye(4)[:1], w_DE, torch.full((4,), 2.0), torch.tensor([True, False, True, True]), ONE, True
        )
        assert unpack_bits(bits, 4).tolist() == [[False, False, True, False]]

    @pytest.mark.parametrize("fallback", [False, True])
    def test_zero_tokens_and_zero_routing_vectors_have_cosine_zero(self, fallback: bool) -> None:
        x_TD, w_DE, _, _ = gate_inputs(4, 8, 3)
        x_TD[1], w_DE[:, 2] = 0, 0
        score_TE, bits, unrouted_T, inv_norm_T, *_ = threshold_gate(
            x_TD, w_DE, torch.full((3,), 0.01), torch.ones(3).bool(), ONE, fallback
        )
        assert (score_TE[1] == 0.5).all()
        assert (score_TE[:, 2] == 0.5).all()
        assert inv_norm_T[1] == 0
        assert bool(unrouted_T[1])
        assert unpack_bits(bits, 3)[1].tolist() == [fallback, False, False]

    def test_a_token_that_is_not_finite_leaves_the_others_alone(self) -> None:
        x_TD, w_DE, threshold_E, active_E = gate_inputs(9, 16, 5)
        clean = threshold_gate(x_TD, w_DE, threshold_E, active_E, ONE, True)
        x_TD[4] = float("nan")
        dirty = threshold_gate(x_TD, w_DE, threshold_E, active_E, ONE, True)
        others = [t for t in range(9) if t != 4]
        for before, after in zip(clean[:4], dirty[:4], strict=True):
            assert torch.equal(before[others], after[others])
        assert bool(dirty[2][4])
        counts_E = unpack_bits(dirty[1], 5).sum(dim=0, dtype=torch.int32)
        assert torch.equal(dirty[4], counts_E)  # nine tokens are one block
        assert not unpack_bits(dirty[1], 5)[4, ~active_E].any()

    def test_tokens_and_weights_of_any_strides(self) -> None:
        x_TD, w_DE, threshold_E, active_E = gate_inputs(18, 97, 65)
        for x, w in ((x_TD[::2], w_DE), (x_TD[:, 3:50], w_DE[3:50]), (x_TD.t()[:18, :17], w_DE[:17])):
            w = w.t().contiguous().t()
            strided = threshold_gate(x, w, threshold_E, active_E, ONE, True)
            contiguous = threshold_gate(x.contiguous(), w.contiguous(), threshold_E, active_E, ONE, True)
            assert relative_rms(strided[0], contiguous[0]) < 1e-6
            assert torch.equal(strided[1], contiguous[1])

    def test_two_runs_are_bitwise_equal(self) -> None:
        inputs = (*gate_inputs(300, 97, 65), ONE, True)
        for first, second in zip(threshold_gate(*inputs), threshold_gate(*inputs), strict=True):
            assert torch.equal(first, second)

    @pytest.mark.parametrize("fallback", [False, True])
    def test_a_token_is_routed_alone_as_in_any_batch(self, fallback: bool) -> None:
        x_TD, *rest = gate_inputs(40, 97, 65)
        score_TE, bits, unrouted_T, *_ = threshold_gate(x_TD, *rest, ONE, fallback)
        order_T = torch.randperm(40, generator=torch.Generator().manual_seed(0))
        for some_T in (order_T, order_T[:13], order_T[:1]):
            own = threshold_gate(x_TD[some_T], *rest, ONE, fallback)
            assert relative_rms(own[0], score_TE[some_T]) < 1e-6
            assert torch.equal(own[1], bits[some_T])
            assert torch.equal(own[2], unrouted_T[some_T])

    def test_without_a_scale_and_with_a_mask_of_floats(self) -> None:
        """As with tau = 1 and bools, gradients too."""
        *inputs, active_E = gate_inputs(50, 24, 5)
        results = []
        for mask, tau in ((active_E, ONE), (active_E.float(), None)):
            x_TD, w_DE = (t.clone().requires_grad_() for t in inputs[:2])
            score_TE, *rest = threshold_gate(x_TD, w_DE, *inputs[2:], mask, tau, False)
            results.append((score_TE.detach(), *rest, *torch.autograd.grad(score_TE.square().sum(), (x_TD, w_DE))))
        for a, b in zip(*results, strict=True):
            assert relative_rms(a, b) < 1e-6 if a.is_floating_point() else torch.equal(a, b)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_autocast_changes_nothing(self, dtype: torch.dtype) -> None:
        inputs = (*gate_inputs(200, 97, 65, dtype), ONE, True)
        plain = threshold_gate(*inputs)
        with torch.autocast("cpu", torch.bfloat16):
            automatic = threshold_gate(*inputs)
        for first, second in zip(plain, automatic, strict=True):
            assert torch.equal(first, second)

    @pytest.mark.parametrize("masked", [False, True])
    @pytest.mark.parametrize("fallback", [False, True])
    @pytest.mark.parametrize(("T", "D", "E"), [(7, 9, 65), (0, 4, 3), (70, 4, 3)])
    def test_opcheck(self, T: int, D: int, E: int, fallback: bool, masked: bool) -> None:
        x_TD, w_DE, threshold_E, active_E = gate_inputs(T, D, E)
        scale = torch.tensor(2.0, requires_grad=True)
        mask = (torch.arange(T) % 3 > 0,) if masked else ()
        inputs = (x_TD.requires_grad_(), w_DE.requires_grad_(), threshold_E, active_E, scale, fallback, *mask)
        torch.library.opcheck(threshold_gate, inputs)


class TestBlockCounts:
    @pytest.mark.parametrize("masked", [False, True])
    @pytest.mark.parametrize("fallback", [False, True])
    @pytest.mark.parametrize(
        ("T", "E"), [(0, 3), (1, 1), (63, 5), (64, 5), (65, 5), (200, 65), (130, 128), (33, 512), (32, 512)]
    )
    def test_are_the_sums_of_the_bits(self, T: int, E: int, fallback: bool, masked: bool) -> None:
        mask_T = torch.arange(T) % 5 > 1 if masked else None
        _, bits, _, _, block_counts = threshold_gate(*gate_inputs(T, 16, E), ONE, fallback, mask_T)
        size = 64 if E <= 128 else 16
        assert size == block_tokens(E)
        assigned_TE = unpack_bits(bits, E)
        wanted = [assigned_TE[t : t + size].sum(dim=0).tolist() for t in range(0, T, size)]
        assert block_counts.dtype == torch.int32
        assert block_counts.shape == (-(-T // size) * E,)
        assert block_counts.view(-1, E).tolist() == wanted
        assert T < 2 or block_counts.any()

    @pytest.mark.parametrize(("E", "size"), [(1, 64), (64, 64), (128, 64), (129, 32), (256, 32), (257, 16), (512, 16)])
    def test_the_tokens_of_a_block(self, E: int, size: int) -> None:
        assert block_tokens(E) == size


class TestMask:
    @pytest.mark.parametrize("fallback", [False, True])
    @pytest.mark.parametrize(("T", "D", "E"), [(64, 16, 4), (33, 47, 130), (9, 8, 64), (1, 1, 1)])
    def test_real_tokens_as_without_padding(self, T: int, D: int, E: int, fallback: bool) -> None:
        x_TD, *rest = gate_inputs(T, D, E)
        mask_T = torch.arange(T) % 3 > 0
        score_TE, bits, unrouted_T, inv_norm_T, block_counts = threshold_gate(x_TD, *rest, ONE, fallback, mask_T)
        own = threshold_gate(x_TD[mask_T], *rest, ONE, fallback)
        assert relative_rms(score_TE[mask_T], own[0]) < 1e-6
        assert torch.equal(bits[mask_T], own[1])
        assert torch.equal(unrouted_T[mask_T], own[2])
        assert relative_rms(inv_norm_T[mask_T], own[3]) < 1e-6
        assert torch.equal(block_counts.view(-1, E).sum(dim=0), own[4].view(-1, E).sum(dim=0))
        assert not bits[~mask_T].any()
        assert not unrouted_T[~mask_T].any()
        if T > 20 and E < 10:  # padding would have had experts, and would have been unrouted
            _, bits, unrouted_T, *_ = threshold_gate(x_TD, *rest, ONE, False)
            assert bits[~mask_T].any()
            assert unrouted_T[~mask_T].any()
            assert unrouted_T[mask_T].any()

    def test_nothing_but_padding_and_no_padding(self) -> None:
        inputs = (*gate_inputs(70, 16, 5), ONE, True)
        _, bits, unrouted_T, _, block_counts = threshold_gate(*inputs, torch.zeros(70).bool())
        assert not bits.any()
        assert not unrouted_T.any()
        assert block_counts.tolist() == [0] * 10
        for plain, masked in zip(threshold_gate(*inputs), threshold_gate(*inputs, torch.ones(70).bool()), strict=True):
            assert torch.equal(plain, masked)

    def test_a_negative_threshold_admits_no_padding(self) -> None:
        """Padding has cosine 0, which is above it."""
        x_TD, w_DE, _, active_E = gate_inputs(70, 16, 5)
        mask_T = torch.arange(70) % 3 > 0
        _, bits, *_, block_counts = threshold_gate(x_TD, w_DE, torch.full((5,), -0.9), active_E, ONE, False, mask_T)
        assert bits[mask_T].any()
        assert not bits[~mask_T].any()
        assert int(block_counts.sum()) == int(unpack_bits(bits, 5).sum())

    def test_gradients_of_the_real_tokens(self) -> None:
        """The mask decides only about experts; each token keeps its scores and their gradient."""
        x_TD, w_DE, threshold_E, active_E = gate_inputs(12, 8, 5)
        mask_T, d_score_TE = torch.arange(12) % 3 > 0, torch.randn(12, 5)
        d_score_TE[~mask_T] = 0  # as with a loss over the real tokens
        found = []
        for x, mask, d_score in ((x_TD, mask_T, d_score_TE), (x_TD[mask_T], None, d_score_TE[mask_T])):
            variables = [t.clone().requires_grad_() for t in (x, w_DE, ONE)]
            score = threshold_gate(variables[0], variables[1], threshold_E, active_E, variables[2], True, mask)[0]
            score.backward(d_score)
            found.append([v.grad for v in variables])
        assert not found[0][0][~mask_T].any()
        found[0][0] = found[0][0][mask_T]
        for one, other in zip(*found, strict=True):
            assert relative_rms(one, other) < 1e-6


class TestBackward:
    def test_gradcheck(self) -> None:
        x_TD, w_DE, threshold_E, active_E = (t.double() for t in gate_inputs(5, 7, 4))
        scale = torch.tensor(2.5, dtype=torch.float64)
        variables = [t.requires_grad_() for t in (x_TD, w_DE, scale)]
        assert torch.autograd.gradcheck(
            lambda x, w, tau: threshold_gate(x, w, threshold_E, active_E > 0, tau, False)[0], variables
        )

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize(("T", "D", "E"), SHAPES)
    def test_equals_the_derivative_of_the_formula(self, T: int, D: int, E: int, dtype: torch.dtype) -> None:
        x_TD, w_DE, threshold_E, active_E = gate_inputs(T, D, E, dtype)
        scale, d_score_TE = torch.tensor(3.0), torch.randn(T, E)
        variables = [t.detach().clone().requires_grad_() for t in (x_TD, w_DE, scale)]
        score_TE = threshold_gate(variables[0], variables[1], threshold_E, active_E, variables[2], False)[0]
        score_TE.backward(d_score_TE.to(score_TE.dtype))
        exact = [t.detach().double().requires_grad_() for t in (x_TD, w_DE, scale)]
        torch.sigmoid(exact[2] * cosine(exact[0], exact[1])).backward(d_score_TE.double())
        cos_TE, s_TE = cosine(x_TD, w_DE), torch.sigmoid(3 * cosine(x_TD, w_DE))
        terms_TE = d_score_TE * s_TE * (1 - s_TE)  # the gradient of scale sums these times cos, which cancel
        floor = {0: 1.0 if D == 1 else 0.0, 1: 1.0 if D == 1 else 0.0, 2: float((terms_TE * cos_TE).norm())}
        for i, (variable, reference) in enumerate(zip(variables, exact, strict=True)):
            assert variable.grad is not None
            assert reference.grad is not None
            assert variable.grad.dtype == variable.dtype
            rounding = 4e-3 if variable.dtype in (torch.bfloat16, torch.float16) else 3e-6
            size = max(float(reference.grad.norm()), floor[i])  # in one dimension the gradients of x and w are 0
            assert float((variable.grad.double() - reference.grad).norm()) <= rounding * size

    def test_zero_vectors_get_zero_gradients(self) -> None:
        x_TD, w_DE, threshold_E, active_E = gate_inputs(4, 8, 3)
        x_TD[1], w_DE[:, 2] = 0, 0
        x_TD.requires_grad_(), w_DE.requires_grad_()
        threshold_gate(x_TD, w_DE, threshold_E, active_E, ONE, False)[0].square().sum().backward()
        assert x_TD.grad is not None
        assert w_DE.grad is not None
        assert (x_TD.grad[1] == 0).all()
        assert (w_DE.grad[:, 2] == 0).all()
        assert x_TD.grad.isfinite().all()
        assert w_DE.grad.isfinite().all()
        assert (x_TD.grad[0] != 0).any()

    def test_in_the_backward_autocast_changes_nothing(self) -> None:
        """A caller may call backward() under autocast: the gate's arithmetic stays fp32."""
        grads = []
        for enabled in (False, True):
            x_TD, w_DE, threshold_E, active_E = gate_inputs(50, 64, 7)
            x_TD.requires_grad_(), w_DE.requires_grad_()
            score_TE = threshold_gate(x_TD, w_DE, threshold_E, active_E, ONE, False)[0]
            with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
                score_TE.square().sum().backward()
            grads.append((x_TD.grad, w_DE.grad))
        for plain, automatic in zip(*grads, strict=True):
            assert plain is not None
            assert automatic is not None
            assert torch.equal(plain, automatic)

    def test_a_strided_gradient(self) -> None:
        x_TD, w_DE, threshold_E, active_E = gate_inputs(6, 8, 3)
        x_TD.requires_grad_()
        threshold_gate(x_TD, w_DE, threshold_E, active_E, ONE, False)[0].sum().backward()  # expanded
        expanded, x_TD.grad = x_TD.grad, None
        threshold_gate(x_TD, w_DE, threshold_E, active_E, ONE, False)[0].backward(torch.ones(3, 6).t())
        assert expanded is not None
        assert x_TD.grad is not None
        assert relative_rms(x_TD.grad, expanded) < 1e-6

    @pytest.mark.parametrize("T", [0, 7])
    def test_opcheck(self, T: int) -> None:
        x_TD, w_DE, threshold_E, active_E = gate_inputs(T, 9, 5)
        score_TE, _, _, inv_norm_T, *_ = threshold_gate(x_TD, w_DE, threshold_E, active_E, ONE, False)
        torch.library.opcheck(threshold_gate_backward, (torch.randn(T, 5), score_TE, x_TD, w_DE, inv_norm_T, ONE))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_an_inactive_slot_may_hold_anything(value: float) -> None:
    """Its score has no gradient. Regression: times 0, its vector reached the gradients of x and of active slots."""
    x, w, G, active_E = gate_inputs(9, 16, 5)
    active_E[1] = False
    results = []
    for _ in range(2):
        leaves = [t.clone().requires_grad_() for t in (x, w, ONE)]
        score, bits, *_ = threshold_gate(leaves[0], leaves[1], G, active_E, leaves[2], False)
        score[:, active_E].square().sum().backward()
        results.append((bits, *(leaf.grad for leaf in leaves)))
        w[:, ~active_E] = value
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


class TestEdges:
    """Tokens and routing vectors at the ends of a dtype's range, and those that are not finite."""

    @pytest.mark.parametrize("fallback", [False, True])
    @pytest.mark.parametrize("exponent", [-120, -50, -41, 41, 66, 100, 120])
    @pytest.mark.parametrize("what", ["one token", "tokens", "vectors"])
    def test_a_power_of_two_changes_no_bit_of_a_score(self, what: str, exponent: int, fallback: bool) -> None:
        x_TD, w_DE, *rest = gate_inputs(33, 47, 6)
        plain = threshold_gate(x_TD, w_DE, *rest, ONE, fallback)
        if what == "vectors":
            w_DE[:, ::2] *= 2.0**exponent
        else:
            x_TD[5 : 6 if what == "one token" else None] *= 2.0**exponent
        found = threshold_gate(x_TD, w_DE, *rest, ONE, fallback)
        for i in (0, 1, 2, 4):
            assert torch.equal(found[i], plain[i])

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("size", [1e-40, 1e-30, 1e-15, 1e20, 1e30, 1e37])
    def test_every_size_has_the_formulas_decisions_and_gradients(self, size: float, dtype: torch.dtype) -> None:
        x_TD, w_DE, threshold_E, active_E = gate_inputs(33, 47, 6, torch.promote_types(dtype, torch.float32))
        size = min(max(size, 1e-6), 1e3) if dtype == torch.float16 else size
        x_TD, w_DE = (x_TD * size).to(dtype).requires_grad_(), w_DE.to(x_TD.dtype).requires_grad_()
        score_TE, bits, unrouted_T, *_ = threshold_gate(x_TD, w_DE, threshold_E, active_E, ONE, False)
        cos_TE = cosine(x_TD, w_DE)
        passed_TE, lost_T = naive_decision(cos_TE.detach(), threshold_E, active_E, False)
        assert torch.equal(unpack_bits(bits, 6), passed_TE)
        assert torch.equal(unrouted_T, lost_T)
        assert relative_rms(score_TE, cos_TE.sigmoid()) < 1e-6
        weight_TE = torch.randn(33, 6, generator=torch.Generator().manual_seed(1)) * min(size, 1)
        (score_TE * weight_TE).sum().backward()
        found, x_TD.grad, w_DE.grad = (x_TD.grad, w_DE.grad), None, None
        (cos_TE.sigmoid() * weight_TE).sum().backward()
        tolerance = 4e-3 if dtype in (torch.bfloat16, torch.float16) else 2e-6
        if size < 1e-30 and dtype != torch.float64:  # too short: 1 / ||x|| overflows
            assert not found[0].any()
        else:
            assert relative_rms(found[0].double() * size, x_TD.grad.double() * size) < tolerance
            assert relative_rms(found[1], w_DE.grad) < 2e-6 if size < 1e37 else found[1].isfinite().all()

    @pytest.mark.parametrize("masked", [False, True])
    @pytest.mark.parametrize("fallback", [False, True])
    @pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
    def test_a_token_that_is_not_finite_gets_the_first_active_expert(
        self, value: float, fallback: bool, masked: bool
    ) -> None:
        x_TD, w_DE, _, active_E = gate_inputs(9, 16, 5)
        active_E[:2] = torch.tensor([False, True])
        threshold_E = torch.full((5,), -0.2)  # a cosine of 0 would pass
        x_TD[4, 3] = value
        mask_T = torch.arange(9) != 4 if masked else None
        _, bits, unrouted_T, inv_norm_T, counts = threshold_gate(
            x_TD, w_DE, threshold_E, active_E, ONE, fallback, mask_T
        )
        assert unpack_bits(bits, 5)[4].tolist() == [False, not masked, False, False, False]
        assert bool(unrouted_T[4]) is not masked
        assert torch.equal(counts, unpack_bits(bits, 5).sum(dim=0, dtype=torch.int32))
        assert bool(inv_norm_T[4].isnan()) is not masked

    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    def test_it_gives_the_router_no_gradient(self, value: float) -> None:
        x_TD, w_DE, threshold_E, active_E = gate_inputs(9, 16, 5)
        d_score_TE = torch.randn(9, 5, generator=torch.Generator().manual_seed(1))
        d_score_TE[4] = 0
        results = []
        for _ in range(2):
            x, w = x_TD.clone().requires_grad_(), w_DE.clone().requires_grad_()
            threshold_gate(x, w, threshold_E, active_E, ONE, False)[0].backward(d_score_TE)
            results.append((x.grad[torch.arange(9) != 4], w.grad))
            x_TD[4, 2] = value
        for clean, dirty in zip(*results, strict=True):
            assert torch.equal(clean, dirty)
            assert dirty.any()

    @pytest.mark.parametrize("fallback", [False, True])
    @pytest.mark.parametrize("broken", ["vector nan", "vector inf", "threshold nan"])
    def test_an_active_expert_that_is_not_finite_shows(self, broken: str, fallback: bool) -> None:
        """Every token activates it, so its NaN reaches the gradients. Regression: no token did, and it was pruned."""
        x_TD, w_DE, threshold_E, _ = gate_inputs(9, 16, 5)
        active_E = torch.tensor([True, True, True, False, True])
        x_TD[7] = float("nan")
        clean = unpack_bits(threshold_gate(x_TD, w_DE, threshold_E, active_E, ONE, fallback)[1], 5)
        for e in (2, 3):  # slot 3 is inactive: what it holds changes nothing
            if broken == "threshold nan":
                threshold_E[e] = float("nan")
            else:
                w_DE[1, e] = float(broken.split()[1])
        _, bits, unrouted_T, *_ = threshold_gate(x_TD, w_DE, threshold_E, active_E, ONE, fallback)
        assigned_TE = unpack_bits(bits, 5)
        assert assigned_TE[:, 2].all()
        assert not assigned_TE[:, 3].any()
        if not fallback:
            finite_T = torch.arange(9) != 7
            assert torch.equal(assigned_TE[finite_T][:, [0, 1, 4]], clean[finite_T][:, [0, 1, 4]])
        assert not unrouted_T.any()

"""Dispatch, combine and row gates against plain loops; unused rows are poisoned."""

from __future__ import annotations

import pytest
import torch
from helpers import relative_rms
from torch import Tensor

from dynmoe_tutel import kernels
from dynmoe_tutel.kernels import combine, dispatch, dispatch_combine, pack_bits, ragged_index, row_gates

HALF = (torch.bfloat16, torch.float16)
DTYPES = (torch.float32, torch.float64, *HALF)
SHAPES = [(7, 97, 65, 0.3), (0, 5, 3, 0.5), (6, 5, 3, 0.0), (4, 1, 1, 1.0), (5, 47, 512, 0.02), (9, 8, 4, 1.0)]


def tolerance(dtype: torch.dtype) -> float:
    return 4e-3 if dtype in HALF else 1e-6


class Index:
    """A random assignment and its index arrays, with `spare` entries of -1 past A."""

    def __init__(self, T: int, E: int, density: float, spare: int | None = None, seed: int = 0) -> None:
        self.assigned_TE = torch.rand(T, E, generator=torch.Generator().manual_seed(seed)) < density
        self.T, self.E, self.A = T, E, int(self.assigned_TE.sum())
        capacity = -1 if spare is None else self.A + spare
        self.all = kernels.Index(*ragged_index(pack_bits(self.assigned_TE), E, capacity))
        self.expert_offsets, self.token_offsets, self.token_of_row, self.row_of_assignment = self.all
        self.csr = self.all[1:]
        self.num_rows = self.token_of_row.shape[0]
        self.pairs = [(t, e) for e in range(E) for t in range(T) if self.assigned_TE[t, e]]  # of each row
        self.k_T1 = self.assigned_TE.sum(1, keepdim=True)


def naive_combine(rows_AD: Tensor, index: Index, mean: bool) -> Tensor:
    y_TD = [torch.zeros_like(rows_AD[0]) if index.A else rows_AD.new_zeros(rows_AD.shape[1])] * index.T
    for row, (t, _) in enumerate(index.pairs):
        y_TD[t] = y_TD[t] + rows_AD[row]
    stacked = torch.stack(y_TD) if index.T else rows_AD.new_zeros(0, rows_AD.shape[1])
    return stacked / index.k_T1.clamp(min=1) if mean else stacked


class TestDispatch:
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize(("T", "D", "E", "density"), SHAPES)
    def test_a_row_is_its_token(self, T: int, D: int, E: int, density: float, dtype: torch.dtype) -> None:
        index, x_TD = Index(T, E, density), torch.randn(T, D).to(dtype)
        rows_AD = dispatch(x_TD, *index.csr)
        assert rows_AD.dtype == dtype
        assert torch.equal(rows_AD, x_TD[[t for t, _ in index.pairs]] if index.pairs else x_TD.new_zeros(0, D))

    def test_tokens_of_any_strides(self) -> None:
        index, wide = Index(7, 5, 0.5), torch.randn(14, 26)
        for x_TD in (wide[::2, ::2], wide[:7, 3:16], wide[:13, :7].t(), wide[:1].expand(7, 26)):
            assert torch.equal(dispatch(x_TD, *index.csr), dispatch(x_TD.contiguous(), *index.csr))

    @pytest.mark.parametrize("spare", [None, 0, 4])
    def test_gradient(self, spare: int | None) -> None:
        index = Index(6, 4, 0.5, spare)
        x_TD = torch.randn(6, 3, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(lambda x: dispatch(x, *index.csr)[: index.A], (x_TD,))

    def test_nothing_leaks_from_behind_the_last_row(self, poisoned: None) -> None:
        index = Index(6, 4, 0.5, spare=5)
        x_TD = torch.randn(6, 3, requires_grad=True)
        rows_AD = dispatch(x_TD, *index.csr)
        assert rows_AD[: index.A].isfinite().all()
        d_rows_AD = torch.full_like(rows_AD, float("nan"))
        d_rows_AD[: index.A] = 1
        rows_AD.backward(d_rows_AD)
        assert x_TD.grad is not None
        assert torch.equal(x_TD.grad, index.k_T1.expand(6, 3).float())

    @pytest.mark.parametrize(("T", "density"), [(6, 0.5), (6, 0.0), (0, 0.5)])
    def test_opcheck(self, T: int, density: float) -> None:
        index = Index(T, 4, density)
        torch.library.opcheck(dispatch, (torch.randn(T, 3, requires_grad=True), *index.csr))

    def test_opcheck_with_spare_rows(self) -> None:
        """Unused rows are undefined, so it compares shapes and not values."""
        index, checks = Index(6, 4, 0.5, 3), ("test_schema", "test_faketensor", "test_autograd_registration")
        torch.library.opcheck(dispatch, (torch.randn(6, 3), *index.csr), test_utils=checks)


class TestCombine:
    @pytest.mark.parametrize("mean", [False, True])
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize(("T", "D", "E", "density"), SHAPES)
    def test_sum_and_mean(self, T: int, D: int, E: int, density: float, dtype: torch.dtype, mean: bool) -> None:
        index = Index(T, E, density)
        rows_AD = torch.randn(index.A, D).to(dtype)
        y_TD = combine(rows_AD, *index.csr, mean)
        assert y_TD.dtype == dtype
        assert y_TD.shape == (T, D)
        assert relative_rms(y_TD, naive_combine(rows_AD.double(), index, mean)) < tolerance(dtype)
        assert (y_TD[index.k_T1.squeeze(1) == 0] == 0).all()

    def test_in_the_order_of_the_experts_bit_by_bit(self) -> None:
        index = Index(50, 40, 0.5)
        rows_AD = torch.randn(index.A, 33) * torch.logspace(-3, 3, index.A).unsqueeze(1)
        assert torch.equal(combine(rows_AD, *index.csr, False), naive_combine(rows_AD, index, False))

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("D", [97, 64])
    def test_a_token_gets_the_same_bits_alone_and_in_a_batch(self, D: int, dtype: torch.dtype) -> None:
        index = Index(40, 24, 0.5)
        rows_AD = torch.randn(index.A, D).to(dtype)
        y_TD = combine(rows_AD, *index.csr, True)
        for t in (0, 17, 39):
            own = [row for row, (token, _) in enumerate(index.pairs) if token == t]
            alone = ragged_index(pack_bits(index.assigned_TE[t : t + 1]), 24)[1:]
            assert torch.equal(combine(rows_AD[own], *alone, True)[0], y_TD[t])

    @pytest.mark.parametrize("dtype", HALF)
    @pytest.mark.parametrize("D", [97, 64, 1])
    def test_half_precision_is_summed_in_fp32(self, D: int, dtype: torch.dtype) -> None:
        """512 ones: a bf16 sum would stop at 256, an fp16 sum would be right; 0.001 exposes fp16."""
        index = Index(2, 512, 1.0)
        for value in (1.0, 0.001):
            rows_AD = torch.full((index.A, D), value).to(dtype)
            expected = naive_combine(rows_AD.double(), index, False)
            assert relative_rms(combine(rows_AD, *index.csr, False), expected) < 4e-3

    @pytest.mark.parametrize("value", [1500.0, 30000.0])
    def test_the_mean_of_fp16_rows_does_not_overflow_in_its_sum(self, value: float) -> None:
        """65 rows of 1500 sum to 97500, above fp16's 65504; their mean is 1500."""
        index = Index(3, 65, 1.0)
        y_TD = combine(torch.full((index.A, 8), value, dtype=torch.float16), *index.csr, True)
        assert (y_TD == value).all()

    @pytest.mark.parametrize("mean", [False, True])
    @pytest.mark.parametrize("spare", [None, 0, 4])
    def test_gradient(self, spare: int | None, mean: bool) -> None:
        index = Index(6, 4, 0.5, spare)
        rows_AD = torch.randn(index.num_rows, 3, dtype=torch.float64, requires_grad=True)

        def combined(real_AD: Tensor) -> Tensor:
            padding = rows_AD.detach()[index.A :]
            return combine(torch.cat([real_AD, padding]), *index.csr, mean)

        assert torch.autograd.gradcheck(combined, (rows_AD.detach()[: index.A].requires_grad_(),))

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_gradient_of_every_dtype(self, dtype: torch.dtype) -> None:
        index = Index(7, 65, 0.3)
        rows_AD = torch.randn(index.A, 97).to(dtype).requires_grad_()
        d_y_TD = torch.randn(97, 7).to(dtype).t()
        combine(rows_AD, *index.csr, True).backward(d_y_TD)
        expected = torch.stack([d_y_TD[t].double() / index.k_T1[t] for t, _ in index.pairs])
        assert rows_AD.grad is not None
        assert rows_AD.grad.dtype == dtype
        assert relative_rms(rows_AD.grad, expected) < tolerance(dtype)

    def test_rows_and_gradients_of_any_strides(self) -> None:
        index = Index(6, 4, 0.5)
        rows_AD = torch.randn(10, index.A).t().requires_grad_()
        y_TD = combine(rows_AD[:, ::2], *index.csr, True)
        assert torch.equal(y_TD, combine(rows_AD[:, ::2].contiguous(), *index.csr, True))
        y_TD.sum().backward()  # an expanded gradient, of stride 0
        assert rows_AD.grad is not None
        assert relative_rms(rows_AD.grad[:, 0], 1 / index.k_T1[[t for t, _ in index.pairs], 0].double()) < 1e-6
        assert (rows_AD.grad[:, 1] == 0).all()

    @pytest.mark.parametrize("mean", [False, True])
    def test_nothing_leaks_from_behind_the_last_row(self, poisoned: None, mean: bool) -> None:
        index = Index(6, 4, 0.5, spare=5)
        real_AD = torch.randn(index.A, 3)
        rows_AD = torch.cat([real_AD, torch.full((5, 3), float("nan"))]).requires_grad_()
        y_TD = combine(rows_AD, *index.csr, mean)
        assert torch.equal(y_TD, combine(real_AD, *Index(6, 4, 0.5).csr, mean))
        y_TD.sum().backward()
        assert rows_AD.grad is not None
        assert rows_AD.grad[: index.A].isfinite().all()

    @pytest.mark.parametrize("T", [0, 6])
    @pytest.mark.parametrize("mean", [False, True])
    def test_opcheck(self, T: int, mean: bool) -> None:
        index = Index(T, 4, 0.5)
        torch.library.opcheck(combine, (torch.randn(index.A, 3, requires_grad=True), *index.csr, mean))
        d_y_TD = torch.randn(T, 3)
        torch.library.opcheck(
            dispatch_combine.combine_backward, (d_y_TD, index.token_offsets, index.token_of_row, mean)
        )

    def test_dispatch_and_combine_are_transposes(self) -> None:
        index = Index(20, 65, 0.2)
        x_TD, rows_AD = torch.randn(20, 9, dtype=torch.float64), torch.randn(index.A, 9, dtype=torch.float64)
        there = (dispatch(x_TD, *index.csr) * rows_AD).sum()
        back = (x_TD * combine(rows_AD, *index.csr, False)).sum()
        assert torch.allclose(there, back, rtol=1e-12)


def straight_through(d_gate_A: Tensor, unrouted_T: Tensor, index: Index, centred: bool) -> tuple[Tensor, Tensor]:
    """dL/ds and dL/dtheta by their formula: the row's gradient, minus the token's mean if centred."""
    d_score_TE = torch.zeros(index.T, index.E, dtype=torch.float64)
    for row, (t, e) in enumerate(index.pairs):
        d_score_TE[t, e] = d_gate_A[row]
    if centred:
        mean_T1 = d_score_TE.sum(1, keepdim=True) / index.k_T1.clamp(min=1)
        d_score_TE -= mean_T1 * index.assigned_TE
    d_score_TE[unrouted_T] = 0
    return d_score_TE, -d_score_TE.sum(0)


class TestRowGates:
    @pytest.mark.parametrize("centred", [False, True])
    @pytest.mark.parametrize("spare", [None, 4])
    @pytest.mark.parametrize(("T", "D", "E", "density"), SHAPES)
    def test_top_any_gates_are_one_and_pass_the_gradient_straight_through(
        self, T: int, D: int, E: int, density: float, spare: int | None, centred: bool
    ) -> None:
        index = Index(T, E, density, spare)
        unrouted_T = torch.arange(T) % 5 == 1  # also tokens with rows: in eval they got their best expert
        score_TE = torch.rand(T, E).requires_grad_()
        threshold_E = torch.rand(E).requires_grad_()
        gate_A = row_gates(score_TE, threshold_E, unrouted_T, index.all, centred)
        assert gate_A.shape == (index.num_rows,)
        assert (gate_A == 1).all()
        d_gate_A = torch.randn(index.num_rows)
        d_gate_A[index.A :] = float("nan")
        gate_A.backward(d_gate_A)
        d_score_TE, d_threshold_E = straight_through(d_gate_A, unrouted_T, index, centred)
        assert score_TE.grad is not None
        assert threshold_E.grad is not None
        assert relative_rms(score_TE.grad, d_score_TE) < 1e-6
        assert relative_rms(threshold_E.grad, d_threshold_E) < 1e-6
        assert (score_TE.grad[~index.assigned_TE] == 0).all()

    def test_centred_gradients_of_a_token_sum_to_zero(self) -> None:
        index, score_TE = Index(30, 8, 0.5), torch.rand(30, 8).requires_grad_()
        gate_A = row_gates(score_TE, torch.zeros(8), torch.zeros(30, dtype=torch.bool), index.all, True)
        gate_A.backward(torch.randn(index.A))
        assert score_TE.grad is not None
        assert score_TE.grad.sum(1).abs().max() < 1e-5
        assert (score_TE.grad[index.k_T1.squeeze(1) == 1] == 0).all()

    @pytest.mark.parametrize("spare", [None, 4])
    @pytest.mark.parametrize(("T", "D", "E", "density"), SHAPES)
    def test_fixed_k_gates_are_the_weights(self, T: int, D: int, E: int, density: float, spare: int | None) -> None:
        index = Index(T, E, density, spare)
        weight_TE = torch.rand(E, T).t().requires_grad_()
        gate_A = row_gates(weight_TE, None, torch.zeros(T, dtype=torch.bool), index.all, False)
        values = [weight_TE[t, e] for t, e in index.pairs]
        assert torch.equal(gate_A[: index.A], torch.stack(values) if values else torch.zeros(0))
        d_gate_A = torch.randn(index.num_rows)
        d_gate_A[index.A :] = float("nan")
        gate_A.backward(d_gate_A)
        assert weight_TE.grad is not None
        for row, (t, e) in enumerate(index.pairs):
            assert weight_TE.grad[t, e] == d_gate_A[row]
        assert (weight_TE.grad[~index.assigned_TE] == 0).all()

    def test_gradcheck_of_fixed_k(self) -> None:
        index = Index(6, 4, 0.5)
        weight_TE = torch.rand(6, 4, dtype=torch.float64, requires_grad=True)
        unrouted_T = torch.zeros(6, dtype=torch.bool)
        assert torch.autograd.gradcheck(lambda w: row_gates(w, None, unrouted_T, index.all, False), (weight_TE,))

    def test_token_times_slots_beyond_int32(self) -> None:
        """Pair 30000 * 100000 + 0 of row 0 does not fit in the index arrays' int32."""
        E = 100_000
        expert_offsets = torch.ones(E + 1, dtype=torch.int32)
        expert_offsets[0] = 0
        pair_A = dispatch_combine._pair_of_row(E, expert_offsets, torch.tensor([30_000], dtype=torch.int32))
        assert pair_A.tolist() == [3_000_000_000]

    @pytest.mark.parametrize("T", [0, 6])
    @pytest.mark.parametrize("centred", [False, True])
    def test_opcheck(self, T: int, centred: bool) -> None:
        index, unrouted_T = Index(T, 4, 0.5), torch.zeros(T, dtype=torch.bool)
        weight_TE = torch.rand(T, 4, requires_grad=True)
        torch.library.opcheck(row_gates, (weight_TE, None, unrouted_T, index.all, False))
        # the straight-through gradient is no derivative, but a traced backward must agree with it
        threshold_E = torch.rand(4, requires_grad=True)
        torch.library.opcheck(row_gates, (weight_TE, threshold_E, unrouted_T, index.all, centred))
        for straight in (False, True):
            d_gate_A = torch.randn(index.A)
            torch.library.opcheck(
                dispatch_combine.row_gates_backward, (d_gate_A, unrouted_T, index.all, straight, centred)
            )

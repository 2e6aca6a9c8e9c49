"""Ragged expert networks against the same networks row by row in float64, with every gradient."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from cases import DTYPES, HALF, NAIVE_ACTIVATIONS, NAMES, SHAPES, Case, tolerance
from helpers import relative_rms
from torch import Tensor, nn

from dynmoe_tutel.kernels import (
    ACTIVATIONS,
    ExpertWeights,
    Index,
    activation_name,
    combine,
    dispatch,
    grouped_ffn,
    grouped_linear,
    pack_bits,
    ragged_index,
)
from dynmoe_tutel.kernels.grouped_ffn import grouped_ffn_backward, grouped_linear_backward


@pytest.fixture(params=[False, True], ids=["widened", "native"])
def native(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Half-precision GEMMs both ways: in fp32, as on a processor without them, and in their own type."""
    module = sys.modules["dynmoe_tutel.kernels.grouped_ffn"]
    widened = () if request.param else HALF
    monkeypatch.setattr(module, "gemm_dtype", lambda dtype, *device: torch.float32 if dtype in widened else dtype)
    return bool(request.param)


class TestForward:
    @pytest.mark.parametrize("save", [True, False])
    @pytest.mark.parametrize("gated", [False, True])
    @pytest.mark.parametrize("biases", [True, False])
    @pytest.mark.parametrize(("T", "D", "H", "Dout", "E", "density"), SHAPES)
    def test_equals_the_rows_one_by_one(
        self, T: int, D: int, H: int, Dout: int, E: int, density: float, biases: bool, gated: bool, save: bool
    ) -> None:
        for apply_gate in (False, True):
            case = Case(T, D, H, Dout, E, density, biases=biases, gated=gated, apply_gate=apply_gate)
            rows, h, u = grouped_ffn(*case.arguments(case.tensors, save))
            scale = case.scales(torch.zeros(case.A, Dout))["rows"]
            assert relative_rms(rows, case.naive(case.tensors), scale) < 1e-6
            assert h.shape == (case.A if save else 0, H)
            assert u.shape == (case.A if save and gated else 0, H)

    @pytest.mark.parametrize("activation", list(ACTIVATIONS))
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_every_activation_in_every_dtype(self, dtype: torch.dtype, activation: str, native: bool) -> None:
        for gated in (False, True):
            case = Case(33, 16, 24, 8, 4, dtype=dtype, activation=activation, gated=gated, apply_gate=True)
            rows = case.run(case.tensors)
            assert rows.dtype == dtype
            limit = (1e-2 if native else 6e-3) if dtype in HALF else 1e-6  # the square doubles the error of h
            assert relative_rms(rows, case.naive(case.tensors)) < limit

    def test_there_is_a_naive_form_of_every_activation(self) -> None:
        assert set(ACTIVATIONS) == set(NAIVE_ACTIVATIONS)

    def test_saving_changes_no_bit(self) -> None:
        case = Case(33, 97, 47, 8, 5, gated=True)
        assert torch.equal(case.run(case.tensors, save=True), case.run(case.tensors, save=False))

    @pytest.mark.parametrize("elements", [1, 100, 2000])
    def test_blocks_of_experts_do_not_show(self, elements: int, monkeypatch: pytest.MonkeyPatch) -> None:
        """Experts with few rows share a block; the size of the block changes at most the last bit."""
        case = Case(40, 12, 10, 7, 65, 0.1, gated=True, apply_gate=True)
        d_rows_AO = torch.randn(case.A, 7)
        rows, grads = case.run(case.tensors), case.grads("run", d_rows_AO)
        monkeypatch.setattr(sys.modules["dynmoe_tutel.kernels.grouped_ffn"], "BLOCK_ELEMENTS", elements)
        assert relative_rms(case.run(case.tensors), rows) < 1e-6
        for name, grad in case.grads("run", d_rows_AO).items():
            assert relative_rms(grad, grads[name]) < 1e-6, name

    def test_two_runs_are_bitwise_equal(self) -> None:
        case = Case(200, 64, 96, 64, 9)
        assert torch.equal(case.run(case.tensors), case.run(case.tensors))
        d_rows_AO = torch.randn(case.A, 64)
        for first, second in zip(
            case.grads("run", d_rows_AO).values(), case.grads("run", d_rows_AO).values(), strict=True
        ):
            assert torch.equal(first, second)

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_a_token_gets_the_same_alone_and_in_any_order(self, dtype: torch.dtype) -> None:
        T, D, E = 30, 33, 6
        case = Case(T, D, 20, D, E, dtype=dtype)
        assigned_TE = torch.zeros(T, E, dtype=torch.bool)
        for t, e in case.pairs:
            assigned_TE[t, e] = True

        def layer(some_T: Tensor) -> Tensor:
            index = Index(*ragged_index(pack_bits(assigned_TE[some_T]), E))
            weights = ExpertWeights(*(case.tensors[name] for name in NAMES[2:]))
            x_TD, gate_A = case.tensors["x"][some_T], torch.ones(index.rows)
            return combine(grouped_ffn(x_TD, gate_A, index, weights, "gelu", False, False)[0], *index[1:], True)

        together = layer(torch.arange(T))
        order_T = torch.randperm(T, generator=torch.Generator().manual_seed(1))
        for some_T in (order_T, order_T[:7], order_T[:1]):
            assert relative_rms(layer(some_T), together[some_T]) < (4e-3 if dtype in HALF else 1e-6)

    @pytest.mark.parametrize("dtype", HALF)
    def test_autocast_inside_the_operation_changes_nothing(self, dtype: torch.dtype) -> None:
        """Products run in the operation's own type: autocast around it must not round them again."""
        case = Case(60, 64, 96, 64, 4, dtype=dtype)
        plain = case.run(case.tensors)
        with torch.autocast("cpu", dtype):
            automatic = case.run(case.tensors)
        assert torch.equal(plain, automatic)

    @pytest.mark.parametrize("gated", [False, True])
    def test_fp32_stays_fp32_under_autocast(self, gated: bool) -> None:
        """Also in the backward: a caller may call backward() under autocast."""
        case = Case(60, 64, 96, 64, 4, gated=gated, apply_gate=True)
        d_rows_AO = torch.randn(case.A, 64)
        plain, grads = case.run(case.tensors), case.grads("run", d_rows_AO)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(case.run(case.tensors), plain)
            for name, grad in case.grads("run", d_rows_AO).items():
                assert torch.equal(grad, grads[name]), name


class TestBackward:
    @pytest.mark.parametrize("apply_gate", [False, True])
    @pytest.mark.parametrize("gated", [False, True])
    @pytest.mark.parametrize("biases", [True, False])
    def test_gradcheck(self, biases: bool, gated: bool, apply_gate: bool) -> None:
        case = Case(5, 4, 3, 2, 3, 0.6, torch.float64, biases, gated, apply_gate=apply_gate)
        names = [name for name, t in case.tensors.items() if t is not None]
        if not apply_gate:
            names.remove("gate")  # the constant 1 in the forward: its gradient is checked below

        def rows(*leaves: Tensor) -> Tensor:
            return case.run({**case.tensors, **dict(zip(names, leaves, strict=True))})

        variables = case.variables()
        assert torch.autograd.gradcheck(rows, [variables[name] for name in names])

    @pytest.mark.parametrize("apply_gate", [False, True])
    @pytest.mark.parametrize("gated", [False, True])
    @pytest.mark.parametrize("biases", [True, False])
    @pytest.mark.parametrize(("T", "D", "H", "Dout", "E", "density"), SHAPES)
    def test_equals_the_gradient_of_the_rows_one_by_one(
        self, T: int, D: int, H: int, Dout: int, E: int, density: float, biases: bool, gated: bool, apply_gate: bool
    ) -> None:
        case = Case(T, D, H, Dout, E, density, biases=biases, gated=gated, apply_gate=apply_gate)
        d_rows_AO = torch.randn(case.A, Dout, dtype=torch.float64)
        grads, exact = case.grads("run", d_rows_AO), case.grads("naive", d_rows_AO)
        scales = case.scales(d_rows_AO)
        for name, reference in exact.items():
            assert relative_rms(grads[name], reference, scales[name]) < 1e-6, name

    @pytest.mark.parametrize("activation", list(ACTIVATIONS))
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_every_activation_in_every_dtype(self, dtype: torch.dtype, activation: str, native: bool) -> None:
        for gated in (False, True):
            case = Case(33, 16, 24, 8, 4, dtype=dtype, activation=activation, gated=gated, apply_gate=True)
            d_rows_AO = torch.randn(case.A, 8, dtype=torch.float64).to(dtype).double()
            grads, exact = case.grads("run", d_rows_AO), case.grads("naive", d_rows_AO)
            for name, reference in exact.items():
                assert relative_rms(grads[name], reference) < tolerance(dtype), name

    def test_the_gate_gradient_is_the_row_times_its_gradient(self) -> None:
        """d_gate = <d_row, row / gate>, also for the constant gate value 1 of a top-any gate."""
        case = Case(33, 16, 24, 8, 4)
        d_rows_AO = torch.randn(case.A, 8)
        rows = case.run(case.tensors)
        assert relative_rms(case.grads("run", d_rows_AO)["gate"], (d_rows_AO * rows).sum(1)) < 1e-5

    def test_silent_experts_get_zero_gradients(self) -> None:
        case = Case(7, 5, 4, 5, 3, gated=True)
        assert all(e != 0 for _, e in case.pairs)
        grads = case.grads("run", torch.ones(case.A, 5))
        for name in NAMES[2:]:
            assert (grads[name][0] == 0).all()
            assert (grads[name][1:] != 0).any()

    def test_gradients_have_the_strides_of_their_parameters(self) -> None:
        case = Case(7, 5, 4, 5, 3)
        w1 = case.grads("run", torch.ones(case.A, 5))["w1"]
        assert w1.stride() == case.tensors["w1"].stride()

    @pytest.mark.parametrize("frozen", ["weights", "tokens", "all but the gate"])
    def test_only_what_needs_a_gradient_gets_one(self, frozen: str) -> None:
        case = Case(7, 5, 4, 5, 3, gated=True, apply_gate=True)
        variables = case.variables()
        names = {"weights": NAMES[2:], "tokens": ("x", "gate"), "all but the gate": ("x", *NAMES[2:])}[frozen]
        for name in names:
            variable = variables[name]
            variable.requires_grad_(False)
        d_rows_AO = torch.randn(case.A, 5)
        case.run(variables).backward(d_rows_AO)
        exact = case.grads("run", d_rows_AO)
        for name, variable in variables.items():
            if name in names:
                assert variable.grad is None
            else:
                assert variable.grad is not None
                assert torch.equal(variable.grad, exact[name])

    def test_strided_tokens_and_an_expanded_gradient(self) -> None:
        case = Case(14, 26, 9, 6, 3)
        wide = torch.randn(28, 52, requires_grad=True)
        strided, contiguous = wide[::2, ::2], wide.detach()[::2, ::2].contiguous().requires_grad_()
        first = case.run({**case.tensors, "x": strided})
        second = case.run({**case.tensors, "x": contiguous})
        assert torch.equal(first, second)
        first.sum().backward()
        second.backward(torch.ones(6, case.A).t())
        assert wide.grad is not None
        assert contiguous.grad is not None
        assert torch.equal(wide.grad[::2, ::2], contiguous.grad)

    def test_saved_tensors_are_unpacked_once(self) -> None:
        """Non-reentrant gradient checkpointing refuses a backward that reads ctx.saved_tensors twice."""
        case, count = Case(7, 5, 4, 5, 3), [0, 0]

        def pack(t: Tensor) -> Tensor:
            count[0] += 1
            return t

        def unpack(t: Tensor) -> Tensor:
            count[1] += 1
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            case.run(case.variables()).sum().backward()
            assert count[0] == count[1] > 0
            rows_AD = torch.randn(case.A, 5, requires_grad=True)
            w_EDO = torch.randn(3, 5, 6, requires_grad=True)
            grouped_linear(rows_AD, case.index[0], w_EDO, torch.zeros(3, 6, requires_grad=True)).sum().backward()
        assert count[0] == count[1]

    @pytest.mark.parametrize("apply_gate", [False, True])
    @pytest.mark.parametrize("gated", [False, True])
    def test_nothing_leaks_from_behind_the_last_row(self, poisoned: None, gated: bool, apply_gate: bool) -> None:
        exact = Case(9, 6, 5, 6, 4, gated=gated, apply_gate=apply_gate)
        padded = Case(9, 6, 5, 6, 4, gated=gated, apply_gate=apply_gate, spare=7)
        gate_A = padded.tensors["gate"]
        padded.tensors = {**exact.tensors, "gate": gate_A}
        gate_A[: exact.A], gate_A[exact.A :] = exact.tensors["gate"], float("nan")
        assert torch.equal(padded.run(padded.tensors)[: exact.A], exact.run(exact.tensors))
        d_rows_AO = torch.randn(exact.A + 7, 6)
        d_rows_AO[exact.A :] = float("nan")
        first, second = padded.grads("run", d_rows_AO), exact.grads("run", d_rows_AO[: exact.A])
        for name in first:
            assert torch.equal(first[name][: exact.A] if name == "gate" else first[name], second[name]), name

    @pytest.mark.parametrize(("T", "gated", "biases"), [(7, True, True), (7, False, False), (0, False, True)])
    def test_opcheck(self, T: int, gated: bool, biases: bool) -> None:
        case = Case(T, 5, 4, 6, 3, gated=gated, biases=biases, apply_gate=True)
        torch.library.opcheck(grouped_ffn, case.arguments(case.variables()))
        rows, h, u = grouped_ffn(*case.arguments(case.tensors))
        inputs = case.arguments(case.tensors)[:-1]
        torch.library.opcheck(grouped_ffn_backward, (torch.randn_like(rows), h, u, *inputs, gated))

    def test_opcheck_without_saving(self) -> None:
        case = Case(7, 5, 4, 6, 3, biases=False)
        torch.library.opcheck(grouped_ffn, case.arguments(case.tensors, save=False))


class TestRecompute:
    """A forward that keeps no pre-activations; its backward recomputes them."""

    @pytest.mark.parametrize("engine", ["torch", "grouped_mm"])
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_gradients_are_the_same_bit_by_bit(self, dtype: torch.dtype, engine: str, native: bool) -> None:
        for options in ({}, {"gated": True, "apply_gate": True}, {"gated": True, "biases": False, "spare": 5}):
            case = Case(33, 17, 23, 8, 5, dtype=dtype, activation="silu", engine=engine, **options)
            d_rows_AO = torch.randn(case.num_rows, 8)
            kept, again = (case.grads("run", d_rows_AO, save) for save in (True, False))
            for name, grad in kept.items():
                rows = slice(case.A) if name == "gate" else slice(None)
                assert torch.equal(again[name][rows], grad[rows]), name

    @pytest.mark.parametrize("elements", [1, 100, 2000])
    def test_in_blocks_of_experts(self, elements: int, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(sys.modules["dynmoe_tutel.kernels.grouped_ffn"], "BLOCK_ELEMENTS", elements)
        case = Case(40, 12, 10, 7, 65, 0.1, gated=True, apply_gate=True)
        d_rows_AO = torch.randn(case.A, 7)
        kept, again = (case.grads("run", d_rows_AO, save) for save in (True, False))
        for name, grad in kept.items():
            assert torch.equal(again[name], grad), name

    @pytest.mark.parametrize("frozen", [NAMES[2:], ("x", "gate")])
    def test_where_only_some_learn(self, frozen: tuple[str, ...]) -> None:
        case = Case(7, 5, 4, 5, 3, gated=True, apply_gate=True)
        variables, d_rows_AO = case.variables(), torch.randn(case.A, 5)
        for name in frozen:
            variables[name].requires_grad_(False)
        case.run(variables, save=False).backward(d_rows_AO)
        exact = case.grads("run", d_rows_AO)
        for name, variable in variables.items():
            assert (variable.grad is None) == (name in frozen)
            assert name in frozen or torch.equal(variable.grad, exact[name])

    @pytest.mark.parametrize("T", [7, 0])
    def test_opcheck(self, T: int) -> None:
        case = Case(T, 5, 4, 6, 3, gated=True)
        torch.library.opcheck(grouped_ffn, case.arguments(case.variables(), save=False))
        rows, h, u = grouped_ffn(*case.arguments(case.tensors, save=False))
        assert h.shape == u.shape == (0, 4)
        inputs = case.arguments(case.tensors)[:-1]
        torch.library.opcheck(grouped_ffn_backward, (torch.ones_like(rows), h, u, *inputs, True))

    @pytest.mark.parametrize("apply_gate", [False, True])
    @pytest.mark.parametrize("gated", [False, True])
    @pytest.mark.parametrize("engine", ["torch", "grouped_mm"])
    def test_what_is_kept(self, engine: str, gated: bool, apply_gate: bool) -> None:
        """It keeps x, the index, with `save` the pre-activations, and the gate only if it is applied."""
        case = Case(33, 16, 24, 8, 4, gated=gated, apply_gate=apply_gate, spare=3, engine=engine)
        parameters = {t.untyped_storage().data_ptr() for n, t in case.tensors.items() if n[0] in "wb" and t is not None}
        for save in (True, False):
            kept: dict[int, int] = {}

            def keep(t: Tensor, kept: dict[int, int] = kept) -> Tensor:
                storage = t.untyped_storage()
                if storage.nbytes() and storage.data_ptr() not in parameters:
                    kept[storage.data_ptr()] = storage.nbytes()
                return t

            with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
                rows = case.run(case.variables(), save)
            expected = [case.tensors["x"], *case.index, *([case.tensors["gate"]] if apply_gate else [])]
            size = sum(t.untyped_storage().nbytes() for t in expected)
            assert sum(kept.values()) == size + save * (1 + gated) * case.num_rows * 24 * 4
            rows.sum().backward()


class TestLinear:
    @pytest.mark.parametrize("bias", [True, False])
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_equals_the_fused_operation_in_stages(self, dtype: torch.dtype, bias: bool, native: bool) -> None:
        case = Case(33, 16, 24, 8, 4, dtype=dtype, biases=bias, activation="silu")
        d_rows_AO = torch.randn(case.A, 8).to(dtype)
        exact, variables = case.grads("naive", d_rows_AO), case.variables()
        x, w1, b1, w2, b2 = (variables[name] for name in ("x", "w1", "b1", "w2", "b2"))
        offsets = case.index[0]
        rows = grouped_linear(F.silu(grouped_linear(dispatch(x, *case.index[1:]), offsets, w1, b1)), offsets, w2, b2)
        assert rows.dtype == dtype
        assert relative_rms(rows, case.naive(case.tensors)) < (8e-3 if dtype in HALF else 1e-6)
        rows.backward(d_rows_AO)
        for name, variable in variables.items():
            if variable is not None and name != "gate":
                assert relative_rms(variable.grad, exact[name]) < tolerance(dtype), name

    def test_gradcheck(self) -> None:
        case = Case(5, 4, 3, 2, 3, 0.6, torch.float64)
        rows_AD = torch.randn(case.A, 4, dtype=torch.float64, requires_grad=True)
        w1, b1 = case.variables()["w1"], case.variables()["b1"]
        assert torch.autograd.gradcheck(lambda r, w, b: grouped_linear(r, case.index[0], w, b), (rows_AD, w1, b1))

    def test_rows_and_gradients_of_any_strides(self) -> None:
        case = Case(9, 6, 5, 6, 4)
        wide = torch.randn(12, case.A).t().requires_grad_()
        out_AO = grouped_linear(wide[:, ::2], case.index[0], case.tensors["w1"], None)
        packed = grouped_linear(wide[:, ::2].contiguous(), case.index[0], case.tensors["w1"], None)
        assert relative_rms(out_AO, packed) < 1e-6
        out_AO.sum().backward()
        assert wide.grad is not None
        expected = torch.stack([case.tensors["w1"][e].sum(1) for _, e in case.pairs])
        assert relative_rms(wide.grad[:, ::2], expected) < 1e-6

    def test_nothing_leaks_from_behind_the_last_row(self, poisoned: None) -> None:
        case = Case(9, 6, 5, 6, 4, spare=7)
        variables = case.variables()
        w1, b1 = variables["w1"], variables["b1"]
        rows_AD = torch.randn(case.num_rows, 6)
        rows_AD[case.A :] = float("nan")
        rows_AD.requires_grad_()
        out_AO = grouped_linear(rows_AD, case.index[0], w1, b1)
        d_out_AO = torch.ones(case.num_rows, 5)
        d_out_AO[case.A :] = float("nan")
        out_AO.backward(d_out_AO)
        for t in (out_AO[: case.A], rows_AD.grad[: case.A], w1.grad, b1.grad):
            assert t.isfinite().all()

    def test_fp32_stays_fp32_under_autocast(self) -> None:
        case, found = Case(60, 64, 96, 64, 4), []
        rows_AD = torch.randn(case.A, 64)
        for enabled in (False, True):
            variables = case.variables()
            leaves = [rows_AD.clone().requires_grad_(), variables["w1"], variables["b1"]]
            with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
                out_AO = grouped_linear(leaves[0], case.index[0], *leaves[1:])
                out_AO.square().sum().backward()
            found.append([out_AO.detach(), *(leaf.grad for leaf in leaves)])
        for plain, automatic in zip(*found, strict=True):
            assert torch.equal(plain, automatic)

    def test_silent_experts_get_zero_gradients(self) -> None:
        case = Case(9, 6, 5, 6, 4)
        variables = case.variables()
        grouped_linear(torch.randn(case.A, 6), case.index[0], variables["w1"], variables["b1"]).sum().backward()
        for name in ("w1", "b1"):
            assert (variables[name].grad[0] == 0).all()
            assert (variables[name].grad[1:] != 0).any()

    @pytest.mark.parametrize(("T", "bias"), [(7, True), (7, False), (0, True)])
    def test_opcheck(self, T: int, bias: bool) -> None:
        case = Case(T, 5, 4, 6, 3, biases=bias)
        variables = case.variables()
        rows_AD = torch.randn(case.A, 5, requires_grad=True)
        torch.library.opcheck(grouped_linear, (rows_AD, case.index[0], variables["w1"], variables["b1"]))
        inputs = (rows_AD.detach(), case.index[0], case.tensors["w1"], case.tensors["b1"])
        torch.library.opcheck(grouped_linear_backward, (torch.randn(case.A, 4), *inputs))


class TestActivations:
    @pytest.mark.parametrize("name", list(ACTIVATIONS))
    def test_the_gradient_is_the_derivative(self, name: str) -> None:
        h = torch.randn(200, dtype=torch.float64, requires_grad=True)
        value, d = ACTIVATIONS[name].value(h), torch.randn(200, dtype=torch.float64)
        assert torch.allclose(value, NAIVE_ACTIVATIONS[name](h), rtol=1e-12, atol=1e-12)
        (expected,) = torch.autograd.grad(NAIVE_ACTIVATIONS[name](h), h, d)
        assert torch.allclose(ACTIVATIONS[name].gradient(d, h.detach()), expected, rtol=1e-10, atol=1e-12)

    @pytest.mark.parametrize(
        ("activation", "name"),
        [
            (F.gelu, "gelu"),
            (F.relu, "relu"),
            (torch.relu, "relu"),
            (F.silu, "silu"),
            (nn.GELU(), "gelu"),
            (nn.GELU(approximate="tanh"), "gelu_tanh"),
            (nn.ReLU(), "relu"),
            (nn.SiLU(), "silu"),
            (nn.Identity(), "identity"),
            (F.leaky_relu, None),
            (nn.LeakyReLU(), None),
            (nn.ReLU6(), None),
            (partial(F.gelu, approximate="tanh"), None),
            (lambda h: h, None),
            ("gelu", None),
        ],
    )
    def test_names(self, activation: object, name: str | None) -> None:
        assert activation_name(activation) == name

    def test_a_subclass_with_its_own_forward_is_not_fused(self) -> None:
        class Doubled(nn.GELU):
            def forward(self, h: Tensor) -> Tensor:
                return 2 * super().forward(h)

        assert activation_name(Doubled()) is None

    def test_a_module_with_hooks_is_not_fused(self) -> None:
        module = nn.GELU()
        module.register_forward_hook(lambda module, inputs, output: output * 2)
        assert activation_name(module) is None

    def test_a_callable_that_has_no_hash(self) -> None:
        @dataclass
        class Scaled:
            factor: float

            def __call__(self, h: Tensor) -> Tensor:
                return h * self.factor

        assert activation_name(Scaled(2.0)) is None

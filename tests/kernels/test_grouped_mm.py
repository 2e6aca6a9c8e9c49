"""The engine "grouped_mm" against the loop over the experts and against float64, and the choice of an engine."""

from __future__ import annotations

import copy
import logging
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from cases import HALF, NAMES, SHAPES, Case, tolerance
from helpers import FP32, relative_rms
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map_only

from dynmoe_tutel.kernels import (
    ACTIVATIONS,
    ExpertWeights,
    Index,
    combine,
    grouped_ffn,
    grouped_linear,
    grouped_mm,
    pack_bits,
    ragged_index,
)
from dynmoe_tutel.kernels import operation as engines
from dynmoe_tutel.kernels.grouped_ffn import grouped_ffn_backward, grouped_linear_backward

DTYPES = (torch.float32, *HALF)
ALIGNED = (33, 16, 24, 8, 4, 0.5)  # every size a multiple of 16 bytes in every dtype


def case_of(*shape: Any, **options: Any) -> Case:
    return Case(*shape, **{"engine": "grouped_mm", **options})


@pytest.fixture
def loop_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail if anything falls back to the loop."""
    monkeypatch.setattr(sys.modules["dynmoe_tutel.kernels.grouped_ffn"], "blocks", None)


@pytest.mark.usefixtures("loop_is_refused", "poisoned")
class TestFFN:
    @pytest.mark.parametrize("gated", [False, True])
    @pytest.mark.parametrize("biases", [True, False])
    @pytest.mark.parametrize("shape", [*SHAPES, ALIGNED])
    def test_equals_the_rows_one_by_one(self, shape: tuple, biases: bool, gated: bool) -> None:
        """With every gradient; fresh memory and unused rows are NaN."""
        for apply_gate in (False, True):
            case = case_of(*shape, biases=biases, gated=gated, apply_gate=apply_gate, spare=3)
            exact = copy.copy(case)
            exact.tensors = dict(case.tensors)
            case.tensors["gate"] = case.tensors["gate"].clone()
            case.tensors["gate"][case.A if apply_gate else 0 :] = float("nan")  # not read
            rows, h, u = grouped_ffn(*case.arguments(case.tensors), "grouped_mm")
            d_rows_AO = torch.randn(case.num_rows, case.Dout, dtype=torch.float64)
            scales = exact.scales(d_rows_AO)
            assert relative_rms(rows[: case.A], exact.naive(exact.tensors), scales["rows"]) < 1e-6
            assert h.shape == (case.num_rows, case.H)
            assert u.shape == (case.num_rows if gated else 0, case.H)
            d_rows_AO[case.A :] = float("nan")
            grads = case.grads("run", d_rows_AO)
            for name, reference in exact.grads("naive", d_rows_AO).items():
                rows_or_all = slice(case.A) if name == "gate" else slice(None)
                assert relative_rms(grads[name][rows_or_all], reference[rows_or_all], scales[name]) < 1e-6, name

    @pytest.mark.parametrize("shape", [(33, 17, 23, 9, 4), ALIGNED])
    @pytest.mark.parametrize("activation", list(ACTIVATIONS))
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_every_activation_in_every_dtype(self, dtype: torch.dtype, activation: str, shape: tuple) -> None:
        for gated in (False, True):
            case = case_of(*shape, dtype=dtype, activation=activation, gated=gated, apply_gate=True)
            rows = case.run(case.tensors)
            assert rows.dtype == dtype
            assert relative_rms(rows, case.naive(case.tensors)) < tolerance(dtype)
            d_rows_AO = torch.randn(case.A, case.Dout, dtype=torch.float64).to(dtype).double()
            grads, exact = case.grads("run", d_rows_AO), case.grads("naive", d_rows_AO)
            for name, reference in exact.items():
                assert relative_rms(grads[name], reference) < 1.5 * tolerance(dtype), name

    def test_silent_experts_get_zero_gradients(self) -> None:
        case = case_of(7, 5, 4, 5, 3, gated=True)
        grads = case.grads("run", torch.ones(case.A, 5))
        for name in NAMES[2:]:
            assert (grads[name][0] == 0).all()
            assert (grads[name][1:] != 0).any()

    @pytest.mark.parametrize("shape", [(7, 5, 3, 6, 3), ALIGNED])
    def test_gradients_have_the_strides_of_their_parameters(self, shape: tuple) -> None:
        case = case_of(*shape, gated=True)
        grads = case.grads("run", torch.ones(case.A, case.Dout))
        for name in NAMES[2:]:
            assert grads[name].stride() == case.tensors[name].stride(), name

    @pytest.mark.parametrize("dtype", HALF)
    def test_weights_in_fp32_for_tokens_in_half(self, dtype: torch.dtype) -> None:
        """As under autocast."""
        case, wide = case_of(*ALIGNED, dtype=dtype, gated=True), case_of(*ALIGNED, dtype=dtype, gated=True)
        for name in NAMES[2:]:
            wide.tensors[name] = wide.tensors[name].float()
        d_rows_AO = torch.randn(case.A, 8).to(dtype).float()
        assert torch.equal(wide.run(wide.tensors), case.run(case.tensors))
        for (name, grad), same in zip(
            wide.grads("run", d_rows_AO).items(), case.grads("run", d_rows_AO).values(), strict=True
        ):
            assert grad.dtype == wide.tensors[name].dtype
            assert torch.equal(grad.to(dtype), same.to(dtype)), name

    def test_parameters_at_any_address(self) -> None:
        """Views into one flat buffer, as in sharded training. Bits may depend on the address, says MKL."""
        case, flat = case_of(*ALIGNED), case_of(*ALIGNED)
        for name in ("w1", "w2", "b1"):
            t = case.tensors[name].contiguous()
            buffer = torch.cat([torch.zeros(1), t.flatten()])
            flat.tensors[name] = buffer[1:].view(t.shape)
        assert relative_rms(flat.run(flat.tensors), case.run(case.tensors)) < FP32

    def test_frozen_weights_get_no_gradient(self) -> None:
        case = case_of(7, 5, 4, 5, 3, apply_gate=True)
        variables, d_rows_AO = case.variables(), torch.randn(case.A, 5)
        for name in ("w1", "b1", "w2", "b2"):
            variables[name].requires_grad_(False)
        case.run(variables).backward(d_rows_AO)
        assert torch.equal(variables["x"].grad, case.grads("run", d_rows_AO)["x"])
        assert variables["w1"].grad is None

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_a_token_gets_the_same_alone_and_in_any_order(self, dtype: torch.dtype) -> None:
        T, D, E = 30, 33, 6
        case = case_of(T, D, 20, D, E, dtype=dtype)
        assigned_TE = torch.zeros(T, E, dtype=torch.bool)
        for t, e in case.pairs:
            assigned_TE[t, e] = True

        def layer(some_T: Tensor) -> Tensor:
            index = Index(*ragged_index(pack_bits(assigned_TE[some_T]), E))
            weights = ExpertWeights(*(case.tensors[name] for name in NAMES[2:]))
            x_TD, gate_A = case.tensors["x"][some_T], torch.ones(index.rows)
            rows = grouped_ffn(x_TD, gate_A, index, weights, "gelu", False, False, "grouped_mm")[0]
            return combine(rows, *index[1:], True)

        together = layer(torch.arange(T))
        order_T = torch.randperm(T, generator=torch.Generator().manual_seed(1))
        for some_T in (order_T, order_T[:7], order_T[:1]):
            assert relative_rms(layer(some_T), together[some_T]) < (4e-3 if dtype in HALF else 1e-6)

    def test_two_runs_are_bitwise_equal(self) -> None:
        case = case_of(200, 64, 96, 64, 9)
        d_rows_AO = torch.randn(case.A, 64)
        first, second = case.grads("run", d_rows_AO), case.grads("run", d_rows_AO)
        for name, grad in first.items():
            assert torch.equal(grad, second[name]), name

    @pytest.mark.parametrize("dtype", HALF)
    def test_fp32_stays_fp32_under_autocast(self, dtype: torch.dtype) -> None:
        case = case_of(60, 64, 96, 64, 4, gated=True, apply_gate=True)
        d_rows_AO = torch.randn(case.A, 64)
        plain, grads = case.run(case.tensors), case.grads("run", d_rows_AO)
        with torch.autocast("cpu", dtype):
            assert torch.equal(case.run(case.tensors), plain)
            for name, grad in case.grads("run", d_rows_AO).items():
                assert torch.equal(grad, grads[name]), name


@pytest.mark.usefixtures("loop_is_refused")
@pytest.mark.parametrize(("T", "gated", "biases"), [(7, True, True), (7, False, False), (0, False, True)])
def test_opcheck(T: int, gated: bool, biases: bool) -> None:
    case = Case(T, 5, 4, 6, 3, gated=gated, biases=biases, apply_gate=True)
    torch.library.opcheck(grouped_ffn, (*case.arguments(case.variables()), "grouped_mm"))
    rows, h, u = grouped_ffn(*case.arguments(case.tensors), "grouped_mm")
    inputs = case.arguments(case.tensors)[:-1]
    torch.library.opcheck(grouped_ffn_backward, (torch.randn_like(rows), h, u, *inputs, gated, "grouped_mm"))
    rows_AD = torch.randn(case.A, 5, requires_grad=True)
    variables = case.variables()
    torch.library.opcheck(grouped_linear, (rows_AD, case.index[0], variables["w1"], variables["b1"], "grouped_mm"))
    linear = (torch.randn(case.A, 4), rows_AD.detach(), case.index[0], case.tensors["w1"], case.tensors["b1"])
    torch.library.opcheck(grouped_linear_backward, (*linear, "grouped_mm"))


@pytest.mark.parametrize(("D", "H", "O"), [(16, 24, 8), (17, 23, 9)])
@pytest.mark.parametrize("gated", [False, True])
def test_no_value_is_asked_of_the_device(gated: bool, D: int, H: int, O: int) -> None:
    """Meta tensors have no values: reading one, for which a GPU would wait, fails here."""
    case = Case(9, D, H, O, 4, dtype=torch.bfloat16, gated=gated, apply_gate=True, spare=3)
    arguments = tree_map_only(Tensor, lambda t: t.to("meta"), case.arguments(case.tensors))
    _, _, index, weights, *_ = arguments
    rows, h, u = grouped_mm.grouped_ffn(*arguments)
    assert (rows.shape, h.shape) == ((case.num_rows, O), (case.num_rows, H))
    for kept in ((h, u), (h[:0], u[:0])):
        grads = grouped_mm.grouped_ffn_backward(rows, *kept, *arguments[:-1], True)
        assert [g.shape for g in grads[:3]] == [t.shape for t in (*arguments[:2], weights.w1_EDH)]
    rows_AD = torch.empty(case.num_rows, D, dtype=torch.bfloat16, device="meta")
    linear = (rows_AD, index.expert_offsets, *weights[:2])
    out_AH = grouped_mm.grouped_linear(*linear)
    assert grouped_mm.grouped_linear_backward(out_AH, *linear)[0].shape == rows_AD.shape


@pytest.mark.usefixtures("loop_is_refused", "poisoned")
class TestLinear:
    @pytest.mark.parametrize("bias", [True, False])
    @pytest.mark.parametrize("shape", [*SHAPES, ALIGNED])
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_equals_each_expert_in_float64(self, dtype: torch.dtype, shape: tuple, bias: bool) -> None:
        """Unused rows are zero in the result and in the gradient, whatever the inputs hold there."""
        case = Case(*shape, dtype=dtype, biases=bias, spare=3)
        variables = case.variables()
        w, b = variables["w1"], variables["b1"]
        rows_AD = torch.randn(case.num_rows, case.D).to(dtype)
        rows_AD[case.A :] = float("nan")
        rows_AD.requires_grad_()
        out_AH = grouped_linear(rows_AD, case.index[0], w, b, "grouped_mm")
        d_out_AH = torch.randn(case.num_rows, case.H).to(dtype)
        d_out_AH[case.A :] = float("nan")
        out_AH.backward(d_out_AH)
        leaves = [t.detach().double().requires_grad_() for t in (rows_AD, w, *([b] if bias else []))]
        rows = [leaves[0][i] @ leaves[1][e] + (leaves[2][e] if bias else 0) for i, (_, e) in enumerate(case.pairs)]
        exact = torch.stack(rows) if rows else torch.zeros(0, case.H, dtype=torch.float64)
        limit = 4e-3 if dtype in HALF else 1e-6
        assert relative_rms(out_AH[: case.A], exact) < limit
        assert (out_AH[case.A :] == 0).all()
        assert rows_AD.grad is not None
        assert (rows_AD.grad[case.A :] == 0).all()
        if rows:
            exact.backward(d_out_AH[: case.A].double())
        found = (rows_AD.grad, w.grad, *([b.grad] if bias else []))
        for grad, leaf in zip(found, leaves, strict=True):
            reference = torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
            assert relative_rms(grad, reference) < limit
            assert grad.dtype == dtype

    def test_rows_and_gradients_of_any_strides(self) -> None:
        case = Case(9, 6, 5, 6, 4)
        wide = torch.randn(12, case.A).t().requires_grad_()
        arguments = (case.index[0], case.tensors["w1"], None, "grouped_mm")
        out_AO = grouped_linear(wide[:, ::2], *arguments)
        assert torch.equal(out_AO, grouped_linear(wide[:, ::2].contiguous(), *arguments))
        out_AO.sum().backward()
        assert wide.grad is not None
        expected = torch.stack([case.tensors["w1"][e].sum(1) for _, e in case.pairs])
        assert relative_rms(wide.grad[:, ::2], expected) < 1e-6


class TestChoice:
    @pytest.fixture(autouse=True)
    def fresh(self, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
        """Turn off the interpreter and clear the caches."""
        monkeypatch.delenv("TRITON_INTERPRET", raising=False)
        for cached in (engines._multiplies_groups, engines._warn_of_dtype):
            cached.cache_clear()
        yield
        engines._multiplies_groups.cache_clear()

    def test_the_loop_on_a_cpu(self) -> None:
        for dtype in (torch.float32, torch.bfloat16, torch.float64):
            assert engines.engine_for("auto", torch.ones(2, dtype=dtype)) == "torch"

    def test_the_named_one_runs(self, monkeypatch: pytest.MonkeyPatch) -> None:
        case, called = Case(7, 5, 4, 5, 3), list[str]()
        for name in ("grouped_ffn", "grouped_ffn_backward", "grouped_linear", "grouped_linear_backward"):
            function = getattr(grouped_mm, name)

            def run(*args: Any, name: str = name, function: Any = function, **kwargs: Any) -> Any:
                called.append(name)
                return function(*args, **kwargs)

            monkeypatch.setattr(grouped_mm, name, run)
        for engine in ("auto", "torch", "grouped_mm"):
            case.engine = engine
            case.run(case.variables()).sum().backward()
            w1 = case.variables()["w1"]
            grouped_linear(torch.ones(case.A, 5), case.index[0], w1, None, engine=engine).sum().backward()
            assert bool(called) == (engine == "grouped_mm")
        assert called == ["grouped_ffn", "grouped_ffn_backward", "grouped_linear", "grouped_linear_backward"]

    @pytest.mark.parametrize(
        ("capability", "dtype", "chosen"),
        [
            ((9, 0), torch.bfloat16, "grouped_mm"),
            ((10, 0), torch.bfloat16, "grouped_mm"),
            ((8, 0), torch.bfloat16, "torch"),
            ((12, 0), torch.bfloat16, "torch"),
            ((9, 0), torch.float16, "torch"),
            ((9, 0), torch.float32, "torch"),
            ((9, 0), torch.float64, "torch"),
        ],
    )
    def test_a_gpu_without_triton(
        self, capability: tuple[int, int], dtype: torch.dtype, chosen: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """It takes torch's grouped product where that does not wait for the device: bf16 on sm_90 and sm_100."""
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        monkeypatch.setattr(torch.version, "hip", None)
        with FakeTensorMode():
            x = torch.empty(2, dtype=dtype, device="cuda")
            assert engines.engine_for("auto", x) == chosen
            assert engines.engine_for("torch", x) == "torch"
            assert engines.engine_for("grouped_mm", x) == ("torch" if dtype == torch.float64 else "grouped_mm")

    def test_triton_without_a_gpu_says_what_to_do(self) -> None:
        case = Case(7, 5, 4, 5, 3, engine="triton")
        with pytest.raises(ValueError, match=r"engine = 'triton'.*GPU.*engine = 'auto'.*TRITON_INTERPRET"):
            case.run(case.tensors)

    def test_triton_that_is_not_installed(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(engines, "find_spec", lambda name: None)
        with FakeTensorMode(), pytest.raises(ValueError, match="pip install triton"):
            engines.engine_for("triton", torch.empty(2, device="cuda"))

    def test_the_interpreter_runs_tritons(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(engines, "find_spec", lambda name: name)
        monkeypatch.setenv("TRITON_INTERPRET", "1")
        assert engines.engine_for("triton", torch.empty(2)) == "triton"

    def test_a_name_that_there_is_not(self) -> None:
        case = Case(7, 5, 4, 5, 3, engine="cuda")
        with pytest.raises(ValueError, match=r"engine = 'cuda': allowed are auto, triton, grouped_mm, numba, torch"):
            case.run(case.tensors)

    def test_float64_takes_the_loop_and_says_so_once(self, caplog: pytest.LogCaptureFixture) -> None:
        case = Case(7, 5, 4, 5, 3, dtype=torch.float64)
        expected = case.run(case.tensors)
        case.engine = "grouped_mm"
        with caplog.at_level(logging.WARNING, "dynmoe_tutel"):
            assert torch.equal(case.run(case.tensors), expected)
            case.run(case.tensors)
        assert [r.getMessage() for r in caplog.records if "float64" in r.getMessage()] == [
            "engine = 'grouped_mm' has no float64: such tensors take engine 'torch'"
        ]

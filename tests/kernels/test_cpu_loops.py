"""The loops that numba compiles, against float64 and against the engine "torch"."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import FP32, HALF, relative_rms
from torch import Tensor

from dynmoe_tutel import MoELayer
from dynmoe_tutel.kernels import ExpertWeights, Index, Router, operation, ragged_index, threshold_gate, top_any_ffn
from dynmoe_tutel.kernels.activations import ACTIVATIONS
from dynmoe_tutel.kernels.top_any_ffn import top_any_ffn_backward

if not operation.numba_is_installed():
    pytest.skip("numba is not installed, or DYNMOE_TUTEL_NUMBA is 0", allow_module_level=True)
from dynmoe_tutel.kernels.cpu import loops, threads

CODES = dict(zip(loops.ACTIVATIONS, range(6), strict=True))


@pytest.fixture
def torch_alone(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], Any]], Any]:
    """Calls a function as if numba were not installed."""

    def call(function: Callable[[], Any]) -> Any:
        with monkeypatch.context() as patch:
            patch.setattr(operation, "numba_is_installed", lambda: False)
            return function()

    return call


@pytest.fixture(params=[1, 3])
def dealt(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """With one thread and with three, however little there is to do."""
    monkeypatch.setattr(threads, "LEAST", 1)
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


def test_every_activation_has_a_code() -> None:
    assert set(loops.ACTIVATIONS) == set(ACTIVATIONS)


@pytest.mark.parametrize("name", list(ACTIVATIONS))
def test_activations_and_slopes(name: str) -> None:
    """On [-30, 30], relative to the larger of 1 and the number."""
    h = torch.linspace(-30, 30, 200_001)
    a, slope, alone = torch.empty_like(h), torch.empty_like(h), torch.empty_like(h)
    loops.activate_with_slope(CODES[name], h.numpy(), a.numpy(), slope.numpy())
    loops.activate(CODES[name], h.numpy(), alone.numpy())
    wide = h.double()
    value, gradient = ACTIVATIONS[name].value, ACTIVATIONS[name].gradient
    exact, exact_slope = value(wide), gradient(torch.ones_like(wide), wide)

    def error(found: Tensor, expected: Tensor) -> float:
        return float(((found.double() - expected).abs() / expected.abs().clamp(min=1)).max())

    assert error(a, exact) < 3e-7
    assert error(alone, exact) < 3e-7
    assert error(slope, exact_slope) < 3e-7


@pytest.mark.parametrize("name", list(ACTIVATIONS))
def test_large_negative_pre_activations_have_no_slope(name: str) -> None:
    """As of a training that diverges: exp is 0 there, not so small that a slope's powers of h make it large again."""
    h = torch.tensor([-100.0, -1e5, -1e12, -1e13, -1e16, -1e18])
    a, slope = torch.empty_like(h), torch.empty_like(h)
    loops.activate_with_slope(CODES[name], h.numpy(), a.numpy(), slope.numpy())
    value, gradient = ACTIVATIONS[name].value(h), ACTIVATIONS[name].gradient(torch.ones_like(h), h)
    torch.testing.assert_close(a, value, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(slope, gradient, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", list(ACTIVATIONS))
def test_a_nan_stays(name: str) -> None:
    h = torch.full((70,), torch.nan)
    a, slope = torch.empty_like(h), torch.empty_like(h)
    loops.activate_with_slope(CODES[name], h.numpy(), a.numpy(), slope.numpy())
    assert a.isnan().all()
    loops.activate(CODES[name], h.numpy(), a.numpy())
    assert a.isnan().all()


def gate_inputs(T: int, D: int, E: int) -> list[Tensor]:
    """x, w, thresholds, active slots, and the scale; about two experts a token, many tokens without one."""
    generator = torch.Generator().manual_seed(T + D + E)
    x_TD, w_DE = torch.randn(T, D, generator=generator), torch.randn(D, E, generator=generator)
    cos_TE = F.normalize(x_TD, dim=1) @ F.normalize(w_DE, dim=0)
    threshold_E = cos_TE.quantile(1 - min(2, E) / (E + 1), dim=0) + 1e-5 if T else torch.zeros(E)
    active_E = torch.rand(E, generator=generator) > 0.2
    active_E[0] = True
    return [x_TD, w_DE, threshold_E, active_E, torch.tensor(2.0)]


BUDGETS: dict[str, tuple[float | None, int]] = {
    "none": (None, 0), "raised": (0.05, 0), "lowered": (-0.05, 0), "cap": (None, 2), "both": (-0.2, 1),
    "wide": (-0.1, 3),
}  # fmt: skip


@pytest.mark.usefixtures("dealt")
@pytest.mark.parametrize("fallback", [False, True])
@pytest.mark.parametrize("budget", list(BUDGETS))
@pytest.mark.parametrize(("T", "D", "E"), [(100, 8, 7), (70, 16, 64), (65, 12, 130), (1, 4, 1), (0, 4, 3)])
def test_gate_decides_as_torch(torch_alone: Any, T: int, D: int, E: int, budget: str, fallback: bool) -> None:
    """Bits, flags and counts are equal, scores to rounding; with padding, and a zero token."""
    inputs = gate_inputs(T, D, E)
    inputs[0][1:2] = 0
    mask_T = torch.arange(T) % 5 != 3
    shift, max_k = BUDGETS[budget]
    shift_1 = None if shift is None else torch.tensor([shift])

    def run() -> Any:
        return threshold_gate(*inputs, fallback, mask_T, shift_1, max_k)

    score, *exact = run()
    expected, *others = torch_alone(run)
    assert relative_rms(score, expected) < FP32 if T else score.shape == expected.shape
    assert relative_rms(exact.pop(2), others.pop(2)) < FP32 if T else True  # inverse norms
    for found, other in zip(exact, others, strict=True):
        assert torch.equal(found, other)


def test_equal_margins_keep_the_lower_slots() -> None:
    x_TD, w_DE = torch.ones(3, 4), torch.ones(4, 70)
    fixed = (torch.zeros(70), torch.ones(70, dtype=torch.bool), torch.ones(()), False)
    bits_TW = threshold_gate(x_TD, w_DE, *fixed, None, None, 66)[1]
    assert bits_TW.tolist() == [[-1, 3]] * 3


def test_a_threshold_of_nan_is_the_largest_margin(torch_alone: Any) -> None:
    inputs = gate_inputs(80, 8, 6)
    inputs[3][:] = True
    inputs[2][4] = torch.nan
    found = threshold_gate(*inputs, False, None, None, 2)[1]
    assert torch.equal(found, torch_alone(lambda: threshold_gate(*inputs, False, None, None, 2))[1])
    assert ((found >> 4) & 1).all()


CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "centred": {"centred": True},
    "not saved": {"save": False},
    "weights not wanted": {"wanted": False},
    "no biases": {"biased": False},
    "gated": {"gated": True, "activation": "silu"},
    "gated, not saved, no biases": {"gated": True, "save": False, "biased": False, "activation": "gelu_tanh"},
    "spare rows": {"spare": 37},
    "transposed weights": {"transposed": True},
    "blocks of one expert": {"block": 1},
    **{name: {"activation": name} for name in ("relu", "squared_relu", "identity")},
    "bf16": {"dtype": torch.bfloat16, "weights_in": torch.bfloat16},
    "bf16, gated": {"dtype": torch.bfloat16, "weights_in": torch.bfloat16, "gated": True, "activation": "silu"},
    "bf16, not saved": {"dtype": torch.bfloat16, "weights_in": torch.bfloat16, "save": False},
    "bf16 by autocast": {"dtype": torch.bfloat16},
    "gated, torch's default dtype is bf16": {"gated": True, "default": torch.bfloat16},
    "torch's default dtype is fp64": {"default": torch.float64},
}


def experts_call(
    activation: str = "gelu", centred: bool = False, save: bool = True, wanted: bool = True, biased: bool = True,
    gated: bool = False, spare: int = 0, transposed: bool = False, block: int = 0, bad_token: float | None = None,
    dtype: torch.dtype = torch.float32, weights_in: torch.dtype = torch.float32, default: torch.dtype = torch.float32,
) -> Callable[[], list[Tensor]]:  # fmt: skip
    """A forward and backward of `top_any_ffn`: 90 tokens, 7 experts of which one has no token; y and all gradients."""
    T, D, H, E, O = 90, 24, 40, 7, 16
    x_TD, w_DE, threshold_E, active_E, scale = gate_inputs(T, D, E)
    active_E[:] = True
    active_E[3] = False
    x_TD = x_TD.to(weights_in)
    if bad_token is not None:
        x_TD[5] = bad_token
    score, bits, unrouted, inv_norm, counts = threshold_gate(x_TD, w_DE, threshold_E, active_E, scale, True)
    arrays = ragged_index(bits, E, -1, counts)
    if spare:
        arrays = ragged_index(bits, E, len(arrays[2]) + spare, counts)
    generator = torch.Generator().manual_seed(5)

    def drawn(*shape: int) -> Tensor:
        if transposed and len(shape) == 3:
            return torch.randn(shape[0], shape[2], shape[1], generator=generator).transpose(1, 2) / shape[1] ** 0.5
        return (torch.randn(shape, generator=generator) / shape[-2] ** 0.5).to(weights_in)

    b1, b3, b2 = (drawn(E, n) if biased else None for n in (H, H, O))
    w3, b3 = (drawn(E, D, H), b3) if gated else (None, None)
    weights = ExpertWeights(drawn(E, D, H), b1, w3, b3, drawn(E, H, O), b2)
    router, index = Router(w_DE, threshold_E, scale, score, inv_norm, unrouted, bits), Index(*arrays)
    d_y_TO = torch.randn(T, O, generator=generator).to(dtype)
    options = (activation, centred, dtype)

    def run() -> list[Tensor]:
        torch.set_default_dtype(default)
        try:
            y, h, u = top_any_ffn(x_TD, router, index, weights, *options, save)
            d_x, d_w, d_threshold_E, d_scale, *others = top_any_ffn_backward(
                d_y_TO, h, u, x_TD, router, index, weights, *options, wanted
            )
        finally:
            torch.set_default_dtype(torch.float32)
        # the scale's gradient is a sum whose parts, of the size of the thresholds' gradients, nearly cancel
        return [y, d_x, d_w, torch.cat([d_threshold_E, d_scale.view(1)]), *others]

    return run


@pytest.mark.usefixtures("dealt")
@pytest.mark.parametrize("case", list(CASES))
def test_experts_as_torch(torch_alone: Any, monkeypatch: pytest.MonkeyPatch, case: str) -> None:
    options = CASES[case]
    if "block" in options:
        monkeypatch.setattr(sys.modules["dynmoe_tutel.kernels.grouped_ffn"], "BLOCK_ELEMENTS", 1)
    run = experts_call(**options)
    for found, expected in zip(run(), torch_alone(run), strict=True):
        assert found.shape == expected.shape
        assert found.dtype == expected.dtype
        limit = FP32 if options.get("dtype", torch.float32) == torch.float32 else HALF
        assert found.numel() == 0 or relative_rms(found, expected) < limit


@pytest.mark.usefixtures("dealt")
def test_two_runs_are_bitwise_equal(poisoned: None) -> None:
    """On the same tensors; what was not written would be NaN."""
    run = experts_call()
    for found, again in zip(run(), run(), strict=True):
        assert torch.equal(found, again)


def test_sums_over_many_rows_keep_their_precision() -> None:
    """Gradients of biases and thresholds: added row by row in fp32 they would be off by 3e-6."""
    experts = {"num_experts_per_device": 2, "hidden_size_per_expert": 8, "activation_fn": F.gelu}
    layer = MoELayer("top_any", 8, experts, seeds=(1, 2))
    with torch.no_grad():
        layer.gates[0].gates.fill_(-1)  # all tokens take both
    generator = torch.Generator().manual_seed(3)
    x_TD, d_y_TD = torch.randn(2, 32768, 8, generator=generator).unbind()

    def gradients(layer: MoELayer, dtype: torch.dtype) -> tuple[Tensor, ...]:
        wanted = layer.gates[0].gates, layer.experts.batched_fc1_bias, layer.experts.batched_fc2_bias
        return torch.autograd.grad(layer(x_TD.to(dtype)), wanted, d_y_TD.to(dtype))

    found = gradients(layer, torch.float32)
    for gradient, exact in zip(found, gradients(layer.double(), torch.float64), strict=True):
        assert relative_rms(gradient, exact) < FP32


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_the_default_dtype_does_not_matter(dtype: torch.dtype) -> None:
    """As where a model is built under torch.set_default_dtype(torch.bfloat16)."""
    run = experts_call()
    expected = run()
    torch.set_default_dtype(dtype)
    try:
        found = run()
    finally:
        torch.set_default_dtype(torch.float32)
    for tensor, other in zip(found, expected, strict=True):
        assert tensor.dtype == other.dtype
        assert tensor.numel() == 0 or relative_rms(tensor, other) < FP32


@pytest.mark.parametrize("value", [torch.nan, torch.inf, 1e30, 0.0])
def test_tokens_out_of_the_ordinary(torch_alone: Any, value: float) -> None:
    """They take torch's operations where the loops do not know them, with the same result."""
    run = experts_call(bad_token=value)
    for found, expected in zip(run(), torch_alone(run), strict=True):
        assert torch.equal(found.isnan(), expected.isnan())
        assert found.numel() == 0 or relative_rms(found.nan_to_num(), expected.nan_to_num()) < FP32


def test_engine_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    experts = {"num_experts_per_device": 4, "hidden_size_per_expert": 16, "engine": "numba"}
    layer = MoELayer({"type": "top_any"}, 8, experts, seeds=(1, 2))
    x_TD = torch.randn(20, 8)
    y_TD = layer(x_TD)
    layer.experts.engine = "torch"
    assert relative_rms(y_TD, layer(x_TD)) < FP32
    monkeypatch.setattr(operation, "numba_is_installed", lambda: False)
    layer.experts.engine = "numba"
    with pytest.raises(ValueError, match=r"pip install .*numba"):
        layer(x_TD)


def test_engine_by_name_says_what_it_does_not_take(caplog: pytest.LogCaptureFixture) -> None:
    operation._warn_of_dtype.cache_clear()
    x_TD = torch.ones(2, 3, dtype=torch.float16)
    with caplog.at_level(logging.WARNING, logger="dynmoe_tutel"):
        assert [operation.engine_for("numba", x_TD) for _ in range(2)] == ["torch"] * 2
    assert [r.message for r in caplog.records] == ["engine = 'numba' has no float16: such tensors take engine 'torch'"]


def test_a_forked_process_has_threads_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a worker of a data loader: a pool without threads would wait for ever."""
    script = """
import os, sys, torch
from dynmoe_tutel.kernels.cpu import threads
done = []
threads.run(lambda part, first, last: done.append(part), 8, 2)
child = os.fork()
if child == 0:
    threads.run(lambda part, first, last: done.append(part), 8, 2)
    os._exit(len(done))
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    if not hasattr(os, "fork"):
        pytest.skip("this system has no fork")
    assert subprocess.run([sys.executable, "-c", script], timeout=60).returncode == 4


def test_a_thread_goes_on_after_the_main_thread() -> None:
    """As a training in a thread of a script that has ended: then no pool takes work."""
    script = """
import os, threading
from dynmoe_tutel.kernels.cpu import threads
def work():
    threading.main_thread().join()
    done = []
    threads.run(lambda part, first, last: done.append((part, first, last)), 8, 2)
    os._exit(sorted(done) == [(0, 0, 4), (1, 4, 8)])
threading.Thread(target=work).start()
"""
    assert subprocess.run([sys.executable, "-c", script], timeout=60).returncode == 1


def test_without_a_folder_for_the_cache() -> None:
    """As in a container that is read-only: each process compiles for itself."""
    script = """
import numba.core.caching
numba.core.caching.CacheImpl._locator_classes = []
from dynmoe_tutel.kernels.cpu import loops
assert isinstance(loops.scores._cache, numba.core.caching.NullCache)
"""
    assert subprocess.run([sys.executable, "-c", script], timeout=60).returncode == 0


def test_without_numba(monkeypatch: pytest.MonkeyPatch) -> None:
    """DYNMOE_TUTEL_NUMBA=0 keeps it from being imported."""
    script = "import sys; from dynmoe_tutel import MoELayer; import torch; " \
        "MoELayer('top_any', 8, {'num_experts_per_device': 2, 'hidden_size_per_expert': 4})(torch.randn(5, 8)); " \
        "sys.exit('numba' in sys.modules)"  # fmt: skip
    assert subprocess.run([sys.executable, "-c", script], env=os.environ | {"DYNMOE_TUTEL_NUMBA": "0"}).returncode == 0


BROKEN = {
    "no library": "raise OSError('no shared object file')",
    "an old one": "import numpy; numpy.no_such_name",
    "a folder of that name": "",
}


@pytest.mark.parametrize("how", list(BROKEN))
def test_a_broken_numba_is_as_none(how: str, tmp_path: Path) -> None:
    """A warning that says why, and torch's operations."""
    (tmp_path / "numba").mkdir()
    (tmp_path / "numba" / "__init__.py").write_text(BROKEN[how])
    script = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); " \
        "from dynmoe_tutel.kernels import operation; sys.exit(operation.numba_is_installed())"  # fmt: skip
    process = subprocess.run([sys.executable, "-c", script], stderr=subprocess.PIPE, text=True, timeout=60)
    assert process.returncode == 0, process.stderr
    assert "numba is installed, but cannot be used" in process.stderr


def test_a_numba_that_does_not_compile_is_as_none() -> None:
    """With NUMBA_DISABLE_JIT, for a debugger, loops run in Python, which has not all their instructions."""
    script = "import sys; from dynmoe_tutel.kernels import operation; sys.exit(operation.numba_is_installed())"
    environment = os.environ | {"NUMBA_DISABLE_JIT": "1"}
    assert subprocess.run([sys.executable, "-c", script], env=environment, timeout=60).returncode == 0

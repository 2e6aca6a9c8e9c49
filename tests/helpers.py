"""Shared by comparisons with `oracle`: errors, random layers with a safe margin, the oracle's view of a layer."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import oracle
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

HAS_GPU = torch.cuda.is_available()
FP32, FP64, HALF = 1e-6, 1e-13, 4e-3  # relative RMS against float64
MARGIN = 2e-6  # closer to a threshold than this, fp32 may decide differently (the design, section 3)
TRAINED_MARGIN = 1e-4  # the same for every step of two trainings, which rounding moves apart
DOUBT = "a decision is too near to its threshold: take another seed"
FEW = 8  # in a result of more numbers, those that do not cancel outweigh those that do
FFN = ("batched_fc1_w", "batched_fc1_bias", "batched_fc2_w", "batched_fc2_bias")
LLAMA = ("W_fc1", "W_fc2", "W_fc3")
TERMS = ("diversity", "simplicity", "load_balance", "efficiency", "gshard")  # of a top-any gate

# Seconds after which a test gives up on another process: 30 times the longest wait on two idle cores. It ends what
# hangs and tests no speed, so every wait uses this value.
PATIENCE = 900.0
GROUP_PATIENCE = timedelta(seconds=PATIENCE)  # for a process group, whose ranks start and compute at different speeds


def wait_until(condition: Callable[[], bool], what: str) -> None:
    """Return as soon as `condition()` holds; raise an AssertionError that names `what` after PATIENCE."""
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end, f"in {PATIENCE:.0f} s it never came that {what}"
        time.sleep(0.02)


def outputs(processes: Sequence[subprocess.Popen[str]]) -> list[tuple[str, str]]:
    """Each process's stdout and stderr; no process outlives PATIENCE or this call."""
    try:
        return [process.communicate(timeout=PATIENCE) for process in processes]
    finally:
        for process in processes:
            process.kill()


def spawn_ranks(function: Callable[..., Any], arguments: tuple[Any, ...], ranks: int) -> None:
    """Run `function(rank, *arguments)` in one process per rank; an exception in one raises here."""
    torch.multiprocessing.spawn(_run_and_leave, args=(function, arguments), nprocs=ranks)


def _run_and_leave(rank: int, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    function(rank, *arguments)
    leave()


def leave() -> None:
    """End the process at once: with Gloo, torch 2.13 sometimes aborts during interpreter shutdown."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def relative_rms(actual: Tensor | float, expected: Tensor | float, scale: float = 0.0) -> float:
    """||actual - expected|| / ||expected||, or the error's RMS if `expected` is zero. Refuses non-finite values.

    With `scale`, the error counts against at least this RMS: for a difference of larger terms (`conditions`).
    """
    a, e = (torch.as_tensor(value).detach().cpu().double() for value in (actual, expected))
    assert a.shape == e.shape, f"shape {list(a.shape)}, expected {list(e.shape)}"
    assert e.isfinite().all(), "the expected values are not finite"
    assert a.isfinite().all(), f"{int((~a.isfinite()).sum())} of {a.numel()} values are not finite"
    error, size = rms(a - e), max(rms(e), scale)
    return error / size if size > 0 else error


def rms(tensor: Tensor) -> float:
    return float(tensor.double().square().mean().sqrt()) if tensor.numel() else 0.0


def conditions(function: Callable[..., Sequence[Tensor | None]], *arguments: Any, few: int = FEW) -> list[float]:
    """The size of each result's terms, as a `scale` for `relative_rms`; 0 for results of more than `few` numbers.

    This is the RMS change of a result per relative change of all floating-point arguments, each element with its own
    sign: the size of the sum if its terms did not cancel. Rounding errors of any processor are proportional to this
    size, not to the sum itself. Computed in float64, by differences.
    """

    def changed(change: Callable[[Tensor], Tensor], values: Any) -> Any:
        return tree_map_only(Tensor, lambda t: change(t) if t.is_floating_point() else t, values)

    exact = changed(lambda t: t.double(), arguments)
    centre = function(*exact)
    small = [result is not None and 0 < result.numel() <= few for result in centre]
    if not any(small):
        return [0.0] * len(centre)
    generator, step, draws = torch.Generator().manual_seed(0), 1e-6, 16
    squares = [0.0] * len(centre)
    for _ in range(draws):
        moved = changed(lambda t: t * (1 + step * (2.0 * torch.randint(2, t.shape, generator=generator) - 1)), exact)
        for i, (result, middle) in enumerate(zip(function(*moved), centre, strict=True)):
            if small[i]:
                squares[i] += (rms(result - middle) / step) ** 2
    return [(square / draws) ** 0.5 for square in squares]


@dataclass
class Case:
    """A layer with random parameters, a batch, an output gradient, and the oracle's view of them."""

    layer: Any
    x: Tensor  # [T, D]
    dy: Tensor  # [T, output_dim]
    names: tuple[str, ...]  # of the expert parameters, in the order of oracle.Experts.parameters
    gate: oracle.Gate
    experts: oracle.Experts

    def k(self) -> list[int]:
        """Assignments of each token."""
        return oracle.assignments(self.x.double(), self.gate).sum(dim=1).tolist()

    def expected_output(self, training: bool) -> Tensor:
        return oracle.forward(self.x.double(), self.gate, self.experts, training)

    def expected_gradients(self, training: bool, combine_gradient: str) -> dict[str, Tensor]:
        """The oracle's gradients, by the names of `gradients`."""
        x_TD, dy_TO = self.x.double(), self.dy.double()
        found = oracle.backward(x_TD, self.gate, self.experts, dy_TO, training, combine_gradient)
        by_slot = zip(*found["parameters"], strict=True)
        return gate_gradients(found, self.gate) | {
            f"experts.{name}": torch.stack(values) for name, values in zip(self.names, by_slot, strict=True)
        }


def gate_gradients(found: dict[str, Any], gate: oracle.Gate) -> dict[str, Tensor]:
    """The oracle's gradients, by the names of the layer's parameters and "x"."""
    named = {"x": found["x"], "gates.0.sim_matrix": found["w"], "gates.0.gates": found["G"]}
    if gate.temperature is not None:
        named["gates.0.temperature"] = torch.tensor([found["temperature"]], dtype=torch.float64)
    return named


def make_case(
    T: int = 24,
    D: int = 16,
    H: int = 20,
    E: int = 5,
    *,
    G: float | tuple[float, float] = (0.0, 0.3),
    active: Sequence[int] | None = None,
    kind: str = "ffn",
    activation: Callable[[Tensor], Tensor] = F.gelu,
    temperature: float | None = None,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    output_dim: int | None = None,
    shift: float | None = None,
    max_k: int | None = None,
    **options: Any,
) -> Case:
    """A top-any layer of E slots. `G` is a value or a range, `temperature` the gate's or None, `shift` and `max_k` its
    budget's; `options` go to the layer. The first token lies along the sum of all active routing vectors, the second
    nearly opposite: if these are few, the first passes all thresholds and the second no positive one. Asserts the
    margin of every decision.
    """
    from dynmoe_tutel import MoELayer

    generator = torch.Generator().manual_seed(seed)
    active = list(range(E)) if active is None else list(active)
    experts: dict[str, Any] = {
        "type": kind,
        "num_experts_per_device": len(active),
        "hidden_size_per_expert": H,
        "activation_fn": activation,
    }
    if output_dim is not None:
        experts["output_dim"] = output_dim
    gate_type: dict[str, Any] = {"type": "top_any", "max_expert_num": E}
    if temperature is not None:
        gate_type["init_t"] = 1.0
    budget = ({} if shift is None else {"target_k": 1.0}) | ({} if max_k is None else {"max_k": max_k})
    if budget:
        gate_type["budget"] = budget
    layer = MoELayer(gate_type=gate_type, experts=experts, model_dim=D, **options)
    gate = layer.gates[0]
    low, high = G if isinstance(G, tuple) else (G, G)
    with torch.no_grad():
        gate.sim_matrix.normal_(generator=generator)
        gate.gates.uniform_(low, high, generator=generator)
        gate.experts_mask.zero_()[active] = 1
        if temperature is not None:
            gate.temperature.fill_(temperature)
        if shift is not None:
            gate.budget_shift.fill_(shift)
        for parameter in layer.experts.parameters():
            parameter.normal_(0, (1 / D) ** 0.5, generator=generator)
    layer.to(dtype)
    x_TD = torch.randn(T, D, generator=generator)
    if T > 1:
        x_TD[0] = F.normalize(gate.sim_matrix.detach().float(), dim=0)[:, active].sum(dim=1)
        x_TD[1] = 0.1 * x_TD[1] - 0.5 * x_TD[0]
    dy_TO = torch.randn(T, output_dim or D, generator=generator)
    case = Case(
        layer,
        x_TD.to(dtype),
        dy_TO.to(dtype),
        LLAMA if kind == "llama_ffn" else FFN,
        oracle_gate(gate),
        oracle_experts(layer.experts, kind, activation),
    )
    assert margin(case.x.double(), case.gate) >= MARGIN, DOUBT
    return case


def oracle_gate(gate: nn.Module) -> oracle.Gate:
    """The oracle's view of a top-any gate's current state."""
    temperature = None if gate.temperature is None else gate.temperature.item()
    tensors = (gate.sim_matrix.detach().cpu().double().clone(), gate.gates.detach().cpu().double().clone())
    shift = 0.0 if gate.budget_shift is None else gate.budget_shift.item()
    max_k = None if gate.budget is None else gate.budget.max_k
    return oracle.Gate(*tensors, gate.experts_mask.nonzero().flatten().tolist(), temperature, shift, max_k)


def oracle_experts(experts: nn.Module, kind: str, activation: Callable[[Tensor], Tensor]) -> oracle.Experts:
    """The oracle's view of `ffn` or `llama_ffn` experts."""
    names, function = (LLAMA, oracle.llama_ffn) if kind == "llama_ffn" else (FFN, oracle.ffn(activation))
    stacks = [getattr(experts, name).detach().double().clone() for name in names]
    return oracle.Experts(function, [[stack[e] for stack in stacks] for e in range(len(stacks[0]))])


def margin(x_TD: Tensor, gate: oracle.Gate) -> float:
    """The least distance of any decision from flipping: cosine to threshold, or best to second in the fallback; with a
    budget also the margin to the shift, and between any two margins of a token."""
    cos_TE = oracle.cosines(x_TD, gate)[:, list(gate.active)]
    margin_TE = cos_TE - gate.G_E[list(gate.active)]
    distances = [margin_TE.abs().flatten(), (margin_TE - gate.shift).abs().flatten()]
    if gate.shift or gate.max_k:
        distances.append(margin_TE.sort(dim=1).values.diff(dim=1).flatten())
    unrouted_T = ~oracle.assignments(x_TD, gate).any(dim=1)
    if len(gate.active) > 1 and unrouted_T.any():
        best_N2 = cos_TE[unrouted_T].topk(2, dim=1).values
        distances.append(best_N2[:, 0] - best_N2[:, 1])
    return float(torch.cat(distances).min()) if len(x_TD) else float("inf")


def assert_margin(layer: Any, x: Tensor, gate_index: int = 0, least: float = MARGIN) -> None:
    """Assert that no decision of a top-any gate on these tokens is in doubt, so that two computations agree."""
    gate = layer.gates[gate_index]
    if hasattr(gate, "sim_matrix") and hasattr(gate, "experts_mask"):
        tokens_TD = x.detach().cpu().double().flatten(end_dim=-2)
        assert margin(tokens_TD, oracle_gate(gate)) >= least, (
            "a decision is too near to its threshold: take another seed"
        )


def gradients(layer: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """The gradients of x and of every parameter; asserts that each has one."""
    named = {"x": x, **dict(layer.named_parameters())}
    missing = [name for name, tensor in named.items() if tensor.grad is None]
    assert not missing, f"no gradient at {missing}"
    return {name: tensor.grad for name, tensor in named.items() if tensor.grad is not None}


def assert_gradients(
    found: dict[str, Tensor],
    expected: dict[str, Tensor],
    gate: oracle.Gate,
    tolerance: float,
    few: float | None = None,
    parts: dict[str, Tensor] | None = None,
) -> None:
    """Assert every gradient within `tolerance`, the router's within `few`, if given: these are sums of products of rows
    and dy that cancel, with up to 2.5 times the error of the others. Where each is a difference, `parts` are what is
    subtracted, and an error counts against these if they are larger. The temperature's error counts against the two
    parts of its sum, through scores and through thresholds (the latter is sum_e G_e * dL/dG_e)."""
    assert found.keys() == expected.keys()
    for name, value in found.items():
        scale, allowed = 0.0 if parts is None else rms(parts[name]), tolerance
        if name.startswith("gates."):
            allowed = few or tolerance
        if name.endswith("temperature") and expected[name].any():
            by_thresholds_E = (gate.G_E + gate.shift) * expected["gates.0.gates"]
            scale = max(scale, float(by_thresholds_E.abs().sum() + (expected[name] - by_thresholds_E.sum()).abs()))
        error = relative_rms(value, expected[name], scale)
        assert error < allowed, f"the gradient of {name} is off by {error:.1e}, allowed is {allowed:.0e}"


def load_importance(score_TE: Tensor, limit_T: Tensor, noise: float) -> Tensor:
    """Fixed k, by Tutel's formula: softmax scores without noise against the k-th noisy logit."""
    load_TE = torch.distributions.Normal(0, noise / score_TE.shape[1]).cdf(score_TE - limit_T[:, None])
    importance, load = (a_TE.sum(dim=0).var() / (a_TE.sum(dim=0).mean() ** 2 + 1e-10) for a_TE in (score_TE, load_TE))
    return (importance + load) / 2

"""`MoE(k=-1)` against upstream's semantics in float64 loops; `test_deepspeed_layer` runs them in one process."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import deepspeed.moe.layer as stock
import oracle
import pytest
import torch
import torch.nn.functional as F
from deepspeed.moe.sharded_moe import MOELayer, multiplicative_jitter
from helpers import FP32, MARGIN, margin, oracle_gate, relative_rms
from torch import Tensor, nn

from dynmoe_tutel import MoELayer
from dynmoe_tutel.deepspeed import MoE

D, E = 12, 6
ACTIVE = {"all": range(E), "some": [1, 3, 4], "one": [5]}
TERMS = ("diversity", "simplicity", "load_balance", "efficiency")


class Normed(nn.Module):
    """LayerNorm and dropout inside, as the ViT of upstream's example."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.LayerNorm(D), nn.Linear(D, 20), nn.GELU(), nn.Dropout(dropout), nn.Linear(20, D))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class Gated(nn.Module):
    """The MLP of a language model, without biases."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = (nn.Linear(*s, bias=False) for s in ((D, 20), (D, 20), (20, D)))

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class WithBias(nn.Module):
    """Returns its output and something else, as Megatron's MLP."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(D, D)

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        return self.linear(x), None


KINDS: dict[str, Callable[[], nn.Module]] = {
    "one linear": lambda: nn.Linear(D, D),
    "norm and dropout": Normed,
    "gated": Gated,
    "tuple": WithBias,
}


def moe(kind: str = "one linear", seed: int = 0, active: Any = ACTIVE["some"], G: float = 0.1, **options: Any) -> MoE:
    """A layer with experts that differ, thresholds near `G`, and the slots `active`.

    Columns have unlike lengths and are not orthogonal: where they are, the gradient of diversity is rounding.
    """
    torch.manual_seed(seed)
    options = {"num_experts": 2, "max_expert_num": E, "k": -1, **options}
    layer = MoE(D, KINDS[kind](), **options)
    gate = layer.deepspeed_moe.gate.wg
    with torch.no_grad():
        for parameter in layer.deepspeed_moe.experts.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
        gate.sim_matrix.add_(0.2 * torch.randn(D, E)).mul_(torch.rand(E) + 0.5)
        gate.gates.copy_(G + 0.1 * torch.randn(E))
        gate.experts_mask.copy_(torch.tensor([slot in active for slot in range(E)]))
    return layer


@dataclass
class Expected:
    """What upstream's layer computes, and its gradients by the names of the parameters."""

    output: Tensor
    l_aux: float
    counts: list[int]
    gradients: dict[str, Tensor]


def expected(layer: MoE, x_TD: Tensor, shaken_TD: Tensor, dy_TD: Tensor, d_aux: float) -> Expected:
    """One loop over assignments (t, e), in float64. The gate sees `shaken_TD`, experts see `x_TD`."""
    layer = copy.deepcopy(layer).double()
    gate, training = oracle_gate(layer.deepspeed_moe.gate.wg), layer.training
    assert margin(shaken_TD, gate) > MARGIN, "a decision is too near to its threshold: take another seed"
    names = [name for name, _ in layer.deepspeed_moe.experts.deepspeed_experts[0].named_parameters()]

    def function(x_D: Tensor, *parameters: Tensor) -> Tensor:
        called = torch.func.functional_call(
            layer.deepspeed_moe.experts.deepspeed_experts[0], dict(zip(names, parameters, strict=True)), (x_D,)
        )
        return called[0] if isinstance(called, tuple) else called

    slots = [[p.detach() for p in expert.parameters()] for expert in layer.deepspeed_moe.experts.deepspeed_experts]
    experts = oracle.Experts(function, slots)
    factor_T1, through_residual = torch.ones(len(x_TD), 1), {}
    if layer.use_residual:
        weight_T2 = torch.softmax(layer.coefficient(x_TD), dim=-1).detach()
        factor_T1 = weight_T2[:, :1]
    chosen_TE, passed_TE = oracle.assignments(shaken_TD, gate, training), oracle.passes(shaken_TD, gate)
    y_TD, ds_TE, dx_TD = 0 * x_TD, 0 * oracle.cosines(shaken_TD, gate), 0 * x_TD
    dslots = [[torch.zeros_like(parameter) for parameter in slot] for slot in slots]
    for t, e in chosen_TE.nonzero().tolist():
        k, dy_D = int(chosen_TE[t].sum()), dy_TD[t] * factor_T1[t]
        made_D = experts(e, x_TD[t])
        y_TD[t] += made_D / k
        dx_D, *dslot = experts.vjp(e, x_TD[t], dy_D / k)
        dx_TD[t] += dx_D
        dslots[e] = [total + part for total, part in zip(dslots[e], dslot, strict=True)]
        if passed_TE[t, e]:
            ds_TE[t, e] = dy_D @ made_D / k
    terms = oracle.losses(shaken_TD, gate)
    every = oracle.Gate(gate.w_DE, gate.G_E, list(range(E)), gate.temperature)
    terms["simplicity"] = oracle.losses(shaken_TD, every)["simplicity"]  # upstream's mean is over all slots
    through_gate = oracle.gate_backward(shaken_TD, gate, ds_TE + d_aux * sum(terms[name][2] for name in TERMS))
    output = y_TD
    if layer.use_residual:
        output, through_residual = _residual(layer, x_TD, y_TD, dy_TD)
        dx_TD += through_residual.pop("x")
    shake_TD = torch.where(x_TD == 0, 0, shaken_TD / x_TD)
    gradients = {
        "x": dx_TD + shake_TD * through_gate["x"],
        "deepspeed_moe.gate.wg.sim_matrix": through_gate["w"] + d_aux * sum(terms[name][1] for name in TERMS),
        "deepspeed_moe.gate.wg.gates": through_gate["G"],
        **through_residual,
    }
    for e, dslot in enumerate(dslots):
        named = {f"deepspeed_moe.experts.deepspeed_experts.{e}.{n}": d for n, d in zip(names, dslot, strict=True)}
        gradients |= named
    return Expected(output, sum(terms[name][0] for name in TERMS), chosen_TE.sum(dim=0).tolist(), gradients)


def _residual(layer: MoE, x_TD: Tensor, y_TD: Tensor, dy_TD: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """The output of a residual MoE, and the gradients that do not pass through its experts."""
    x_TD = x_TD.clone().requires_grad_()
    of_mlp = layer.mlp(x_TD)
    of_mlp = of_mlp[0] if isinstance(of_mlp, tuple) else of_mlp
    weight_T2 = torch.softmax(layer.coefficient(x_TD), dim=-1)
    output = y_TD * weight_T2[:, :1] + of_mlp * weight_T2[:, 1:]
    beside = {n: p for n, p in layer.named_parameters() if not n.startswith("deepspeed_moe.")}
    named = {"x": x_TD, **beside}
    found = torch.autograd.grad(output, list(named.values()), dy_TD)
    return output.detach(), dict(zip(named, found, strict=True))


def check(layer: MoE, x: Tensor, used: Tensor | None = None, shaken: Tensor | None = None) -> Expected:
    """Compare a forward and backward of the layer on `x` with `expected` on the tokens that are used."""
    keep_T = torch.ones(x[..., 0].numel(), dtype=torch.bool) if used is None else used.flatten().bool()
    dy, d_aux = torch.randn(x.shape), 3.0
    if not layer.training:
        d_aux = 0.0  # in eval l_aux is a number to log
    real_TD = x.reshape(-1, D)[keep_T].double()
    want = expected(
        layer,
        real_TD,
        real_TD if shaken is None else shaken.reshape(-1, D)[keep_T].double(),
        dy.reshape(-1, D)[keep_T].double(),
        d_aux,
    )
    x = x.clone().requires_grad_()
    output, l_aux, counts = layer(x, used)
    ((output * dy).sum() + d_aux * l_aux).backward()
    assert output.shape == x.shape
    assert (l_aux.shape, l_aux.dtype, counts.dtype) == ((), torch.float32, torch.int64)
    assert counts.tolist() == want.counts
    assert relative_rms(output.reshape(-1, D)[keep_T], want.output) < FP32
    if layer.training:
        assert relative_rms(l_aux, want.l_aux) < FP32
    found = {"x": x.grad.reshape(-1, D)[keep_T], **{n: p.grad for n, p in layer.named_parameters() if p.requires_grad}}
    assert found.keys() == want.gradients.keys()
    for name, gradient in found.items():
        scale = 1.0 if name.startswith("coefficient") else 0.0  # of a softmax: sums that cancel
        assert relative_rms(gradient, want.gradients[name], scale) < FP32, name
    return want


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_parity(kind: str, residual: bool, training: bool) -> None:
    layer = moe(kind, use_residual=residual).train(training)
    want = check(layer, torch.randn(3, 7, D))
    assert sum(want.counts) > 0


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("active", ACTIVE)
def test_masks(active: str, training: bool) -> None:
    check(moe(active=ACTIVE[active], seed=3).train(training), torch.randn(2, 9, D))


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_without_assignments(kind: str) -> None:
    """The output is 0, or the residual's; every parameter has a gradient."""
    want = check(moe(kind, G=2.0, use_residual=True), torch.randn(5, D))
    assert sum(want.counts) == 0
    layer = moe(kind, G=2.0)
    output, _, _ = layer(torch.randn(5, D))
    assert not output.any()
    output.sum().backward()
    experts = list(layer.deepspeed_moe.experts.parameters())
    assert all(parameter.grad is not None and not parameter.grad.any() for parameter in experts)


def test_temperature_scales_scores_and_thresholds() -> None:
    layer = moe()
    with torch.no_grad():
        layer.deepspeed_moe.gate.wg.temperature.fill_(0.7)
    check(layer, torch.randn(15, D))
    assert layer.deepspeed_moe.gate.wg.temperature.grad is None


@pytest.mark.parametrize("form", ["bool", "float, flat"])
def test_used_token(form: str) -> None:
    """Padding reaches no expert and no loss; its output is 0."""
    layer, x = moe("norm and dropout"), torch.randn(3, 7, D)
    used = torch.arange(21).view(3, 7) % 4 > 0
    check(layer, x, used if form == "bool" else used.flatten().float())
    output, _, _ = layer(x, used)
    assert not output[~used].any()


@pytest.mark.parametrize("training", [True, False])
def test_jitter(training: bool) -> None:
    """The gate sees tokens that are shaken as DeepSpeed shakes them, in training; experts do not."""
    layer, x = moe(noisy_gate_policy="Jitter", seed=1).train(training), torch.randn(20, D)
    torch.manual_seed(5)
    torch.randn(x.shape)  # what `check` draws before the forward
    shaken = multiplicative_jitter(x, x.device) if training else x
    torch.manual_seed(5)
    check(layer, x, shaken=shaken)


def test_dropout_acts_in_training_alone() -> None:
    torch.manual_seed(0)
    layer = MoE(D, Normed(0.5), num_experts=2, k=-1, max_expert_num=2)
    with torch.no_grad():
        layer.deepspeed_moe.gate.wg.gates.fill_(-1)
    x = torch.randn(8, D)
    assert not torch.equal(layer(x)[0], layer(x)[0])
    layer.eval()
    assert torch.equal(layer(x)[0], layer(x)[0])


def test_the_loss_belongs_to_the_forward() -> None:
    """Also to the one that reentrant checkpointing recomputes: gradients are those without it."""
    found = []
    for recompute in (False, True):
        layer, x = moe("gated", use_residual=True), torch.linspace(-1, 1, 9 * D).sin().view(9, D).requires_grad_()

        def loss(x: Tensor, layer: MoE = layer) -> Tensor:
            output, l_aux, _ = layer(x)
            return output.square().sum() + l_aux

        value = torch.utils.checkpoint.checkpoint(loss, x, use_reentrant=True) if recompute else loss(x)
        value.backward()
        found.append([x.grad, *(p.grad for p in layer.parameters() if p.requires_grad)])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_bf16() -> None:
    layer = moe("gated", use_residual=True).bfloat16()
    output, l_aux, counts = layer(torch.randn(4, 5, D, dtype=torch.bfloat16))
    assert (output.dtype, l_aux.dtype) == (torch.bfloat16, torch.float32)
    assert sum(counts.tolist()) > 0


@pytest.mark.parametrize("k", [1, 2, 3])
def test_another_k_is_deepspeeds_own(k: int) -> None:
    """Bitwise: start weights, outputs, losses, counts, gradients, state dict."""
    found = []
    for cls in (stock.MoE, MoE):
        torch.manual_seed(0)
        layer = cls(D, Normed(), 4, 1, k, 2.0, use_residual=True, noisy_gate_policy="Jitter")
        assert type(layer.deepspeed_moe) is MOELayer
        x = torch.randn(12, D, requires_grad=True)
        output, l_aux, counts = layer(x)
        (output.sum() + l_aux).backward()
        found.append({"y": output, "l": l_aux, "n": counts, "x": x.grad, **layer.state_dict()})
        found[-1] |= {f"d {name}": parameter.grad for name, parameter in layer.named_parameters()}
    first, second = found
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first if first[name] is not None)


def test_it_is_both_layers() -> None:
    layer = moe()
    assert isinstance(layer, stock.MoE)
    assert isinstance(layer.deepspeed_moe, MoELayer)
    copied = copy.deepcopy(layer)
    x = torch.randn(6, D)
    assert relative_rms(copied(x)[0], layer(x)[0]) < FP32
    copied(x)[0].sum().backward()
    assert all(parameter.grad is None for parameter in layer.parameters())

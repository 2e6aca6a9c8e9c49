"""Only forwards that a backward can follow are recorded, each once, with and without gradient checkpointing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dynmoe_tutel import MoELayer
from dynmoe_tutel.forwards import in_backward, is_training
from dynmoe_tutel.metrics import RoutingMeter

D, T = 8, 12
MODES = [None, False, True]  # no checkpointing, non-reentrant, reentrant
pytestmark = pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad:UserWarning")  # under no_grad


class Net(nn.Module):
    """Two layers behind a map; each in a region of its own, or both in one, or a region in a region."""

    def __init__(self, reentrant: bool | None = None, regions: str = "each", gate: Any = "top_any") -> None:
        super().__init__()
        self.reentrant, self.regions = reentrant, regions
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.first = nn.Linear(D, D)
            ffn = {"num_experts_per_device": 4, "hidden_size_per_expert": 6, "activation_fn": F.gelu}
            self.layers = nn.ModuleList(MoELayer(gate, D, ffn, seeds=(i, i)) for i in range(2))

    def region(self, function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        if self.reentrant is None:
            return function(x)
        return checkpoint(function, x, use_reentrant=self.reentrant)  # type: ignore[return-value]

    def both(self, x: Tensor, inner: bool) -> Tensor:
        for layer in self.layers:
            x = x + (self.region(layer, x) if inner else layer(x))
        return x

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        if self.regions == "each":
            return self.both(x, True)
        return self.region(lambda x: self.both(x, self.regions == "nested"), x)


def tokens(seed: int = 0) -> Tensor:
    return torch.randn(T, D, generator=torch.Generator().manual_seed(seed))


def opened(model: Net, record_eval: bool = False) -> Net:
    for layer in model.layers:
        layer.begin_record_routing(record_eval)
    return model


def recorded(model: Net) -> list[int]:
    return [int(layer.record.tokens) for layer in model.layers]


@pytest.mark.parametrize("regions", ["each", "both", "nested"])
@pytest.mark.parametrize("reentrant", MODES)
def test_a_training_forward_is_recorded_once(reentrant: bool | None, regions: str) -> None:
    model = opened(Net(reentrant, regions))
    y = model(tokens())
    assert recorded(model) == [T, T]  # before the backward
    y.sum().backward()
    assert recorded(model) == [T, T]


@pytest.mark.parametrize("reentrant", MODES)
def test_twice_backward_records_once(reentrant: bool | None) -> None:
    model = opened(Net(reentrant))
    y = model(tokens()).sum()
    y.backward(retain_graph=True)
    y.backward()
    assert recorded(model) == [T, T]


@pytest.mark.parametrize("regions", ["each", "nested"])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("reentrant", MODES)
def test_without_grad_mode_nothing_is_recorded(reentrant: bool | None, mode: Any, regions: str) -> None:
    """SWA's update_bn, test-time adaptation, the forward of an average of the weights: in train mode, without
    gradients."""
    model = opened(Net(reentrant, regions))
    with mode():
        model(tokens())
    assert recorded(model) == [0, 0]
    model(tokens()).sum().backward()
    with mode():
        model(tokens(1))
    assert recorded(model) == [T, T]


def test_update_bn_is_not_recorded() -> None:
    model = opened(Net())
    torch.optim.swa_utils.update_bn([tokens()], nn.Sequential(model, nn.BatchNorm1d(D)))
    assert recorded(model) == [0, 0]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("reentrant", MODES)
def test_on_request_every_forward_is_recorded(reentrant: bool | None, training: bool) -> None:
    model = opened(Net(reentrant), record_eval=True).train(training)
    with torch.no_grad():
        model(tokens())
    assert recorded(model) == [T, T]
    model(tokens()).sum().backward()
    assert recorded(model) == [2 * T, 2 * T]


@pytest.mark.parametrize("reentrant", MODES)
def test_a_frozen_layer_in_training_is_recorded(reentrant: bool | None) -> None:
    """Gradients pass through it: a discriminator in the generator's step, an adapter below frozen experts."""
    model = opened(Net(reentrant))
    model.layers.requires_grad_(False)
    model(tokens()).sum().backward()
    assert recorded(model) == [T, T]


@pytest.mark.parametrize("reentrant", MODES)
def test_generator_and_discriminator(reentrant: bool | None) -> None:
    """Two steps of a GAN with one backward each. D sees real and fake tokens, then fake ones."""
    G, D_ = opened(Net(reentrant)), opened(Net(reentrant))
    with torch.no_grad():
        fake = G(tokens())
    (D_(tokens(1)).mean() - D_(fake).mean()).backward()
    assert (recorded(G), recorded(D_)) == ([0, 0], [2 * T, 2 * T])
    D_.requires_grad_(False)
    D_(G(tokens())).mean().backward()
    assert (recorded(G), recorded(D_)) == ([T, T], [3 * T, 3 * T])


@pytest.mark.parametrize("reentrant", MODES)
def test_the_meter_of_training_counts_the_same(reentrant: bool | None) -> None:
    model = Net(reentrant)
    meter = RoutingMeter(model, training_only=True)

    def counted() -> list[int]:
        return [int(sums["k_histogram"].sum()) for sums in meter.state_dict().values()]

    with torch.no_grad():
        model(tokens())
    assert counted() == [0, 0]
    model(tokens()).sum().backward()
    assert counted() == [T, T]


@pytest.mark.parametrize("preserve", [True, False])
@pytest.mark.parametrize("reentrant", MODES)
def test_a_function_of_ones_own(reentrant: bool | None, preserve: bool) -> None:
    """A module that only asks: grad mode, and whether the forward is a recompute."""
    seen = []

    class Asks(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            seen.append((is_training(self), in_backward()))
            return x.sin()

    def run(x: Tensor) -> Tensor:
        if reentrant is None:
            return module(x)
        return checkpoint(module, x, use_reentrant=reentrant, preserve_rng_state=preserve)  # type: ignore[return-value]

    module = Asks()
    run(tokens().requires_grad_() * 2).sum().backward()
    assert seen == [(True, False), (True, True)][: 1 if reentrant is None else 2]
    seen.clear()
    with torch.no_grad():
        run(tokens().requires_grad_() * 2)
    module.eval()
    run(tokens().requires_grad_() * 2)
    assert seen == [(False, False)] * 2


@pytest.mark.parametrize("gate", [{"type": "top", "k": 2, "gate_noise": 2.0}, {"type": "gated_multi_gate_t"}])
@pytest.mark.parametrize("reentrant", [True, False])
def test_noise_and_losses_of_each_forward_are_its_own(reentrant: bool, gate: dict[str, Any]) -> None:
    """Two forwards before one backward: gradients, losses and records as without checkpointing."""
    found = []
    for mode in (None, reentrant):
        torch.manual_seed(3)
        model = opened(Net(mode, gate=gate))
        a = model(tokens())
        first = [layer.l_aux for layer in model.layers]
        with torch.no_grad():
            model(tokens(2))
        b = model(tokens(1)[:5])
        last = [layer.l_aux for layer in model.layers]
        loss = a.square().mean() + b.square().mean()
        if not reentrant:
            loss = loss + sum(first) + sum(last)
        loss.backward()
        assert all(layer.l_aux is loss for layer, loss in zip(model.layers, last, strict=True))
        assert recorded(model) == [T + 5, T + 5]
        losses = [each.detach() for each in (*first, *last)]
        found.append([*losses, *(p.grad for p in model.parameters() if p.grad is not None)])
    assert len(found[0]) == len(found[1]) > 8
    for value, expected in zip(found[1], found[0], strict=True):
        assert torch.allclose(value, expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("reentrant", MODES)
def test_a_list_of_gates(reentrant: bool | None) -> None:
    """The recompute takes the gate of its forward, and each gate's record gets its own tokens once."""
    ffn = {"num_experts_per_device": 4, "hidden_size_per_expert": 6}
    gradients = []
    for mode in (None, reentrant):
        layer = MoELayer(["top_any", {"type": "top_any", "init_t": 0.3}], D, ffn, seeds=(1, 2, 3))
        layer.begin_record_routing()
        y = []
        for gate, x in enumerate((tokens(), tokens(1)[:5])):
            x = x.requires_grad_() * 1

            def call(x: Tensor, layer: MoELayer = layer, gate: int = gate) -> Tensor:
                return layer(x, gate_index=gate)

            y.append(call(x) if mode is None else checkpoint(call, x, use_reentrant=mode))
        (y[0].square().sum() + y[1].square().sum()).backward()
        assert [int(record.tokens) for record in layer.records] == [T, 5]
        gradients.append([p.grad for p in layer.parameters() if p.grad is not None])
    assert len(gradients[0]) == len(gradients[1])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_recompute_sets_nothing_for_later_calls(reentrant: bool) -> None:
    layer = Net().layers[0]
    losses = []
    for degree in (2, 1):
        x = tokens().requires_grad_() * 1
        losses.append(checkpoint(lambda x, n=degree: layer(x, a2a_ffn_overlap_degree=n), x, use_reentrant=reentrant))
    (losses[0].sum() + losses[1].sum()).backward()
    assert layer.a2a_ffn_overlap_degree == 1


def test_a_compiled_layer_in_a_reentrant_region_is_recorded_once() -> None:
    """A compiled graph cannot see the region around it: its run with grad mode, the recompute, counts."""
    torch._dynamo.reset()
    layer = Net().layers[0]
    layer.begin_record_routing()
    run = torch.compile(layer, backend="aot_eager", fullgraph=True)
    checkpoint(run, tokens().requires_grad_() * 1, use_reentrant=True).sum().backward()  # type: ignore[union-attr]
    assert int(layer.record.tokens) == T
    with torch.no_grad():
        run(tokens())
    assert int(layer.record.tokens) == T
    torch._dynamo.reset()

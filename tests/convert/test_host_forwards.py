"""A recompute of gradient checkpointing gets the mask of its own forward, however many precede the backward."""

from __future__ import annotations

import copy
import gc
import threading
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from helpers import relative_rms
from masked_host import Host, batch, gradients, host, layers, mask
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dynmoe_tutel.convert import aux_loss
from dynmoe_tutel.convert.host_forwards import Forward
from dynmoe_tutel.convert.padding_mask import _Keep

MODES = [False, True]  # use_reentrant
REGIONS = ["each", "all", "nested"]  # a region a block; one region; regions in one region
pytestmark = pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad:UserWarning")  # under no_grad


@dataclass
class Record:
    hidden: Tensor
    rest: Any = None


class Opaque:
    def __init__(self, hidden: Tensor) -> None:
        self.hidden = hidden


def check(loss_of: Callable[[Host], Tensor], reentrant: bool | str, regions: str = "each") -> None:
    """Gradients and records are those without checkpointing."""
    found = []
    for model in (host(), host(reentrant, regions)):
        for layer in layers(model):
            layer.begin_record_routing()
        values = gradients(model, loss_of(model))
        found.append((values, [layer.record.counts.tolist() for layer in layers(model)]))
    (expected, counts), (values, own) = found
    assert own == counts
    assert len(values) == len(expected) > 1
    for value, reference in zip(values, expected, strict=True):
        assert relative_rms(value, reference, 1e-6) < 1e-5


def pair(model: Host) -> Tensor:
    a, b = model(batch(0), mask(6, 2)), model(batch(1), mask(1, 5))
    return (a[:, 0] * b[:, 0]).sum().tanh() + a.square().mean() + b.mean()


def three(model: Host) -> Tensor:
    anchor, positive = model(batch(0), mask(5, 4)), model(batch(0), mask(2, 3))
    negative = model(batch(1), mask(1, 1))
    return (anchor * positive).mean() - (anchor * negative).mean() + anchor.mean()


def shapes(model: Host) -> Tensor:
    long = model(batch(0, 3, 9), mask(9, 4, 2, L=9))
    short = model(batch(1, 1, 4), mask(2, L=4))
    return long[:, 0].sum() * short[:, 0].sum()


def without_a_mask_between(model: Host) -> Tensor:
    a, free, b = model(batch(0), mask(6, 2)), model(batch(1)), model(batch(2), mask(1, 2))
    return (a * b * free).mean()


def masked_between(model: Host) -> Tensor:
    a, masked, b = model(batch(0)), model(batch(1), mask(1, 2)), model(batch(2))
    return (a * b * masked).mean()


def no_grad_between(model: Host) -> Tensor:
    """DPO's reference, a validation step, a metric."""
    a = model(batch(0), mask(6, 2))
    with torch.no_grad():
        reference = model(batch(1), mask(1, 1))
    model.eval()(batch(1), mask(1, 1))
    return (a * reference).mean() + model.train()(batch(2), mask(2, 3)).mean()


def backward_out_of_order(model: Host) -> Tensor:
    a, b = model(batch(0), mask(6, 2)), model(batch(1), mask(1, 5))
    a.square().mean().backward()
    c = model(batch(2), mask(3, 3))
    c.mean().backward()
    return b.square().mean()


def one_of_two(model: Host) -> Tensor:
    a, b = model(batch(0), mask(6, 2)), model(batch(1), mask(1, 5))
    return a.square().mean() + 0 * b.detach().mean()


def failed_between(model: Host) -> Tensor:
    a = model(batch(0), mask(6, 2))
    model.fail = True
    with pytest.raises(RuntimeError, match="out of memory"):
        model(batch(1), mask(1, 1))
    model.fail = False
    return (a * model(batch(2), mask(2, 3))).mean()


LOSSES = [
    pair, three, shapes, without_a_mask_between, masked_between, no_grad_between, backward_out_of_order, one_of_two,
    failed_between,
]  # fmt: skip


@pytest.mark.parametrize("regions", REGIONS)
@pytest.mark.parametrize("reentrant", MODES)
@pytest.mark.parametrize("loss", LOSSES)
def test_gradients_are_those_without_checkpointing(loss: Any, reentrant: bool, regions: str) -> None:
    check(loss, reentrant, regions)


def test_the_masks_matter() -> None:
    """Another forward's mask gives another gradient: the tests above would see it."""
    model = host()
    right = gradients(model, pair(model))
    own = (model(batch(0), mask(1, 5)), model(batch(1), mask(1, 5)))
    wrong = gradients(model, (own[0][:, 0] * own[1][:, 0]).sum().tanh() + own[0].square().mean() + own[1].mean())
    assert max(relative_rms(a, b, 1e-6) for a, b in zip(right, wrong, strict=True)) > 0.1


@pytest.mark.parametrize("regions", REGIONS)
def test_checkpointing_of_ones_own(regions: str) -> None:
    check(pair, "own", regions)


@pytest.mark.parametrize("reentrant", MODES)
def test_twice_backward(reentrant: bool) -> None:
    def twice(model: Host) -> Tensor:
        loss = pair(model)
        loss.backward(retain_graph=True)
        model(batch(3), mask(2, 2))
        return loss

    check(twice, reentrant)


@pytest.mark.parametrize("regions", REGIONS)
@pytest.mark.parametrize("reentrant", MODES)
def test_a_backward_in_another_thread(reentrant: bool, regions: str) -> None:
    """As on a GPU. Each thread numbers its nodes from 0, so that those of a recompute look like those of a forward."""

    def backward_elsewhere(model: Host) -> Tensor:
        loss = pair(model)
        thread = threading.Thread(target=loss.backward)
        thread.start()
        thread.join()
        elsewhere.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
        return pair(model)

    elsewhere: list[list[Tensor]] = []
    check(backward_elsewhere, reentrant, regions)
    for value, reference in zip(*elsewhere, strict=True):
        assert relative_rms(value, reference, 1e-6) < 1e-5


def test_autograd_grad() -> None:
    found = []
    for model in (host(), host(False)):
        parameters = [p for p in model.parameters() if p.requires_grad]
        found.append(torch.autograd.grad(pair(model), parameters, allow_unused=True))
    for value, reference in zip(*found, strict=True):
        assert value is None or relative_rms(value, reference, 1e-6) < 1e-5


@pytest.mark.parametrize("inner", [True, False])
@pytest.mark.parametrize("outer", MODES)
def test_a_host_within_a_region(outer: bool, inner: bool) -> None:
    """Both forwards of a pair in one region, whose recompute runs the host anew; its blocks are regions too."""

    def whole(model: Host) -> Tensor:
        def both(scale: Tensor) -> Tensor:
            return pair(model) * scale

        scale = torch.ones((), requires_grad=True)
        if model.reentrant is None:
            return both(scale) + pair(model)
        return checkpoint(both, scale, use_reentrant=outer) + pair(model)  # type: ignore[operator]

    check(whole, inner)


@pytest.mark.parametrize("reentrant", MODES)
def test_generator_and_discriminator(reentrant: bool) -> None:
    """Two hosts whose forwards alternate before one backward, one of them frozen."""
    found = []
    for mode in (None, reentrant):
        g, d = host(mode), host(mode)
        d.requires_grad_(False)
        d.embed.requires_grad_(True)  # without an input that needs a gradient, reentrant checkpointing gives none
        loss = torch.zeros(())
        for step in range(3):
            fake = g(batch(step), mask(6, step + 1))
            loss = loss + (fake * d(batch(step + 5), mask(step + 1, 2))).mean() * fake.mean()
        found.append(gradients(g, loss))
    for value, reference in zip(*found, strict=True):
        assert relative_rms(value, reference, 1e-6) < 1e-5


@pytest.mark.parametrize("reentrant", MODES)
def test_accumulation_over_many_forwards(reentrant: bool) -> None:
    check(lambda model: sum(model(batch(i), mask(i % 6 + 1, 1)).mean() for i in range(20)), reentrant)  # type: ignore[arg-type,return-value]


def test_losses_of_two_forwards() -> None:
    def with_aux(model: Host) -> Tensor:
        a = model(batch(0), mask(6, 2)).mean() + aux_loss(model, 0.1)
        return a * model(batch(1), mask(1, 5)).mean() + aux_loss(model, 0.1)

    check(with_aux, False)


def test_the_loss_alone_holds_its_forward() -> None:
    def aux_alone(model: Host) -> Tensor:
        losses = []
        for i in range(3):
            model(batch(i), mask(6, i + 1))
            losses.append(aux_loss(model))
        return sum(losses)  # type: ignore[return-value]

    check(aux_alone, False)


@pytest.mark.parametrize(
    "pack",
    [
        lambda y: (None, [y]),
        lambda y: {"hidden": y},
        lambda y: Record(y),
        lambda y: [Record(None, {"y": Record(y)})],  # type: ignore[arg-type]
    ],
)
@pytest.mark.parametrize("reentrant", MODES)
def test_outputs_of_any_kind(reentrant: bool, pack: Any) -> None:
    def tensor(output: Any) -> Tensor:
        while not isinstance(output, Tensor):
            if isinstance(output, Record):
                output = output.hidden if output.rest is None else output.rest
            else:
                output = next(iter(output.values())) if isinstance(output, dict) else output[-1]
        return output

    def loss(model: Host) -> Tensor:
        model.pack = pack
        a, b = tensor(model(batch(0), mask(6, 2))), tensor(model(batch(1), mask(1, 5)))
        return (a * b).mean()

    check(loss, reentrant)


def test_an_output_that_cannot_be_read() -> None:
    """Right where one backward follows each forward; an error, not a wrong gradient, where it does not."""

    def one(model: Host) -> Tensor:
        model.pack = Opaque
        for seed in (3, 4):
            model(batch(seed), mask(1, 1)).hidden.mean().backward()
        return model(batch(0), mask(6, 2)).hidden.square().mean()

    def two(model: Host) -> Tensor:
        model.pack = Opaque
        a, b = model(batch(0), mask(6, 2)).hidden, model(batch(1), mask(1, 5)).hidden
        return (a * b).mean()

    check(one, True)
    check(one, False)

    def unmasked(model: Host) -> Tensor:
        model.pack = Opaque
        return (model(batch(0)).hidden * model(batch(1)).hidden).mean()

    check(two, False)  # here the layers' inputs hold it
    check(unmasked, True)
    with pytest.raises(RuntimeError, match=r"whose attention mask is gone.*before the next forward"):
        check(two, True)


def alive(model: nn.Module) -> int:
    hooks = [h for m in model.modules() for h in m._forward_pre_hooks.values() if isinstance(h, _Keep)]
    return sum(len(hook.forwards._alive) for hook in hooks)


@pytest.mark.parametrize("reentrant", [None, *MODES])
def test_masks_are_freed_with_their_graphs(reentrant: bool | None) -> None:
    """By their last reference, without the garbage collector; the newest one stays, as does one forward's mask."""
    model = host(reentrant)
    gc.collect()
    gc.disable()
    try:
        outputs = [model(batch(i), mask(6, 2)) for i in range(5)]
        assert alive(model) == 5
        sum(y.mean() for y in outputs[1:3]).backward()  # type: ignore[union-attr]
        assert alive(model) == 5
        del outputs[:4]
        assert alive(model) == 1
        for i in range(20):
            loss = model(batch(i), mask(6, 2)).mean()
            loss.backward()
            assert alive(model) <= 3
        with torch.no_grad():
            for i in range(20):
                model(batch(i), mask(6, 2))
        del loss, outputs
        assert alive(model) == 1
    finally:
        gc.enable()


def test_a_mask_lives_no_longer_than_its_graph() -> None:
    forward = Forward(torch.ones(2, 3, dtype=torch.bool))
    forward.first = 0
    x = torch.ones(2, requires_grad=True)
    old, freed = x * 2, weakref.ref(forward)
    forward.first = torch.autograd._get_sequence_nr()
    for tensor in (x, old, None, 3.0):  # what it did not make does not hold it
        forward.live_with(tensor)
    new = x * 3
    forward.live_with(new)
    del forward
    assert freed() is not None
    y = new.sin()
    del new
    assert freed() is not None
    del y
    assert freed() is None


def test_a_backward_that_failed_leaves_nothing() -> None:
    model = host(True, "nested")
    y = model(batch(0), mask(6, 2))
    handle = model.blocks[0].register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        y.mean().backward()
    handle.remove()
    found = gradients(model, pair(model))
    reference = host()
    for value, expected in zip(found, gradients(reference, pair(reference)), strict=True):
        assert relative_rms(value, expected, 1e-6) < 1e-5


@pytest.mark.parametrize("reentrant", MODES)
def test_copies_have_forwards_of_their_own(reentrant: bool) -> None:
    model = host(reentrant)
    y = model(batch(1), mask(1, 1))
    twin = copy.deepcopy(model)
    found = gradients(twin, pair(twin))
    y.mean().backward()
    reference = host()
    for value, expected in zip(found, gradients(reference, pair(reference)), strict=True):
        assert relative_rms(value, expected, 1e-6) < 1e-5


@pytest.fixture
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("_fresh_compiler")
class TestCompiled:
    def compiled(self, reentrant: bool | None) -> tuple[Host, Any]:
        model = host(reentrant)
        return model, torch.compile(model, backend="aot_eager", fullgraph=reentrant is None)

    @pytest.mark.parametrize("reentrant", [None, *MODES])
    def test_gradients_are_those_of_eager(self, reentrant: bool | None) -> None:
        """Two forwards before the backward, or, with checkpointing, one."""
        model, run = self.compiled(reentrant)
        reference = host()
        for _ in range(1 if reentrant is None else 2):
            found, expected = (
                gradients(m, pair(call) if reentrant is None else call(batch(0), mask(6, 2)).square().mean())
                for m, call in ((model, run), (reference, reference))
            )
            for value, each in zip(found, expected, strict=True):
                assert relative_rms(value, each, 1e-6) < 1e-5

    def test_two_forwards_are_an_error_and_not_a_wrong_gradient(self) -> None:
        _, run = self.compiled(True)
        loss = pair(run)
        with pytest.raises(RuntimeError, match=r"under torch\.compile"):
            loss.backward()

"""`aux_loss` finds what wrappers drop: `y.l_aux` is an attribute of one tensor, and a new tensor does not have it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from dynmoe_tutel import MoELayer, validation
from dynmoe_tutel.convert import aux_loss

T, D, H, E = 10, 8, 6, 4
Run = Callable[[Tensor], Tensor]


def model() -> nn.Sequential:
    experts = {"num_experts_per_device": E, "hidden_size_per_expert": H, "activation_fn": "gelu"}
    first, last = (MoELayer("top_any", D, experts, seeds=(seed, seed)) for seed in range(2))
    return nn.Sequential(first, last)


def tokens() -> Tensor:
    return torch.randn(T, D, generator=torch.Generator().manual_seed(5)).requires_grad_()


@pytest.fixture(scope="module", autouse=True)
def one_rank(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    store: Path = tmp_path_factory.mktemp("store") / "store"
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def with_backward_hook(model: nn.Sequential) -> Run:
    model[1].register_full_backward_hook(lambda *_: None)
    return model


def under_autocast(model: nn.Sequential) -> Run:
    def run(x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return model(x)

    return run


def compiled(model: nn.Sequential, **options: Any) -> Run:
    return torch.compile(model, backend="aot_eager", **options)


WRAPPED: dict[str, tuple[Callable[[nn.Sequential], Run], bool]] = {  # the wrapped model; whether y keeps l_aux
    "none": (lambda model: model, True),
    "operation after": (lambda model: lambda x: model(x) + 1, False),
    "module after": (lambda model: nn.Sequential(model, nn.Linear(D, D)), False),
    "dropout of 0 after": (lambda model: nn.Sequential(model, nn.Dropout(0.0)), True),
    "full backward hook": (with_backward_hook, False),
    "autocast": (under_autocast, True),
    "checkpoint": (lambda model: lambda x: checkpoint(model, x, use_reentrant=False), True),
    "compile": (compiled, True),
    "compiled layers": (lambda model: nn.Sequential(*(compiled(layer) for layer in model)), True),  # type: ignore[arg-type,misc]
    "DDP": (DistributedDataParallel, True),
    "DDP, static graph": (lambda model: DistributedDataParallel(model, static_graph=True), False),
    "DDP, unused": (lambda model: DistributedDataParallel(model, find_unused_parameters=True), False),
    "DataParallel on a CPU": (nn.DataParallel, True),
}


@pytest.mark.parametrize("wrapper", WRAPPED)
def test_it_counts_behind(wrapper: str) -> None:
    """Of the routing vectors: the gradient of the loss alone, which all wrappers leave as it is."""
    torch._dynamo.reset()
    wrap, kept = WRAPPED[wrapper]
    plain, wrapped = model(), model()
    run = wrap(wrapped)
    plain(tokens())
    aux_loss(plain, weight=0.5).backward()
    y = run(tokens())
    assert hasattr(y, "l_aux") == kept
    (aux_loss(wrapped, weight=0.5) + 0 * y.sum()).backward()
    for of_plain, of_wrapped in zip(plain, wrapped, strict=True):
        expected, actual = (layer.gates[0].sim_matrix.grad for layer in (of_plain, of_wrapped))  # type: ignore[union-attr,index]
        assert expected.count_nonzero() > 0
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("how", ["reentrant", "no_grad"])
def test_a_loss_without_a_gradient_is_reported(
    how: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(validation, "_warned", set())
    whole = model()
    if how == "reentrant":
        checkpoint(whole, tokens(), use_reentrant=True)
    else:
        with torch.no_grad():
            whole(tokens())
    with caplog.at_level(logging.WARNING, "dynmoe_tutel"):
        aux_loss(whole)
    assert "use_reentrant=False" in caplog.text


@pytest.mark.parametrize("how", ["eval", "frozen gates", "logged without a gradient", "no terms", "kept"])
def test_what_needs_no_gradient_is_not_reported(
    how: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(validation, "_warned", set())
    whole = model()
    if how == "no terms":
        experts = {"num_experts_per_device": E, "hidden_size_per_expert": H}
        whole = nn.Sequential(MoELayer("top_any", D, experts, aux_losses={}))
    if how == "frozen gates":
        for layer in whole:
            layer.gates.requires_grad_(False)  # type: ignore[union-attr,operator]
    with torch.set_grad_enabled(how != "eval"), caplog.at_level(logging.WARNING, "dynmoe_tutel"):
        whole.train(how != "eval")(tokens())
    with torch.set_grad_enabled(how != "logged without a gradient"):
        aux_loss(whole)
    assert not caplog.text

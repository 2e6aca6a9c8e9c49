"""The layer under torch's machinery: hooks, pruning, forward mode, inference mode, and state that stays in place."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import numpy
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import prune

from dynmoe_tutel import MoELayer, RoutingRecord

T, D, H, E = 10, 8, 6, 4


def layer_with(gate: str = "top_any", experts: dict[str, Any] | None = None, **options: Any) -> MoELayer:
    ffn = {"num_experts_per_device": E, "hidden_size_per_expert": H, "activation_fn": F.gelu, **(experts or {})}
    return MoELayer(gate, D, ffn, seeds=(0, 0), **options)


def tokens() -> Tensor:
    return torch.randn(T, D, generator=torch.Generator().manual_seed(32))  # no cosine is near the thresholds, 0


@pytest.mark.parametrize("gate", ["top_any", "top"])
class TestHooks:
    def test_of_the_experts_run(self, gate: str) -> None:
        layer, calls = layer_with(gate), []
        expected = layer(tokens())
        layer.experts.register_forward_hook(lambda *_: calls.append(1))
        assert torch.allclose(layer(tokens()), expected, atol=1e-6)
        assert calls == [1]

    def test_pruned_weights_are_computed_anew(self, gate: str) -> None:
        """torch.nn.utils.prune masks in a forward pre-hook: without the hook, the first masked copy would stay."""
        layer = layer_with(gate)
        prune.l1_unstructured(layer.experts, "batched_fc2_w", 0.5)
        optimizer = torch.optim.SGD(layer.parameters(), lr=1.0)
        layer(tokens()).sum().backward()
        optimizer.step()
        layer(tokens())
        experts: Any = layer.experts
        assert torch.equal(experts.batched_fc2_w, experts.batched_fc2_w_orig * experts.batched_fc2_w_mask)

    @pytest.mark.parametrize("of", ["backward pre-hook", "own forward"])
    def test_of_the_activation_run(self, gate: str, of: str) -> None:
        activation, calls = nn.GELU(), []
        layer = layer_with(gate, {"activation_fn": activation})
        if of == "own forward":
            activation.forward = lambda h: calls.append(1) or h * 0  # type: ignore[method-assign,assignment,func-returns-value]
        else:
            activation.register_full_backward_pre_hook(lambda *_: calls.append(1))
        layer(tokens()).sum().backward()
        assert calls == [1]


@pytest.mark.parametrize("made", [None, (torch.zeros(3), 1)])
def test_an_activation_that_makes_no_tensor(made: Any) -> None:
    with pytest.raises(ValueError, match="activation_fn returned"):
        layer_with(experts={"activation_fn": lambda h: made})(tokens())


@pytest.mark.parametrize("gate", ["top_any", "top"])
def test_forward_mode_is_refused(gate: str) -> None:
    """The operations have no forward derivative, and torch would silently use zero."""
    layer, x = layer_with(gate).requires_grad_(False), tokens()
    with pytest.raises(NotImplementedError, match="no forward-mode"):
        torch.func.jvp(layer, (x,), (x,))
    with torch.autograd.forward_ad.dual_level(), pytest.raises(NotImplementedError, match="no forward-mode"):
        layer(torch.autograd.forward_ad.make_dual(x, x))
    layer(x)


def per_sample_gradients(layer: MoELayer, x: Tensor) -> Any:
    parameters = {name: p.detach() for name, p in layer.named_parameters()}

    def loss(parameters: dict[str, Tensor], sample: Tensor) -> Tensor:
        return torch.func.functional_call(layer, parameters, (sample,)).sum()

    return torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, torch.stack([x, 2 * x]))


def old_onnx(layer: MoELayer, x: Tensor) -> None:
    torch.onnx.export(nn.Sequential(layer).eval(), (x,), io.BytesIO(), dynamo=False)


REFUSED: dict[str, tuple[Callable[[MoELayer, Tensor], Any], str]] = {  # the call and what its error names
    "vmap": (lambda layer, x: torch.vmap(layer)(torch.stack([x, x])), r"torch\.func's transforms"),
    "grad": (lambda layer, x: torch.func.grad(lambda t: layer(t).sum())(x), r"torch\.func's transforms"),
    "vjp": (lambda layer, x: torch.func.vjp(layer, x), r"torch\.func's transforms"),
    "jacrev": (lambda layer, x: torch.func.jacrev(layer)(x), r"torch\.func's transforms"),
    "gradients by sample": (per_sample_gradients, r"torch\.func's transforms .* once a sample"),
    "jacfwd": (lambda layer, x: torch.func.jacfwd(layer)(x), "no forward-mode"),
    "hessian": (lambda layer, x: torch.func.hessian(lambda t: layer(t).sum())(x), "no forward-mode"),
    "linearize": (lambda layer, x: torch.func.linearize(layer, x), "no forward-mode"),
    "route": (lambda layer, x: torch.func.jvp(lambda t: layer.route(t).scores, (x,), (x,)), "no forward-mode"),
    "jit.trace": (lambda layer, x: torch.jit.trace(layer, x), r"torch\.jit\.trace"),
    "jit.trace of a model": (lambda layer, x: torch.jit.trace(nn.Sequential(layer), x), r"torch\.jit\.trace"),
    "jit.script": (lambda layer, x: torch.jit.script(nn.Sequential(layer)), r"torch\.jit\.script"),
    "fx": (lambda layer, x: torch.fx.symbolic_trace(layer), r"torch\.fx\.symbolic_trace"),
    "fx of a model": (lambda layer, x: torch.fx.symbolic_trace(nn.Sequential(layer)), r"torch\.fx\.symbolic_trace"),
    "onnx by tracing": (old_onnx, "ONNX"),
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch.jit
@pytest.mark.parametrize("gate", ["top_any", "top"])
@pytest.mark.parametrize("what", REFUSED)
def test_what_has_no_rule_is_refused_by_name(what: str, gate: str) -> None:
    layer, (call, named) = layer_with(gate), REFUSED[what]
    with pytest.raises(NotImplementedError, match=named):
        call(layer, tokens())
    assert layer(tokens()).shape == (T, D)


@pytest.mark.parametrize("strict", [False, True])
def test_onnx_by_export_is_refused_by_name(monkeypatch: pytest.MonkeyPatch, strict: bool) -> None:
    """torch.onnx.export runs torch.export first; strict, torch.compile takes its flag for False."""
    layer = layer_with().eval()
    torch.export.export(layer, (tokens(),), strict=strict)
    monkeypatch.setattr(torch.onnx, "is_in_onnx_export", lambda: True)
    with pytest.raises(Exception, match="cannot be exported to ONNX"):
        torch.export.export(layer, (tokens(),), strict=strict)


def test_onnx() -> None:
    pytest.importorskip("onnxscript")
    with pytest.raises(torch.onnx.OnnxExporterError, match="cannot be exported to ONNX"):
        torch.onnx.export(layer_with().eval(), (tokens(),), io.BytesIO(), dynamo=True, verbose=False)


@pytest.mark.parametrize("gate", ["top_any", "top"])
@pytest.mark.parametrize("of", ["y", "l_aux"])
def test_second_derivatives_are_refused_by_name(gate: str, of: str) -> None:
    if (gate, of) == ("top", "l_aux"):
        pytest.skip("torch's own operations, which have them")
    layer, x = layer_with(gate), tokens().requires_grad_()
    y = layer(x)
    of_first = [x] if of == "y" else list(layer.gates.parameters())[:1]
    (first,) = torch.autograd.grad(y.square().sum() if of == "y" else y.l_aux, of_first, create_graph=True)
    with pytest.raises(NotImplementedError, match="first derivatives only: take a second one"):
        first.square().sum().backward()


def test_transforms_with_a_rule() -> None:
    layer, x = layer_with().double(), tokens().double()
    y = layer(x)
    assert torch.equal(torch.func.functional_call(layer, dict(layer.named_parameters()), (x,)), y)
    assert torch.equal(torch.func.functionalize(layer)(x), y)
    one_by_one = torch.autograd.functional.jacobian(layer, x)
    assert torch.equal(torch.autograd.functional.jacobian(layer, x, vectorize=True), one_by_one)


def test_a_tracer_of_torch_fx_may_take_the_layer_for_a_leaf() -> None:
    class Tracer(torch.fx.Tracer):
        def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
            return isinstance(m, MoELayer) or super().is_leaf_module(m, module_qualified_name)

    model = nn.Sequential(nn.Linear(D, D), layer_with())
    traced = torch.fx.GraphModule(model, Tracer().trace(model))
    assert torch.equal(traced(tokens()), model(tokens()))


def test_operations_refuse_what_torch_would_take_for_zero() -> None:
    x, routing = tokens(), layer_with().route(tokens())
    for of in (routing.dispatch, lambda t: routing.combine(routing.dispatch(x) * t.sum())):
        with pytest.raises(NotImplementedError, match="no forward-mode derivative"):
            torch.func.jvp(of, (x,), (x,))
        with pytest.raises(NotImplementedError, match=r"torch\.func\.grad"):
            torch.func.grad(lambda t, of=of: of(t).sum())(x)  # type: ignore[misc]
    constant = torch.func.jvp(lambda t: routing.dispatch(x).sum() * t, (x,), (x,))[1]
    assert torch.equal(constant, routing.dispatch(x).sum() * x)


def test_data_parallel_is_refused_where_it_loses_something() -> None:
    """Its copies run the forward; l_aux and records of a copy are gone."""
    layer = layer_with()
    copy: Any = layer._replicate_for_data_parallel()
    with pytest.raises(NotImplementedError, match="DistributedDataParallel"):
        copy(tokens())
    layer.eval()
    copy = layer._replicate_for_data_parallel()
    copy._parameters, copy._buffers = layer._parameters, layer._buffers
    assert torch.equal(copy(tokens()), layer(tokens()))


@pytest.mark.parametrize(
    "make",
    [lambda x: x.to_sparse(), lambda x: torch.nested.nested_tensor([x, x[:3]]),
     lambda x: torch.nested.nested_tensor([x, x[:3]], layout=torch.jagged)],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_tokens_that_are_not_dense_are_refused(make: Callable[[Tensor], Tensor]) -> None:
    with pytest.raises(ValueError, match="give a dense tensor"):
        layer_with()(make(tokens()))


@pytest.mark.parametrize("keep_tokens", [0, 3])
def test_a_window_opened_in_inference_mode(keep_tokens: int) -> None:
    layer = layer_with()
    layer.record.keep_tokens = keep_tokens
    with torch.inference_mode():
        layer.begin_record_routing()
    layer(tokens())
    assert int(layer.record.tokens) == T


def test_records_stay_where_they_are() -> None:
    """A captured CUDA graph writes to their addresses."""

    def addresses(record: RoutingRecord) -> list[int]:
        return [value.data_ptr() for value in vars(record).values() if isinstance(value, Tensor)]

    layer = layer_with()
    layer.record.keep_tokens = 5
    layer.begin_record_routing()
    before = addresses(layer.record), layer.dropped_assignments.data_ptr()
    layer(tokens())
    state = layer.record.state_dict()
    layer.begin_record_routing()
    assert int(layer.record.tokens) == 0
    layer.record.load_state_dict(state)
    assert int(layer.record.tokens) == T
    assert torch.equal(layer.record.unrouted_sample, state["unrouted_sample"])
    layer.adaptive_update_experts()
    layer.load_state_dict(layer.state_dict())
    assert (addresses(layer.record), layer.dropped_assignments.data_ptr()) == before


@pytest.mark.parametrize("capacity", [1e5, 1e308, numpy.float32(300.0), numpy.int64(70)])
def test_no_more_rows_than_assignments_can_be(capacity: Any) -> None:
    routing = layer_with(capacity=capacity).route(tokens())
    assert routing.token_of_row.shape == (T * E,)
    assert int(routing.dropped) == 0


@pytest.mark.parametrize(
    "make",
    [
        lambda v: layer_with(is_gshard_loss=v),
        lambda v: layer_with(normalize_gate=v),
        lambda v: layer_with(value_norm_weighted=v),
        lambda v: layer_with(check_finite=v),
        lambda v: layer_with(experts={"has_fc1_bias": v}),
    ],
)
def test_flags_are_flags(make: Callable[[Any], MoELayer]) -> None:
    for value in ("False", "no", 2, 0.5):
        with pytest.raises(ValueError, match="give True or False"):
            make(value)
    for value in (True, 0, numpy.bool_(True)):
        make(value)


def test_a_group_is_a_process_group() -> None:
    with pytest.raises(ValueError, match="group = 'abc'"):
        layer_with(group="abc")


def test_the_masks_say_how_many_experts_there_are() -> None:
    layer = layer_with()
    state = layer.state_dict() | {"_num_global_experts": torch.tensor(3)}
    layer.load_state_dict(state)
    assert layer.num_global_experts == E

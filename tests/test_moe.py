"""The surface of a layer: shapes, modes, copies, capacity, the functional form, and errors on bad input."""

from __future__ import annotations

import copy
import inspect
import io
import logging
import math
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dynmoe_tutel import MoELayer, Routing, moe, validation

D, H, E, START = 16, 24, 6, 4
KINDS: dict[str, Any] = {
    "top_any": {"type": "top_any", "max_expert_num": E},
    "gated_multi_gate": {"type": "gated_multi_gate", "max_expert_num": E},
    "gated_multi_gate_t": {"type": "gated_multi_gate_t", "max_expert_num": E},
    "top": {"type": "top", "k": 2},
    "cosine_top": {"type": "cosine_top", "k": 2, "proj_dim": 8},
}
EXPERTS: dict[str, dict[str, Any]] = {
    "ffn": {"type": "ffn", "activation_fn": F.gelu},
    "lambda": {"type": "ffn", "activation_fn": lambda h: F.gelu(h)},
    "llama": {"type": "llama_ffn"},
}


def layer_with(gate: Any = "top_any", experts: str = "ffn", cls: Any = moe.moe_layer, **given: Any) -> Any:
    """A layer of 4 experts in up to 6 slots; thresholds differ, so that k does."""
    config = {**EXPERTS[experts], "num_experts_per_device": START, "hidden_size_per_expert": H}
    layer = cls(KINDS.get(gate, gate) if isinstance(gate, str) else gate, D, config, seeds=(1, 2), **given)
    for one in layer.gates:
        if one.adaptive:
            with torch.no_grad():
                one.gates.copy_(torch.linspace(-0.2, 0.3, one.slots))
    return layer


def tokens(T: int = 40, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(T, D, generator=torch.Generator().manual_seed(seed)).to(dtype)


def gradients(layer: Any, x: Tensor, run: Callable[[Tensor], tuple[Tensor, Tensor]] | None = None) -> list[Tensor]:
    """Gradients of x and of every parameter, for a loss of output and l_aux."""
    x = x.detach().clone().requires_grad_()
    layer.zero_grad()
    if run is None:
        y = layer(x)
        l_aux = y.l_aux
    else:
        y, l_aux = run(x)
    (y.float().square().sum() + l_aux).backward()
    found = [x.grad, *(p.grad for p in layer.parameters())]
    assert all(grad is not None for grad in found)
    return [grad.clone() for grad in found]  # type: ignore[union-attr]


def relative(value: Tensor, reference: Tensor) -> float:
    value, reference = value.detach().double(), reference.detach().double()
    return float((value - reference).norm() / reference.norm())


@pytest.fixture
def warnings(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    """Capture the package's warnings from here on, as if it had not warned before."""
    monkeypatch.setattr(validation, "_warned", set())
    caplog.set_level(logging.WARNING, "dynmoe_tutel")
    return caplog


class TestForward:
    @pytest.mark.parametrize("kind", list(KINDS))
    @pytest.mark.parametrize("shape", [(40, D), (4, 10, D), (2, 2, 2, 5, D), (1, D), (0, D), (3, 0, D)])
    def test_leading_dimensions(self, shape: tuple[int, ...], kind: str) -> None:
        layer, x = layer_with(kind), tokens(math.prod(shape[:-1])).view(shape)
        y = layer(x)
        assert y.shape == x.shape
        assert y.l_aux is layer.l_aux
        assert y.l_aux.shape == ()
        assert y.l_aux.dtype == torch.float32
        assert y.l_aux.isfinite()
        assert torch.equal(y.view(-1, D), layer(x.view(-1, D)))

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("kind", list(KINDS))
    def test_output_has_the_dtype_of_the_input(self, kind: str, dtype: torch.dtype) -> None:
        for layer in (layer_with(kind), layer_with(kind).to(dtype)):
            y = layer(tokens(dtype=dtype))
            assert y.dtype == dtype
            assert y.l_aux.dtype == torch.float32

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("experts", list(EXPERTS))
    def test_a_layer_of_half_precision(self, experts: str, dtype: torch.dtype) -> None:
        layer = layer_with("gated_multi_gate_t", experts).to(dtype)
        if experts == "llama":  # drawn so small that fp16 has no digits left of its products
            with torch.no_grad():
                layer.experts.W_fc1.mul_(20), layer.experts.W_fc2.mul_(20), layer.experts.W_fc3.mul_(20)
        exact = copy.deepcopy(layer).double()
        x = tokens(dtype=dtype)
        assert torch.equal(layer.route(x).assigned, exact.route(x.double()).assigned)
        assert relative(layer(x), exact(x.double())) < 1e-2
        for half, double in zip(gradients(layer, x), gradients(exact, x.double()), strict=True):
            assert half.dtype == dtype
            if double.abs().max() > 1e-8:
                assert relative(half, double) < 0.1

    @pytest.mark.parametrize("experts", list(EXPERTS))
    def test_inputs_of_any_strides(self, experts: str) -> None:
        layer, wide = layer_with(experts=experts), torch.randn(2 * D, 60)
        for x in (
            wide.t()[:, ::2],
            torch.randn(80, D)[::2],
            torch.randn(1, D).expand(7, D),
            torch.randn(D, 4, 5).permute(2, 1, 0),
        ):
            assert not x.is_contiguous() or x.stride(0) == 0
            assert torch.equal(layer(x), layer(x.contiguous()))

    def test_reserve_dims(self) -> None:
        layer, x = layer_with(), tokens()
        y = layer(x.view(4, 10, 2, D // 2), reserve_dims=2)
        assert y.shape == (4, 10, 2, D // 2)
        assert torch.equal(y.view(-1, D), layer(x))

    def test_result_func(self) -> None:
        layer = layer_with(result_func=lambda y: (y, y.l_aux))
        y, l_aux = layer(tokens())
        assert torch.equal(y, layer_with()(tokens()))
        assert l_aux is layer.l_aux

    def test_skip_moe_is_the_identity(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("SKIP_MOE", "1")
        layer, x = layer_with(), tokens()
        y = layer(x)
        assert torch.equal(y, x)
        assert y.l_aux is None
        assert layer_with(result_func=lambda y: (y, y.l_aux))(x)[1] is None
        monkeypatch.setenv("SKIP_MOE", "0")
        assert not torch.equal(layer_with()(x), x)

    def test_skip_moe_leaves_the_callers_tensor_as_it_is(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("SKIP_MOE", "1")
        x = tokens()
        layer_with()(x)
        assert not hasattr(x, "l_aux")

    def test_counts_by_upstreams_names(self) -> None:
        layer = layer_with()
        counts = (layer.num_global_experts, layer.max_num_global_experts, layer.num_local_experts)
        assert counts == (START, E, START)
        assert (layer.max_num_local_experts, layer.world_size, layer.sharded_count) == (E, 1, 1)
        assert moe.moe_layer is moe.MOELayer
        assert issubclass(moe.moe_layer, MoELayer)
        assert MoELayer.global_expert_count(3) == 3
        assert f"{START} of {E}" in repr(layer)

    def test_arguments_of_tutel_scripts_are_taken(self) -> None:
        layer = layer_with(
            a2a_ffn_overlap_degree=2,
            batch_prioritized_routing=True,
            parallel_type="data",
            use_2dh=True,
            scan_expert_func=lambda name, parameter: None,
        )
        plain = layer_with()
        x = tokens()
        y = layer(x, 0, None, None, 1, 1, True, 1)
        assert torch.equal(y, plain(x))

    def test_state_dict_keys(self) -> None:
        ffn = {"batched_fc1_w", "batched_fc1_bias", "batched_fc2_w", "batched_fc2_bias"}
        counts = {"_num_global_experts", "_max_num_global_experts"}
        expected = {"sim_matrix", "gates", "experts_mask"}
        assert set(layer_with().state_dict()) == counts | {f"gates.0.{k}" for k in expected} | {
            f"experts.{k}" for k in ffn
        }
        assert "gates.0.temperature" in layer_with("gated_multi_gate_t").state_dict()

    @pytest.mark.parametrize("kind", list(KINDS))
    def test_two_runs_are_bitwise_equal(self, kind: str) -> None:
        layer, x = layer_with(kind), tokens(300)
        assert torch.equal(layer(x), layer(x))
        for first, second in zip(gradients(layer, x), gradients(layer, x), strict=True):
            assert torch.equal(first, second)

    @pytest.mark.parametrize("train", [True, False])
    @pytest.mark.parametrize("experts", list(EXPERTS))
    @pytest.mark.parametrize("kind", list(KINDS))
    def test_a_token_gets_the_same_alone_in_a_batch_and_in_any_order(
        self, kind: str, experts: str, train: bool
    ) -> None:
        """Regression for upstream's defect D4: eval output depended on whether a batch mate activated two experts."""
        layer, x = layer_with(kind, experts).train(train), tokens()
        y = layer(x)
        order = torch.randperm(40, generator=torch.Generator().manual_seed(3))
        for some in (order, order[:13], *(order[i : i + 1] for i in range(8))):
            own = layer(x[some])
            zero = (y[some] == 0).all(1)
            assert torch.equal((own == 0).all(1), zero)
            assert ((own - y[some]).norm(dim=1) <= 1e-6 * y[some].norm(dim=1)).all()


class TestModes:
    @pytest.mark.parametrize("train", [True, False])
    @pytest.mark.parametrize("kind", list(KINDS))
    def test_no_grad_and_inference_mode(self, kind: str, train: bool) -> None:
        layer, x = layer_with(kind).train(train), tokens()
        y = layer(x)
        for context in (torch.no_grad, torch.inference_mode):
            with context():
                silent = layer(x)
            assert torch.equal(silent, y)
            assert not silent.requires_grad
            assert not silent.l_aux.requires_grad
            assert torch.equal(silent.l_aux, y.l_aux)
        assert y.requires_grad

    def test_recording_in_inference_mode_and_after_it(self) -> None:
        layer, x = layer_with(), tokens()
        layer.begin_record_routing(record_eval=True)
        with torch.inference_mode():
            layer(x)
        layer(x)
        assert int(layer.record.tokens) == 80
        assert torch.equal(layer.record.counts, 2 * layer.route(x).counts)

    @pytest.mark.parametrize("train", [True, False])
    @pytest.mark.parametrize("capacity", ["exact", 1.0])
    @pytest.mark.parametrize("experts", list(EXPERTS))
    @pytest.mark.parametrize("kind", list(KINDS))
    def test_every_parameter_gets_a_gradient(self, kind: str, experts: str, capacity: Any, train: bool) -> None:
        """Regression: data-parallel training hangs or fails if a rank has none. Unused parameters get zeros."""
        layer = layer_with(kind, experts, capacity=capacity).train(train)
        everything = dict(layer.named_parameters())
        for x in (tokens(), tokens(1), tokens(0), torch.zeros(3, D)):
            layer.zero_grad()
            layer(x).sum().backward()
            missing = [name for name, p in everything.items() if p.grad is None]
            assert not missing, f"{missing} of {list(x.shape)}"
            assert all(p.grad.isfinite().all() for p in everything.values())

    def test_every_parameter_gets_a_gradient_without_a_routed_token(self) -> None:
        layer = layer_with("gated_multi_gate_t")
        with torch.no_grad():
            layer.gates[0].gates.fill_(2.0)
        y = layer(tokens())
        assert (y == 0).all()
        y.sum().backward()
        assert all(p.grad is not None and (p.grad == 0).all() for p in layer.parameters())

    def test_frozen_parameters(self) -> None:
        layer, x = layer_with(), tokens()
        expected = dict(zip(["x", *(n for n, _ in layer.named_parameters())], gradients(layer, x), strict=True))
        for part in ("experts", "gates"):
            layer.requires_grad_(True).zero_grad()
            getattr(layer, part).requires_grad_(False)
            y = layer(x)
            (y.square().sum() + y.l_aux).backward()
            for name, p in layer.named_parameters():
                assert (p.grad is None) == name.startswith(part)
                assert p.grad is None or torch.equal(p.grad, expected[name])
        layer.requires_grad_(False)
        x.requires_grad_()
        layer(x).square().sum().backward()
        assert x.grad is not None
        assert relative(x.grad, expected["x"]) < 1e-5

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_only_tokens_pre_activations_and_the_index_are_kept(self, dtype: torch.dtype) -> None:
        """the design, section 6: saved for backward / (x + pre-activations + 8 bytes an assignment) <= 1.05."""
        experts = {"num_experts_per_device": 4, "hidden_size_per_expert": 512, "activation_fn": F.gelu}
        layer = moe.moe_layer("top_any", 256, experts, seeds=(1, 2)).to(dtype)
        x = torch.randn(512, 256, generator=torch.Generator().manual_seed(0)).to(dtype).requires_grad_()
        parameters = {p.untyped_storage().data_ptr() for p in layer.parameters()}
        kept: dict[int, int] = {}

        def pack(t: Tensor) -> Tensor:
            storage = t.untyped_storage()
            if storage.data_ptr() not in parameters:
                kept[storage.data_ptr()] = storage.nbytes()
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            layer(x)
        A = int(layer.route(x).num_assignments)
        assert sum(kept.values()) <= 1.05 * (x.element_size() * (512 * 256 + A * 512) + 8 * A)

    def test_gradients_accumulate(self) -> None:
        layer, x = layer_with(), tokens()
        once = gradients(layer, x)
        y = layer(x)
        (y.square().sum() + y.l_aux).backward()
        for p, grad in zip(layer.parameters(), once[1:], strict=True):
            assert torch.equal(p.grad, 2 * grad)


class TestAutocast:
    @pytest.mark.parametrize("train", [True, False])
    @pytest.mark.parametrize("kind", list(KINDS))
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_a_forward_routes_in_fp32(self, dtype: torch.dtype, kind: str, train: bool) -> None:
        layer, x, found = layer_with(kind).train(train), tokens(400), []
        for enabled in (False, True):
            layer.begin_record_routing(record_eval=True)
            with torch.autocast("cpu", dtype, enabled=enabled):
                y = layer(x)
            assert y.dtype == torch.float32
            found.append((layer.record.counts.clone(), layer.record.k_histogram.clone(), y.l_aux))
        for plain, automatic in zip(*found, strict=True):
            assert torch.equal(plain, automatic)

    @pytest.mark.parametrize("train", [True, False])
    @pytest.mark.parametrize("kind", list(KINDS))
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_route_is_what_a_forward_does(self, dtype: torch.dtype, kind: str, train: bool) -> None:
        layer, x = layer_with(kind).train(train), tokens(400)
        plain = layer.route(x)
        with torch.autocast("cpu", dtype):
            automatic = layer.route(x)
        assert automatic.scores.dtype == torch.float32
        assert torch.equal(plain.scores, automatic.scores)
        assert torch.equal(plain.bits, automatic.bits)

    def test_the_functional_form_routes_in_fp32(self) -> None:
        gate, x = layer_with().gates[0], tokens(400)
        plain = moe.top_any_routing(x, gate.sim_matrix, gate.gates, gate.experts_mask)
        with torch.autocast("cpu", torch.bfloat16):
            automatic = moe.top_any_routing(x, gate.sim_matrix, gate.gates, gate.experts_mask)
        assert torch.equal(plain.scores, automatic.scores)

    @pytest.mark.parametrize("experts", list(EXPERTS))
    def test_experts_compute_in_the_dtype_of_autocast(self, experts: str) -> None:
        layer, x = layer_with(experts=experts), tokens()
        exact, half = layer(x), copy.deepcopy(layer)
        half.experts.bfloat16()
        with torch.autocast("cpu", torch.bfloat16):
            y = layer(x)
        assert 1e-4 < relative(y, exact) < 1e-2
        assert relative(y, half(x)) < 6e-3  # the same but for where rows and weights are rounded
        with torch.autocast("cpu", torch.bfloat16):
            double = copy.deepcopy(layer).double()
            assert relative(double(x.double()), exact) < 1e-5

    @pytest.mark.parametrize("experts", list(EXPERTS))
    @pytest.mark.parametrize("kind", list(KINDS))
    def test_backward_inside_the_context_equals_that_outside(self, kind: str, experts: str) -> None:
        """torch advises against it, but many scripts do it: no crash, and the layer's own arithmetic stays fp32."""
        layer, found = layer_with(kind, experts), []
        for inside in (False, True):
            layer.zero_grad()
            x = tokens().requires_grad_()
            with torch.autocast("cpu", torch.bfloat16):
                y = layer(x)
                if inside:
                    y.square().sum().backward()
            if not inside:
                y.square().sum().backward()
            found.append([x.grad, *(p.grad for p in layer.parameters())])
        for outside, within in zip(*found, strict=True):
            if kind in ("top", "cosine_top"):  # their logits are torch's own operations
                assert float((within - outside).norm()) <= 2e-2 * float(outside.norm()) + 1e-6
            else:
                assert torch.equal(within, outside)


class TestCheckpointing:
    @pytest.mark.parametrize("reentrant", [True, False])
    @pytest.mark.parametrize("experts", list(EXPERTS))
    @pytest.mark.parametrize("kind", list(KINDS))
    @pytest.mark.parametrize("capacity", ["exact", 0.7])
    def test_same_gradients_and_recorded_once(self, capacity: Any, kind: str, experts: str, reentrant: bool) -> None:
        layer, x = layer_with(kind, experts, capacity=capacity), tokens()
        layer.begin_record_routing()
        expected = gradients(layer, x)
        record, dropped = layer.record.state_dict(), int(layer.dropped_assignments)
        layer.reset_record_routing()
        layer.dropped_assignments = torch.tensor(0)

        def run(x: Tensor) -> tuple[Tensor, Tensor]:
            def inner(x: Tensor) -> tuple[Tensor, Tensor]:
                y = layer(x)
                return y, y.l_aux

            return checkpoint(inner, x, use_reentrant=reentrant)  # type: ignore[return-value]

        for grad, reference in zip(gradients(layer, x, run), expected, strict=True):
            assert torch.equal(grad, reference)
        assert all(
            torch.equal(torch.as_tensor(layer.record.state_dict()[k]), torch.as_tensor(record[k])) for k in record
        )
        assert int(layer.dropped_assignments) == dropped

    def test_noise_of_the_recompute_is_that_of_the_forward(self) -> None:
        layer, x = layer_with({"type": "top", "k": 2, "gate_noise": 4.0}), tokens()
        torch.manual_seed(0)
        expected = gradients(layer, x)
        torch.manual_seed(0)
        found = gradients(layer, x, lambda x: checkpoint(lambda x: (layer(x), layer.l_aux), x, use_reentrant=False))
        for grad, reference in zip(found, expected, strict=True):
            assert torch.equal(grad, reference)


class TestTutelsMeaning:
    """What Tutel's arguments mean is what `moe_layer` takes them for; several ranks: `parallel/drop_in.py`."""

    def test_isinstance_against_tutels_names_finds_every_layer(self) -> None:
        config = {"num_experts_per_device": 2, "hidden_size_per_expert": H}

        class Own(moe.moe_layer):  # type: ignore[misc, valid-type]
            pass

        for cls in (MoELayer, moe.moe_layer, Own):
            layer = cls("top_any", D, config)
            assert isinstance(layer, moe.MOELayer)
            assert isinstance(layer, MoELayer)
            assert issubclass(cls, moe.moe_layer)
            assert isinstance(layer, Own) == (cls is Own)
            assert issubclass(cls, Own) == (cls is Own)
        assert not isinstance(nn.Linear(2, 2), moe.MOELayer)
        assert inspect.signature(moe.moe_layer) == inspect.signature(MoELayer)

    @pytest.mark.parametrize("gate", ["top", "cosine_top", "custom"])
    def test_k_above_the_experts_is_all_of_them(self, gate: str) -> None:
        def layer(k: int) -> Any:
            torch.manual_seed(0)
            own = {"module": nn.Linear(D, START)} if gate == "custom" else {}
            return layer_with({"type": gate, "k": k, **own})

        x = tokens()
        many, every, one = layer(START + 3), layer(START), layer(1)
        assert many.gates[0].top_k == START
        assert torch.equal(many(x), every(x))
        assert torch.equal(one(x, top_k=START + 3), every(x))
        assert torch.equal(many(x, top_k=0), every(x))
        assert layer_with(f"Top{START + 5}Gate").gates[0].top_k == START

    def test_k_above_the_experts_warns_once(self, warnings: pytest.LogCaptureFixture) -> None:
        layer = layer_with({"type": "top", "k": START + 3})
        for _ in range(2):
            layer(tokens(), top_k=START + 3)
            layer_with({"type": "cosine_top", "k": START + 3})
        message = f"k = {START + 3} is more than the {START} experts of a layer: a token takes them all, as in Tutel"
        assert [record.getMessage() for record in warnings.records] == [message]

    def test_r_of_tutels_scripts(self) -> None:
        """helloworld_switch calls with every r and degree in turn."""
        layer, x = layer_with("top"), tokens()
        y = layer(x)
        assert (layer.valid_rs, layer.adaptive_degree) == ([0, 1], 1)
        for r in layer.valid_rs:
            assert torch.equal(layer(x, adaptive_r=r, a2a_ffn_overlap_degree=r + 1), y)

    def test_a_layer_before_the_process_group_says_what_it_holds(
        self, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        monkeypatch.setattr(validation, "_warned", set())
        layer_with()
        assert not caplog.records
        monkeypatch.setenv("WORLD_SIZE", "2")
        layer_with(cls=MoELayer)
        assert not caplog.records
        layer_with()
        (record,) = caplog.records
        assert "before torch.distributed.init_process_group() in a job of WORLD_SIZE = 2" in record.getMessage()
        assert "dynmoe_tutel.MoELayer" in record.getMessage()


class TestCopies:
    @pytest.mark.parametrize("kind", list(KINDS))
    @pytest.mark.parametrize("how", ["deepcopy", "pickle", "save"])
    def test_a_copy_after_a_backward_and_in_a_record_window(self, how: str, kind: str) -> None:
        layer, x = layer_with(kind), tokens()
        layer.begin_record_routing()
        y = layer(x)
        (y.sum() + y.l_aux).backward()
        copied = copies(layer, how)
        assert copied.l_aux is None
        assert copied.aux_terms == {}
        assert layer.l_aux is not None
        assert copied.record_routing
        assert torch.equal(copied.record.counts, layer.record.counts)
        for grad, reference in zip(gradients(copied, x), gradients(layer, x), strict=True):
            assert torch.equal(grad, reference)
        before = layer.record.counts.clone()
        with torch.no_grad():
            for p in copied.parameters():
                p.zero_()
        copied(x)
        assert torch.equal(layer.record.counts, before)
        assert not torch.equal(layer(x), copied(x))

    @pytest.mark.parametrize("kind", list(KINDS))
    def test_state_dict_round_trip(self, kind: str) -> None:
        layer, x = layer_with(kind), tokens()
        if layer.gates[0].adaptive:
            layer.gates[0].activate(5, torch.randn(D))
            layer.gates[0].deactivate(1)
        other = moe.moe_layer(KINDS[kind], D, {"num_experts_per_device": 4, "hidden_size_per_expert": H})
        other.experts.activation_fn = layer.experts.activation_fn
        buffer = io.BytesIO()
        torch.save(layer.state_dict(), buffer)
        buffer.seek(0)
        assert str(other.load_state_dict(torch.load(buffer, weights_only=True))) == "<All keys matched successfully>"
        for mode in (True, False):
            assert torch.equal(layer.train(mode)(x), other.train(mode)(x))

    @pytest.mark.parametrize("kind", list(KINDS))
    def test_to_a_dtype_and_back(self, kind: str) -> None:
        layer, x = layer_with(kind), tokens()
        y = layer(x)
        layer.double()
        assert relative(layer(x.double()), y) < 1e-6
        assert layer._num_global_experts.dtype == torch.int64
        assert torch.equal(layer.float()(x), y)

    @pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("kind", list(KINDS))
    def test_construction_under_another_default_dtype(self, kind: str, dtype: torch.dtype) -> None:
        """Model loaders call the constructors under torch.set_default_dtype(bfloat16)."""
        torch.set_default_dtype(dtype)
        try:
            layer = layer_with(kind)
            x = torch.randn(5, D)
        finally:
            torch.set_default_dtype(torch.float32)
        assert layer(x).isfinite().all()

    @pytest.mark.parametrize("kind", list(KINDS))
    @pytest.mark.parametrize("assign", [True, False])
    def test_built_on_the_meta_device(self, assign: bool, kind: str) -> None:
        layer, x = layer_with(kind), tokens()
        with torch.device("meta"):
            empty = moe.moe_layer(
                KINDS[kind], D, {**EXPERTS["ffn"], "num_experts_per_device": START, "hidden_size_per_expert": H}
            )
        assert all(t.is_meta for t in empty.state_dict().values())
        if not assign:
            empty = empty.to_empty(device="cpu")
        empty.load_state_dict(layer.state_dict(), assign=assign)
        assert torch.equal(empty(x), layer(x))
        empty.begin_record_routing()
        empty(x)
        assert int(empty.record.tokens) == 40

    def test_an_open_window_goes_with_the_layer(self) -> None:
        """Regression: a controller made on meta, before the weights, recorded nothing and failed at its update."""
        layer, x = layer_with(), tokens()
        with torch.device("meta"):
            empty = layer_with()
        empty.begin_record_routing()
        empty.to_empty(device="cpu").load_state_dict(layer.state_dict())
        layer.begin_record_routing()
        layer(x), empty(x)
        assert torch.equal(empty.record.counts, layer.record.counts)
        assert int(layer.record.tokens) == 40
        layer.double()
        assert int(layer.record.tokens) == 40
        assert layer.record.unrouted_sum.dtype == torch.float32
        layer.to("meta")
        assert layer.record.counts.is_meta

    @pytest.mark.parametrize("assign", [True, False])
    def test_a_bounded_layer_built_on_the_meta_device(self, assign: bool) -> None:
        """Tensors outside the state dict must be valid too: the count of drops, the records."""
        layer, x = layer_with(capacity=0.5), tokens()
        with torch.device("meta"):
            config = {**EXPERTS["ffn"], "num_experts_per_device": START, "hidden_size_per_expert": H}
            empty = moe.moe_layer(KINDS["top_any"], D, config, capacity=0.5)
        if not assign:
            empty = empty.to_empty(device="cpu")
        empty.load_state_dict(layer.state_dict(), assign=assign)
        assert int(empty.record.state_dict()["tokens"]) == 0
        assert len(empty.record.unrouted_sample) == 0
        for _ in range(2):
            assert torch.equal(empty(x), layer(x))
        assert int(empty.dropped_assignments) == int(layer.dropped_assignments) > 0

    def test_a_layer_on_the_meta_device_can_be_printed(self) -> None:
        with torch.device("meta"):
            layer = moe.moe_layer("top_any", D, {"num_experts_per_device": START, "hidden_size_per_expert": H})
        assert "MoELayer" in repr(nn.Sequential(layer))


def copies(layer: Any, how: str) -> Any:
    if how == "deepcopy":
        return copy.deepcopy(layer)
    if how == "pickle":
        return pickle.loads(pickle.dumps(layer_without_functions(layer)))
    buffer = io.BytesIO()
    torch.save(layer_without_functions(layer), buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


def layer_without_functions(layer: Any) -> Any:
    assert layer.experts.activation == "gelu"
    return layer


class TestCapacity:
    @pytest.mark.parametrize("experts", list(EXPERTS))
    @pytest.mark.parametrize("kind", list(KINDS))
    @pytest.mark.parametrize("capacity", ["full", 6.0, float(E)])
    @pytest.mark.parametrize("train", [True, False])
    def test_spare_rows_change_nothing(
        self, train: bool, capacity: Any, kind: str, experts: str, poisoned: None
    ) -> None:
        x = tokens()
        exact, padded = (layer_with(kind, experts, capacity=c).train(train) for c in ("exact", capacity))
        slots = exact.max_num_global_experts
        rows = padded.route(x).token_of_row
        assert rows.shape[0] == 40 * (slots if capacity == "full" else min(slots, int(capacity)))
        assert torch.equal(padded(x), exact(x))
        assert torch.equal(padded.l_aux, exact.l_aux)
        for grad, reference in zip(gradients(padded, x), gradients(exact, x), strict=True):
            assert torch.equal(grad, reference)
        assert int(padded.dropped_assignments) == 0

    @pytest.mark.parametrize("kind", list(KINDS))
    @pytest.mark.parametrize("capacity", [0.01, 0.5, 1, 1.3])
    def test_overflow_drops_the_smallest_margins(
        self, capacity: float, kind: str, poisoned: None, warnings: pytest.LogCaptureFixture
    ) -> None:
        x = tokens()
        exact, bounded = layer_with(kind), layer_with(kind, capacity=capacity)
        all_of, kept = exact.route(x), bounded.route(x)
        rows = math.ceil(capacity * 40)
        A = int(all_of.num_assignments)
        assert kept.token_of_row.shape == (rows,)
        assert int(kept.num_assignments) == min(rows, A)
        margin_TE = all_of.scores if all_of.thresholds is None else all_of.scores - all_of.thresholds
        dropped_TE = all_of.assigned & ~kept.assigned
        assert not (kept.assigned & ~all_of.assigned).any()
        if dropped_TE.any():
            assert margin_TE[dropped_TE].max() <= margin_TE[kept.assigned].min()
        y = bounded(x)
        assert y.isfinite().all()
        assert (y[kept.k_per_token == 0] == 0).all()
        reference = layer_of(exact, kept)(x)
        assert relative(y, reference) < 1e-6
        assert all(g.isfinite().all() for g in gradients(bounded, x))
        assert int(bounded.dropped_assignments) == 2 * (A - int(kept.num_assignments))

    def test_dropping_is_said_once_and_counted(self, warnings: pytest.LogCaptureFixture) -> None:
        layer = layer_with(capacity=0.5)
        total = 0
        for seed in range(5):
            x = tokens(seed=seed)
            layer(x)
            total += int(layer_with().route(x).num_assignments) - 20
        assert int(layer.dropped_assignments) == total
        assert ["capacity = 0.5" in r.getMessage() for r in warnings.records] == [True]

    def test_the_bound_is_the_same_bits_twice(self) -> None:
        layer, x = layer_with("top", capacity=0.6), tokens().repeat(5, 1)  # equal margins
        first, second = layer.route(x), layer.route(x)
        assert torch.equal(first.bits, second.bits)

    def test_dropped_assignments_are_not_recorded_as_unrouted(self) -> None:
        layer = layer_with(capacity=0.05)
        x = tokens()
        layer.begin_record_routing()
        layer(x)
        lost_T = layer_with().route(x).unrouted
        assert int(layer.record.unrouted_tokens) == int(lost_T.sum())
        assert torch.allclose(layer.record.unrouted_sum, x[lost_T].sum(0), atol=1e-5)


def layer_of(layer: Any, routing: Routing) -> Any:
    """The experts of `layer` under a routing, computed densely."""

    def forward(x: Tensor) -> Tensor:
        assigned = routing.assigned.float()
        share = assigned / assigned.sum(1, keepdim=True).clamp(min=1)
        if routing.weights is not None:
            share = routing.weights * assigned
        p = layer.experts
        h = F.gelu(torch.einsum("td,ehd->teh", x, p.batched_fc1_w) + p.batched_fc1_bias)
        rows = torch.einsum("teh,eho->teo", h, p.batched_fc2_w) + p.batched_fc2_bias
        return torch.einsum("te,teo->to", share, rows)

    return forward


class TestFunctions:
    def test_fast_cumsum_sub_one(self) -> None:
        mask_TE = F.one_hot(torch.tensor([1, 0, 1, 1, 0]))
        place_TE = moe.fast_cumsum_sub_one(mask_TE)
        assert (place_TE * mask_TE).sum(dim=1).tolist() == [0, 0, 1, 2, 1]
        assert place_TE.dtype == torch.int64
        for data, dim in ((mask_TE, 1), (mask_TE[0], 0), ([1], 0)):
            with pytest.raises(ValueError, match=r"takes a matrix \[T, E\] and dim = 0, got"):
                moe.fast_cumsum_sub_one(data, dim)

    @pytest.mark.parametrize("train", [True, False])
    @pytest.mark.parametrize("kind", ["top_any", "gated_multi_gate_t"])
    @pytest.mark.parametrize("combine_gradient", ["mean", "normalized"])
    def test_the_parts_make_the_layer(self, combine_gradient: str, kind: str, train: bool) -> None:
        layer = layer_with(kind, combine_gradient=combine_gradient, aux_losses={}).train(train)
        gate, experts = layer.gates[0], layer.experts
        expected = gradients(layer, tokens())

        def run(x: Tensor) -> tuple[Tensor, Tensor]:
            routing = moe.top_any_routing(
                x, gate.sim_matrix, gate.gates, gate.experts_mask, scale=gate.scale(), fallback=not train
            )
            rows = moe.fast_encode(x, routing)
            h = F.gelu(rows @ experts.batched_fc1_w.transpose(1, 2) + experts.batched_fc1_bias.unsqueeze(1))
            y = h @ experts.batched_fc2_w + experts.batched_fc2_bias.unsqueeze(1)
            return moe.fast_decode(y, routing, combine_gradient=combine_gradient), torch.zeros(())

        for grad, reference in zip(gradients(layer, tokens(), run), expected, strict=True):
            assert float((grad - reference).norm()) <= 2e-6 * float(reference.norm()) + 1e-7

    def test_by_default_all_slots_are_active(self) -> None:
        x, w = tokens(), torch.randn(D, 3)
        routing = moe.top_any_routing(x, w, torch.zeros(3))
        assert torch.equal(routing.assigned, F.normalize(x) @ F.normalize(w, dim=0) > 0)
        masked = moe.top_any_routing(x, w, torch.zeros(3), torch.tensor([1.0, 0.0, 1.0]))
        assert torch.equal(masked.counts, routing.counts * torch.tensor([1, 0, 1]))

    def test_double_precision(self) -> None:
        x, w, g = tokens(dtype=torch.float64), torch.randn(D, 3, dtype=torch.float64), torch.zeros(3).double() + 0.1
        for scale in (0.7, torch.tensor(0.7, dtype=torch.float64), torch.full((1,), 0.7, dtype=torch.float64)):
            routing = moe.top_any_routing(x, w, g, scale=scale)
            expected = torch.sigmoid(0.7 * (F.normalize(x) @ F.normalize(w, dim=0)))
            assert torch.allclose(routing.scores, expected, rtol=1e-12, atol=0)
            assert torch.allclose(routing.thresholds, torch.sigmoid(0.7 * g), rtol=1e-12, atol=0)

    def test_capacity(self) -> None:
        routing = moe.top_any_routing(tokens(), torch.randn(D, 3), torch.full((3,), -2.0), capacity=1.5)
        assert int(routing.num_assignments) == 60
        assert int(routing.dropped) == 60

    @pytest.mark.parametrize(
        ("call", "said"),
        [
            (lambda x, w, g: moe.top_any_routing(x[0], w, g), ["x", "[16]"]),
            (lambda x, w, g: moe.top_any_routing(x[:, 1:], w, g), ["x", "[40, 15]"]),
            (lambda x, w, g: moe.top_any_routing(x, w[0], g), ["sim_matrix"]),
            (lambda x, w, g: moe.top_any_routing(x, w, g[:2]), ["gates", "[2]"]),
            (lambda x, w, g: moe.top_any_routing(x, w, g, g[:2]), ["experts_mask", "[2]"]),
            (lambda x, w, g: moe.top_any_routing(x.long(), w, g), ["x", "int64"]),
            (lambda x, w, g: moe.top_any_routing([1.0], w, g), ["x"]),
            (lambda x, w, g: moe.top_any_routing(x, w.to("meta"), g), ["sim_matrix", "meta"]),
            (lambda x, w, g: moe.top_any_routing(x, w, g.to("meta")), ["gates", "meta"]),
            (lambda x, w, g: moe.top_any_routing(x, w, g, capacity="fool"), ["capacity", "'fool'"]),
            (lambda x, w, g: moe.top_any_routing(x, w, g, capacity=-1.0), ["capacity", "-1.0"]),
            (lambda x, w, g: moe.top_any_routing(x, w, g, capacity=math.nan), ["capacity", "nan"]),
            (lambda x, w, g: moe.top_any_routing(x, w, g, scale="1"), ["scale", "'1'"]),
            (lambda x, w, g: moe.top_any_routing(x, w, g, scale=0.0), ["scale", "0.0"]),
            (lambda x, w, g: moe.top_any_routing(x, w, g, scale=-1.0), ["scale", "-1.0"]),
            (lambda x, w, g: moe.top_any_routing(x, w, g, scale=torch.ones(3)), ["scale", "[3]"]),
            (lambda x, w, g: moe.top_any_routing(x, w, g, torch.zeros(3), fallback=True), ["experts_mask"]),
        ],
    )
    def test_bad_arguments_of_top_any_routing(self, call: Callable[..., Any], said: list[str]) -> None:
        with pytest.raises(ValueError) as error:
            call(tokens(), torch.randn(D, 3), torch.zeros(3))
        for word in said:
            assert word in str(error.value)

    @pytest.mark.parametrize(
        ("call", "said"),
        [
            (lambda r: moe.fast_encode(torch.randn(3, D), r), ["[3, 16]", "40"]),
            (lambda r: moe.fast_encode(torch.randn(50, D), r), ["[50, 16]", "40"]),
            (lambda r: moe.fast_encode(torch.randn(40), r), ["[40]"]),
            (lambda r: moe.fast_decode(torch.randn(30, D), r), ["[30, 16]", "[E, C, D]"]),
            (lambda r: moe.fast_decode(torch.randn(3, 1, D), r), ["1 rows", "an expert has"]),
            (lambda r: moe.fast_decode(torch.randn(2, 40, D), r), ["[3 * 40, D]", "[80, 16]"]),
            (
                lambda r: moe.fast_decode(moe.fast_encode(tokens(), r), r, combine_gradient="average"),
                ["combine_gradient", "'average'"],
            ),
            (lambda r: r.row_gates("average"), ["combine_gradient", "'average'"]),
        ],
    )
    def test_bad_arguments_of_encode_and_decode(self, call: Callable[..., Any], said: list[str]) -> None:
        routing = moe.top_any_routing(tokens(), torch.randn(D, 3), torch.zeros(3))
        with pytest.raises(ValueError) as error:
            call(routing)
        for word in said:
            assert word in str(error.value)

    @pytest.mark.parametrize(
        ("given", "said"),
        [
            ({"assigned": torch.ones(4, 3)}, ["assigned", "float32"]),
            ({"assigned": torch.ones(4).bool()}, ["assigned", "[4]"]),
            ({"assigned": [[True]]}, ["assigned", "list"]),
            ({"weights": torch.ones(4, 2)}, ["weights", "[4, 2]", "[4, 3]"]),
            ({"scores": torch.ones(5, 3)}, ["scores", "[5, 3]", "[4, 3]"]),
            ({"scores": torch.ones(4, 3), "weights": torch.ones(4, 4)}, ["weights", "[4, 4]"]),
            ({"weights": torch.ones(4, 3).long()}, ["weights", "int64"]),
            ({"capacity": "all"}, ["capacity", "'all'"]),
            ({"capacity": -0.5}, ["capacity", "-0.5"]),
            ({"capacity": math.nan}, ["capacity", "nan"]),
        ],
    )
    def test_bad_arguments_of_from_assignments(self, given: dict[str, Any], said: list[str]) -> None:
        with pytest.raises(ValueError) as error:
            Routing.from_assignments(**{"assigned": torch.ones(4, 3).bool(), **given})
        for word in said:
            assert word in str(error.value)

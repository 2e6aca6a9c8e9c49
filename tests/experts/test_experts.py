"""Expert networks under a fixed routing without gradient, against dense formulas in float64."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dynmoe_tutel import Routing, moe

D, H, E, T = 12, 10, 5, 11


class Fixed(nn.Module):
    """A gate that routes by a map, by the mean or by weights; expert 0 and token 3 have no assignment."""

    def __init__(self, weighted: bool = False, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.assigned_TE = torch.rand(T, E, generator=generator) > 0.5
        self.assigned_TE[:, 0], self.assigned_TE[3] = False, False
        self.weights_TE = torch.rand(T, E, generator=generator).to(dtype) if weighted else None
        self.capacity: Any = "exact"

    def forward(self, x_TD: Tensor) -> Routing:
        return Routing.from_assignments(self.assigned_TE, weights=self.weights_TE, capacity=self.capacity)

    def combine(self) -> Tensor:
        """[T, E]: each expert's weight in a token's output."""
        if self.weights_TE is not None:
            return self.weights_TE * self.assigned_TE
        return self.assigned_TE / self.assigned_TE.sum(1, keepdim=True).clamp(min=1).double()


def layer_with(
    experts: dict[str, Any], weighted: bool = False, dtype: torch.dtype = torch.float64, **options: Any
) -> Any:
    gate = {"type": "custom", "module": Fixed(weighted, dtype)}
    return moe.moe_layer(gate, D, {"num_experts_per_device": E, **experts}, **{"seeds": (1, 2), **options}).to(dtype)


def ffn(**options: Any) -> dict[str, Any]:
    return {"type": "ffn", "hidden_size_per_expert": H, **options}


def tokens(dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    return torch.randn(T, D, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def naive_ffn(x_TD: Tensor, p: dict[str, Tensor], act: Callable[[Tensor], Tensor]) -> Tensor:
    """[T, E, O]."""
    h = torch.einsum("td,ehd->teh", x_TD, p["batched_fc1_w"]) + p.get("batched_fc1_bias", 0)
    return torch.einsum("teh,eho->teo", act(h), p["batched_fc2_w"]) + p.get("batched_fc2_bias", 0)


def naive_llama(x_TD: Tensor, p: dict[str, Tensor], act: Callable[[Tensor], Tensor]) -> Tensor:
    gate, up = (torch.einsum("td,edh->teh", x_TD, p[name]) for name in ("W_fc1", "W_fc2"))
    return torch.einsum("teh,ehd->ted", act(gate) * up, p["W_fc3"])


def run(layer: Any, seed: int = 5) -> dict[str, Tensor]:
    """Output and all gradients for a random output gradient."""
    x_TD = tokens(seed=0).to(next(layer.parameters()).dtype).requires_grad_()
    layer.zero_grad()
    y = layer(x_TD)
    generator = torch.Generator().manual_seed(seed)
    y.backward(torch.randn(y.shape, generator=generator, dtype=torch.float64).to(y.dtype))
    assert x_TD.grad is not None
    found = {"y": y.detach(), "x": x_TD.grad}
    for name, parameter in layer.experts.named_parameters():
        assert parameter.grad is not None, f"{name} got no gradient"
        found[name] = parameter.grad.clone()
    return found


def expected(
    layer: Any, naive: Callable[..., Tensor], act: Callable[[Tensor], Tensor], seed: int = 5
) -> dict[str, Tensor]:
    """The same by dense computation and autograd."""
    x_TD = tokens().requires_grad_()
    params = {n: p.detach().double().requires_grad_() for n, p in layer.experts.named_parameters()}
    y = torch.einsum("te,teo->to", layer.gates[0].module.combine(), naive(x_TD, params, act))
    y.backward(torch.randn(y.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64))
    assert x_TD.grad is not None
    grads = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in params.items()}
    return {"y": y.detach(), "x": x_TD.grad, **grads}


def check(found: dict[str, Tensor], reference: dict[str, Tensor], limit: float = 1e-12) -> None:
    assert set(found) == set(reference)
    for name, value in reference.items():
        assert found[name].shape == value.shape, name
        error, size = float((found[name].double() - value).norm()), float(value.norm())
        assert error <= limit * size + 1e-14, f"{name}: {error} of {size}"


class TestFFN:
    @pytest.mark.parametrize("weighted", [False, True])
    @pytest.mark.parametrize("activation", [F.gelu, F.relu, F.silu, torch.tanh], ids=["gelu", "relu", "silu", "tanh"])
    @pytest.mark.parametrize(("bias1", "bias2"), [(True, True), (False, True), (True, False), (False, False)])
    def test_equals_the_formula(self, bias1: bool, bias2: bool, activation: Any, weighted: bool) -> None:
        """tanh is not fused: same results."""
        layer = layer_with(ffn(activation_fn=activation, has_fc1_bias=bias1, has_fc2_bias=bias2), weighted)
        names = [name for name, _ in layer.experts.named_parameters()]
        assert ("batched_fc1_bias" in names, "batched_fc2_bias" in names) == (bias1, bias2)
        check(run(layer), expected(layer, naive_ffn, activation))

    def test_the_default_activation_is_relu(self) -> None:
        layer = layer_with(ffn())
        check(run(layer), expected(layer, naive_ffn, F.relu))

    @pytest.mark.parametrize(
        ("fused", "plain"),
        [
            (F.gelu, lambda h: F.gelu(h)),
            (nn.GELU(), lambda h: F.gelu(h)),
            (nn.GELU(approximate="tanh"), lambda h: F.gelu(h, approximate="tanh")),
            (torch.relu, lambda h: torch.relu(h)),
            (nn.ReLU(inplace=True), lambda h: torch.relu(h)),
            (nn.SiLU(), lambda h: F.silu(h)),
            (nn.Identity(), lambda h: h),
        ],
        ids=["gelu", "GELU", "GELU tanh", "relu", "ReLU", "SiLU", "Identity"],
    )
    @pytest.mark.parametrize("weighted", [False, True])
    def test_fused_activations_equal_any_function(self, fused: Any, plain: Any, weighted: bool) -> None:
        first, second = (layer_with(ffn(activation_fn=f), weighted) for f in (fused, plain))
        assert first.experts.activation is not None
        assert second.experts.activation is None
        check(run(first), run(second))

    def test_a_subclass_of_gelu_does_what_it_says(self) -> None:
        """Experiments subclass activations, for example with dropout first; the subclass's forward must run."""

        class Doubled(nn.GELU):
            def forward(self, h: Tensor) -> Tensor:
                return 2 * super().forward(h)

        layer = layer_with(ffn(activation_fn=Doubled()))
        check(run(layer), expected(layer, naive_ffn, lambda h: 2 * F.gelu(h)))

    def test_activation_fn_with_self(self) -> None:
        layer = layer_with(ffn(activation_fn_with_self=lambda h, experts: F.gelu(h) * experts.factor))
        layer.experts.factor = 3.0
        check(run(layer), expected(layer, naive_ffn, lambda h: 3 * F.gelu(h)))
        copied = copy.deepcopy(layer)
        copied.experts.factor = 5.0
        check(run(copied), expected(copied, naive_ffn, lambda h: 5 * F.gelu(h)))
        check(run(layer), expected(layer, naive_ffn, lambda h: 3 * F.gelu(h)))

    def test_dropout_in_the_activation_follows_the_mode(self) -> None:
        layer = layer_with(ffn(activation_fn=nn.Sequential(nn.Dropout(0.5), nn.GELU())))
        layer.eval()
        check(run(layer), expected(layer, naive_ffn, F.gelu))
        layer.train()
        torch.manual_seed(0)
        first = run(layer)["y"]
        torch.manual_seed(0)
        assert torch.equal(run(layer)["y"], first)
        assert not torch.equal(run(layer)["y"], first)

    @pytest.mark.parametrize("capacity", ["exact", "full", 20.0])
    def test_an_activation_that_learns(self, capacity: Any, poisoned: None) -> None:
        """Spare rows of a bounded layer may hold anything; they must not reach the gradient of the shared slope."""
        layer = layer_with(ffn(activation_fn=nn.PReLU(dtype=torch.float64)), capacity=capacity)
        layer.gates[0].module.capacity = capacity
        slope = layer.experts.activation_fn.weight

        def prelu(x_TD: Tensor, p: dict[str, Tensor], act: Any) -> Tensor:
            return naive_ffn(x_TD, p, lambda h: torch.where(h > 0, h, p["activation_fn.weight"] * h))

        check(run(layer), expected(layer, prelu, lambda h: h), 1e-9)
        assert float(slope.grad) != 0

    @pytest.mark.parametrize("output_dim", [1, 7, 12, 30])
    @pytest.mark.parametrize("activation", [F.gelu, torch.tanh], ids=["fused", "unfused"])
    def test_output_dim(self, activation: Any, output_dim: int) -> None:
        layer = layer_with(ffn(activation_fn=activation, output_dim=output_dim))
        check(run(layer), expected(layer, naive_ffn, activation))
        assert layer(tokens().view(1, T, D)).shape == (1, T, output_dim)

    def test_names_and_shapes_are_upstreams(self) -> None:
        layer = layer_with(ffn(output_dim=7))
        assert {name: tuple(p.shape) for name, p in layer.experts.named_parameters()} == {
            "batched_fc1_w": (E, H, D),
            "batched_fc1_bias": (E, H),
            "batched_fc2_w": (E, H, 7),
            "batched_fc2_bias": (E, 7),
        }

    @pytest.mark.parametrize("seeds", [(1, 2), None])
    def test_drawn_as_linear_layers_draw(self, seeds: Any) -> None:
        layer = layer_with({"type": "ffn", "hidden_size_per_expert": 300}, seeds=seeds)
        for name, bound in (("fc1_w", D**-0.5), ("fc1_bias", D**-0.5), ("fc2_w", 300**-0.5), ("fc2_bias", 300**-0.5)):
            p = getattr(layer.experts, f"batched_{name}").detach()
            assert p.abs().max() <= bound
            assert p.std() == pytest.approx(bound / 3**0.5, rel=0.15)
            assert not torch.equal(p[0], p[1])

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("activation", [F.gelu, torch.tanh], ids=["fused", "unfused"])
    @pytest.mark.parametrize("weighted", [False, True])
    def test_every_dtype(self, dtype: torch.dtype, activation: Any, weighted: bool) -> None:
        layer = layer_with(ffn(activation_fn=activation), weighted, dtype)
        half = dtype != torch.float32
        reference = copy.deepcopy(layer).double()
        with torch.no_grad():
            x = tokens(dtype).double()
        params = dict(reference.experts.named_parameters())
        exact = torch.einsum("te,teo->to", layer.gates[0].module.combine().double(), naive_ffn(x, params, activation))
        y = layer(x.to(dtype))
        assert y.dtype == dtype
        assert float((y.double() - exact).norm() / exact.norm()) < (8e-3 if half else 1e-6)

    def test_tokens_of_another_dtype_than_the_weights(self) -> None:
        """The experts compute in their weights' dtype, as in Tutel; the output has the tokens' dtype."""
        layer = layer_with(ffn(activation_fn=F.gelu), dtype=torch.float32)
        for dtype in (torch.bfloat16, torch.float64):
            y = layer(tokens(dtype))
            assert y.dtype == dtype
            assert torch.equal(y, layer(tokens(dtype).float()).to(dtype))


class TestLlama:
    @pytest.mark.parametrize("weighted", [False, True])
    @pytest.mark.parametrize("activation", [None, F.gelu, torch.tanh], ids=["default", "gelu", "tanh"])
    def test_equals_the_formula(self, activation: Any, weighted: bool) -> None:
        given = {} if activation is None else {"activation_fn": activation}
        layer = layer_with({"type": "llama_ffn", "hidden_size_per_expert": H, **given}, weighted)
        with torch.no_grad():
            for parameter in layer.experts.parameters():
                parameter.mul_(30)
        check(run(layer), expected(layer, naive_llama, activation or F.silu))

    def test_names_and_shapes_are_tutels(self) -> None:
        layer = layer_with({"type": "llama_ffn", "hidden_size_per_expert": H})
        shapes = {name: tuple(p.shape) for name, p in layer.experts.named_parameters()}
        assert shapes == {"W_fc1": (E, D, H), "W_fc2": (E, D, H), "W_fc3": (E, H, D)}
        assert layer.experts.W_fc1.detach().std() == pytest.approx(0.01, rel=0.2)


class Expert(nn.Module):
    """A user's own expert."""

    def __init__(self, hidden: int = H, output_dim: int = D) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(D, hidden), nn.Linear(hidden, output_dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x)))


class Batched(nn.Module):
    """All experts in one module, as Tutel's custom experts are: forward(x [E, C, D], ctx)."""

    def __init__(self, model_dim: int, local_experts: int, sharded_count: int, hidden: int = H) -> None:
        super().__init__()
        assert sharded_count == 1
        self.w1 = nn.Parameter(torch.randn(local_experts, model_dim, hidden))
        self.b1 = nn.Parameter(torch.randn(local_experts, 1, hidden))
        self.w2 = nn.Parameter(torch.randn(local_experts, hidden, model_dim))
        self.b2 = nn.Parameter(torch.randn(local_experts, 1, model_dim))
        self.seen: list[torch.Size] = []

    def forward(self, x: Tensor, ctx: Any) -> Tensor:
        assert (ctx.num_global_experts, ctx.num_local_experts, ctx.model_dim) == (x.shape[0], x.shape[0], D)
        assert (ctx.sharded_count, ctx.adaptive_degree, ctx.megablocks_size, ctx.group) == (1, 1, 0, None)
        assert int(ctx.dispatch_count.max()) <= x.shape[1]
        self.seen.append(x.shape)
        return torch.bmm(F.gelu(torch.bmm(x, self.w1) + self.b1), self.w2) + self.b2


class BatchedOfWidth(nn.Module):
    """Like Tutel's kind, with an option that has no default."""

    def __init__(self, model_dim: int, width: int) -> None:
        super().__init__()

    def forward(self, x: Tensor, ctx: Any) -> Tensor:
        return x


def copy_ffn(source: Any, target: nn.Module) -> None:
    """Copy the weights of ffn experts into custom ones."""
    with torch.no_grad():
        if isinstance(target, Batched):
            target.w1.copy_(source.batched_fc1_w.transpose(1, 2))
            target.b1.copy_(source.batched_fc1_bias.unsqueeze(1))
            target.w2.copy_(source.batched_fc2_w)
            target.b2.copy_(source.batched_fc2_bias.unsqueeze(1))
            return
        for e, expert in enumerate(target):  # type: ignore[arg-type]
            expert.up.weight.copy_(source.batched_fc1_w[e])
            expert.up.bias.copy_(source.batched_fc1_bias[e])
            expert.down.weight.copy_(source.batched_fc2_w[e].t())
            expert.down.bias.copy_(source.batched_fc2_bias[e])


def as_ffn(found: dict[str, Tensor], batched: bool) -> dict[str, Tensor]:
    """Gradients of custom experts under ffn's names."""

    def of_list(name: str) -> Tensor:
        return torch.stack([found[f"module.{e}.{name}"] for e in range(E)])

    if batched:
        w1, b1, w2, b2 = (found[f"module.{name}"] for name in ("w1", "b1", "w2", "b2"))
        grads = (w1.transpose(1, 2), b1[:, 0], w2, b2[:, 0])
    else:
        w1, b1, w2, b2 = (of_list(name) for name in ("up.weight", "up.bias", "down.weight", "down.bias"))
        grads = (w1, b1, w2.transpose(1, 2), b2)
    names = ("batched_fc1_w", "batched_fc1_bias", "batched_fc2_w", "batched_fc2_bias")
    return {"y": found["y"], "x": found["x"], **dict(zip(names, grads, strict=True))}


CUSTOM: dict[str, Callable[[], dict[str, Any]]] = {
    "list": lambda: {"module": [Expert() for _ in range(E)]},
    "ModuleList": lambda: {"module": nn.ModuleList(Expert() for _ in range(E))},
    "class": lambda: {"module": Expert, "hidden": H},
    "function": lambda: {"module": lambda: Expert()},
    "batched class": lambda: {"module": Batched, "hidden": H},
    "batched instance": lambda: {"module": Batched(D, E, 1)},
}


class TestCustom:
    @pytest.mark.parametrize("capacity", ["exact", "full", 20.0])
    @pytest.mark.parametrize("weighted", [False, True])
    @pytest.mark.parametrize("kind", list(CUSTOM))
    def test_equals_ffn_with_the_same_weights(self, kind: str, weighted: bool, capacity: Any, poisoned: None) -> None:
        reference = layer_with(ffn(activation_fn=F.gelu), weighted)
        layer = layer_with({"type": "custom", **CUSTOM[kind]()}, weighted, capacity=capacity)
        layer.gates[0].module.capacity = capacity
        copy_ffn(reference.experts, layer.experts.module)
        check(as_ffn(run(layer), "batched" in kind), run(reference))

    def test_padded_rows_are_as_many_as_the_largest_load(self) -> None:
        layer = layer_with({"type": "custom", "module": Batched})
        layer(tokens())
        load = int(layer.gates[0].module.assigned_TE.sum(0).max())
        assert layer.experts.module.seen == [(E, load, D)]

    def test_nobody_is_routed(self) -> None:
        for kind in CUSTOM:
            layer = layer_with({"type": "custom", **CUSTOM[kind]()})
            layer.gates[0].module.assigned_TE[:] = False
            found = run(layer)
            assert all((value == 0).all() for value in found.values()), kind

    def test_the_same_module_in_every_slot(self) -> None:
        """Tied experts: the list may contain a module more than once."""
        expert = Expert().double()
        layer = layer_with({"type": "custom", "module": [expert] * E})
        share_T1 = layer.gates[0].module.combine().sum(1, keepdim=True)
        assert torch.allclose(layer(tokens()), expert(tokens()) * share_T1)

    @pytest.mark.parametrize("kind", ["list", "class"])
    def test_another_output_dim(self, kind: str) -> None:
        given = {"module": [Expert(H, 7) for _ in range(E)]} if kind == "list" else {"module": Expert, "output_dim": 7}
        layer = layer_with({"type": "custom", **given})
        assert layer(tokens().view(1, T, D)).shape == (1, T, 7)

    @pytest.mark.parametrize(
        ("experts", "said"),
        [
            ({}, ["'module'"]),
            ({"module": nn.Linear(D, D)}, ["one module", "list"]),
            ({"module": [nn.Linear(D, D)] * 3}, ["3 entries", "5 slots"]),
            ({"module": "abc"}, ["'module'"]),
            ({"module": 5}, ["'module'", "5"]),
            ({"module": lambda: 3}, ["'module'"]),
            ({"module": nn.Linear, "in_features": D, "out_featurs": D}, ["out_featurs"]),
            ({"module": [nn.Linear(D, D) for _ in range(E)], "hidden": 3}, ["hidden"]),
            ({"module": Batched, "hiden": 3}, ["hiden"]),
            ({"module": Batched(D, E, 1), "hidden": 3}, ["hidden"]),
            ({"module": BatchedOfWidth}, ["width"]),
        ],
    )
    def test_what_cannot_be_an_expert_is_refused(self, experts: dict[str, Any], said: list[str]) -> None:
        with pytest.raises(ValueError) as error:
            layer_with({"type": "custom", **experts})
        for word in said:
            assert word in str(error.value)

    @pytest.mark.parametrize("broken", [lambda x: x[:1], lambda x: x.sum(), lambda x: None, lambda x: x.unsqueeze(0)])
    def test_an_expert_that_returns_something_else_is_refused(self, broken: Any) -> None:
        class Broken(nn.Module):
            def forward(self, x: Tensor) -> Any:
                return broken(x)

        layer = layer_with({"type": "custom", "module": [*(nn.Linear(D, D) for _ in range(E - 1)), Broken()]})
        with pytest.raises(ValueError, match="expert"):
            layer(tokens(torch.float64))


class TestSlots:
    KINDS = {"ffn": ffn(), "llama": {"type": "llama_ffn", "hidden_size_per_expert": H}} | {
        kind: {"type": "custom", "module": module} for kind, module in (("custom", Expert), ("batched", Batched))
    }

    @pytest.mark.parametrize("kind", list(KINDS))
    def test_slot_parameters_select_one_expert(self, kind: str) -> None:
        """Zeroing the selected parameters changes only that expert's output."""
        for slot in range(1, E):
            layer = layer_with(copy.deepcopy(self.KINDS[kind]))
            before, assigned_TE = layer(tokens()), layer.gates[0].module.assigned_TE
            with torch.no_grad():
                for parameter, index in layer.experts.slot_parameters(slot):
                    parameter[index] = 0
            changed_T = (layer(tokens()) != before).any(1)
            assert torch.equal(changed_T, assigned_TE[:, slot])

    @pytest.mark.parametrize("kind", list(KINDS))
    def test_copies_are_exact_and_means_are_means(self, kind: str) -> None:
        layer = layer_with(copy.deepcopy(self.KINDS[kind]))
        values = [[p[i].clone() for p, i in layer.experts.slot_parameters(slot)] for slot in range(E)]
        layer.experts.copy_slot(4, [1])
        layer.experts.copy_slot(2, [0, 3])
        for slot, sources in ((0, [0]), (1, [1]), (2, [0, 3]), (3, [3]), (4, [1])):
            for i, (p, index) in enumerate(layer.experts.slot_parameters(slot)):
                mean = torch.stack([values[source][i] for source in sources]).mean(0)
                assert torch.allclose(p[index], mean, rtol=1e-12)
                assert p.grad_fn is None
                assert p.requires_grad

    @pytest.mark.parametrize("kind", ["ffn", "llama", "custom"])
    def test_a_slot_drawn_anew(self, kind: str) -> None:
        drawn = []
        for global_seed in (0, 1):
            layer = layer_with(copy.deepcopy(self.KINDS[kind]))
            others = [[p[i].clone() for p, i in layer.experts.slot_parameters(slot)] for slot in range(E)]
            torch.manual_seed(global_seed)
            state = torch.get_rng_state()
            layer.experts.reset_slot(2, torch.Generator().manual_seed(9))
            assert torch.equal(torch.get_rng_state(), state)
            for slot in range(E):
                same = [
                    torch.equal(p[i], o)
                    for (p, i), o in zip(layer.experts.slot_parameters(slot), others[slot], strict=True)
                ]
                assert any(same) == (slot != 2)
                assert all(same) == (slot != 2)
            drawn.append([p[i].clone() for p, i in layer.experts.slot_parameters(2)])
        for first, second in zip(*drawn, strict=True):
            assert torch.equal(first, second)

    def test_a_batched_module_cannot_be_drawn_anew(self) -> None:
        layer = layer_with({"type": "custom", "module": Batched})
        with pytest.raises(ValueError, match="'nearest' or 'mean'"):
            layer.experts.reset_slot(2, torch.Generator())


class TestSurface:
    @pytest.mark.parametrize("weighted", [False, True])
    @pytest.mark.parametrize("kind", [*CUSTOM, "ffn", "lambda", "llama"])
    def test_skip_expert_makes_experts_the_identity(
        self, kind: str, weighted: bool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("SKIP_EXPERT", "1")
        built = {
            "ffn": ffn(),
            "lambda": ffn(activation_fn=lambda h: h),
            "llama": {"type": "llama_ffn", "hidden_size_per_expert": H},
        }
        layer = layer_with(built.get(kind) or {"type": "custom", **CUSTOM[kind]()}, weighted)
        x_TD = tokens()
        assert torch.allclose(layer(x_TD), x_TD * layer.gates[0].module.combine().sum(1, keepdim=True))
        monkeypatch.setenv("SKIP_EXPERT", "0")
        assert not torch.allclose(layer_with(ffn(), weighted)(x_TD), x_TD)

    def test_every_expert_parameter_is_scanned_and_marked(self) -> None:
        seen: list[tuple[str, nn.Parameter]] = []
        layer = layer_with(ffn(), scan_expert_func=lambda name, parameter: seen.append((name, parameter)))
        named = list(layer.experts.named_parameters())
        assert [name for name, _ in seen] == [name for name, _ in named]
        assert all(p is q for (_, p), (_, q) in zip(seen, named, strict=True))
        assert all(p._tutel_expert for p in layer.experts.parameters())
        assert not any(hasattr(p, "_tutel_expert") for p in layer.gates.parameters())

    def test_marks_survive_a_copy(self) -> None:
        """Optimizer groups and gradient reducers depend on them, often after a deepcopy."""
        for copied in (copy.deepcopy(layer_with(ffn())), pickle.loads(pickle.dumps(layer_with(ffn())))):
            assert all(getattr(p, "_tutel_expert", False) for p in copied.experts.parameters())

    def test_parameter_iterators(self) -> None:
        layer = moe.moe_layer({"type": "top"}, D, ffn(num_experts_per_device=3))
        assert [name for name, _ in layer.get_parameter_iterator("gate")] == ["0.wg.weight"]
        local = dict(layer.get_parameter_iterator("local_experts"))
        assert all(local[name] is p for name, p in layer.experts.named_parameters())
        assert len(local) == 4

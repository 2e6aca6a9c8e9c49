"""Layers that others build and fill: loaders that replace tensors one by one, meta, fake tensors, resets, DDP."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from helpers import GROUP_PATIENCE, spawn_ranks
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.parallel import DistributedDataParallel

from dynmoe_tutel import MoELayer

D, H, SLOTS, START = 8, 12, 6, 4
GATES: dict[str, Any] = {
    "top_any": {"type": "top_any", "max_expert_num": SLOTS, "init_t": 0.5},
    "gated_multi_gate": {"type": "gated_multi_gate", "max_expert_num": SLOTS},
    "top": {"type": "top", "k": 2},
    "cosine_top": {"type": "cosine_top", "k": 2, "proj_dim": 5},
    "custom": {
        "type": "custom",
        "module": lambda model_dim, num_global_experts: nn.Linear(model_dim, num_global_experts),
    },
}


class Normed(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Linear(D, D), nn.BatchNorm1d(D))


class Batched(nn.Module):
    def __init__(self, num_experts_per_device: int) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.empty(num_experts_per_device, D, D))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.w)

    def forward(self, x: Tensor, ctx: Any) -> Tensor:
        return torch.bmm(x, self.w)


EXPERTS: dict[str, Any] = {
    "ffn": {"hidden_size_per_expert": H},
    "tanh": {"hidden_size_per_expert": H, "activation_fn": torch.tanh},
    "llama_ffn": {"type": "llama_ffn", "hidden_size_per_expert": H},
    "modules": {"type": "custom", "module": Normed},
    "batched": {"type": "custom", "module": Batched},
}


def layer_with(gate: Any = "top_any", experts: str = "ffn", **options: Any) -> MoELayer:
    config = {**EXPERTS[experts], "num_experts_per_device": START}
    return MoELayer(GATES[gate] if isinstance(gate, str) else gate, D, config, **options)


def on_meta(*arguments: Any, **options: Any) -> MoELayer:
    with torch.device("meta"):
        return layer_with(*arguments, **options)


def fill_with_noise(layer: nn.Module) -> None:
    """What `to_empty` may leave."""
    with torch.no_grad():
        for tensor in (*layer.parameters(), *layer.buffers()):
            tensor.fill_(torch.nan if tensor.is_floating_point() else 12345)


def same_state(a: nn.Module, b: nn.Module) -> bool:
    pairs = zip(a.state_dict().items(), b.state_dict().items(), strict=True)
    return all(x == y and torch.equal(s, t) for (x, s), (y, t) in pairs)


class TestCountOfDrops:
    def test_it_is_no_buffer_and_in_no_state_dict(self) -> None:
        layer = layer_with(capacity=0.5)
        layer(torch.randn(40, D))
        assert int(layer.dropped_assignments) > 0
        assert (layer.dropped_assignments.shape, layer.dropped_assignments.dtype) == ((), torch.int64)
        assert not any("dropped" in name for name, _ in (*layer.named_buffers(), *layer.named_parameters()))
        assert not any("dropped" in name for name in layer.state_dict())

    @pytest.mark.parametrize("copied", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
    def test_a_copy_counts_on_by_itself(self, copied: Any) -> None:
        layer, x = layer_with(capacity=0.5), torch.randn(40, D)
        layer(x)
        once = int(layer.dropped_assignments)
        other = copied(layer)
        other(x)
        assert (int(layer.dropped_assignments), int(other.dropped_assignments)) == (once, 2 * once)

    @pytest.mark.parametrize("how", ["to_empty", "assign", "one by one", "through meta"])
    def test_it_is_zero_however_the_layer_was_filled(self, how: str) -> None:
        layer, x = layer_with(capacity=0.5, seeds=(1, 2)), torch.randn(40, D)
        empty = on_meta(capacity=0.5)
        if how == "to_empty":
            empty.to_empty(device="cpu")
            fill_with_noise(empty)
            empty.load_state_dict(layer.state_dict())
        elif how == "assign":
            empty.load_state_dict(layer.state_dict(), assign=True)
        elif how == "through meta":
            empty = layer_with(capacity=0.5)
            empty(x)
            empty.to("meta").to_empty(device="cpu").load_state_dict(layer.state_dict())
        else:  # as accelerate and transformers do
            state = layer.state_dict()
            for name, module in empty.named_modules():
                for kind in (module._parameters, module._buffers):
                    for key, value in kind.items():
                        if value is not None:
                            full = f"{name}.{key}".lstrip(".")
                            noise = torch.full_like(value, 12345, device="cpu")  # not saved: nobody fills it
                            kind[key] = (
                                nn.Parameter(state[full]) if key in module._parameters else state.get(full, noise)
                            )
        assert int(empty.dropped_assignments) == 0
        layer(x), empty(x)
        assert int(empty.dropped_assignments) == int(layer.dropped_assignments) > 0

    def test_loading_weights_keeps_it(self) -> None:
        layer = layer_with(capacity=0.5)
        layer(torch.randn(40, D))
        before = int(layer.dropped_assignments)
        layer.load_state_dict(layer_with(capacity=0.5).state_dict())
        assert int(layer.dropped_assignments) == before > 0

    def test_ddp_leaves_each_rank_its_own(self, tmp_path: Path) -> None:
        spawn_ranks(_ddp_rank, (str(tmp_path),), 2)


def _ddp_rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=2, timeout=GROUP_PATIENCE)
    layer = layer_with(capacity=0.5, seeds=(1, 2))
    alone = copy.deepcopy(layer)
    model = DistributedDataParallel(layer)
    for step in range(3):
        x = torch.randn(20 + 20 * rank, D, generator=torch.Generator().manual_seed(10 * step + rank))
        model(x).sum().backward()
        alone(x)
    assert int(layer.dropped_assignments) == int(alone.dropped_assignments) > 0
    dist.barrier()
    dist.destroy_process_group()


class TestReset:
    @pytest.mark.parametrize("experts", list(EXPERTS))
    @pytest.mark.parametrize("gate", list(GATES))
    def test_it_gives_the_bits_of_construction(self, gate: str, experts: str) -> None:
        made = layer_with(gate, experts, seeds=(3, 5))
        layer = on_meta(gate, experts, seeds=(3, 5)).to_empty(device="cpu")
        for _ in range(2):  # a second reset draws the same
            fill_with_noise(layer)
            layer.reset_parameters()
            assert same_state(layer, made)
        x = torch.randn(30, D)
        assert torch.equal(layer(x), made(x))

    @pytest.mark.parametrize("gate", [name for name in GATES if name != "custom"])
    @pytest.mark.parametrize("experts", ["ffn", "llama_ffn"])
    def test_without_seeds_it_draws_from_the_global_state_as_construction(self, gate: str, experts: str) -> None:
        layer = layer_with(gate, experts)
        fill_with_noise(layer)
        torch.manual_seed(7)
        made = layer_with(gate, experts)
        torch.manual_seed(7)
        layer.reset_parameters()
        assert same_state(layer, made)

    def test_module_by_module_after_to_empty(self) -> None:
        """As FSDP materialises a model: any order, each module by itself."""
        made = layer_with(seeds=(3, 5))
        for modules in (lambda m: list(m.modules()), lambda m: list(m.modules())[::-1]):
            layer = on_meta(seeds=(3, 5))
            for module in modules(layer):
                module.to_empty(device="cpu", recurse=False)
                if hasattr(module, "reset_parameters"):
                    module.reset_parameters()
            assert same_state(layer, made)
            assert layer.num_global_experts == START

    def test_a_trained_layer_starts_anew(self) -> None:
        layer, made = layer_with(seeds=(3, 5), capacity=0.5), layer_with(seeds=(3, 5))
        layer.begin_record_routing()
        layer(torch.randn(40, D))
        layer.gates[0].activate(5, torch.ones(D))
        layer._num_global_experts.fill_(5)
        torch.manual_seed(0)
        state = torch.get_rng_state()
        layer.reset_parameters()
        assert torch.equal(torch.get_rng_state(), state)
        assert same_state(layer, made)
        assert (int(layer.dropped_assignments), int(layer.record.tokens), layer.num_global_experts) == (0, 0, START)

    def test_a_module_without_the_method_is_refused_by_name(self) -> None:
        class Scale(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.by = nn.Parameter(torch.ones(D))

            def forward(self, x: Tensor) -> Tensor:
                return x * self.by

        experts = {"type": "custom", "module": Scale, "num_experts_per_device": START}
        with pytest.raises(ValueError, match="Scale, a part of a custom expert, has no reset_parameters"):
            MoELayer("top_any", D, experts).reset_parameters()
        with pytest.raises(ValueError, match="Scale, a part of a custom gate"):
            layer_with({"type": "custom", "module": Scale()}).reset_parameters()


def allreduce_off(name: str, parameter: nn.Parameter) -> None:
    parameter.skip_allreduce = True  # type: ignore[attr-defined]


class TestMarks:
    @pytest.mark.parametrize("experts", list(EXPERTS))
    @pytest.mark.parametrize("how", ["assign", "to_empty", "apply", "one by one", "deepcopy", "parent"])
    def test_they_survive(self, how: str, experts: str) -> None:
        layer = layer_with("top_any", experts)
        empty = on_meta("top_any", experts, scan_expert_func=allreduce_off)
        for parameter in empty.experts.parameters():
            parameter.of_mine = "set later"  # type: ignore[attr-defined]
        noted = how != "one by one"
        if how == "assign":
            empty.load_state_dict(layer.state_dict(), assign=True)
        elif how == "parent":
            nn.Sequential(empty).load_state_dict(nn.Sequential(layer).state_dict(), assign=True)
        elif how == "to_empty":
            nn.Sequential(empty).to_empty(device="cpu")
        elif how == "apply":
            empty._apply(lambda t: torch.zeros_like(t, device="cpu"))
        elif how == "deepcopy":
            empty = copy.deepcopy(empty)
        else:
            for module in empty.experts.modules():
                for name, parameter in module._parameters.items():
                    if parameter is not None:
                        module._parameters[name] = nn.Parameter(torch.zeros_like(parameter, device="cpu"))
            nn.Sequential(empty).eval()
        for parameter in empty.experts.parameters():
            assert parameter._tutel_expert  # type: ignore[attr-defined]
            assert parameter.skip_allreduce  # type: ignore[attr-defined]
            assert getattr(parameter, "of_mine", None) == ("set later" if noted else None)
        assert not any(hasattr(parameter, "_tutel_expert") for parameter in empty.gates.parameters())


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("capacity", ["exact", "full", 0.5])
@pytest.mark.parametrize("experts", ["ffn", "tanh", "llama_ffn", "modules"])
@pytest.mark.parametrize("gate", ["top_any", "top", "cosine_top", "custom"])
class TestWithoutValues:
    def shapes(self, layer: Any, training: bool, **options: Any) -> None:
        layer.train(training).begin_record_routing(record_eval=True)
        x = torch.empty(2, 30, D, requires_grad=True, **options)
        mask = torch.ones(2, 30, dtype=torch.bool, **options)
        y = layer(x, token_mask=mask)
        assert (y.shape, y.dtype, y.device, y.l_aux.shape) == (x.shape, x.dtype, x.device, ())
        (y.sum() + y.l_aux).backward()
        assert x.grad is not None
        assert x.grad.shape == x.shape

    def test_on_the_meta_device(self, gate: str, experts: str, capacity: Any, training: bool) -> None:
        self.shapes(on_meta(gate, experts, capacity=capacity), training, device="meta")

    def test_fake_tensors(self, gate: str, experts: str, capacity: Any, training: bool) -> None:
        with FakeTensorMode():
            self.shapes(layer_with(gate, experts, capacity=capacity), training)

    def test_a_real_layer_on_fake_tokens(self, gate: str, experts: str, capacity: Any, training: bool) -> None:
        """Neither its record nor its count of drops may take fake values."""
        layer, x = layer_with(gate, experts, capacity=capacity, seeds=(1, 2)), torch.randn(200, D)
        with FakeTensorMode(allow_non_fake_inputs=True):
            self.shapes(layer, training)
        assert (int(layer.record.tokens), int(layer.dropped_assignments)) == (0, 0)
        layer(x)
        assert int(layer.record.tokens) == 200


def test_tutels_kind_of_module_without_values_is_refused_by_name() -> None:
    with pytest.raises(NotImplementedError, match="Batched, of Tutel's kind"):
        on_meta("top_any", "batched")(torch.empty(3, D, device="meta"))

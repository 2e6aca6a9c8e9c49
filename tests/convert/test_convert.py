"""`convert` and `revert` on plain torch models; test_convert_hosts and _timm cover libraries' models."""

from __future__ import annotations

import copy
import pickle
from collections import OrderedDict
from typing import Any

import pytest
import torch
from helpers import FP32, relative_rms
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dynmoe_tutel import MoELayer
from dynmoe_tutel.adaptive import Budgets
from dynmoe_tutel.convert import aux_loss, convert, revert
from dynmoe_tutel.convert.find_ffns import find_ffns

D, H, BLOCKS = 12, 24, 4


class Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.out = nn.Linear(D, H, False), nn.Linear(D, H, False), nn.Linear(H, D, False)
        self.act_fn = nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.act_fn(self.two(x)) * self.one(x))


class Scaled(nn.Module):
    """Looks like an FFN but is none: it scales its result."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.act, self.fc2 = nn.Linear(D, H), nn.GELU(), nn.Linear(H, D)

    def forward(self, x: Tensor) -> Tensor:
        return 2 * self.fc2(self.act(self.fc1(x)))


def mlp(p: float = 0.0, last: float = 0.0) -> nn.Module:
    parts = [("fc1", nn.Linear(D, H)), ("act", nn.GELU()), ("drop", nn.Dropout(p)), ("fc2", nn.Linear(H, D))]
    return nn.Sequential(OrderedDict([*parts, *([("last", nn.Dropout(last))] if last else [])]))


class Host(nn.Module):
    """Residual blocks of FFNs over [B, L, D], with an attention mask in the style of transformers."""

    def __init__(self, *ffns: nn.Module, checkpointed: bool = False) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.ModuleDict({"norm": nn.LayerNorm(D), "mlp": f}) for f in ffns)
        self.head, self.checkpointed = nn.Linear(D, 3), checkpointed

    def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        for block in self.blocks:
            run = lambda h, block=block: h + block["mlp"](block["norm"](h))  # noqa: E731
            x = checkpoint(run, x, use_reentrant=False) if self.checkpointed else run(x)
        return self.head(x)


def host(**options: Any) -> Host:
    torch.manual_seed(0)
    return Host(*(mlp() for _ in range(BLOCKS)), **options)


def tokens(B: int = 3, L: int = 7) -> Tensor:
    return torch.randn(B, L, D, generator=torch.Generator().manual_seed(1))


def moe_layers(model: nn.Module) -> list[Any]:
    return [m for m in model.modules() if isinstance(m, MoELayer)]


SPLIT = [("contiguous", 1), ("random", 1), ("random", 2), ("kmeans", 1)]


class TestEquality:
    @pytest.mark.parametrize("ffn", [mlp, Gated], ids=["mlp", "gated"])
    @pytest.mark.parametrize("gate", [{"type": "top_any", "max_expert_num": 6}, {"type": "cosine_top", "k": 2}])
    def test_copies(self, ffn: Any, gate: dict[str, Any]) -> None:
        """In eval every token is routed and gets the dense model's output."""
        model = Host(*(ffn() for _ in range(BLOCKS))).eval()
        before = model(tokens())
        assert convert(model, "all", gate_type=gate, num_experts=4) is model
        assert len(moe_layers(model)) == BLOCKS
        assert not any(layer.training for layer in moe_layers(model))
        assert relative_rms(model(tokens()), before) < FP32

    @pytest.mark.parametrize(("split", "repeat"), SPLIT)
    @pytest.mark.parametrize("ffn", [mlp, Gated], ids=["mlp", "gated"])
    def test_shares_of_the_neurons(self, ffn: Any, split: str, repeat: int) -> None:
        """The token activates every slot; 3 slots, so that no scale is a power of two."""
        model = Host(*(ffn() for _ in range(2))).eval()
        before = model(tokens())
        convert(model, "all", "emoe", num_experts=3, split=split, expert_repeat=repeat)
        for layer in moe_layers(model):
            with torch.no_grad():
                layer.gates[0].gates.fill_(-2)  # every cosine passes
        assert relative_rms(model(tokens()), before) < FP32

    def test_the_gate_of_emoe(self) -> None:
        """avg-k: keys are means of the first weights, and scores count as 1."""
        model = host().eval()
        before = model(tokens())
        convert(
            model, [1], "emoe", gate_type={"type": "top", "k": 4}, num_experts=4, split="random", one_score_gate=True
        )
        (layer,) = moe_layers(model)
        assert relative_rms(model(tokens()), before) < FP32
        assert torch.allclose(layer.gates[0].wg.weight, layer.experts.batched_fc1_w.mean(dim=1))

    def test_neurons_of_one_cluster_lie_together(self) -> None:
        model = Host(mlp())
        ffn: Any = model.blocks[0]["mlp"]  # type: ignore[index]
        with torch.no_grad():
            for unit in range(H):  # 3 directions in turn
                ffn.fc1.weight[unit] = torch.eye(D)[unit % 3] + 0.01 * ffn.fc1.weight[unit]
        convert(model, "all", "emoe", num_experts=3)
        rows = moe_layers(model)[0].experts.batched_fc1_w.detach()
        assert all(len(set(rows[e, :, :3].argmax(dim=1).tolist())) == 1 for e in range(3))

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
    def test_dtypes(self, dtype: torch.dtype) -> None:
        model = host().to(dtype).eval()
        before = model(tokens().to(dtype))
        convert(model, "every_other")
        assert {p.dtype for p in model.parameters()} == {dtype}
        assert relative_rms(model(tokens().to(dtype)), before) < (8e-3 if dtype == torch.bfloat16 else 1e-12)

    def test_dropout_of_the_host(self) -> None:
        model = Host(mlp(0.5, 0.25), mlp())
        convert(model, "all")
        first, second = moe_layers(model)
        assert first.experts.activation_fn.p == 0.5
        assert model.blocks[0]["mlp"].dropout.p == 0.25  # type: ignore[index, union-attr]
        assert second.experts.activation == "gelu"
        again = Host(mlp(0.5))
        convert(again, "all", moe_dropout=0.0)
        assert moe_layers(again)[0].experts.activation == "gelu"


class TestRevert:
    @pytest.mark.parametrize("ffn", [mlp, Gated], ids=["mlp", "gated"])
    @pytest.mark.parametrize(
        "options",
        [{}, *({"recipe": "emoe", "num_experts": 3, "split": s, "expert_repeat": r} for s, r in SPLIT)],
    )
    def test_bit_for_bit(self, ffn: Any, options: dict[str, Any]) -> None:
        model = Host(*(ffn() for _ in range(3)))
        before = copy.deepcopy(model.state_dict())
        convert(model, "all", **options)
        assert not {key for key in model.state_dict() if ".fc1." in key or ".out." in key}
        revert(model)
        after = model.state_dict()
        assert list(after) == list(before)
        assert all(torch.equal(after[key], before[key]) for key in before)
        assert not model._forward_pre_hooks
        assert model(tokens()).shape == (3, 7, 3)

    def test_every_slot_learns_and_is_asked_for(self) -> None:
        model = host()
        convert(model, [0], num_experts=2)
        (layer,) = moe_layers(model)
        with torch.no_grad():
            layer.experts.batched_fc1_w[1] += 1
        with pytest.raises(ValueError, match="not one FFN any more: give expert="):
            revert(model)
        with pytest.raises(ValueError, match="expert = 5: the active slots"):
            revert(model, 5)
        mean = layer.experts.batched_fc1_w.mean(dim=0)
        assert torch.allclose(revert(copy.deepcopy(model), "mean").blocks[0]["mlp"].fc1.weight, mean)
        assert torch.equal(revert(model, 1).blocks[0]["mlp"].fc1.weight, layer.experts.batched_fc1_w[1])

    def test_pruned_neurons_make_no_dense_ffn(self) -> None:
        model = host()
        convert(model, [0], "emoe", num_experts=3, split="random")
        moe_layers(model)[0].gates[0].deactivate(1)
        with pytest.raises(ValueError, match="were grown or pruned"):
            revert(model)

    def test_nothing_to_revert(self) -> None:
        with pytest.raises(ValueError, match="has no layer that convert"):
            revert(host())

    def test_after_copies_and_files(self) -> None:
        """After deepcopy, pickle and loading another conversion's state dict."""
        model = host()
        dense = copy.deepcopy(model.state_dict())
        convert(model, "all")
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert all(torch.equal(v, dense[k]) for k, v in revert(other).state_dict().items())
        fresh = convert(Host(*(mlp() for _ in range(BLOCKS))), "all")
        fresh.load_state_dict(model.state_dict())
        assert torch.equal(fresh.eval()(tokens()), model.eval()(tokens()))


class TestWhichLayers:
    @pytest.mark.parametrize(
        ("layers", "blocks"),
        [
            ("all", [0, 1, 2, 3]),
            ("every_other", [1, 3]),
            ("last_two", [0, 2]),
            (-1, [3]),
            ([0, "blocks.2"], [0, 2]),
            ("blocks.1.mlp", [1]),
        ],
    )
    def test_names_and_indices(self, layers: Any, blocks: list[int]) -> None:
        model = convert(host(), layers)
        assert [i for i in range(BLOCKS) if isinstance(model.blocks[i]["mlp"], MoELayer)] == blocks

    def test_what_is_no_ffn(self) -> None:
        attention = nn.ModuleDict({k: nn.Linear(D, D) for k in "qkv"})
        model = nn.ModuleDict({"a": attention, "b": Scaled(), "c": mlp()})
        assert [ffn.name for ffn in find_ffns(model)] == ["c"]
        with pytest.raises(ValueError, match=r"'b' is no FFN: 'b' is a Scaled with the linear maps .*fc1 \[24, 12\]"):
            convert(model, "b")

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"layers": 4}, "FFN 4 of 4: give 0 to 3"),
            ({"layers": "block.1"}, "'block.1' is no FFN: there is no module 'block.1'"),
            ({"layers": "blocks"}, "'blocks' holds 4 FFNs: name one"),
            ({"layers": []}, "give at least one"),
            ({"layers": [1, -3]}, "names an FFN twice"),
            ({"layers": 1.5}, "layers = 1.5: give indices or names"),
            ({"recipe": "moe"}, "recipe = 'moe': allowed are 'gmoe', 'emoe'"),
            ({"recipe": "emoe", "split": "spectral"}, "split = 'spectral': allowed"),
            (
                {"recipe": "emoe", "num_experts": 5, "split": "random"},
                "has 24 neurons, which cannot be divided among 5",
            ),
            ({"recipe": "emoe", "num_experts": 4, "expert_repeat": 5}, "expert_repeat = 5: there are 4 slots"),
            ({"num_experts": 0}, "num_experts"),
            ({"moe_dropout": 1.5}, "moe_dropout"),
            ({"key_gate": True}, "key_gate = True with recipe 'gmoe'"),
            ({"experts": {"hidden": 3}}, "unknown key 'hidden' in experts"),
            ({"capacty": 2.0}, "capacty"),
            ({"one_score_gate": True, "gate_type": {"type": "top", "k": 2}}, "one_score_gate adds the experts up"),
        ],
    )
    def test_refused_and_unchanged(self, options: dict[str, Any], message: str) -> None:
        model = host()
        before = copy.deepcopy(model)
        with pytest.raises((ValueError, TypeError), match=message.replace("[", r"\[")):
            convert(model, **options)
        assert str(model) == str(before)
        assert not model._forward_pre_hooks

    def test_kmeans_names_its_extra(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(__import__("sys").modules, "k_means_constrained", None)
        with pytest.raises(ImportError, match=r"dynmoe_tutel\[emoe\]"):
            convert(host(), "all", "emoe", num_experts=3)


class TestPadding:
    MASK = torch.tensor([[1] * 7, [1] * 4 + [0] * 3, [0] * 2 + [1] * 5])

    @pytest.mark.parametrize("checkpointed", [False, True])
    def test_padding_reaches_no_expert_record_or_loss(self, checkpointed: bool) -> None:
        model = convert(host(checkpointed=checkpointed), "all")
        layer = moe_layers(model)[0]
        layer.begin_record_routing()
        x = tokens().requires_grad_()
        y = model(x, attention_mask=self.MASK)
        (y[self.MASK > 0].sum() + aux_loss(model)).backward()
        assert int(layer.record.tokens) == int(self.MASK.sum())
        assert (x.grad[self.MASK == 0] == 0).all()
        model(tokens())
        assert int(layer.record.tokens) == int(self.MASK.sum()) + 21

    def test_with_a_cache_the_mask_is_longer(self) -> None:
        model = convert(host(), "all")
        layer = moe_layers(model)[0]
        layer.begin_record_routing()
        model(tokens()[:, -2:], self.MASK)
        assert int(layer.record.tokens) == 4
        model(tokens(), self.MASK[:, :3])  # does not fit these tokens
        assert int(layer.record.tokens) == 4 + 21

    def test_can_be_left_out(self) -> None:
        model = convert(host(), "all", mask_padding=False)
        layer = moe_layers(model)[0]
        layer.begin_record_routing()
        model(tokens(), self.MASK)
        assert int(layer.record.tokens) == 21


class TestLoss:
    def test_the_sum_of_the_last_forward(self) -> None:
        model = convert(host(), "all")
        model(tokens())
        expected = 0.01 * sum(layer.l_aux for layer in moe_layers(model))
        got = aux_loss(model, 0.01)
        assert got.dtype == torch.float32
        assert got.shape == ()
        assert torch.allclose(got, expected)
        got.backward()
        assert all(layer.gates[0].sim_matrix.grad is not None for layer in moe_layers(model))

    def test_checkpointing_changes_no_gradient(self) -> None:
        grads = []
        for checkpointed in (False, True):
            model = convert(host(checkpointed=checkpointed), "all", seeds=(1, 1))
            (model(tokens()).square().mean() + aux_loss(model, 0.1)).backward()
            grads.append([p.grad for p in model.parameters()])
        assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))

    def test_nothing_to_add(self) -> None:
        with pytest.raises(ValueError, match="has no MoE layer"):
            aux_loss(host())
        with pytest.raises(ValueError, match="none of its 4 MoE layers has run"):
            aux_loss(convert(host(), "all"))


def test_meta_weights_are_refused() -> None:
    with torch.device("meta"):
        model = Host(mlp())
    with pytest.raises(ValueError, match="meta device"):
        convert(model, "all")


def test_frozen_and_global_state() -> None:
    """A frozen FFN makes frozen experts; k-means and the random split draw from no global state."""
    model = host()
    model.blocks[1]["mlp"].requires_grad_(False)  # type: ignore[index, union-attr]
    convert(model, [1], "emoe", num_experts=3, split="random", seeds=(0, 0))
    assert not any(p.requires_grad for p in moe_layers(model)[0].experts.parameters())
    assert all(p.requires_grad for p in moe_layers(model)[0].gates.parameters())


def test_a_budget_holds_in_every_layer_of_a_converted_model() -> None:
    gate = {"type": "top_any", "max_expert_num": 4, "budget": {"target_k": 2.0, "max_k": 3}}
    model = convert(host(), layers=[1, 3], gate_type=gate, num_experts=4)
    layers = [module for module in model.modules() if isinstance(module, MoELayer)]
    budgets = Budgets(model)
    for _ in range(30):
        model(tokens(16, 16))
        budgets.step()
    assert len(layers) == 2
    k: list[float] = []
    for layer in layers:
        layer.gates[0].register_forward_hook(lambda *call: k.append(float(call[2].k_per_token.float().mean())))
        assert layer.gates[0].budget.max_k == 3
    model(tokens(16, 16))
    assert k == pytest.approx([2.0, 2.0], abs=0.15)

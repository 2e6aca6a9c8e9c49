"""Mistakes of a careless user: each raises a ValueError that names the argument, the value and the remedy."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_moe import START, D, H, layer_with, tokens
from torch import nn

from dynmoe_tutel import Decision, MoELayer, moe


def build(
    gate: Any = "top_any", model_dim: Any = D, experts: Any = None, cls: Any = moe.moe_layer, **given: Any
) -> Any:
    config = {"type": "ffn", "num_experts_per_device": START, "hidden_size_per_expert": H, **(experts or {})}
    return cls(gate, model_dim, config, **given)


def gate(kind: str = "top_any", **keys: Any) -> dict[str, Any]:
    return {"type": kind, **keys}


def call(**given: Any) -> Callable[[], Any]:
    """A forward of a good layer with bad arguments."""
    return lambda: layer_with(**given.pop("layer", {}))(given.pop("x", tokens()), **given)


INF, NAN = math.inf, math.nan
BAD: dict[str, tuple[Callable[[], Any], list[str]]] = {
    # tokens
    "last dimension": (call(x=torch.randn(5, 17)), ["input", "[5, 17]", "16"]),
    "one dimension": (call(x=torch.randn(D)), ["input", "[16]", "two dimensions"]),
    "no dimension": (call(x=torch.tensor(1.0)), ["input", "[]"]),
    "no tensor": (call(x=[[1.0] * D]), ["input", "list"]),
    "integers": (call(x=torch.ones(5, D).long()), ["int64", "float32"]),
    "booleans": (call(x=torch.ones(5, D).bool()), ["bool", "float32"]),
    "complex": (call(x=torch.ones(5, D, dtype=torch.complex64)), ["complex64", "float32"]),
    "float8": (call(x=torch.ones(5, D).to(torch.float8_e4m3fn)), ["float8_e4m3fn", "float32"]),
    "device": (call(x=torch.ones(5, D, device="meta")), ["meta", "cpu", ".to("]),
    "not finite": (
        call(layer={"check_finite": True}, x=torch.full((5, D), NAN)),
        ["5 of 5 tokens", "non-finite", "token 0"],
    ),
    "one inf": (
        call(layer={"check_finite": True}, x=torch.cat([torch.ones(3, D), torch.full((1, D), INF)]).view(2, 2, D)),
        ["1 of 4 tokens", "token 3"],
    ),
    "route list": (lambda: layer_with().route([[1.0] * D]), ["input", "list"]),
    "route": (lambda: layer_with().route(torch.randn(5, 17)), ["input", "[5, 17]", "16"]),
    # arguments of a call
    "gate_index": (call(gate_index=1), ["gate_index", "1", "0"]),
    "gate_index < 0": (call(gate_index=-1), ["gate_index", "-1"]),
    "gate_index text": (call(gate_index="0"), ["gate_index", "'0'"]),
    "gate_index None": (call(gate_index=None), ["gate_index", "None"]),
    "gate_index float": (call(gate_index=0.5), ["gate_index", "0.5"]),
    "top_k": (call(layer={"gate": "top", "cls": MoELayer}, top_k=5), ["top_k", "5", "4"]),
    "top_k 0": (call(layer={"gate": "top", "cls": MoELayer}, top_k=0), ["top_k", "0"]),
    "top_k float": (call(layer={"gate": "top"}, top_k=1.5), ["top_k", "1.5"]),
    "reserve_dims 0": (call(x=torch.ones(1, D), reserve_dims=0), ["reserve_dims", "0"]),
    "reserve_dims -1": (call(reserve_dims=-1), ["reserve_dims", "-1"]),
    "reserve_dims text": (call(reserve_dims="1"), ["reserve_dims", "'1'"]),
    "reserve_dims 3": (call(x=torch.ones(1, D), reserve_dims=3), ["reserve_dims", "3"]),
    # the layer
    "unknown": (lambda: build(capasity=1.0), ["'capasity'", "'capacity'"]),
    "unknown by the name of the catch-all": (lambda: build(unknown=1), ["'unknown'"]),
    "unknown return": (lambda: build(**{"return": 1}), ["'return'"]),
    "experts None": (lambda: moe.moe_layer("top_any", D), ["experts", "dict"]),
    "experts list": (lambda: moe.moe_layer("top_any", D, [1]), ["experts", "dict", "list"]),
    "experts empty": (lambda: moe.moe_layer("top_any", D, {}), ["hidden_size_per_expert"]),
    "is_postscore": (lambda: build(is_postscore=False), ["is_postscore"]),
    **{
        f"capacity_factor {v!r}": (call(capacity_factor=v), ["capacity_factor", repr(v)])
        for v in (False, True, "", "1", NAN, INF)
    },
    **{
        f"overlap {v!r}": (lambda v=v: build(a2a_ffn_overlap_degree=v), ["a2a_ffn_overlap_degree", repr(v)])  # type: ignore[misc]
        for v in (-1, 2.5, "2", True, None, NAN)
    },
    "overlap of a call": (call(a2a_ffn_overlap_degree="2"), ["a2a_ffn_overlap_degree", "'2'"]),
    "is_postscore text": (lambda: build(is_postscore="yes"), ["is_postscore", "'yes'"]),
    "use_2dh": (lambda: build(use_2dh=2.5), ["use_2dh", "2.5"]),
    "seeds int": (lambda: build(seeds=5), ["seeds", "5"]),
    "seeds text": (lambda: build(seeds="ab"), ["seeds", "ab"]),
    "seeds float": (lambda: build(seeds=(1.5,)), ["seeds", "1.5"]),
    "seeds big": (lambda: build(seeds=(2**64,)), ["seeds"]),
    "scan_expert_func": (lambda: build(scan_expert_func=3), ["scan_expert_func", "3"]),
    "result_func": (lambda: build(result_func=3), ["result_func", "3"]),
    "momentum nan": (lambda: build(update_momentum=NAN), ["update_momentum", "nan"]),
    "momentum 2": (lambda: build(update_momentum=2), ["update_momentum", "2"]),
    "momentum text": (lambda: build(update_momentum="x"), ["update_momentum", "'x'"]),
    **{
        f"slot {v!r}": (lambda v=v: build(gate(max_expert_num=6)).slot_parameters(v), ["slot", repr(v), "6"])  # type: ignore[misc]
        for v in (6, -1, 1.5, None)
    },
    "prune no slot": (lambda: build().update_experts(Decision(prune=[(9, "")])), ["9", "4"]),
    "grow no direction": (
        lambda: build(gate(max_expert_num=6)).update_experts(Decision(grow=[(torch.ones(D + 1), "")])),
        ["[17]", "16"],
    ),
    "grow nan": (
        lambda: build(gate(max_expert_num=6)).update_experts(Decision(grow=[(torch.full((D,), NAN), "")])),
        ["finite"],
    ),
    "init": (lambda: build().update_experts(Decision(), init="nearst"), ["init", "'nearst'", "nearest"]),
    "one_score top_any": (lambda: build(one_score_gate=True), ["one_score_gate", "'top'"]),
    "update_one_score_gate": (lambda: build().update_one_score_gate(), ["one_score_gate"]),
    "param_type": (lambda: build().get_parameter_iterator("expert"), ["param_type", "'expert'", "'local_experts'"]),
    "adaptive of top": (lambda: build("top").adaptive_update_experts(), ["TopKGate", "top_any"]),
    "no window": (lambda: build().adaptive_update_experts(), ["begin_record_routing"]),
    "is_gshard_loss False": (lambda: build("top", is_gshard_loss=False), ["gate_noise"]),
    "different slots": (
        lambda: build([gate(max_expert_num=8), "top"]),
        ["[8, 4]", "same number"],
    ),
    # gate_type
    "gate_type None": (lambda: build(None), ["gate_type", "NoneType"]),
    "gate_type int": (lambda: build(3), ["gate_type", "int"]),
    "gate_type empty": (lambda: build([]), ["gate_type", "at least one"]),
    "gate_type empty dict": (lambda: build({}), ["gate_type['type']", "top_any"]),
    "gate_type text": (lambda: build("top_eny"), ["'top_eny'", "top_any"]),
    "gate_type of list": (lambda: build(gate(["top_any"])), ["gate_type['type']", "['top_any']"]),  # type: ignore[arg-type]
    "unknown gate key": (lambda: build(gate(max_experts=9)), ["'max_experts'", "'max_expert_num'"]),
    "k of top_any": (lambda: build(gate(k=2)), ["'k'", "top-any"]),
    "unknown key of top": (lambda: build(gate("top", max_expert_num=8)), ["'max_expert_num'"]),
    "k > E": (lambda: build(gate("top", k=5), cls=MoELayer), ["gate_type['k']", "5", "4"]),
    "k > E by name": (lambda: build("Top9Gate", cls=MoELayer), ["gate_type['k']", "9", "4"]),
    **{f"k {v!r}": (lambda v=v: build(gate("top", k=v)), ["gate_type['k']", repr(v)]) for v in (0, -1, 2.5, "2", None)},  # type: ignore[misc]
    "max_expert_num < start": (lambda: build(gate(max_expert_num=3)), ["max_expert_num", "3", "4"]),
    "GMGate2": (lambda: build("GMGate2"), ["max_expert_num", "2", "4"]),
    **{
        f"max_expert_num {v!r}": (lambda v=v: build(gate(max_expert_num=v)), ["max_expert_num", repr(v)])  # type: ignore[misc]
        for v in (0, -1, 8.5, "8", NAN, [8], True)
    },
    **{
        f"init_t {v!r}": (lambda v=v: build(gate(init_t=v)), ["gate_type['init_t']", repr(v)])  # type: ignore[misc]
        for v in (0, -1, NAN, INF, "1", [1])
    },
    **{
        f"cosine init_t {v!r}": (lambda v=v: build(gate("cosine_top", init_t=v)), ["init_t", repr(v)])  # type: ignore[misc]
        for v in (0, NAN, "1", None)
    },
    **{
        f"proj_dim {v!r}": (lambda v=v: build(gate("cosine_top", proj_dim=v)), ["proj_dim", repr(v)])  # type: ignore[misc]
        for v in (0, -1, 2.5, "2", None)
    },
    **{
        f"gate_noise {v!r}": (lambda v=v: build(gate("top", gate_noise=v)), ["gate_noise", repr(v)])  # type: ignore[misc]
        for v in (-1.0, NAN, INF, "x", None)
    },
    "custom without module": (lambda: build(gate("custom")), ["'module'"]),
    "custom text": (lambda: build(gate("custom", module="x")), ["'module'", "'x'"]),
    "custom k": (lambda: build(gate("custom", module=nn.Linear(D, START), k=2.5)), ["'k'", "2.5"]),
    "custom no module": (lambda: build(gate("custom", module=lambda **given: 3)), ["'module'"]),
    "custom of wrong arguments": (lambda: build(gate("custom", module=nn.Linear)), ["'module'", "model_dim"]),
    "custom options": (lambda: build(gate("custom", module=nn.Linear(D, START), width=3)), ["width"]),
    "custom shape": (lambda: build(gate("custom", module=nn.Linear(D, 5)))(tokens()), ["[40, 4]", "[40, 5]"]),
    "custom result": (lambda: build(gate("custom", module=nn.LSTM(D, START)))(tokens()), ["Routing", "tuple"]),
    # experts
    "experts type": (lambda: build(experts={"type": "fnn"}), ["experts['type']", "'fnn'", "llama_ffn"]),
    "unknown key of experts": (lambda: build(experts={"hidden": 4}), ["'hidden'", "hidden_size_per_expert"]),
    "llama output_dim": (lambda: build(experts={"type": "llama_ffn", "output_dim": 4}), ["'output_dim'"]),
    "two counts": (lambda: build(experts={"count_per_node": 2}), ["num_experts_per_device", "count_per_node"]),
    **{
        f"num_experts {v!r}": (
            lambda v=v: build(experts={"num_experts_per_device": v}),  # type: ignore[misc]
            ["num_experts_per_device", repr(v)],
        )
        for v in (0, -1, 2.5, "4", None, NAN)
    },
    "count_per_node 0": (
        lambda: moe.moe_layer("top_any", D, {"count_per_node": 0, "hidden_size_per_expert": 3}),
        ["count_per_node", "0"],
    ),
    "no hidden size": (
        lambda: moe.moe_layer("top_any", D, {"type": "ffn", "num_experts_per_device": 2}),
        ["hidden_size_per_expert"],
    ),
    "no hidden size, llama": (
        lambda: moe.moe_layer("top_any", D, {"type": "llama_ffn", "num_experts_per_device": 2}),
        ["hidden_size_per_expert"],
    ),
    **{
        f"hidden {v!r}": (
            lambda v=v: build(experts={"hidden_size_per_expert": v}),  # type: ignore[misc]
            ["hidden_size_per_expert", repr(v)],
        )
        for v in (0, -1, 2.5, "4", None)
    },
    **{
        f"output_dim {v!r}": (lambda v=v: build(experts={"output_dim": v}), ["output_dim", repr(v)])  # type: ignore[misc]
        for v in (0, -1, 2.5, "4")
    },
    **{f"model_dim {v!r}": (lambda v=v: build(model_dim=v), ["model_dim", repr(v)]) for v in (0, -1, 2.5, "4", None)},  # type: ignore[misc]
    "two activations": (
        lambda: build(experts={"activation_fn": F.relu, "activation_fn_with_self": lambda h, s: h}),
        ["activation_fn", "activation_fn_with_self"],
    ),
    "activation text": (lambda: build(experts={"activation_fn": "swish"}), ["activation_fn", "'swish'", "silu"]),
    "activation class": (lambda: build(experts={"activation_fn": nn.GELU}), ["activation_fn", "GELU"]),
    "activation shape": (lambda: build(experts={"activation_fn": lambda h: h[:, 1:]})(tokens()), ["activation_fn"]),
    "llama activation": (
        lambda: build(experts={"type": "llama_ffn", "activation_fn": 3}),
        ["activation_fn", "3"],
    ),
    # capacity, losses, gradients
    **{
        f"capacity {v!r}": (lambda v=v: build(capacity=v), ["capacity", repr(v), '"exact"'])  # type: ignore[misc]
        for v in (0, -1, 0.0, -0.5, NAN, INF, "half", True, [1])
    },
    **{
        f"combine_gradient {v!r}": (lambda v=v: build(combine_gradient=v), ["combine_gradient", repr(v), "'mean'"])  # type: ignore[misc]
        for v in ("sum", "Mean", 1, ["mean"])
    },
    "unknown loss": (lambda: build(aux_losses={"diversty": 1}), ["aux_losses", "'diversty'", "diversity"]),
    "loss of the other kind": (lambda: build("top", aux_losses={"diversity": 1}), ["'diversity'", "gshard"]),
    **{
        f"loss weight {v!r}": (lambda v=v: build(aux_losses={"diversity": v}), ["aux_losses", "diversity", repr(v)])  # type: ignore[misc]
        for v in (NAN, INF, "1", None)
    },
    "losses list": (lambda: build(aux_losses=["diversity"]), ["aux_losses", "diversity"]),
    "losses text": (lambda: build(aux_losses="diversity"), ["aux_losses", "diversity"]),
    "losses number": (lambda: build(aux_losses=1), ["aux_losses", "1"]),
    "load_importance without noise": (
        lambda: build("top", aux_losses={"load_importance": 1}),
        ["load_importance", "gate_noise"],
    ),
}


class TestBadInput:
    @pytest.mark.parametrize("name", list(BAD))
    def test_is_refused_by_name_value_and_remedy(self, name: str) -> None:
        attempt, said = BAD[name]
        with pytest.raises(ValueError) as error:
            attempt()
        for word in said:
            assert word in str(error.value)

    def test_the_message_of_an_unknown_key_lists_only_arguments(self) -> None:
        with pytest.raises(ValueError) as error:
            build(capasity=1)
        assert "return" not in str(error.value)
        assert "unknown," not in str(error.value)

    @pytest.mark.parametrize("value", ["yes", "2.5"])
    def test_environment_variables_are_named(self, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
        for name in ("SKIP_MOE", "SKIP_EXPERT"):
            monkeypatch.setenv(name, value)
            with pytest.raises(ValueError, match=name):
                build()
            monkeypatch.delenv(name)

    def test_a_failed_call_leaves_the_layer_as_it_was(self) -> None:
        layer = layer_with(check_finite=True)
        layer.begin_record_routing()
        y = layer(tokens())
        for x in (torch.randn(3, 17), torch.full((3, D), NAN), torch.ones(3, D).long()):
            with pytest.raises(ValueError):
                layer(x)
        assert layer.l_aux is y.l_aux
        assert int(layer.record.tokens) == 40

    def test_integers_of_other_kinds(self) -> None:
        """Shapes read from numpy are integers too."""
        numpy = pytest.importorskip("numpy")
        experts = {"num_experts_per_device": numpy.int64(3), "hidden_size_per_expert": numpy.int32(8)}
        layer = moe.moe_layer(gate(max_expert_num=numpy.int64(4)), numpy.int64(D), experts)
        assert (layer.num_global_experts, layer.max_num_global_experts) == (3, 4)
        assert layer(tokens()).shape == (40, D)

    def test_finite_tokens_pass_the_check(self) -> None:
        x = tokens()
        assert torch.equal(layer_with(check_finite=True)(x), layer_with()(x))
        assert layer_with(check_finite=True)(tokens(0)).shape == (0, D)

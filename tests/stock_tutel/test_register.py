"""Registration only adds gate types to Tutel, whose functions then also take a ragged routing."""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import helpers
import pytest
import torch
import torch.nn.functional as F
from helpers import FP32, relative_rms
from torch import Tensor, nn
from tutel_twin import draw

from dynmoe_tutel import Routing
from dynmoe_tutel.moe import critical_data

tutel = pytest.importorskip("tutel", reason="stock Tutel is not installed: its README says how")
D, H, E = 16, 20, 4


class StockGate(nn.Module):
    """A custom gate of Tutel's kind."""

    def __init__(self, model_dim: int, num_global_experts: int) -> None:
        super().__init__()
        self.wg = nn.Linear(model_dim, num_global_experts)
        self.top_k = 2

    def forward(self, x: Tensor) -> Tensor:
        return self.wg(x)


STOCK: dict[str, Any] = {
    "top-1": {"type": "top", "k": 1},
    "top-2": {"type": "top", "k": 2, "fp32_gate": True, "capacity_factor": 0.7},
    "noisy": {"type": "top", "k": 2, "gate_noise": 1.0, "capacity_factor": -1.5},
    "cosine": {"type": "cosine_top", "k": 2, "proj_dim": 8},
    "custom": {"type": "custom", "module": StockGate},
    "name": "Top2Gate",
    "list": [{"type": "top", "k": 1}, {"type": "cosine_top", "k": 3}],
}


def stock_run(gate_type: Any, **options: Any) -> list[Tensor]:
    """Output, loss and gradients of a layer of `tutel.moe`, from fixed seeds."""
    from tutel import moe

    copies = [dict(g) for g in gate_type] if isinstance(gate_type, list) else gate_type
    copies = dict(copies) if isinstance(copies, dict) else copies
    layer = moe.moe_layer(
        gate_type=copies,
        experts={"type": "ffn", "num_experts_per_device": E, "hidden_size_per_expert": H, "activation_fn": F.gelu},
        model_dim=D,
        seeds=(1, 2, 3),
        **options,
    )
    x = torch.randn(3, 12, D).requires_grad_()
    y = layer(x)
    (y.square().sum() + y.l_aux).backward()
    return [y.detach(), y.l_aux.detach(), x.grad, *(p.grad for p in layer.parameters() if p.grad is not None)]


@pytest.mark.parametrize("name", STOCK)
def test_tutels_own_gates_give_the_same_bits(name: str, request: pytest.FixtureRequest) -> None:
    options = {"is_gshard_loss": False} if name == "noisy" else {}
    before = stock_run(STOCK[name], **options)
    request.getfixturevalue("registered")
    upstream = {"one_score_gate": False, "normalize_one_score_gate": False, "update_momentum": 0.0}
    for found in (stock_run(STOCK[name], **options), stock_run(STOCK[name], **options, **upstream)):
        assert len(found) == len(before)
        for value, expected in zip(found, before, strict=True):
            assert torch.equal(value, expected)


def test_register_and_unregister() -> None:
    from dynmoe_tutel import tutel_backend

    owners = [tutel.moe, tutel.impls.moe_layer, tutel.gates, tutel.impls.fast_dispatch, tutel.checkpoint.gather]
    before = [dict(vars(owner)) for owner in owners]
    modules = {name for name in sys.modules if name.startswith("tutel")}
    for _ in range(2):
        tutel_backend.register()
    layer_class = tutel.moe.moe_layer
    assert tutel.impls.moe_layer.MOELayer is tutel.impls.moe_layer.moe_layer is layer_class
    for kind in ("top_any", "gated_multi_gate", "gated_multi_gate_t"):
        gate = importlib.import_module(f"tutel.gates.{kind}").Gate(model_dim=D, num_global_experts=3, fp32_gate=True)
        assert isinstance(gate(torch.randn(7, D)), Routing)
        assert gate.sim_matrix.shape == (D, 3 if kind == "top_any" else 64)
    for _ in range(2):
        tutel_backend.unregister()
    assert [dict(vars(owner)) for owner in owners] == before
    assert {name for name in sys.modules if name.startswith("tutel")} == modules
    with pytest.raises(Exception, match="Unrecognized gate_type"):
        tutel.moe.moe_layer(
            gate_type={"type": "top_any"}, experts={"type": "ffn", "hidden_size_per_expert": H}, model_dim=D
        )


def test_a_layer_survives_unregister(registered: None) -> None:
    from dynmoe_tutel import tutel_backend

    torch.manual_seed(0)
    layer = tutel.moe.moe_layer(
        gate_type="GMGate6",
        experts={"type": "ffn", "count_per_node": 3, "hidden_size_per_expert": H},
        model_dim=D,
        layout="padded",
    )
    x = torch.randn(5, D)
    y = layer(x)
    tutel_backend.unregister()
    assert torch.equal(layer(x), y)


def test_upstreams_constructor(registered: None) -> None:
    """Upstream's arguments, with the default losses of its scripts and the avg-k gate, which stock Tutel refuses."""
    from tutel import moe

    common = {"batch_prioritized_routing": True, "normalize_one_score_gate": False, "update_momentum": 0.0}
    experts = {"type": "ffn", "count_per_node": 3, "hidden_size_per_expert": H, "activation_fn": nn.GELU()}
    for gate in (
        {"type": "gated_multi_gate", "fp32_gate": True, "max_expert_num": 6, "adaptive_experts": True},
        {"type": "gated_multi_gate_t", "fp32_gate": True, "max_expert_num": 6, "init_t": 0.2},
    ):
        layer = moe.moe_layer(
            gate_type=gate, experts=experts, model_dim=D, is_gshard_loss=False, one_score_gate=False, **common
        )
        assert layer.combine_gradients == ["normalized"]
        assert (layer.max_num_local_experts, layer.num_local_experts, layer.num_global_experts) == (6, 3, 3)
        layer(torch.randn(9, D)).l_aux.backward()
    keys = moe.moe_layer(
        gate_type={"type": "top", "k": 2, "fp32_gate": True, "gate_noise": 1.0},
        experts=experts,
        model_dim=D,
        is_gshard_loss=False,
        one_score_gate=True,
        **common,
    )
    keys.update_one_score_gate()
    assert torch.equal(keys.gates[0].wg.weight, keys.experts.batched_fc1_w.mean(dim=1))
    assert isinstance(keys, tutel.impls.moe_layer.MOELayer)


def ragged(seed: int = 0, T: int = 30) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x, w = torch.randn(T, D, generator=generator), torch.randn(D, 6, generator=generator)
    return x.requires_grad_(), w.requires_grad_(), torch.full((6,), 0.1).requires_grad_()


def experts_of(rows_ECD: Tensor) -> Tensor:
    return rows_ECD.tanh() * torch.arange(1.0, 7.0).view(6, 1, 1)


@pytest.mark.parametrize("postscore", [True, False])
@pytest.mark.parametrize("combine_gradient", ["mean", "normalized"])
def test_tutels_kernels_read_the_ragged_tuple(combine_gradient: str, postscore: bool, registered: None) -> None:
    """Tutel's own kernels skip index -1; output and gradients equal the ragged routing's."""
    from tutel import moe

    found = []
    for as_tuple in (True, False):
        x, w, g = ragged()
        routing = moe.top_any_routing(x, w, g)
        assert {0, 1, 2} <= set(routing.k_per_token.tolist())
        if as_tuple:
            data = critical_data(routing, combine_gradient=combine_gradient)
            assert any((column < 0).any() for column in data[1])
            y = moe.fast_decode(experts_of(moe.fast_encode(x, data, postscore)), data, postscore)
        else:
            dispatcher = moe.fast_dispatcher(6, 0, D, x.dtype)
            dispatcher.update(routing, is_postscore=postscore, combine_gradient=combine_gradient)
            rows = dispatcher.encode(x).view(6, dispatcher.capacity, D)
            y = dispatcher.decode(experts_of(rows).flatten(0, 1))
            if combine_gradient == "mean":
                same = moe.fast_decode(experts_of(moe.fast_encode(x, routing, postscore)), routing, postscore)
                assert torch.equal(same, y)
        (y * torch.linspace(-1, 1, D)).sum().backward()
        found.append([y.detach(), x.grad, w.grad, g.grad])
    for value, expected in zip(*found, strict=True):
        assert relative_rms(value, expected) < 3 * FP32
        assert value.abs().sum() > 0


def test_the_dispatcher_still_takes_tutels_lists(registered: None) -> None:
    from tutel import moe

    score_TE = torch.rand(20, 6, generator=torch.Generator().manual_seed(0)).softmax(dim=1)
    crit, l_aux = moe.top_k_routing(score_TE, 2)
    own, own_loss = tutel.impls.fast_dispatch.extract_critical(score_TE, 2)
    assert torch.equal(l_aux, own_loss)
    x = torch.randn(20, D)
    dispatcher = moe.fast_dispatcher(6, 0, D, x.dtype)
    assert isinstance(dispatcher, tutel.impls.fast_dispatch.fast_dispatcher)
    dispatcher.update(*crit[1:-1])
    encoded = tutel.impls.fast_dispatch.fast_encode(x, own)
    assert torch.equal(dispatcher.encode(x).view(6, -1, D), encoded)
    assert torch.equal(moe.fast_encode(x, crit), encoded)
    assert torch.equal(moe.fast_decode(encoded, crit), tutel.impls.fast_dispatch.fast_decode(encoded, own))


@pytest.mark.parametrize("k", [1, 2, 5])
@pytest.mark.parametrize("options", [{}, {"capacity_factor": 0.0}, {"normalize_gate": False, "alignment": 4}], ids=str)
def test_this_packages_top_k_routing_is_tutels(options: dict, k: int) -> None:
    """`dynmoe_tutel.moe` has the same functions without Tutel."""
    from dynmoe_tutel import moe

    score_TE = torch.rand(33, 6, generator=torch.Generator().manual_seed(k)).softmax(dim=1).requires_grad_()
    found, l_aux = moe.top_k_routing(score_TE, k, **options)
    expected, expected_loss = tutel.impls.fast_dispatch.extract_critical(score_TE, k, **options)
    assert relative_rms(l_aux, expected_loss) < FP32
    assert (found[0], found[4]) == (expected[0], expected[4])
    for i in (1, 2, 3):
        for value, column in zip(found[i], expected[i], strict=True):
            assert value.dtype == column.dtype
            assert torch.allclose(value, column, rtol=1e-6)
    assert torch.equal(found[5].long(), expected[5].long())
    x = torch.randn(33, D)
    encoded = moe.fast_encode(x, expected)
    assert torch.equal(encoded, tutel.impls.fast_dispatch.fast_encode(x, expected))
    decoded = tutel.impls.fast_dispatch.fast_decode(encoded, expected)
    assert relative_rms(moe.fast_decode(encoded, expected), decoded) < FP32


def test_a_k_of_each_token(registered: None) -> None:
    from tutel import moe

    score_TE = torch.rand(9, 5, generator=torch.Generator().manual_seed(0))
    crit, _ = moe.top_k_routing(score_TE, torch.tensor([0, 1, 2, 5, 3, 0, 4, 1, 2]), capacity_factor=0.0)
    routing = Routing.from_assignments(torch.stack(crit[1], dim=1).ge(0))
    x = torch.randn(9, D)
    back = moe.fast_decode(moe.fast_encode(x, crit), crit)
    assert torch.allclose(back, x * (routing.k_per_token > 0).unsqueeze(1), atol=1e-6)
    again, _ = moe.top_k_routing(moe.top_any_routing(*(t.detach() for t in ragged())))
    assert int(again[5].sum()) == sum(int((column >= 0).sum()) for column in again[1])


class TestCheckpoints:
    @pytest.mark.parametrize("layout", ["packed", "padded"])
    @pytest.mark.parametrize("kind", ["ffn", "llama_ffn"])
    def test_stock_and_back(self, kind: str, layout: str, registered: None) -> None:
        """A checkpoint of Tutel's `top` gate fills the experts of a top-any layer with more slots, and one of ours
        loads into Tutel's layer."""
        from tutel import moe

        experts = {"type": kind, "num_experts_per_device": E, "hidden_size_per_expert": H, "activation_fn": F.silu}
        stock = moe.moe_layer(gate_type={"type": "top"}, experts=dict(experts), model_dim=D)
        draw(stock.experts)
        slots = E if layout == "padded" and kind == "llama_ffn" else E + 2
        ours = moe.moe_layer(
            gate_type={"type": "top_any", "max_expert_num": slots}, experts=experts, model_dim=D, layout=layout
        )
        result = ours.load_state_dict(stock.state_dict(), strict=False)
        assert set(result.unexpected_keys) == {"gates.0.wg.weight"}
        assert {key.split(".")[0] for key in result.missing_keys} == {"gates"}
        for (name, value), (_, own) in zip(
            stock.experts.named_parameters(), ours.experts.named_parameters(), strict=True
        ):
            assert torch.equal(value.flatten(), own.flatten()[: value.numel()]), name
        assert ours.num_global_experts == E
        if slots == E:
            stock.load_state_dict(ours.state_dict(), strict=False)

    @pytest.mark.parametrize("pruned", [False, True])
    def test_gather_and_scatter(self, pruned: bool, tmp_path: Path, registered: None) -> None:
        """Tutel's own tools, on a model with fewer active experts than slots."""
        from tutel import moe

        def build() -> nn.Module:
            layer = moe.moe_layer(
                gate_type={"type": "top_any", "max_expert_num": 4},
                experts={"type": "ffn", "num_experts_per_device": 4, "hidden_size_per_expert": H},
                model_dim=D,
            )
            draw(layer.experts)
            return nn.ModuleDict({"mlp": layer, "head": nn.Linear(D, 2)})

        torch.manual_seed(0)
        model = build()
        if pruned:
            model["mlp"].gates[0].deactivate(1)
            model["mlp"]._num_global_experts.fill_(3)
        torch.save(model.state_dict(), tmp_path / "whole.pt")
        command = [sys.executable, "-m", "dynmoe_tutel", "run", "-m"]
        scatter = [
            "tutel.checkpoint.scatter",
            "--input",
            "whole.pt",
            "--outputs",
            "part-{rank}.pt",
            "--output_size",
            "2",
        ]
        gather = ["tutel.checkpoint.gather", "--inputs", "part-{rank}.pt", "--output", "again.pt", "--input_size", "2"]
        for tool in (scatter, gather):
            done = subprocess.run([*command, *tool], cwd=tmp_path, capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stderr
        part = torch.load(tmp_path / "part-1.pt")
        assert torch.equal(part["mlp.experts.batched_fc1_w"], model["mlp"].experts.batched_fc1_w[2:])
        again = torch.load(tmp_path / "again.pt")
        assert list(again) == list(model.state_dict())
        for name, value in model.state_dict().items():
            assert torch.equal(again[name], value), name
        assert int(part["mlp._num_global_experts"]) == int(again["mlp._num_global_experts"]) == 4 - pruned


def test_the_layer_through_the_functions(registered: None) -> None:
    """A custom layer built from the registered functions equals the registered layer."""
    from tutel import moe

    torch.manual_seed(0)
    layer = moe.moe_layer(
        gate_type={"type": "top_any"},
        experts={"type": "ffn", "num_experts_per_device": E, "hidden_size_per_expert": H, "activation_fn": F.gelu},
        model_dim=D,
    )
    draw(layer.experts)
    x = torch.randn(30, D)
    gate, experts = layer.gates[0], layer.experts
    routing = moe.top_any_routing(x, gate.sim_matrix, gate.gates, gate.experts_mask)
    rows = moe.fast_encode(x, routing)
    h = F.gelu(rows @ experts.batched_fc1_w.transpose(1, 2) + experts.batched_fc1_bias.unsqueeze(1))
    rows = h @ experts.batched_fc2_w + experts.batched_fc2_bias.unsqueeze(1)
    assert relative_rms(moe.fast_decode(rows, routing), layer(x)) < FP32
    assert helpers.HAS_GPU or layer.layout == "packed"


def test_the_block_of_the_documents() -> None:
    from dynmoe_tutel import tutel_backend

    page = (Path(__file__).parents[2] / "docs" / "tutel.md").read_text()
    block = re.findall(r"```python tutel\n(.*?)```", page, re.DOTALL)[0]
    names: dict[str, Any] = {}
    try:
        exec(compile(textwrap.dedent(block), "docs/tutel.md", "exec"), names)
        assert names["layer"](torch.randn(3, 384)).shape == (3, 384)
        assert isinstance(names["layer"], tutel.impls.moe_layer.MOELayer)
    finally:
        tutel_backend.unregister()

"""Names, arguments and state of `MoE(k=-1)` are upstream's; `test_deepspeed_layer` runs these in one process."""

from __future__ import annotations

import inspect
import io
import logging
from typing import Any

import deepspeed.moe.layer as stock
import pytest
import torch
from deepspeed.moe.utils import is_moe_param
from helpers import FP32, relative_rms
from torch import Tensor, nn

from dynmoe_tutel import validation
from dynmoe_tutel.deepspeed import MoE

D, E = 8, 4
WG = "deepspeed_moe.gate.wg."


def moe(**options: Any) -> MoE:
    return MoE(D, **{"expert": nn.Linear(D, D), "num_experts": 2, "k": -1, "max_expert_num": E, **options})


def upstreams_state(residual: bool = False) -> dict[str, Tensor]:
    """A state dict as upstream's layer writes it."""
    state = {
        f"{WG}sim_matrix": torch.randn(D, E),
        f"{WG}gates": torch.randn(E),
        f"{WG}experts_mask": torch.tensor([1.0, 0.0, 1.0, 1.0]),
        f"{WG}temperature": torch.zeros(1),
    }
    for e in range(E):
        state[f"deepspeed_moe.experts.deepspeed_experts.{e}.weight"] = torch.randn(D, D)
        state[f"deepspeed_moe.experts.deepspeed_experts.{e}.bias"] = torch.randn(D)
    if residual:
        state |= {"mlp.weight": torch.randn(D, D), "mlp.bias": torch.randn(D)}
        state |= {"coefficient.weight": torch.randn(2, D), "coefficient.bias": torch.randn(2)}
    return state


@pytest.mark.parametrize("residual", [False, True])
def test_upstreams_state_loads_strictly(residual: bool) -> None:
    state, layer = upstreams_state(residual), moe(use_residual=residual)
    layer.load_state_dict(dict(state), strict=True)
    assert layer.deepspeed_moe.num_global_experts == layer.deepspeed_moe._num_global_experts == 3
    saved = layer.state_dict()
    mask = f"{WG}experts_mask"
    assert {mask if name == f"{WG}active" else name for name in saved} == state.keys()
    assert all(torch.equal(saved[f"{WG}active" if name == mask else name], value) for name, value in state.items())
    again = moe(use_residual=residual)
    again.load_state_dict(saved, strict=True)
    x = torch.randn(5, D)
    assert relative_rms(again(x)[0], layer(x)[0]) < FP32


def test_the_mask_may_have_the_types_that_upstream_leaves() -> None:
    """In bf16 the first update of upstream makes its mask fp32."""
    state = {name: value.bfloat16() for name, value in upstreams_state().items()}
    state[f"{WG}experts_mask"] = state[f"{WG}experts_mask"].float()
    layer = moe().bfloat16()
    layer.load_state_dict(state, strict=True)
    assert layer.deepspeed_moe.gate.wg.active().tolist() == [True, False, True, True]


def test_a_checkpoint_without_an_active_expert_is_refused() -> None:
    state = {**upstreams_state(), f"{WG}experts_mask": torch.zeros(E)}
    with pytest.raises(ValueError, match="has no active expert"):
        moe().load_state_dict(state)


def test_what_is_missing_or_unknown_is_said() -> None:
    state = upstreams_state()
    del state[f"{WG}experts_mask"]
    with pytest.raises(RuntimeError, match=r"Missing key.*gate.wg.experts_mask"):
        moe().load_state_dict(state)
    with pytest.raises(RuntimeError, match=r"Unexpected key.*gate.wg.bias"):
        moe().load_state_dict({**upstreams_state(), f"{WG}bias": torch.zeros(1)})


def test_the_engine_takes_no_key_for_an_experts() -> None:
    """It takes any key with "expert" in it, and looks for a number behind `deepspeed_experts`."""
    outside = [name for name in moe(use_residual=True).state_dict() if "deepspeed_experts" not in name]
    assert outside
    assert not [name for name in outside if "expert" in name]


def test_parameters() -> None:
    """Names in upstream's order, by which scripts choose what to train and optimizers number their state."""
    layer = moe(use_residual=True)
    experts = [f"deepspeed_moe.experts.deepspeed_experts.{e}.{name}" for e in range(E) for name in ("weight", "bias")]
    beside = ["mlp.weight", "mlp.bias", "coefficient.weight", "coefficient.bias"]
    gate = [f"{WG}{name}" for name in ("sim_matrix", "gates", "temperature")]
    assert [name for name, _ in layer.named_parameters()] == [*gate, *experts, *beside]
    assert [name for name, p in layer.named_parameters() if not p.requires_grad] == [f"{WG}temperature"]


@pytest.mark.parametrize("change", ["none", "bf16", "load", "assign"])
def test_expert_parameters_are_marked(change: str) -> None:
    layer = moe(ep_size=2, use_residual=True)
    if change == "bf16":
        layer.bfloat16()
    if change in ("load", "assign"):
        layer.load_state_dict({n: v.clone() for n, v in layer.state_dict().items()}, assign=change == "assign")
    marked = {n: p.group_name for n, p in layer.named_parameters() if is_moe_param(p)}
    assert marked == {n: "ep_size_2" for n, _ in layer.named_parameters() if "deepspeed_experts" in n}


def test_what_the_engine_reads() -> None:
    layer = moe(ep_size=2)
    assert (layer.num_experts, layer.num_local_experts, layer.ep_size, layer.expert_group_name) == (
        4,
        2,
        2,
        "ep_size_2",
    )
    assert len(layer.deepspeed_moe.experts.deepspeed_experts) == 2
    with pytest.raises(ValueError, match=r"ep_size = 2 needs the other ranks.*deepspeed.initialize"):
        layer(torch.randn(3, D))


def test_a_state_of_all_slots_before_the_ranks_are_known_is_refused() -> None:
    with pytest.raises(ValueError, match=r"all 4 slots, and a MoE with ep_size = 2 .*after deepspeed.initialize"):
        moe(ep_size=2).load_state_dict(upstreams_state())
    moe(ep_size=2).load_state_dict(moe(ep_size=2).state_dict())  # what one rank saved


def test_start_weights_are_upstreams() -> None:
    """The routing vectors come from the global random state, experts are copies, the first slots are active."""
    expert = nn.Linear(D, D)
    torch.manual_seed(3)
    vectors = nn.init.orthogonal_(torch.empty(E, D)).T
    after = torch.randn(1)
    torch.manual_seed(3)
    layer = MoE(D, expert, num_experts=3, ep_size=2, k=-1, max_expert_num=E)
    assert torch.equal(torch.randn(1), after)
    assert torch.equal(layer.deepspeed_moe.gate.wg.sim_matrix, vectors)
    assert layer.deepspeed_moe.gate.wg.experts_mask.tolist() == [1, 1, 1, 0]
    assert all(torch.equal(e.weight, expert.weight) for e in layer.deepspeed_moe.experts.deepspeed_experts)


class Reader:
    """A forward hook as upstream's analysis has them."""

    def __call__(self, module: nn.Module, inputs: Any, output: Any) -> None:
        self.records, self.tokens = module.routing_records.detach().cpu(), module.total_tokens


def test_hooks_of_the_analysis() -> None:
    """They are found by name, and read the window with the forward in which they run."""
    layer = moe()
    found = {n: m for n, m in layer.named_modules() if "gate" in n and "wg" not in n and not isinstance(m, nn.Linear)}
    assert list(found) == ["deepspeed_moe.gate"]
    (vectors,) = (m for n, m in layer.named_modules() if "gate" in n and "wg" in n)
    assert vectors.sim_matrix.shape == (D, E)
    assert vectors.gates.shape == (E,)
    reader = Reader()
    found["deepspeed_moe.gate"].register_forward_hook(reader)
    layer(torch.randn(7, D))
    assert reader.tokens == 0
    layer.begin_record_routing()
    total = torch.zeros(E, dtype=torch.int64)
    for n in range(1, 4):
        total += layer(torch.randn(7, D))[2]
        assert reader.records.tolist() == total.tolist()
        assert reader.tokens == 7 * n
    layer.eval()(torch.randn(7, D))
    layer.train().end_record_routing()
    layer(torch.randn(7, D))
    gate = layer.deepspeed_moe.gate
    assert gate.routing_records.tolist() == total.tolist()
    assert gate.routing_records.dtype == torch.float32
    assert gate.total_tokens == 21


@pytest.mark.parametrize("how", ["test_time_record", "begin_record_routing"])
def test_an_analysis_in_eval(how: str) -> None:
    """Either way of upstream's counts forwards in eval, up to the one that runs."""
    layer = moe().eval()
    layer(torch.randn(3, D))
    if how == "test_time_record":
        layer.test_time_record = True
    else:
        layer.begin_record_routing()
    counts = sum(layer(torch.randn(5, D))[2] for _ in range(3))
    assert layer.deepspeed_moe.gate.routing_records.tolist() == counts.tolist()
    assert layer.deepspeed_moe.gate.total_tokens == 15
    layer.train().begin_record_routing()
    layer.eval()(torch.randn(5, D))
    assert layer.deepspeed_moe.gate.total_tokens == 0


def test_flags_of_the_forward() -> None:
    """The window begins before a forward and ends after one; without an engine the next training forward updates."""
    torch.manual_seed(0)
    layer = moe()
    with torch.no_grad():
        layer.deepspeed_moe.gate.wg.gates.fill_(2)  # all tokens are unrouted
    layer(torch.randn(9, D), if_begin_record_routing=True, if_end_record_routing=True)
    assert layer.update_due
    assert layer.deepspeed_moe.record_routing
    assert layer.deepspeed_moe.num_global_experts == 2
    layer.eval()(torch.randn(9, D))
    assert layer.update_due
    layer.train()(torch.randn(9, D))
    assert not layer.update_due
    assert not layer.deepspeed_moe.record_routing
    # of two experts without a token the last stays, and one grows from the unrouted tokens
    assert layer.deepspeed_moe.gate.wg.active().sum() == 2
    with pytest.raises(ValueError, match="no record window is open"):
        layer(torch.randn(9, D), if_end_record_routing=True)


def test_growth_takes_the_first_free_slot() -> None:
    """As upstream's, whatever ep_size is: results do not depend on it."""
    torch.manual_seed(0)
    layer = MoE(D, nn.Linear(D, D), num_experts=3, k=-1, max_expert_num=6)
    vectors = layer.deepspeed_moe.gate.wg
    with torch.no_grad():
        vectors.deactivate(1)
    layer.begin_record_routing()
    layer(-3 * vectors.sim_matrix.detach()[:, :3].sum(dim=1).expand(4, D) + 0.01 * torch.randn(4, D))
    layer(vectors.sim_matrix.detach()[:, [0, 2]].T.contiguous())
    changes = layer.adaptive_update_experts()
    assert [(change.slot, change.action) for change in changes] == [(1, "grown")]


def test_the_fifteenth_positional_argument() -> None:
    """Upstream's scripts give the slots there; DeepSpeed's own argument of that place is a truth value."""
    first = (D, nn.Linear(D, D), 2, 1, -1, 1.0, 1.0, 4, False, None, True, True, False, False)
    assert MoE(*first, 6).num_experts == 6
    assert MoE(*first, True).num_experts == 4
    assert MoE(*first, True, 6).num_experts == 6
    with pytest.raises(ValueError, match="given twice"):
        MoE(*first, 6, 6)
    own, theirs = (list(inspect.signature(cls).parameters) for cls in (MoE, stock.MoE))
    assert own == [*theirs, "max_expert_num"]


def test_slots_by_default() -> None:
    assert MoE(D, nn.Linear(D, D), num_experts=2, k=-1).num_experts == 4
    assert MoE(D, nn.Linear(D, D), num_experts=7, k=-1).num_experts == 7


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_expert_num": 1}, "max_expert_num = 1 is less than num_experts = 2"),
        ({"ep_size": 3}, "max_expert_num = 4 cannot be divided over ep_size = 3"),
        ({"num_experts": 0}, "num_experts = 0"),
        ({"ep_size": 0}, "ep_size = 0"),
        ({"max_expert_num": 2.5}, "max_expert_num = 2.5"),
        ({"expert": nn.Linear}, "expert must be a torch.nn.Module"),
        ({"noisy_gate_policy": "Gumbel"}, "noisy_gate_policy = 'Gumbel': allowed are"),
    ],
)
def test_bad_arguments(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        moe(**options)


def test_a_used_token_for_other_tokens_is_refused() -> None:
    with pytest.raises(ValueError, match=r"used_token must have an entry for each token, \[2, 3\] or \[6\]"):
        moe()(torch.randn(2, 3, D), torch.ones(5))


def test_what_does_not_apply_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    validation._warned.clear()
    with caplog.at_level(logging.WARNING, logger="dynmoe_tutel"):
        moe()
        assert not caplog.records
        for _ in range(2):
            moe(capacity_factor=1.5, noisy_gate_policy="RSample", use_tutel=True)
            MoE(D, nn.Linear(D, D), num_experts=2, k=1, max_expert_num=4)
    said = sorted(record.getMessage() for record in caplog.records)
    parts = ("capacity_factor", "max_expert_num = 4 is ignored with k = 1", "RSample", "use_tutel")
    assert len(said) == len(parts)
    assert all(part in message for part, message in zip(parts, said, strict=True))


def test_an_expert_of_another_width_is_refused() -> None:
    layer = MoE(D, nn.Linear(D, D + 1), num_experts=2, k=-1)
    with pytest.raises(ValueError, match=r"expert 0 returned .* \[1, 1, \d+, 9\].* for \[1, 1, \d+, 8\]"):
        layer(torch.randn(3, D))


def test_fixed_k_has_no_windows() -> None:
    layer = MoE(D, nn.Linear(D, D), num_experts=2, k=1)
    for method in (layer.begin_record_routing, layer.end_record_routing, layer.adaptive_update_experts):
        with pytest.raises(ValueError, match="this MoE has DeepSpeed's fixed k"):
            method()


def test_a_layer_can_be_saved_whole() -> None:
    layer = moe()
    x = torch.randn(5, D)
    layer(x)
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    assert relative_rms(torch.load(file, weights_only=False)(x)[0], layer(x)[0]) < FP32


def test_nothing_is_printed(capfd: pytest.CaptureFixture[str]) -> None:
    layer = moe()
    layer.begin_record_routing()
    layer(torch.randn(5, D))
    layer.adaptive_update_experts()
    assert not capfd.readouterr().out

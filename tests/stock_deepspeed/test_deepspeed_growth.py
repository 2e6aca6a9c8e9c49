"""A change of experts reaches the fp32 copy that DeepSpeed trains, and clears the moments of that slot alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from engine_jobs import BF16, COPIED, WITHOUT, batches, config_of, engine_of, launch, model_of, train
from torch import Tensor, nn

pytestmark = WITHOUT
LR = 0.01
# class of the optimizer: (stage, options of the config)
ENGINES: dict[str, tuple[int, dict[str, Any]]] = {
    "Adam": (0, {}),
    "FP16_UnfusedOptimizer": (0, BF16),
    "DeepSpeedZeroOptimizer 1": (1, {}),
    "DeepSpeedZeroOptimizer 2": (2, BF16),
    "BF16_Optimizer": (1, COPIED),
    "DeepSpeedZeroOptimizer_Stage3": (3, BF16),
}
BY_HAND = ("FP16_Optimizer fp16", "FP16_Optimizer bf16", "FP16_UnfusedOptimizer fp16")


def held(optimizer: Any, parameter: nn.Parameter) -> tuple[Tensor, Tensor]:
    """The copy that is trained and its first moment, whole and fp32, as DeepSpeed itself says where it can."""
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    if hasattr(parameter, "_hp_mapping") or hasattr(parameter, "ds_id"):
        copy = safe_get_full_fp32_param(parameter)
        return copy.clone(), safe_get_full_optimizer_state(parameter, "exp_avg").clone()
    if hasattr(optimizer, "fp32_groups_flat"):
        (group,), (flat,) = optimizer.fp16_groups, optimizer.fp32_groups_flat
        start = sum(p.numel() for p in group[: [id(p) for p in group].index(id(parameter))])
        both = (flat, optimizer.optimizer.state[flat]["exp_avg"])
        return tuple(t.detach()[start : start + parameter.numel()].view_as(parameter).clone() for t in both)  # type: ignore[return-value]
    copy, state = parameter, getattr(optimizer, "optimizer", optimizer).state
    for group, copies in zip(getattr(optimizer, "fp16_groups", ()), getattr(optimizer, "fp32_groups", ()), strict=True):
        copy = next((c for p, c in zip(group, copies, strict=True) if p is parameter), copy)
    return copy.detach().clone(), state[copy]["exp_avg"].clone()


def changed(engine: Any, optimizer: Any, layer: Any, data: Any, step: Any) -> dict[str, Any]:
    """Train until an expert has grown in slot 2, and one step on."""
    import deepspeed

    gate, experts = layer.held_gates[0], layer.experts
    step(data[0])
    step(data[1])
    with deepspeed.zero.GatheredParameters([gate.sim_matrix]):
        w_D = gate.sim_matrix[:, 2].detach().float().clone()
    copy, moment = held(optimizer, gate.sim_matrix)
    fc1, fc1_moment = held(optimizer, experts.batched_fc1_w)
    step(data[2])
    after, _ = held(optimizer, gate.sim_matrix)
    return {
        "optimizer": type(optimizer).__name__,
        "active": gate.active().tolist(),
        "written": float((copy[:, 2] - w_D).abs().max()),
        "size": float(w_D.norm()),
        "moved": float((after[:, 2] - copy[:, 2]).abs().max()),
        "moment": float(moment[:, 2].abs().max()),
        "other moments": float(moment[:, :2].abs().amax(dim=0).min()),
        "expert": min(float((fc1[2] - fc1[slot]).abs().max()) for slot in (0, 1)),
        "expert's moment": float(fc1_moment[2].abs().max()),
        "other experts' moments": float(fc1_moment[:2].abs().amax(dim=(1, 2)).min()),
    }


def by_engine(rank: int) -> dict[str, Any]:
    found = {}
    for name, (stage, options) in ENGINES.items():
        engine = engine_of(model_of(), config_of(stage, {"schedule": 2}, **options), lr=LR)
        found[name] = changed(
            engine, engine.optimizer, engine.module.layer, batches(rank, 3), lambda b, e=engine: train(e, [b])
        )
        if name == "DeepSpeedZeroOptimizer 1":  # the pieces of two ranks meet inside a parameter
            pieces = [p._hp_mapping.lp_fragment_address for p in engine.module.parameters() if p._hp_mapping]
            found["split"] = any(piece.start > 0 for piece in pieces)
    return found


def by_hand(rank: int) -> dict[str, Any]:
    """Classes that DeepSpeed's engine uses on a GPU alone, each with its own dtype."""
    from deepspeed.runtime.fp16.fused_optimizer import FP16_Optimizer
    from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer

    from dynmoe_tutel import ExpertController
    from dynmoe_tutel.deepspeed.optimizer_states import optimizer_rows_of

    found = {}
    for name in BY_HAND:
        kind = FP16_Optimizer if name.startswith("FP16_Optimizer") else FP16_UnfusedOptimizer
        dtype = torch.float16 if name.endswith("fp16") else torch.bfloat16
        model = model_of().to(dtype)
        adam = torch.optim.Adam(model.parameters(), lr=LR)
        optimizer = kind(adam, low_precision_dtype=dtype, static_loss_scale=8.0 if dtype == torch.float16 else 1.0)
        controller = ExpertController(model, optimizer_rows_of(optimizer), schedule=2)

        def step(batch: Any, model=model, optimizer=optimizer, controller=controller, dtype=dtype) -> None:  # type: ignore[no-untyped-def]
            optimizer.backward(model(batch[0].to(dtype), batch[1]))
            optimizer.step()
            controller.step()

        found[name] = changed(None, optimizer, model.layer, batches(0, 3), step)
    return found


def both(rank: int) -> dict[str, Any]:
    return {**by_engine(rank), **by_hand(rank)}


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return launch(both, tmp_path_factory.mktemp("growth"))


@pytest.mark.parametrize("name", [*ENGINES, *BY_HAND])
def test_a_grown_expert_is_trained_from_where_it_started(results: list[dict[str, Any]], name: str) -> None:
    for found in (result[name] for result in results):
        assert found["optimizer"] == name.split()[0]
        assert found["active"][:3] == [True, True, True]
        assert found["size"] == pytest.approx(1, abs=0.01), "w is R_S / ||R_S||"
        assert found["written"] == 0
        assert 0 < found["moved"] < 1.2 * LR, "Adam's first step is at most the learning rate"
        assert found["moment"] == 0 < found["other moments"]
        assert found["expert"] < 0.01, "a copy of the nearest expert"
        assert found["expert's moment"] == 0 < found["other experts' moments"]


def test_pieces_of_a_parameter_lie_on_both_ranks(results: list[dict[str, Any]]) -> None:
    assert any(result["split"] for result in results)

"""What `initialize` does before DeepSpeed: refuse by name what the layers cannot be trained by, and mark and sort the
parameters as DeepSpeed wants them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from deepspeed.moe.layer import MoE
from deepspeed.moe.utils import is_moe_param, split_params_into_different_moe_groups_for_optimizer
from deepspeed.runtime.pipe.module import PipelineModule
from deepspeed.runtime.tensor_parallel.init_utils import load_ds_config
from deepspeed.utils import set_z3_leaf_modules
from torch import nn

from ..layer import MoELayer

HOW = "deepspeed.moe.utils.split_params_into_different_moe_groups_for_optimizer"


def prepared(given: dict[str, Any]) -> dict[str, Any]:
    """The arguments of `deepspeed.initialize` to call it with, in the place of `given`."""
    model, config = given["model"], _config(given)
    _refuse_parallelism(model, config, given["mpu"])
    if _zero_stage(config) == 3:
        _refuse_sharded_moe(model)
        set_z3_leaf_modules(model, [MoELayer])
    if not any(is_moe_param(parameter) for parameter in model.parameters()):
        return given
    return {
        **given,
        "optimizer": _with_moe_groups(given["optimizer"], given["lr_scheduler"]),
        "model_parameters": _named_groups(given["model_parameters"]),
    }


def _config(given: dict[str, Any]) -> dict[str, Any]:
    """DeepSpeed's config, from where DeepSpeed looks for it; {} if it has none, which DeepSpeed then says."""
    found = given["config"]
    if found is None:
        found = given["config_params"]
    if found is None:
        found = getattr(given["args"], "deepspeed_config", None)
    if found is None:
        return {}
    loaded: dict[str, Any] = found if isinstance(found, dict) else load_ds_config(found)
    return loaded


def _zero_stage(config: dict[str, Any]) -> int:
    zero = config.get("zero_optimization", {})
    return int(zero.get("stage", 0)) if isinstance(zero, dict) else int(bool(zero))


def _refuse_parallelism(model: nn.Module, config: dict[str, Any], mpu: Any) -> None:
    """ValueError if layers or pipeline stages are split over ranks."""
    name = next(name for name, module in model.named_modules() if isinstance(module, MoELayer)) or "the layer"
    if isinstance(model, PipelineModule):
        raise ValueError(
            f"model: {name} is part of a PipelineModule, and experts do not adapt across pipeline stages: give a plain "
            "module"
        )
    ranks = max(int((config.get("tensor_parallel") or {}).get("autotp_size") or 0), _model_parallel_ranks(mpu))
    if ranks > 1:
        raise ValueError(
            f"model: {name} cannot be split by tensor parallelism over {ranks} ranks: give no mpu and no "
            "tensor_parallel.autotp_size above 1, or use expert parallelism (ep_size)"
        )


def _model_parallel_ranks(mpu: Any) -> int:
    for name in ("get_model_parallel_world_size", "get_tensor_model_parallel_world_size"):
        if hasattr(mpu, name):
            return int(getattr(mpu, name)())
    return 1


def _refuse_sharded_moe(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if isinstance(module, MoE):
            raise ValueError(
                f"model: {name or 'the model'} is a deepspeed.moe.layer.MoE, which ZeRO stage 3 does not train: choose "
                "stage 0, 1 or 2, or use dynmoe_tutel.MoELayer, which it trains"
            )


def _with_moe_groups(optimizer: Any, lr_scheduler: Any) -> Any:
    """The optimizer with groups for the experts; ValueError if the schedule of its rates would not see them."""
    if not isinstance(optimizer, torch.optim.Optimizer):
        return _splitting(optimizer) if callable(optimizer) else optimizer
    if _has_moe_groups(optimizer.param_groups):
        return optimizer
    if lr_scheduler is not None and not callable(lr_scheduler):
        raise ValueError(
            "optimizer has no parameter groups for the experts, and lr_scheduler was made for the groups that it has: "
            "give lr_scheduler as a function of the optimizer, or split the groups before you make both, by "
            f"{HOW}(groups), whose groups need a 'name'"
        )
    _split(optimizer)
    return optimizer


def _splitting(make: Callable[[Any], Any]) -> Callable[[Any], Any]:
    def made(parameters: Any) -> Any:
        optimizer = make(parameters)
        if not _has_moe_groups(optimizer.param_groups):
            _split(optimizer)
        return optimizer

    return made


def _has_moe_groups(groups: Any) -> bool:
    return any(group.get("moe", False) for group in groups)


def _split(optimizer: torch.optim.Optimizer) -> None:
    """Give each group's experts a group of their own, with the same options."""
    split = split_params_into_different_moe_groups_for_optimizer(_named_groups(optimizer.param_groups))
    optimizer.param_groups[:] = [group for group in split if group["params"]]


def _named_groups(parameters: Any) -> Any:
    """Parameter groups that all have a name, by which DeepSpeed tells them apart; parameters as they are."""
    if parameters is None:
        return None
    listed = list(parameters)
    if not listed or not all(isinstance(group, dict) for group in listed):
        return listed
    return [{"name": f"group {number}", **copy.copy(group)} for number, group in enumerate(listed)]

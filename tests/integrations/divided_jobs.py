"""Hosts that train a model with divided experts, in a rank of a real process group; `test_divided_experts` starts them.

Every optimizer step sees all items, divided over ranks and micro-batches: one process with torch's clip is the measure.
"""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from helpers import GROUP_PATIENCE, relative_rms
from tiny import D, Items
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

from dynmoe_tutel import MoELayer, parallel
from dynmoe_tutel.checkpoint import distributed

WEIGHT, LR, STEPS, MAX_NORM, ITEMS = 0.3, 0.05, 6, 0.25, 16


class Net(nn.Module):
    """Maps x [B, TOKENS, D] and labels [B] to loss and logits; experts divided over `group`."""

    def __init__(self, group: Any = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.head = nn.Linear(D, D), nn.Linear(D, 2)
        ranks = 1 if group is None else dist.get_world_size(group)
        experts = {"num_experts_per_device": 4 // ranks, "hidden_size_per_expert": 12, "activation_fn": F.gelu}
        self.moe = MoELayer({"type": "top_any", "max_expert_num": 4}, D, experts, group=group, seeds=(0, 1))
        with torch.no_grad():
            self.head.weight.mul_(10)

    def forward(self, x: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        x = self.first(x)
        logits = self.head((x + self.moe(x)).mean(dim=1))
        return {"logits": logits} if labels is None else {"loss": F.cross_entropy(logits, labels), "logits": logits}


def one_process(max_norm: float) -> tuple[Net, list[float]]:
    """The trained model, and the norms before clipping."""
    net, items = Net(), Items(ITEMS)
    optimizer, norms = torch.optim.SGD(net.parameters(), LR), []
    for _ in range(STEPS):
        optimizer.zero_grad()
        (net(items.x, items.labels)["loss"] + WEIGHT * net.moe.l_aux).backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(net.parameters(), max_norm)))
        optimizer.step()
    assert max(norms) > MAX_NORM
    return net, norms


def assert_trained(net: Net, norms: list[float], max_norm: float) -> None:
    expected, norms_of_one = one_process(max_norm)
    assert norms == pytest.approx(norms_of_one, rel=1e-4)
    for (name, p), q in zip(net.named_parameters(), expected.parameters(), strict=True):
        full = q.chunk(net.moe.world_size)[net.moe.rank] if ".experts." in name else q
        assert relative_rms(p, full) < 1e-4, name
    assert_replicas(net)


def assert_replicas(net: nn.Module) -> None:
    experts = {id(p) for _, p in parallel.expert_parameters(net)}
    assert experts
    for name, p in net.named_parameters():
        parts = [torch.empty_like(p) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, p.detach())
        assert all(torch.equal(parts[0], part) for part in parts) == (id(p) not in experts), name


def start(rank: int, ranks: int, folder: str) -> None:
    """As torchrun starts a process, on a file store."""
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks), LOCAL_WORLD_SIZE=str(ranks))
    os.environ.update(GROUP_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT="29500", TORCHELASTIC_RUN_ID="job")
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=ranks, timeout=GROUP_PATIENCE)


def overflow_once(net: Net, step: int) -> None:
    """In step 1, an inf in the gradient of an expert of rank 1."""
    if step == 1 and dist.get_rank() == 1:
        net.moe.experts.batched_fc1_w.grad.view(-1)[0] = math.inf


# transformers


def run_transformers(rank: int, ranks: int, folder: str) -> None:
    start(rank, ranks, folder)
    for options in ({}, {"gradient_accumulation_steps": 2}, {"max_grad_norm": 0.0}):
        trainer_norms(Path(folder), **options)
    trainer_overflow(Path(folder))
    trainer_refusals(Path(folder))
    dist.barrier()


def run_transformers_with_copies(rank: int, ranks: int, folder: str) -> None:
    start(rank, ranks, folder)
    mesh = init_device_mesh("cpu", (ranks // 2, 2), mesh_dim_names=("data", "experts"))
    trainer_norms(Path(folder), mesh["experts"].get_group(), mesh["data"].get_group())
    refused, _ = divided_trainer(Path(folder), Net(mesh["experts"].get_group()))
    with pytest.raises(ValueError, match="expert_data_group is None, and divided experts have copies on 2 ranks"):
        refused.train()
    dist.barrier()


def divided_trainer(
    folder: Path, net: nn.Module, *callbacks: Any, copies: Any = None, **options: Any
) -> tuple[Any, Any]:
    from hf_trainers import trainer_of, with_callback

    batch = ITEMS // dist.get_world_size() // options.get("gradient_accumulation_steps", 1)
    given = {
        "max_steps": STEPS,
        "per_device_train_batch_size": batch,
        "learning_rate": LR,
        "optim": "sgd",
        "max_grad_norm": MAX_NORM,
        "logging_strategy": "steps",
        "logging_steps": 1,
        "ddp_backend": "gloo",
        **options,
    }
    trainer = trainer_of(net, folder, Items(ITEMS), callbacks=list(callbacks), **given)
    return trainer, with_callback(trainer, schedule={"every": 100}, expert_data_group=copies)


def trainer_norms(folder: Path, group: Any = None, copies: Any = None, **options: Any) -> None:
    net = Net(group or dist.group.WORLD)
    trainer, callback = divided_trainer(folder, net, copies=copies, **options)
    trainer.train()
    assert isinstance(trainer.model_wrapped, nn.parallel.DistributedDataParallel)
    norms = [log["grad_norm"] for log in trainer.state.log_history if "grad_norm" in log]
    assert_trained(net, norms, math.inf if options.get("max_grad_norm") == 0 else MAX_NORM)
    assert "clip_grad_norm_" not in vars(trainer.accelerator)
    assert "save_model" not in vars(trainer)
    saved = folder / "-".join(["saved", *options])
    distributed.save(saved, net, trainer.optimizer, callback.controller)
    distributed.load(saved, net, trainer.optimizer, callback.controller)


def trainer_overflow(folder: Path) -> None:
    from hf_trainers import transformers

    class Overflow(transformers.TrainerCallback):
        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            overflow_once(net, state.global_step)

    net, scaler = Net(dist.group.WORLD), torch.amp.GradScaler("cpu", init_scale=1024.0)
    trainer, _ = divided_trainer(folder, net, Overflow(), max_grad_norm=0.0)
    trainer.accelerator.scaler = scaler
    trainer.train()
    assert scaler.get_scale() == 512
    assert "_unscale_grads_" not in vars(scaler)
    assert_replicas(net)


def trainer_refusals(folder: Path) -> None:
    from hf_trainers import transformers

    class Save(transformers.TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            control.should_save = True

    saving, _ = divided_trainer(folder / "saving", Net(dist.group.WORLD), save_strategy="steps")
    with pytest.raises(ValueError, match=r"save_strategy = 'steps' would write .*distributed\.save"):
        saving.train()
    asked, callback = divided_trainer(folder / "asked", Net(dist.group.WORLD), Save())
    with pytest.raises(ValueError, match=r"Trainer\.save_model would write the experts of rank 0 alone"):
        asked.train()
    callback.close()
    assert not list((folder / "asked").glob("**/*.safetensors"))
    assert "clip_grad_norm_" not in vars(asked.accelerator)
    late, _ = divided_trainer(folder, Net(dist.group.WORLD))
    late.model._ddp_params_and_buffers_to_ignore = []
    with pytest.raises(ValueError, match=r"DistributedDataParallel averages moe\.experts\.batched_fc1_w"):
        late.train()


# Lightning


def run_lightning(rank: int, ranks: int, folder: str) -> None:
    start(rank, ranks, folder)
    for manual, accumulation in ((False, 1), (False, 2), (True, 1)):
        lightning_norms(Path(folder), manual, accumulation)
    lightning_overflow(Path(folder))
    lightning_refusals(Path(folder))
    dist.barrier()


def lightning_module(manual: bool = False, overflows: bool = False) -> Any:
    from test_lightning import lightning

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = not manual
            self.norms: list[float] = []
            self.net: Any = None

        def configure_model(self) -> None:
            if self.net is None:
                self.net = Net(dist.group.WORLD)

        def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor | None:
            loss = self.net(**batch)["loss"]
            if not manual:
                return loss
            self.optimizers().zero_grad()
            self.manual_backward(loss)
            self.clip_gradients(self.optimizers(), gradient_clip_val=MAX_NORM, gradient_clip_algorithm="norm")
            self.optimizers().step()
            return None

        def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
            self.net(**batch)

        def on_before_optimizer_step(self, optimizer: Any) -> None:
            self.norms.append(float(parallel.grad_norm(self)))

        def on_after_backward(self) -> None:
            if overflows:
                overflow_once(self.net, self.trainer.global_step)

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), LR)

    return Module()


def divided_fit(folder: Path, module: Any, accumulation: int = 1, **options: Any) -> Any:
    from lightning.pytorch.strategies import DDPStrategy
    from test_lightning import trainer_of
    from torch.utils.data import DataLoader

    from dynmoe_tutel.integrations.lightning import DynMoECallback

    ranks = dist.get_world_size()
    loader = DataLoader(Items(ITEMS), batch_size=ITEMS // ranks // accumulation)
    given = {
        "max_epochs": STEPS,
        "devices": ranks,
        "strategy": DDPStrategy(process_group_backend="gloo"),
        "accumulate_grad_batches": accumulation,
        "gradient_clip_val": MAX_NORM if module.automatic_optimization else None,
        **options,
    }
    trainer = trainer_of(folder, DynMoECallback({"every": 100}, WEIGHT), **given)
    trainer.fit(module, loader)
    return trainer


def lightning_norms(folder: Path, manual: bool, accumulation: int) -> None:
    module = lightning_module(manual)
    trainer = divided_fit(folder, module, accumulation)
    if manual:  # read after it has clipped
        assert max(module.norms) <= MAX_NORM * 1.001
        module.norms = one_process(MAX_NORM)[1]
    assert_trained(module.net, module.norms, MAX_NORM)
    assert not {"clip_grad_by_norm", "clip_grad_by_value"} & set(vars(trainer.precision_plugin))
    assert not {"save_checkpoint"} & set(vars(trainer))
    from torch.utils.data import DataLoader

    trainer.validate(module, DataLoader(Items(ITEMS), batch_size=4), verbose=False)
    assert_replicas(module.net)  # and experts are still a rank's own


def lightning_overflow(folder: Path) -> None:
    from test_lightning import lightning

    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    plugin = lightning.plugins.MixedPrecision("16-mixed", "cpu", scaler)
    plugin.autocast_context_manager = lambda: torch.autocast("cpu", enabled=False)  # type: ignore[method-assign]
    module = lightning_module(overflows=True)
    divided_fit(folder, module, plugins=[plugin])
    assert scaler.get_scale() == 512
    assert "_unscale_grads_" not in vars(scaler)
    assert_replicas(module.net)


def lightning_refusals(folder: Path) -> None:
    with pytest.raises(ValueError, match="enable_checkpointing = True: Lightning would write"):
        divided_fit(folder, lightning_module(), enable_checkpointing=True)

    module = lightning_module()
    module.on_train_epoch_end = lambda: module.trainer.save_checkpoint(folder / "some.ckpt")
    with pytest.raises(ValueError, match=r"Trainer\.save_checkpoint would write the experts of rank 0 alone"):
        divided_fit(folder, module)
    assert "save_checkpoint" not in vars(module.trainer)
    assert not (folder / "some.ckpt").exists()

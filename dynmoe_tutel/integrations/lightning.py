"""`DynMoECallback` for `lightning.pytorch.Trainer`.

A callback cannot replace the loss that `training_step` returns, so the layers add the gradient of the auxiliary loss
(`auxiliary_gradient`), with Lightning's factor on the loss. The logged loss stays the task's.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from dynmoe_tutel.integrations import require
from dynmoe_tutel.integrations.divided_experts import WRITES_ONE_RANK, has_divided_experts, replaced
from dynmoe_tutel.integrations.training import MoECallback, MoETraining, refuse_without_layers
from dynmoe_tutel.parallel import ignore_experts_in_ddp

if TYPE_CHECKING:
    from lightning.pytorch import Callback, LightningModule, Trainer
else:
    Callback = require("lightning.pytorch", "lightning").Callback

logger = logging.getLogger(__name__)

# they shard parameters, so that no row belongs to one expert
_UNSERVED_STRATEGIES = ("FSDPStrategy", "DeepSpeedStrategy", "ModelParallelStrategy")


class DynMoECallback(MoECallback, Callback):
    """Trains the MoE layers of a LightningModule: `Trainer(callbacks=[DynMoECallback(schedule=300)])`.

    * An `ExpertController` with `schedule` and the further `options` (`policy`, `init`, `patience`, ...) counts every
      step of an optimizer that owns a parameter of an adaptive layer, also one that Lightning does not see because it
      is of the raw optimizer; not one that a GradScaler skips. It does so at the end of each training batch, where of
      several optimizers the one with most steps counts. `controller` and `events` exist once `fit` has begun. A model
      without an adaptive gate trains without a controller; what its routers hold moves.
    * `aux_weight` times the sum of the layers' l_aux is minimised beside the loss. Like the loss, it is divided by
      `accumulate_grad_batches`, but not under manual optimization. Do not add it in `training_step` as well.
    * When Lightning logs, the callback logs `moe/<layer>/...`: the numbers of `MoETraining.scalars`.
    * Lightning's checkpoints hold the state under the callback's name: `fit(ckpt_path=...)` resumes bitwise, even in
      the middle of a record window. A second `fit` of the same trainer continues with the same controller state
      (Lightning then makes new optimizers).
    * Experts that ranks divide are kept out of DistributedDataParallel; their gradients are averaged once before each
      optimizer step, with copies over `expert_data_group` (`parallel.average_gradients`). `gradient_clip_val`,
      `clip_gradients` and a GradScaler's skipped steps are of all ranks. Lightning must not save then
      (`enable_checkpointing=False`): its files would hold rank 0's experts alone.

    Only training forwards are recorded, not those of validation, test, prediction or the sanity check. `fit` raises
    ValueError for a model without MoE layers and for FSDP, DeepSpeed and ModelParallel strategies; Lightning itself
    refuses a second DynMoECallback.
    """

    def __init__(
        self, schedule: Any = None, aux_weight: float = 0.01, expert_data_group: Any = None, **options: Any
    ) -> None:
        super().__init__(aux_weight, {"schedule": schedule, **options}, expert_data_group)
        self._state_to_load: dict[str, Any] | None = None
        self._steps = 0  # trainer.global_step at the last look
        self._goes_on = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Keep divided experts out of what the strategy makes equal on all ranks, in evaluation too.

        The model may be made after this call, by `configure_model`, but before the strategy's set-up.
        """
        set_up = trainer.strategy.setup

        def set_up_after(*arguments: Any, **options: Any) -> None:
            put_back()
            if has_divided_experts(pl_module):
                ignore_experts_in_ddp(pl_module)
            set_up(*arguments, **options)

        put_back = replaced(trainer.strategy, "setup", set_up_after)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        _refuse_unserved(trainer)
        refuse_without_layers(pl_module)
        state = self._state_to_load
        if state is None and self._training is not None and trainer.global_step > 0:
            state = self._training.state_dict()  # a second fit of the same trainer
        self.close()
        self._take_over_gradients(trainer, pl_module)
        self._training = MoETraining(pl_module, trainer.optimizers, self._aux_weight, self._options)
        self._goes_on = state is not None
        if state is not None:
            self._training.load_state_dict(state)
            self._state_to_load = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._steps = trainer.global_step
        if self._steps > 0 and not self._goes_on:
            logger.warning(
                "the checkpoint of step %d was written without DynMoECallback: the adaptive process starts anew",
                self._steps,
            )

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        assert self._training is not None
        batches = trainer.accumulate_grad_batches if pl_module.automatic_optimization else 1
        self._training.set_factor(1 / batches, getattr(trainer.precision_plugin, "scaler", None))

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        if self._gradients is not None:
            parameters = list(trainer.precision_plugin.main_params(optimizer))
            self._gradients.average_once(parameters)
            self._gradients.step_follows(parameters)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        assert self._training is not None
        known = trainer.global_step != self._steps  # to Lightning, which does not see steps of a raw optimizer
        self._steps = trainer.global_step
        if not self._training.step(int(known)) and not known:
            return  # more batches to accumulate
        if trainer._logger_connector.should_update_logs:  # the test of Lightning's own callbacks
            pl_module.log_dict(self._training.scalars())

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert self._training is not None
        self._training.warn_without_steps()

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.close()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self.close()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self.close()
        self._state_to_load = None  # left over if a checkpoint was only evaluated

    def _take_over_gradients(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Where experts are divided, stand in for what Lightning does with gradients and checkpoints."""
        precision, wrapped = trainer.precision_plugin, trainer.strategy.model
        assert wrapped is not None
        gradients = self._gradients_of(pl_module, wrapped)
        if gradients is None:
            return
        if trainer.checkpoint_callbacks:
            raise ValueError(f"enable_checkpointing = True: Lightning {WRITES_ONE_RANK}")

        def clip_by_norm(optimizer: Any, clip_val: float) -> None:
            parameters = list(precision.main_params(optimizer))
            if not pl_module.automatic_optimization:  # it clips before it steps
                gradients.average_once(parameters)
            gradients.clip(parameters, clip_val)

        clip_each = precision.clip_grad_by_value

        def clip_by_value(optimizer: Any, clip_val: float) -> None:
            if not pl_module.automatic_optimization:
                gradients.average_once(precision.main_params(optimizer))
            clip_each(optimizer, clip_val)

        self._gradients = gradients
        gradients.stand_in(precision, "clip_grad_by_norm", clip_by_norm)
        gradients.stand_in(precision, "clip_grad_by_value", clip_by_value)
        gradients.refuse_saving(trainer, "save_checkpoint")
        if (scaler := getattr(precision, "scaler", None)) is not None:
            gradients.share_overflow(scaler)

    def state_dict(self) -> dict[str, Any]:
        return {} if self._training is None else self._training.state_dict()

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        self._state_to_load = dict(state_dict)


def _refuse_unserved(trainer: Trainer) -> None:
    """ValueError if the trainer uses a strategy under which the callback would do harm."""
    strategy = type(trainer.strategy).__name__
    if strategy in _UNSERVED_STRATEGIES:
        raise ValueError(f"trainer cannot be served by DynMoECallback: {strategy} splits the parameters of an expert")

"""`DynMoECallback` for `transformers.Trainer`.

The Trainer scales its loss by micro-batches, by `num_items_in_batch`, or by the user's function or subclass, each with
or without a GradScaler; and a callback cannot change a loss. So the layers add the gradient of the auxiliary loss
(`auxiliary_gradient`), divided by the step's number of micro-batches. `loss` in the log is the task's: it compares
with a dense model's and with `eval_loss`.
"""

from __future__ import annotations

import logging
import shutil
import uuid
from collections.abc import Callable
from functools import update_wrapper
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from dynmoe_tutel.checkpoint import is_checkpoint, read_checkpoint, write_checkpoint
from dynmoe_tutel.integrations import require
from dynmoe_tutel.integrations.divided_experts import WRITES_ONE_RANK, has_divided_experts
from dynmoe_tutel.integrations.training import MoECallback, MoETraining, refuse_without_layers
from dynmoe_tutel.parallel import ignore_experts_in_ddp

if TYPE_CHECKING:
    from torch import nn
    from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
    from transformers.trainer_utils import SaveStrategy
else:
    TrainerCallback = require("transformers", "hf").TrainerCallback
    require("accelerate", "hf")
    SaveStrategy = require("transformers.trainer_utils", "hf").SaveStrategy

logger = logging.getLogger(__name__)

FOLDER = "dynmoe"  # subfolder of every checkpoint-N
STATE_KEY = "dynmoe_tutel"  # in trainer_state.json, under stateful_callbacks


class DynMoECallback(MoECallback, TrainerCallback):
    """Trains the MoE layers of a Trainer's model: `trainer.add_callback(DynMoECallback(trainer, schedule=300))`.

    * An `ExpertController` with `schedule` and the further `options` (`policy`, `init`, `patience`, ...) counts every
      optimizer step, not one that a GradScaler skips; `controller` and `events` exist once training has begun. A model
      without an adaptive gate trains without a controller; what its routers hold moves.
    * `aux_weight` times the sum of the layers' l_aux is minimised beside the loss, as the mean over the micro-batches
      of a step and over the ranks; do not add it in the model as well. `loss` in the log does not include it.
    * When the Trainer logs, it also logs `moe/<layer>/...`: the numbers of `MoETraining.scalars`.
    * Every checkpoint-N gets a folder `dynmoe`, from which `trainer.train(resume_from_checkpoint=...)` resumes bitwise,
      even in the middle of a record window. A moved checkpoint is looked up in `output_dir` and in
      `TrainingArguments(resume_from_checkpoint=...)`.
    * Experts that ranks divide are kept out of DistributedDataParallel; their gradients are averaged once a step, with
      copies over `expert_data_group` (`parallel.average_gradients`). `max_grad_norm`, the logged `grad_norm` and a
      GradScaler's skipped steps are of all ranks. The Trainer must not save then (`save_strategy="no"`): its files
      would hold rank 0's experts alone.

    * Under DeepSpeed (ZeRO stage 0 to 2) its engine averages and clips gradients, and a change of experts is written
      through to its fp32 copies. Experts of a `MoE` that ranks divide need the optimizer in DeepSpeed's config; the
      Trainer's model file then holds rank 0's experts alone, and DeepSpeed's checkpoint beside it holds all.

    Only the Trainer's training forwards are recorded, and a `train()` that an exception or Ctrl-C ends leaves nothing
    on the model. Raises ValueError for a model without MoE layers, unknown options, a second DynMoECallback, another
    Trainer than `trainer`, and for unsupported training: FSDP and ZeRO 3 (they shard parameters), DataParallel, and
    `enable_jit_checkpoint` (it writes checkpoints without calling callbacks).
    """

    def __init__(
        self,
        trainer: Trainer,
        schedule: Any = None,
        aux_weight: float = 0.01,
        expert_data_group: Any = None,
        **options: Any,
    ) -> None:
        super().__init__(aux_weight, {"schedule": schedule, **options}, expert_data_group)
        if not hasattr(trainer, "callback_handler"):
            raise ValueError(f"trainer must be the transformers.Trainer itself, got {type(trainer).__name__}")
        refuse_without_layers(trainer.model)  # type: ignore[arg-type]
        self._trainer = trainer
        self._session = ""
        self._refuse_unserved()
        _Train.of(trainer, self)
        if not trainer.is_deepspeed_enabled and has_divided_experts(trainer.model):  # type: ignore[arg-type]
            ignore_experts_in_ddp(trainer.model)  # type: ignore[arg-type]

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.close()
        if state is not self._trainer.state:
            raise ValueError(
                "this DynMoECallback was made for another Trainer: make one for each, "
                "trainer.add_callback(DynMoECallback(trainer, ...))"
            )
        self._refuse_unserved()
        model, optimizer = kwargs["model"], kwargs["optimizer"]
        if self._trainer.is_deepspeed_enabled:
            optimizer = self._rows_of_engine(model)
        else:
            self._take_over_gradients(model)
        self._training = MoETraining(model, optimizer, self._aux_weight, self._options)
        if state.global_step > 0:
            self._resume(args, state, self._training)
        self._session = uuid.uuid4().hex
        # The Trainer does not say which folder it resumes from, but it restores this.
        _stateful(state)[STATE_KEY] = {"session": self._session, "folder": str(_output_dir(args).absolute())}

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        assert self._training is not None
        micro_batches = self._trainer.current_gradient_accumulation_steps  # fewer in an epoch's last step
        engine: Any = self._trainer.deepspeed
        scale = engine.optimizer.loss_scale if engine is not None and engine.fp16_enabled() else 1
        self._training.set_factor(scale / micro_batches, self._trainer.accelerator.scaler)

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._gradients is not None:
            self._gradients.average_once()  # where the Trainer has not asked for the norm
            self._gradients.step_follows()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        assert self._training is not None
        self._training.step(int(not self._trainer.accelerator.optimizer_step_was_skipped))
        self._log(control)

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._log(control)
        assert self._training is not None
        self._training.warn_without_steps()

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        assert self._training is not None
        training = self._training.state_dict()  # on every rank
        if not args.should_save:
            return
        if state.is_hyper_param_search:
            logger.warning("the controller is not saved in a hyper-parameter search: its checkpoints cannot be resumed")
            return
        folder = _checkpoint(_output_dir(args), state.global_step) / FOLDER
        shutil.rmtree(folder, ignore_errors=True)  # the Trainer too overwrites a repeated step's files
        write_checkpoint(folder, {"session": self._session, "step": state.global_step, "training": training})

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.close()

    def _rows_of_engine(self, model: nn.Module) -> Any:
        """The experts' rows in what DeepSpeed's engine trains."""
        from dynmoe_tutel.deepspeed.optimizer_states import optimizer_rows_of

        engine: Any = self._trainer.deepspeed
        if hasattr(engine, "controller"):
            raise ValueError(
                "trainer cannot be served by DynMoECallback: dynmoe_tutel.deepspeed is registered, whose engine has a "
                "controller of its own: call dynmoe_tutel.deepspeed.unregister() before train(), or leave out the "
                "callback"
            )
        if has_divided_experts(model) and SaveStrategy(self._trainer.args.save_strategy) is not SaveStrategy.NO:
            logger.warning(
                "ranks divide the experts: the Trainer's model files hold those of rank 0 alone; DeepSpeed's folder "
                "global_step* in each checkpoint holds all"
            )
        return optimizer_rows_of(engine.optimizer)

    def _take_over_gradients(self, model: nn.Module) -> None:
        """Where experts are divided, stand in for what the Trainer does with gradients and checkpoints."""
        trainer, accelerator = self._trainer, self._trainer.accelerator
        gradients = self._gradients_of(model, trainer.model_wrapped)
        if gradients is None:
            return
        if SaveStrategy(trainer.args.save_strategy) is not SaveStrategy.NO:
            raise ValueError(f"save_strategy = '{SaveStrategy(trainer.args.save_strategy).value}' {WRITES_ONE_RANK}")

        def clip_grad_norm(parameters: Any, max_norm: float, norm_type: float = 2) -> Any:
            accelerator.unscale_gradients()
            gradients.average_once()
            return gradients.clip(parameters, max_norm, norm_type)

        self._gradients = gradients
        gradients.stand_in(accelerator, "clip_grad_norm_", clip_grad_norm)
        gradients.refuse_saving(trainer, "save_model")
        if accelerator.scaler is not None:
            gradients.share_overflow(accelerator.scaler)

    def _log(self, control: TrainerControl) -> None:
        if control.should_log:
            assert self._training is not None
            self._trainer.log(self._training.scalars())
            control.should_log = True  # log() clears it, and the Trainer's own log is still to come

    def _resume(self, args: TrainingArguments, state: TrainerState, training: MoETraining) -> None:
        saved = _stateful(state).get(STATE_KEY)
        if saved is None:
            logger.warning(
                "the checkpoint of step %d was written without DynMoECallback: the adaptive process starts anew",
                state.global_step,
            )
            return
        candidates = [_checkpoint(parent, state.global_step) for parent in (Path(saved["folder"]), _output_dir(args))]
        if args.resume_from_checkpoint is not None:
            candidates.insert(0, Path(args.resume_from_checkpoint))
        for folder in candidates:
            if is_checkpoint(folder / FOLDER):
                found = read_checkpoint(folder / FOLDER)
                if (found["session"], found["step"]) == (saved["session"], state.global_step):
                    training.load_state_dict(found["training"])
                    return
        raise ValueError(
            f"no state of DynMoECallback for step {state.global_step} in any of {', '.join(map(str, candidates))}: "
            "name the checkpoint that is resumed in TrainingArguments(resume_from_checkpoint=...) too"
        )

    def _refuse_unserved(self) -> None:
        """ValueError if the Trainer uses a feature under which the callback would do harm."""
        trainer = self._trainer
        callbacks = trainer.callback_handler.callbacks
        second = any(isinstance(other, DynMoECallback) and other is not self for other in callbacks)
        reasons = {
            "it has another DynMoECallback already": second,
            "FSDP splits the parameters, and the rows of one expert with them": trainer.is_fsdp_enabled,
            "DeepSpeed's ZeRO stage 3 splits them too: choose stage 0, 1 or 2": _zero_stage(trainer) == 3,
            "DataParallel copies the layers in every forward: use torchrun, or show one GPU": trainer.args.n_gpu > 1,
            "enable_jit_checkpoint writes checkpoints without asking callbacks": trainer.args.enable_jit_checkpoint,
        }
        for reason, applies in reasons.items():
            if applies:
                raise ValueError(f"trainer cannot be served by DynMoECallback: {reason}")


class _Train:
    """The `train` of one Trainer, after which its callback detaches: the Trainer tells no callback of an exception."""

    def __init__(self, train: Callable[..., Any], callback: DynMoECallback) -> None:
        self.train, self.callback = train, callback
        update_wrapper(self, train)

    @classmethod
    def of(cls, trainer: Trainer, callback: DynMoECallback) -> None:
        """Put it in the place of the Trainer's `train`, or of that of an earlier callback."""
        train = trainer.train.train if isinstance(trainer.train, cls) else trainer.train
        trainer.train = cls(train, callback)  # type: ignore[method-assign]

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        try:
            return self.train(*arguments, **options)
        finally:
            self.callback.close()


def _zero_stage(trainer: Trainer) -> int:
    """The stage of DeepSpeed's ZeRO; 0 without DeepSpeed."""
    plugin = getattr(trainer.accelerator.state, "deepspeed_plugin", None)
    return 0 if plugin is None else int(plugin.zero_stage)


def _output_dir(args: TrainingArguments) -> Path:
    assert args.output_dir is not None  # the Trainer's default has been set
    return Path(args.output_dir)


def _checkpoint(parent: Path, step: int) -> Path:
    return parent / f"checkpoint-{step}"


def _stateful(state: TrainerState) -> dict[str, Any]:
    """The Trainer's dict of callback states in trainer_state.json; its annotation says list."""
    return cast(dict[str, Any], state.stateful_callbacks)

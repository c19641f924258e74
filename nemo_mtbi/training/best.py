"""The weights of the best validation, kept beside the last ones."""

import math
from typing import Any

import lightning.pytorch as pl

from nemo_mtbi.checkpoints.run_directory import RunDirectory
from nemo_mtbi.errors import ConfigError
from nemo_mtbi.io import jsonl


class BestWeights(pl.Callback):
    """After each validation, that before the first step included, keeps the trained tensors if they are the best.

    Args:
        run: where they go: ``<stage>/kept/best.safetensors``, and ``best.json`` with step and value.
        stage: of training.
        monitor, mode: as exp_manager's ``checkpoint_callback_params``.
    """

    def __init__(self, run: RunDirectory, stage: str, monitor: str, mode: str) -> None:
        self.run, self.stage, self.monitor, self.mode = run, stage, monitor, mode
        self.best: float | None = None
        self.validated: int | None = None  # the step of the last whole validation

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """What the first rank knows of an interrupted run holds for all."""
        record = jsonl.read_json(self.run.best_record(self.stage))
        value = record.get("value") if record.get("monitor") == self.monitor else None
        value = trainer.strategy.broadcast(value)
        self.best = value if value is not None and math.isfinite(value) else None
        if self.validated is None:
            self.validated = trainer.strategy.broadcast(jsonl.read_json(self.run.validated(self.stage)).get("step"))

    def on_validation_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        value = trainer.callback_metrics.get(self.monitor)
        if trainer.sanity_checking:
            return
        self._look(trainer, pl_module, value)
        self.validated = trainer.global_step
        if trainer.is_global_zero:
            jsonl.write_json(self.run.validated(self.stage), {"step": trainer.global_step})

    def _look(self, trainer: pl.Trainer, pl_module: Any, value: Any) -> None:
        if value is None and self.monitor.startswith("val") and trainer.callback_metrics:
            measured = ", ".join(sorted(name for name in trainer.callback_metrics if name.startswith("val")))
            raise ConfigError(
                f"exp_manager.checkpoint_callback_params.monitor={self.monitor}: the stage {self.stage} does not "
                f"measure it, so no weights would be the best. It measures {measured}."
            )
        if value is None:
            return
        now = float(trainer.strategy.broadcast(float(value)))  # all ranks take part in saving, or none
        if not math.isfinite(now):
            return
        if self.best is not None and (now <= self.best if self.mode == "max" else now >= self.best):
            return
        self.best = now
        self.run.save_weights(pl_module, self.stage, self.run.best_weights(self.stage))
        if trainer.is_global_zero:
            record = {"monitor": self.monitor, "mode": self.mode, "value": now, "step": trainer.global_step}
            jsonl.write_json(self.run.best_record(self.stage), record)


class LastValidation(pl.Callback):
    """Lets the last weights be validated too, wherever ``val_check_interval`` stands.

    It comes after exp_manager's callbacks, whose timer (``max_time_per_run``) leaves where it sees that training is to
    stop.
    """

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step >= trainer.max_steps:
            trainer.should_stop = True


class Ended(pl.Callback):
    """Whether the user's early stopping has ended the stage, for whatever reason."""

    def __init__(self) -> None:
        self.early = False

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        stopping = any(isinstance(c, pl.callbacks.EarlyStopping) for c in trainer.early_stopping_callbacks)
        self.early = stopping and trainer.should_stop and trainer.global_step < trainer.max_steps

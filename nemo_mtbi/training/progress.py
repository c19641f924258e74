"""The one progress bar of a training stage, and its line when the stage has ended."""

import time
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import ProgressBar

from nemo_mtbi import console

SHOWN = ("val_agreement", "val_loss")


class StageProgress(ProgressBar):
    """In the place of Lightning's bars, of which there is one for each epoch and each validation.

    Args:
        stage: its name.
    """

    def __init__(self, stage: str) -> None:
        super().__init__()
        self.stage = stage
        self.bar: Any = None
        self.step, self.begin = 0, 0.0

    def disable(self) -> None:
        """Lightning's, on all ranks but the first; there :mod:`nemo_mtbi.console` shows nothing anyway."""

    def print(self, *args: Any, **_: Any) -> None:
        console.say(" ".join(map(str, args)))

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.step, self.begin = trainer.global_step, time.monotonic()
        self.bar = console.progress(total=trainer.max_steps, initial=self.step, desc=self.stage, unit="step")

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step > self.step:
            if not self.bar.disable:  # the figures wait for the device
                self.bar.set_postfix_str(self.figures(trainer), refresh=False)
            self.bar.update(trainer.global_step - self.step)
            self.step = trainer.global_step

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.bar is not None:
            self.bar.set_description(f"{self.stage}, validation")

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.bar is not None:
            self.bar.set_description(self.stage)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.close()
        seconds = time.monotonic() - self.begin
        console.say(f"{self.stage}: step {trainer.global_step}, {self.figures(trainer)} ({seconds:.0f} s)")

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self.close()

    def close(self) -> None:
        """Take the bar off the terminal."""
        if self.bar is not None:
            self.bar.close()
            self.bar = None

    @staticmethod
    def figures(trainer: pl.Trainer) -> str:
        """The loss of the last step and the watched figures of the last validation."""
        metrics = trainer.callback_metrics
        names = ["loss", *(name for name in SHOWN if name in metrics)]
        return ", ".join(f"{name} {float(metrics[name]):.3f}" for name in names if name in metrics)

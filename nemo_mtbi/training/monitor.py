"""What a run shows while it trains: throughput, and answers next to the teacher's."""

import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.loggers import TensorBoardLogger, WandbLogger

from nemo_mtbi.io import jsonl
from nemo_mtbi.models.speech import first_examples

SAMPLES_FILE = "samples.jsonl"


class Throughput(pl.Callback):
    """Logs ``tokens_per_second`` (LLM positions of prompt and response) and ``examples_per_second`` of this rank."""

    def __init__(self) -> None:
        self._begin = 0.0
        self._tokens = self._examples = 0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._restart()

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._restart()

    def _restart(self) -> None:
        self._begin, self._tokens, self._examples = time.monotonic(), 0, 0

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._examples += len(batch["examples"])
        self._tokens += sum(len(e.prompt_ids) + len(e.response_ids) for e in batch["examples"])
        if (batch_idx + 1) % trainer.log_every_n_steps == 0:  # type: ignore[attr-defined]
            seconds = max(1e-9, time.monotonic() - self._begin)
            rates = {"tokens_per_second": self._tokens / seconds, "examples_per_second": self._examples / seconds}
            for logger in trainer.loggers:
                logger.log_metrics(rates, trainer.global_step)
            self._restart()


class SampleAnswers(pl.Callback):
    """At each validation of the imitation stage, answers to a few examples of pure speech beside the teacher's.

    They go to TensorBoard (text) or W&B (table), and to ``samples.jsonl`` in the stage's folder.

    Args:
        folder: of the stage.
        count: examples of the first batch of each validation set; 0 turns it off.
        max_new_tokens: of an answer.
    """

    def __init__(self, folder: Path, count: int, max_new_tokens: int) -> None:
        self.folder, self.count, self.max_new_tokens = folder, count, max_new_tokens
        self._rows: list[dict[str, Any]] = []

    def on_validation_batch_end(
        self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        if batch_idx or not self.count or pl_module.stage != "imitation":
            return
        decode = pl_module.tokenizer.tokenizer.decode
        for name, part in batch.items():
            if part is None:
                continue
            few = first_examples(part, self.count)
            answers = pl_module.answer(few, self.max_new_tokens)
            self._rows += [
                {
                    "step": trainer.global_step,
                    "set": name,
                    "id": e.id,
                    "task": e.task,
                    "prompt": e.prompt_id,
                    "transcript": e.transcript,
                    "teacher": decode(e.response_ids, skip_special_tokens=True),
                    "answer": decode(a, skip_special_tokens=True),
                }
                for e, a in zip(few["examples"], answers, strict=True)
            ]

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        rows, self._rows = self._rows, []
        if not rows or not trainer.is_global_zero:
            return
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                logger.experiment.add_text("answers", _table(rows), trainer.global_step)
            elif isinstance(logger, WandbLogger):
                logger.log_table("answers", columns=list(rows[0]), data=[list(r.values()) for r in rows])
        with jsonl.Appender(self.folder / SAMPLES_FILE) as out:
            for row in rows:
                out.write(row)


def _table(rows: list[dict[str, Any]]) -> str:
    """Markdown, as TensorBoard shows it."""
    columns = ("task", "transcript", "teacher", "answer")
    cells = [[r[k].replace("|", "\\|").replace("\n", " ") for k in columns] for r in rows]
    lines = [f"| {' | '.join(c)} |" for c in [columns, ["---"] * len(columns), *cells]]
    return "\n".join(lines)

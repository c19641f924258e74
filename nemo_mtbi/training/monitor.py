"""What a run shows while it trains: throughput, and answers next to the teacher's."""

import resource
import time
from functools import cache
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.throughput import get_available_flops
from lightning.pytorch.loggers import TensorBoardLogger, WandbLogger

from nemo_mtbi.io import jsonl
from nemo_mtbi.models.speech import first_examples
from nemo_mtbi.modules.causal_lm import causal_lm

SAMPLES_FILE = "samples.jsonl"


class Throughput(pl.Callback):
    """What a rank gets done between two logged steps.

    - ``tokens_per_second`` (of prompt, transcript and response) and ``examples_per_second``;
    - ``data_wait_fraction``: share of the host's time in which the loop waits for its next batch;
    - ``llm_tflops``: TFLOP/s of the LLM's matrix products (:mod:`nemo_mtbi.models.work`), and ``mfu``, their share of
      what Lightning's table says of the GPU, where that knows it;
    - ``peak_memory_gib``: of the GPU since the last time, or of this process.
    """

    def __init__(self) -> None:
        self._begin = self._waited = 0.0
        self._tokens = self._examples = 0

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self._restart(trainer, pl_module)

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        self._restart(trainer, pl_module)

    def _restart(self, trainer: Any, model: Any) -> None:
        self._begin, self._tokens, self._examples = time.monotonic(), 0, 0
        self._waited = trainer.datamodule.waited.seconds
        model.work.taken()

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self._examples += len(batch["examples"])
        self._tokens += sum(len(e.prompt_ids) + len(e.response_ids) for e in batch["examples"])
        if (batch_idx + 1) % trainer.log_every_n_steps == 0:
            seconds = max(1e-9, time.monotonic() - self._begin)
            flops = pl_module.work.taken() / seconds
            rates = {
                "tokens_per_second": self._tokens / seconds,
                "examples_per_second": self._examples / seconds,
                "data_wait_fraction": (trainer.datamodule.waited.seconds - self._waited) / seconds,
                "llm_tflops": flops / 1e12,
                "peak_memory_gib": peak_memory_gib(pl_module.device),
            }
            if (most := peak_flops(pl_module.device, next(causal_lm(pl_module.llm).parameters()).dtype)) is not None:
                rates["mfu"] = flops / most
            for logger in trainer.loggers:
                logger.log_metrics(rates, trainer.global_step)
            self._restart(trainer, pl_module)


@cache
def peak_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """FLOP/s of a GPU by Lightning's table; None for others, and for CPUs."""
    if device.type != "cuda":
        return None
    try:
        return get_available_flops(device, dtype)
    except (ValueError, KeyError):  # no such number type there
        return None


def peak_memory_gib(device: torch.device) -> float:
    """Of the GPU since the last call; on a CPU, of this process since it began."""
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        return peak / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


class SampleAnswers(pl.Callback):
    """At each validation of the imitation stage, answers to a few examples of pure speech beside the teacher's.

    They go to TensorBoard (text) or W&B (table), and to ``samples.jsonl``.

    Args:
        folder: where that goes.
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
        self.folder.mkdir(parents=True, exist_ok=True)
        with jsonl.Appender(self.folder / SAMPLES_FILE) as out:
            for row in rows:
                out.write(row)


def _table(rows: list[dict[str, Any]]) -> str:
    """Markdown, as TensorBoard shows it."""
    columns = ("task", "transcript", "teacher", "answer")
    cells = [[r[k].replace("|", "\\|").replace("\n", " ") for k in columns] for r in rows]
    lines = [f"| {' | '.join(c)} |" for c in [columns, ["---"] * len(columns), *cells]]
    return "\n".join(lines)

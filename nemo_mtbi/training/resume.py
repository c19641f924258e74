"""Training that survives interruption.

Atomic checkpoints, SIGTERM, and a resumed run that goes on as if nothing had happened.
"""

import inspect
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import lightning.pytorch as pl
import torch
from lhotse import CutSet
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.trainer.states import TrainerFn
from nemo.utils.callbacks import NeMoModelCheckpoint
from nemo.utils.exp_manager import _flush_in_flight_batch_progress
from nemo.utils.get_rank import is_global_rank_zero
from torch.utils.data import DataLoader, IterableDataset

from nemo_mtbi import console
from nemo_mtbi.data.shar import without_data
from nemo_mtbi.io.jsonl import keep

log = logging.getLogger(__name__)
OF_A_STEP = ("params", "lr", "step")  # keys of an optimizer's group that are no settings
DERIVED = {"base_lrs", "decay_steps", "constant_steps", "hold_steps"}  # by NeMo's and PyTorch's schedulers


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint under a temporary name and renames it: a file with a checkpoint's name is complete."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        if "://" in str(path):  # object stores show only complete objects
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        path = Path(path)
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        super().save_checkpoint(checkpoint, temporary, storage_options)
        keep(temporary)
        temporary.replace(path)


class Preemption(pl.Callback):
    """SIGTERM (as SLURM sends it before it takes the machine) and Ctrl-C: finish the step, write the last checkpoint,
    exit with 0 (after Ctrl-C with 130; a second one ends at once).

    NeMo's own callback does this on GPUs only. All ranks leave together, whichever was told.
    """

    def __init__(self) -> None:
        self.noticed: int | None = None
        self.previous: dict[int, Any] = {}

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if not self.previous:
            self.previous = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
        self._listen()

    def _listen(self) -> None:
        signal.signal(signal.SIGTERM, self._notice)
        if self.previous.get(signal.SIGINT) is not signal.SIG_IGN:  # as of jobs in the background
            signal.signal(signal.SIGINT, self._notice)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # After ``setup`` Lightning puts its own handler before ours, and would leave in the middle of a step.
        self._listen()

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._listen()

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)
        self.previous = {}

    def _notice(self, number: int, _: Any) -> None:
        if number == self.noticed == signal.SIGINT:
            raise KeyboardInterrupt
        self.noticed = number
        if number == signal.SIGINT and is_global_rank_zero():
            console.tell("\nStopping after this step; Ctrl-C again stops at once.")

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if (batch_idx + 1) % trainer.accumulate_grad_batches == 0:
            self._leave_if_told(trainer)

    def on_validation_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        """A long validation is left at once, and not taken up again."""
        self._leave_if_told(trainer)

    def _leave_if_told(self, trainer: pl.Trainer) -> None:
        if not trainer.strategy.reduce_boolean_decision(self.noticed is not None, all=False):
            return
        if trainer.state.fn != TrainerFn.FITTING:
            self._leave("stopped before the first step; the same command begins anew.")
        callback = trainer.checkpoint_callback
        assert isinstance(callback, NeMoModelCheckpoint)
        _flush_in_flight_batch_progress(trainer)
        candidates = callback._monitor_candidates(trainer)
        if callback.last_model_path != callback.format_checkpoint_name(candidates, callback.CHECKPOINT_NAME_LAST):
            callback._save_last_checkpoint(trainer, candidates)
        self._leave(f"stopped after step {trainer.global_step}; the same command continues from there.")

    def _leave(self, how: str) -> NoReturn:
        by_hand = self.noticed == signal.SIGINT
        log.warning(f"{'Ctrl-C' if by_hand else 'SIGTERM'}: {how}")
        if by_hand and is_global_rank_zero():
            console.tell(how.capitalize())
        sys.exit(console.INTERRUPTED if by_hand else 0)


class ConfiguredSettings(pl.Callback):
    """A resumed stage follows its configuration: with moments and counters Lightning restores a checkpoint's settings
    of optimizer and scheduler too, such as a scheduler's length, whatever the configuration says now.
    """

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Before a checkpoint's state is restored."""
        self.groups = [dict(group) for optimizer in trainer.optimizers for group in optimizer.param_groups]
        self.schedulers = [settings_of(config.scheduler) for config in trainer.lr_scheduler_configs]

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not trainer.global_step:
            return
        changed: dict[str, str] = {}
        groups = [group for optimizer in trainer.optimizers for group in optimizer.param_groups]
        for group, own in zip(groups, self.groups, strict=True):
            _put(group, {key: value for key, value in own.items() if key not in OF_A_STEP}, "optimizer", changed)
            if not trainer.lr_scheduler_configs:  # a constant rate
                _put(group, {"lr": own["lr"]}, "optimizer", changed)
        for config, own in zip(trainer.lr_scheduler_configs, self.schedulers, strict=True):
            _put(config.scheduler.__dict__, own, "lr_scheduler", changed)
            if changed:
                for group, rate in zip(
                    config.scheduler.optimizer.param_groups, rates_of(config.scheduler), strict=True
                ):
                    group["lr"] = rate
        if changed and is_global_rank_zero():
            told = ", ".join(f"{key} {how}" for key, how in changed.items())
            console.say(f"Settings other than the checkpoint's, which hold from here on: {told}.")


def settings_of(scheduler: Any) -> dict[str, Any]:
    """What a scheduler was made with, as far as it keeps it under that name, and what it derives from that."""
    named = {name for kind in type(scheduler).__mro__ for name in inspect.signature(kind).parameters}
    kept = (named | DERIVED) - {"self", "optimizer", "last_epoch"}
    return {key: value for key, value in scheduler.__dict__.items() if key in kept}


def rates_of(scheduler: Any) -> list[float]:
    """Learning rates of the step that a scheduler stands at."""
    if hasattr(scheduler, "_get_closed_form_lr"):
        return scheduler._get_closed_form_lr()
    if type(scheduler).__module__.startswith("nemo."):  # a function of the step
        return scheduler.get_lr()
    groups = scheduler.optimizer.param_groups
    return [
        group["lr"] * base / (group["initial_lr"] or 1) for group, base in zip(groups, scheduler.base_lrs, strict=True)
    ]


def _put(place: dict[str, Any], own: dict[str, Any], name: str, changed: dict[str, str]) -> None:
    """Values of ``own`` that ``place`` has others of, noted in ``changed``."""
    for key, value in own.items():
        before = place.get(key)
        pair = [list(v) if isinstance(v, tuple) else v for v in (before, value)]
        if pair[0] != pair[1]:
            place[key] = value
            changed.setdefault(f"{name}.{key}", f"{before} -> {value}")


class WholeSteps(pl.Callback):
    """A resumed run goes on with the first batch of the next optimizer step.

    Checkpoints are written while Lightning's counters stand between two batches (one short at the end of a step, or
    in the middle of an accumulation after a validation). Gradients are not in a checkpoint, so an unfinished step is
    done again, whole; the counters, and the training data (:class:`LaterBatches`), are set to where it begins.
    """

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not trainer.global_step:
            return
        loop = trainer.fit_loop.epoch_loop
        batches = trainer.global_step * trainer.accumulate_grad_batches
        counters: tuple[Any, Any] = (loop.batch_progress.current, loop.batch_progress.total)
        for progress in counters:
            progress.ready = progress.started = progress.processed = progress.completed = batches
        loop._batches_that_stepped = trainer.global_step
        for callback in trainer.checkpoint_callbacks:  # what is resumed from is not written again
            if isinstance(callback, pl.callbacks.ModelCheckpoint):
                callback._last_global_step_saved = trainer.global_step


def settle_checkpoints(folder: Path) -> None:
    """Bring a stage's checkpoints into the state that NeMo resumes from, after a kill at any time.

    All ranks of a job may do this at once. Partial files go, and of several ``*last.ckpt`` (an older one is removed
    after the newer is complete) the newest stays.
    """
    averaged = any(folder.glob("*-EMA.ckpt"))
    for marker in folder.glob("*-unfinished"):  # NeMo's; with AtomicCheckpointIO a file that is there is complete
        name = marker.name.removesuffix("-unfinished")
        if averaged and not (folder / f"{name}-EMA.ckpt").is_file():  # one of two files
            (folder / f"{name}.ckpt").unlink(missing_ok=True)
        marker.unlink(missing_ok=True)
    for unfinished in folder.glob(".*.ckpt.*"):
        unfinished.unlink(missing_ok=True)
    last = list(folder.glob("*last.ckpt"))
    if len(last) > 1:
        last.sort(key=step_of)
        for older in last[:-1]:
            older.unlink(missing_ok=True)


def step_of(checkpoint: str | Path) -> int:
    """Optimizer steps after which a checkpoint was written; -1 if another rank has just removed it."""
    try:
        return torch.load(checkpoint, map_location="cpu", mmap=True, weights_only=True)["global_step"]
    except FileNotFoundError:
        return -1


def state_of_data(checkpoint: str | Path, name: str) -> dict[str, Any] | None:
    """What the data module of that name kept in a checkpoint."""
    return torch.load(checkpoint, map_location="cpu", mmap=True, weights_only=True).get(name)


class Wrapped:
    """What stands in place of a ``source`` of batches, and has its attributes."""

    def __init__(self, source: Any) -> None:
        self.source = source

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "source":  # while it is unpickled
            raise AttributeError(name)
        return getattr(self.source, name)


class Dealt(Wrapped):
    """Every ``count``-th batch of a Lhotse sampler, from the ``rank``-th one on; where the last round has fewer, an
    empty one, so that all ranks have as many. (Lhotse gives some examples to two ranks instead.)
    """

    def __init__(self, source: Any, rank: int, count: int) -> None:
        super().__init__(source)
        self.rank, self.count = rank, count

    def __iter__(self) -> Iterator[CutSet]:
        given = 0
        for batch in self.source:
            if given % self.count == self.rank:
                yield batch
            given += 1
        if 0 < given % self.count <= self.rank:
            yield CutSet()


class LaterBatches(Wrapped):
    """A Lhotse sampler, or a loader, without its first ``skip`` mini-batches: a sampler draws their metadata, a loader
    reads them too.

    At every iteration, because Lightning makes an iterator, and drops it, before the one that it trains with;
    training data has no second epoch.
    """

    def __init__(self, source: Any, skip: int) -> None:
        super().__init__(source)
        self.skip = skip

    def __iter__(self) -> Iterator[Any]:
        return self._rest(iter(self.source))  # made at once, as without skipping: a loader's workers then begin

    def _rest(self, batches: Iterator[Any]) -> Iterator[Any]:
        with without_data():
            for _ in console.progress(
                range(self.skip), desc="finding the place in the data", unit="batch", disable=self.skip < 100
            ):
                next(batches)
        while True:  # not ``yield from``: a Lhotse sampler is its own iterator, and iter() starts it anew
            try:
                yield next(batches)
            except StopIteration:
                return


def with_sampler(loader: DataLoader, sampler: Any) -> DataLoader:
    """A loader of whole batches, with another sampler of them."""
    return _as(loader, loader.dataset, sampler=sampler)


def with_dataset(loader: DataLoader, dataset: IterableDataset) -> DataLoader:
    """A loader whose workers draw, with what gives them whole batches."""
    return _as(loader, dataset)


def _as(loader: DataLoader, dataset: Any, **more: Any) -> DataLoader:
    return DataLoader(
        dataset,
        batch_size=None,
        num_workers=loader.num_workers,
        pin_memory=loader.pin_memory,
        worker_init_fn=loader.worker_init_fn,
        **more,
    )


def spare_workers(loader: DataLoader) -> None:
    """Let a loader's workers outlive the SIGTERM that their whole process group gets (torchrun, SLURM): the step that
    :class:`Preemption` finishes needs them, and one that dies ends it with an error."""
    loader.worker_init_fn = partial(_spared, loader.worker_init_fn)


def _spared(own: Callable[[int], None] | None, worker: int) -> None:
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})  # of this thread and those that it begins
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes of a terminal
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    if own is not None:
        own(worker)


def _end_with(parent: int) -> None:
    """End this process at the SIGTERM of its parent, which ends its workers so; not at others'."""
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(0)

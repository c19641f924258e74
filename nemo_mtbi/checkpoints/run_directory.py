"""Where a training run keeps what later steps need.

::

    <output_dir>/model.json                        the model's configuration, with the CTC vocabulary size filled in
    <output_dir>/<stage>/trained.safetensors       trained tensors that later steps use: of the best validation
                                                   (stages untrained, alignment, imitation)
    <output_dir>/<stage>/last.safetensors          trained tensors after the last step
    <output_dir>/<stage>/kept/best.safetensors, .json   trained tensors of the best validation so far; its step, value
    <output_dir>/<stage>/optimizer.safetensors     the optimizer's moments at the end of a stage
    <output_dir>/<stage>/checkpoints, events...    NeMo's exp_manager: resumable checkpoints and TensorBoard curves
    <output_dir>/<stage>/kept/samples.jsonl        answers at each validation beside the teacher's
    <output_dir>/data.json                         manifests that were trained and validated on
    <output_dir>/seen.json                         examples and response tokens of each task and prompt
"""

import json
import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from nemo.utils.get_rank import is_global_rank_zero
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from nemo_mtbi.checkpoints.trained_state import TrainableCheckpoint
from nemo_mtbi.errors import CheckpointError, ConfigError
from nemo_mtbi.io import jsonl
from nemo_mtbi.io.tensors import copy_file, save_tensors
from nemo_mtbi.parallel.launch import tensors_from_first_rank

log = logging.getLogger(__name__)
RUN_OF_TRAINING = "data.json"  # what exports lack

UNTRAINED, ALIGNMENT, IMITATION = "untrained", "alignment", "imitation"
STAGES = (UNTRAINED, ALIGNMENT, IMITATION)


def split_stage(name: str) -> tuple[str, str]:
    """``RUN@STAGE`` -> run and stage; the stage of ``RUN`` is empty. Folders may have an ``@`` in their names.

    Raises:
        CheckpointError: the text after the ``@`` is no stage, and there is no such folder.
    """
    path, at, stage = name.rpartition("@")
    if not at or (stage not in STAGES and Path(name).exists()):
        return name, ""
    if stage not in STAGES and "/" not in stage:
        raise CheckpointError(f"{name}: {stage!r} is no stage; there are {', '.join(STAGES)}.")
    return (path, stage) if stage in STAGES else (name, "")


# What trained weights mean nothing without.
OF_THE_MODEL = ("audio_locator_tag", "lora", "perception", "prompt_format", "speech_position")


class RunDirectory:
    """Paths and files of one run."""

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root)

    def stage(self, name: str) -> Path:
        return self.root / name

    def weights(self, name: str) -> Path:
        """What export, evaluation and the next stage use of a stage: the weights of its best validation."""
        return self.stage(name) / "trained.safetensors"

    def last_weights(self, name: str) -> Path:
        """Weights after the last step of a stage."""
        return self.stage(name) / "last.safetensors"

    def kept(self, name: str) -> Path:
        """What a stage writes while it trains. NeMo moves the files beside it into ``run_N`` at every restart."""
        return self.stage(name) / "kept"

    def best_weights(self, name: str) -> Path:
        """Weights of the best validation so far of a stage."""
        return self.kept(name) / "best.safetensors"

    def best_record(self, name: str) -> Path:
        """Step and value of the best validation."""
        return self.kept(name) / "best.json"

    def validated(self, name: str) -> Path:
        """Step of the last whole validation."""
        return self.kept(name) / "validated.json"

    def moments(self, name: str) -> Path:
        """The optimizer's moments at the end of a stage."""
        return self.stage(name) / "optimizer.safetensors"

    def seen(self, name: str) -> Path:
        """Counts of what was trained on, up to the end of a stage."""
        return self.kept(name) / "seen.json"

    def finish_stage(self, model: TrainableCheckpoint, name: str, keep: str = "best") -> None:
        """Keep the last weights, and give the stage, and the model, the best ones or the last.

        The best are the last where nothing was validated.

        All ranks call this.
        """
        self.save_weights(model, name, path=self.last_weights(name))
        if is_global_rank_zero():
            chosen = self.best_weights(name)
            chosen = chosen if keep == "best" and chosen.is_file() else self.last_weights(name)
            copy_file(chosen, self.weights(name))
        if keep == "best":  # as where the next stage is begun by another process; others may not see the file
            model.load_trained_state(tensors_from_first_rank(lambda: load_file(self.weights(name))))

    def last_stage(self) -> str:
        """The furthest finished stage.

        Raises:
            CheckpointError: none is; what training starts from has to be named.
        """
        finished = [name for name in STAGES if self.weights(name).is_file()]
        begun = [name for name in STAGES if (self.stage(name) / "checkpoints").is_dir() and name not in finished]
        if not finished:
            raise CheckpointError(
                f"{self.root} holds no trained model. Run train.py with output_dir={self.root} first."
            )
        if finished == [UNTRAINED] and (self.root / RUN_OF_TRAINING).is_file():
            raise CheckpointError(
                f"No stage of {self.root} is finished{f' ({begun[-1]} was begun)' if begun else ''}: finish the "
                f"training, or take what it starts from, {self.root}@{UNTRAINED} (or stage={UNTRAINED})."
            )
        if begun:
            log.warning(
                f"The stage {begun[-1]} of {self.root} is not finished; this is the one before, {finished[-1]}."
            )
        return finished[-1]

    @classmethod
    def parse(cls, name: str) -> tuple["RunDirectory", str]:
        """``RUN`` or ``RUN@STAGE`` -> the run, and the stage (default: the furthest finished)."""
        path, stage = split_stage(name)
        run = cls(path)
        return run, stage or run.last_stage()

    def save_config(self, model: TrainableCheckpoint, cfg: dict[str, Any]) -> None:
        jsonl.write_json(self.root / "model.json", {"model": cfg, "references": model.references})

    def save_data_paths(self, paths: dict[str, list[str]]) -> None:
        jsonl.write_json(self.root / RUN_OF_TRAINING, paths)

    def check_same_model(self, model: TrainableCheckpoint, cfg: dict[str, Any]) -> bool:
        """Whether what the run began with (``untrained``) stays: stages are finished, or ``model.json`` says the same.

        Args:
            model: of a run that is begun or goes on here.
            cfg: its configuration.

        Raises:
            ConfigError: stages are finished here with another encoder, LLM or input length, or the last one with other
                settings of the model.
            CheckpointError: its weights do not fit the model.
        """
        file = self.root / "model.json"
        if not file.is_file():
            return False
        before = json.loads(file.read_text())
        finished = [stage for stage in (ALIGNMENT, IMITATION) if self.weights(stage).is_file()]
        if finished and before["references"] != model.references:
            raise ConfigError(
                f"{self.root} was trained with {before['references']}, now {model.references}. Use another output_dir."
            )
        if IMITATION in finished and (key := first_difference(before["model"], cfg, OF_THE_MODEL)) is not None:
            raise ConfigError(
                f"{self.root} holds a finished run with another model.{key}. Use another output_dir; init_from begins "
                "with its weights."
            )
        if finished:
            read_trained(model, self.weights(finished[-1]))
        return bool(finished) or before == {"model": cfg, "references": model.references}

    def save_weights(self, model: TrainableCheckpoint, name: str, path: Path | None = None) -> Path:
        """Trained tensors and references, written under a temporary name and renamed.

        All ranks call this, one writes.

        Args:
            model: whose.
            name: of the stage.
            path: default: what later steps use of the stage.
        """
        path = path or self.weights(name)
        state = model.trained_state(needed=is_global_rank_zero())
        if is_global_rank_zero():
            save_tensors(state, path, {"references": json.dumps(model.references)})
        return path

    def load_weights(self, model: TrainableCheckpoint, name: str) -> None:
        """
        Raises:
            CheckpointError: another LLM or encoder, or tensors that do not fit.
        """
        load_trained(model, self.weights(name))

    def model_config(self) -> dict[str, Any]:
        """The model's configuration.

        Raises:
            CheckpointError: not a training run.
        """
        file = self.root / "model.json"
        if not file.is_file():
            raise CheckpointError(f"{self.root} is not a training run: there is no model.json.")
        return json.loads(file.read_text())["model"]


def first_difference(before: Any, now: Any, keys: Iterable[str] | None = None) -> str | None:
    """Dotted name of the first value that two configurations both have and that differs; of some ``keys``, or all."""
    if not (isinstance(before, dict) and isinstance(now, dict)):
        return "" if before != now else None
    for key in before if keys is None else keys:
        if key in before and key in now and (rest := first_difference(before[key], now[key])) is not None:
            return f"{key}.{rest}".rstrip(".")
    return None


def load_trained(model: TrainableCheckpoint, path: Path) -> None:
    """Load trained tensors into a model with the same frozen parts."""
    model.load_trained_state(read_trained(model, path))


def read_trained(model: TrainableCheckpoint, path: Path) -> dict[str, Tensor]:
    """Trained tensors that fit a model.

    Raises:
        CheckpointError: they do not, or cannot be read.
    """
    if not path.is_file():
        raise CheckpointError(f"There is no {path}.")
    try:
        with safe_open(path, "pt") as file:
            references = json.loads((file.metadata() or {}).get("references", "{}"))
        state = load_file(path)
    except Exception as error:
        raise CheckpointError(f"{path} cannot be read ({error}). Was it copied completely?") from error
    for part, reference in model.references.items():
        if references.get(part) != reference:
            raise CheckpointError(f"{path} was trained with another {part}: {references.get(part)}, now {reference}.")
    model.upgrade_state(state)
    # A sharded layer's extra state is no tensor.
    own = {key: value for key, value in model.state_dict().items() if isinstance(value, Tensor)}
    missing = model.trainable_names() - set(state)
    unexpected = set(state) - set(own)
    if missing or unexpected:
        raise CheckpointError(
            f"{path} does not fit the model: {len(missing)} tensors missing, {len(unexpected)} unexpected."
        )
    for key, value in model.own_state(state).items():
        there, here = tuple(value.shape), tuple(own[key].shape)
        if there != here:
            raise CheckpointError(
                f"{path} does not fit the model: {key} is {there} there, {here} in the model. Give "
                "model.perception (or model.lora) the values that it was trained with."
            )
    return state

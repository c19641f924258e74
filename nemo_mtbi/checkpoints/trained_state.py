"""Lightning checkpoints that hold what is trained, and references (content hashes) to what is frozen."""

from collections import Counter
from collections.abc import Callable
from typing import Any

from lightning import LightningModule
from torch import Tensor

from nemo_mtbi.config import ModelConfig
from nemo_mtbi.errors import CheckpointError
from nemo_mtbi.losses.vocabulary import VocabularyShard
from nemo_mtbi.modules.parameter_groups import parameter_groups
from nemo_mtbi.modules.perception import connector_of
from nemo_mtbi.parallel.parts import Part, part_of

KEY = "nemo_mtbi"
CONNECTOR_PREFIX = "perception.modality_adapter."
MERGED_LORA = "+lora"  # end of an LLM's reference: adapters were added to its weights


class TrainableCheckpoint(LightningModule):
    """Mixin for :class:`nemo_mtbi.models.MTBISALM`."""

    config: ModelConfig
    perception: Any
    references: dict[str, str]
    seen: Any
    stage: str
    data_parallel_group: Callable[[], Any]
    vocabulary_shard: VocabularyShard
    strict_loading = False  # the frozen parts are not in the checkpoint

    def trainable_names(self) -> set[str]:
        """State-dict names of trained parameters, and of all that the connector holds."""
        names = {n for n, p in self.named_parameters() if p.requires_grad}
        return names | {n for n in self.state_dict() if n.startswith(CONNECTOR_PREFIX)}

    def kept_names(self) -> set[str]:
        """``trainable_names``, and the buffers of modules with a trained parameter (an encoder's BatchNorm, say)."""
        trained = {n.rpartition(".")[0] for n, p in self.named_parameters() if p.requires_grad}
        buffers = {n for n, _ in self.named_buffers() if n.rpartition(".")[0] in trained}
        return self.trainable_names() | (buffers & self.state_dict().keys())

    def trained_parts(self) -> dict[str, Part]:
        """Trained parameters of which this rank holds a part (LoRA under tensor parallelism)."""
        trained = ((n, part_of(p)) for n, p in self.named_parameters() if p.requires_grad)
        return {name: part for name, part in trained if part is not None}

    def trained_state(self, needed: bool = True) -> dict[str, Tensor]:
        """Trained tensors, whole, on the CPU. All ranks of a tensor-parallel group call this together; those that do
        not need them give their parts alone, and get nothing."""
        names = self.kept_names() if needed else set(self.trained_parts())
        state = self.whole_state({k: v.detach() for k, v in self.state_dict().items() if k in names})
        return {k: v.cpu().contiguous() for k, v in state.items()} if needed else {}

    def upgrade_state(self, state: dict[str, Tensor]) -> None:
        """Bring trained tensors of an earlier version into this one's form, in place."""
        connector = connector_of(self.perception)
        if connector is not None:
            connector.upgrade_state(state, CONNECTOR_PREFIX)

    def load_trained_state(self, state: dict[str, Tensor]) -> None:
        """Take this rank's parts of whole trained tensors."""
        self.load_state_dict(self.own_state(state), strict=False)

    def whole_state(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        parts, group = self.trained_parts(), self.vocabulary_shard.group
        return {k: parts[k].whole(v, group) if k in parts else v for k, v in state.items()}

    def own_state(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        parts = self.trained_parts()
        return {k: parts[k].of(v, v.shape[parts[k].dim]) if k in parts else v for k, v in state.items()}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Whole tensors, so that a checkpoint does not depend on the layout; that of the optimizer's states too."""
        names = self.kept_names()
        checkpoint["state_dict"] = self.whole_state({k: v for k, v in checkpoint["state_dict"].items() if k in names})
        group = self.vocabulary_shard.group
        self._convert_optimizer_states(checkpoint, lambda part, value: part.whole(value, group))
        checkpoint[KEY] = {
            "references": self.references,
            "seen": dict(self.seen.over_ranks(self.data_parallel_group())),
            "bad_steps": self.bad_steps,
            "stage": self.stage,
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """
        Raises:
            CheckpointError: the checkpoint belongs to another LLM, encoder or connector, or lacks trained weights.
        """
        own = checkpoint.get(KEY)
        if own is None:
            raise CheckpointError("This checkpoint was not written by nemo_mtbi: it has no references to frozen parts.")
        for part, value in self.references.items():
            if own["references"].get(part) != value:
                raise CheckpointError(
                    f"The checkpoint was trained with another {part} ({own['references'].get(part)}, now {value}). "
                    f"Set model.pretrained_{'llm' if part == 'llm' else 'asr'} to the one it was trained with."
                )
        if own.get("stage", self.stage) != self.stage:
            raise CheckpointError(
                f"The checkpoint is of the stage {own['stage']}, and this is {self.stage}: give each stage a folder of "
                "its own (exp_manager.checkpoint_callback_params.dirpath)."
            )
        self.upgrade_state(checkpoint["state_dict"])
        missing = self.trainable_names() - set(checkpoint["state_dict"])
        if missing:
            raise CheckpointError(
                f"The checkpoint lacks {len(missing)} trained tensors, e.g. {sorted(missing)[0]}: "
                "model.perception or model.lora differ from those it was trained with."
            )
        checkpoint["state_dict"] = self.own_state(checkpoint["state_dict"])
        self._convert_optimizer_states(checkpoint, lambda part, value: part.of(value, value.shape[part.dim]))
        # The record is a sum over ranks, so one of them goes on with it.
        self.seen.counts = Counter(own["seen"]) if self.global_rank == 0 else Counter()
        self.bad_steps = own["bad_steps"]

    def _convert_optimizer_states(self, checkpoint: dict[str, Any], convert: Callable[[Part, Tensor], Tensor]) -> None:
        """Apply ``convert`` to the states of parameters that are spread.

        The optimizer numbers trained parameters in the order of its groups.
        """
        named = [(name, p) for name, p in self.named_parameters() if p.requires_grad]
        groups = parameter_groups(named, self.config.parameter_groups)
        trained = [p for group in groups for p in group["params"]]
        if all(part_of(p) is None for p in trained):
            return
        for optimizer in checkpoint.get("optimizer_states", []):
            if "state" not in optimizer:  # spread, and another rank's to write
                continue
            states = dict(optimizer["state"])  # the optimizer's own dictionaries stay as they are
            for index, parameter in enumerate(trained):
                part = part_of(parameter)
                if part is not None and index in states:
                    states[index] = {
                        k: convert(part, v) if isinstance(v, Tensor) and v.ndim == parameter.ndim else v
                        for k, v in states[index].items()
                    }
            optimizer["state"] = states

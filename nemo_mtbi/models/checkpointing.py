"""Lightning checkpoints that hold what is trained, and references (content hashes) to what is frozen."""

from collections import Counter
from typing import Any

from nemo_mtbi.errors import CheckpointError

KEY = "nemo_mtbi"


class TrainableCheckpoint:
    """Mixin for :class:`nemo_mtbi.models.MTBISALM`."""

    strict_loading = False  # the frozen parts are not in the checkpoint

    def trainable_names(self) -> set[str]:
        """State-dict names of trained parameters, and of the buffers of modules that hold any."""
        names = {n for n, p in self.named_parameters() if p.requires_grad}  # type: ignore[attr-defined]
        prefix = "perception.modality_adapter."
        return names | {n for n in self.state_dict() if n.startswith(prefix)}  # type: ignore[attr-defined]

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        names = self.trainable_names()
        checkpoint["state_dict"] = {k: v for k, v in checkpoint["state_dict"].items() if k in names}
        checkpoint[KEY] = {
            "references": self.references,  # type: ignore[attr-defined]
            "seen": dict(self.all_seen()),  # type: ignore[attr-defined]
            "bad_steps": self.bad_steps,
            "stage": self.stage,  # type: ignore[attr-defined]
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """
        Raises:
            CheckpointError: the checkpoint belongs to another LLM, encoder or connector, or lacks trained weights.
        """
        own = checkpoint.get(KEY)
        if own is None:
            raise CheckpointError("This checkpoint was not written by nemo_mtbi: it has no references to frozen parts.")
        for part, value in self.references.items():  # type: ignore[attr-defined]
            if own["references"].get(part) != value:
                raise CheckpointError(
                    f"The checkpoint was trained with another {part} ({own['references'].get(part)}, now {value}). "
                    f"Set model.pretrained_{'llm' if part == 'llm' else 'asr'} to the one it was trained with."
                )
        missing = self.trainable_names() - set(checkpoint["state_dict"])
        if missing:
            raise CheckpointError(
                f"The checkpoint lacks {len(missing)} trained tensors, e.g. {sorted(missing)[0]}: "
                "model.perception or model.lora differ from those it was trained with."
            )
        # The record is a sum over ranks, so one of them goes on with it.
        self.seen = Counter(own["seen"]) if self.global_rank == 0 else Counter()  # type: ignore[attr-defined]
        self.bad_steps = own["bad_steps"]

"""A speech LLM from files and to files: exports, training runs, hubs, merged LoRA."""

from pathlib import Path
from typing import Any, Self

from huggingface_hub import snapshot_download
from omegaconf import open_dict

from nemo_mtbi.checkpoints.archive import SHARD, save_nemo
from nemo_mtbi.checkpoints.archive import save_directory as export_directory
from nemo_mtbi.checkpoints.exported import (
    checked_directory,
    export_folder,
    local_config,
    require_every_weight,
)
from nemo_mtbi.checkpoints.fast_loading import fill, without_initialization
from nemo_mtbi.checkpoints.run_directory import RunDirectory
from nemo_mtbi.checkpoints.trained_state import MERGED_LORA
from nemo_mtbi.errors import CheckpointError, ConfigError
from nemo_mtbi.io.tensors import read_tensors
from nemo_mtbi.modules.causal_lm import lent_embedding
from nemo_mtbi.parallel.launch import once_per_node

WEIGHT_PATTERNS = ["*.safetensors", "*.safetensors.index.json"]
HUB_PATTERNS = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt"]


class PersistenceMixin:
    """Mixin for :class:`nemo_mtbi.models.MTBISALM`."""

    @classmethod
    def restore_from(
        cls,
        path: str | Path,
        map_location: str = "cpu",
        tensor_model_parallel_size: int = 1,
        trust_remote_code: bool = False,
    ) -> Self:
        """Open a ``.nemo`` file or a directory that ``export.py`` wrote; nothing else is needed.

        A training run, or an export of what was trained alone, is opened too; that needs the LLM and the encoder by
        the names that its ``model.json`` gives.

        Args:
            tensor_model_parallel_size: ranks that hold the LLM together, in a job that
                :func:`nemo_mtbi.parallel.launch.join_ranks` has joined.
            trust_remote_code: of a training run, whether it may run code that its LLM brings.

        Raises:
            CheckpointError: missing, damaged, hostile, or another kind of model.
        """
        path = Path(path)
        if (path / "model.json").is_file():
            run = RunDirectory(path)
            if run.model_config().get("trust_remote_code") and not trust_remote_code:
                raise CheckpointError(
                    f"{path / 'model.json'} asks to run code that comes with its LLM. If you trust who made it: "
                    "trust_remote_code=true (in Python restore_from(path, trust_remote_code=True))."
                )
            model = cls.from_run(run, tensor_model_parallel_size=tensor_model_parallel_size)
            return model.to(map_location)  # type: ignore[attr-defined]
        together = tensor_model_parallel_size > 1
        with once_per_node(lambda: export_folder(path)) if together else export_folder(path) as folder:
            return cls._from_export(folder, map_location, tensor_model_parallel_size)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, map_location: str = "cpu", **hub: Any) -> Self:
        """Open an exported directory, or one that was pushed to a hub; ``hub`` goes to ``snapshot_download``.

        The checks are those of :meth:`restore_from`: every weight there, safetensors only, no code from the model.
        """
        folder = Path(pretrained_model_name_or_path)
        if not folder.is_dir():
            folder = Path(snapshot_download(str(pretrained_model_name_or_path), allow_patterns=HUB_PATTERNS, **hub))
        return cls._from_export(folder, map_location)

    @classmethod
    def from_run(
        cls,
        run: RunDirectory,
        stage: str | None = None,
        llm_dtype: str | None = None,
        tensor_model_parallel_size: int = 1,
    ) -> Self:
        """The model of a stage of a training run, in evaluation mode.

        Args:
            run: where it was trained.
            stage: default: the furthest finished one.
            llm_dtype: other than the one that it was trained with.
            tensor_model_parallel_size: ranks that hold the LLM together.

        Raises:
            CheckpointError: no training run, or weights that do not fit.
        """
        stage = stage or run.last_stage()
        own = {"llm_dtype": llm_dtype, "tensor_model_parallel_size": tensor_model_parallel_size}
        model: Any = cls(run.model_config() | {k: v for k, v in own.items() if v})  # type: ignore[call-arg]
        model.configure_model()
        run.load_weights(model, stage)
        return model.eval()

    @classmethod
    def _from_export(cls, folder: Path, map_location: str, ranks: int = 1) -> Self:
        files = checked_directory(folder)
        model = (
            cls._sharded(folder, files, map_location, ranks) if ranks > 1 else cls._whole(folder, files, map_location)
        )
        require_every_weight(model, folder, files)
        return model.eval()

    @classmethod
    def _whole(cls, folder: Path, files: dict[str, Path], map_location: str) -> Any:
        with without_initialization():
            model: Any = cls(local_config(folder))  # type: ignore[call-arg]
        fill(model, files)
        return model.to(map_location)

    @classmethod
    def _sharded(cls, folder: Path, files: dict[str, Path], map_location: str, ranks: int) -> Any:
        cfg = local_config(folder) | {"tensor_model_parallel_size": ranks}
        model: Any = cls(cfg)  # type: ignore[call-arg]
        model.llm_weights = folder
        model.configure_model()
        rest = {n: f for n, f in files.items() if "lora_" in n or not n.startswith(("llm.", "embed_tokens."))}
        model.load_trained_state(dict(read_tensors(rest)))
        return model.to(map_location)

    def save_to(self, path: str | Path) -> Path:
        """Write one self-contained ``.nemo`` file."""
        return save_nemo(self, Path(path))

    def save_pretrained(
        self: Any,
        save_directory: str | Path,
        *,
        repo_id: str | None = None,
        push_to_hub: bool = False,
        max_shard_size: str = SHARD,
        **hub: Any,
    ) -> str | None:
        """Write the directory that ``mtbi export hf=...`` writes, in files of weights of at most ``max_shard_size``.

        ``push_to_hub`` uploads one too, in files of the default size (:meth:`push_to_hub`).

        Raises:
            CheckpointError: the folder is in use, or the model is one rank's part of it.
        """
        for name in ("config", "model_card_kwargs"):  # these are the model's own
            hub.pop(name, None)
        folder = export_directory(self, Path(save_directory), max_shard_size=max_shard_size)
        return self.push_to_hub(repo_id or folder.name, **hub) if push_to_hub else None

    def push_to_hub(self, *args: Any, **hub: Any) -> str:
        """``huggingface_hub``'s, which also removes the repository's former files of weights, as the number of files
        may be another one."""
        return super().push_to_hub(*args, **{"delete_patterns": WEIGHT_PATTERNS, **hub})  # type: ignore[misc]

    def merge_lora(self: Any) -> None:
        """Add the LoRA adapters to the LLM's own weights; the model computes the same without them, up to rounding.

        Raises:
            ConfigError: the model has no LoRA.
        """
        if self.config.lora is None:
            raise ConfigError("The model has no LoRA adapters to merge (model.lora is not set).")
        with lent_embedding(self):
            self.llm = self.llm.merge_and_unload()
        self.config.lora = None
        self.references["llm"] += MERGED_LORA  # another LLM from now on: targets of the old one do not fit it
        with open_dict(self.cfg):
            del self.cfg["lora"]

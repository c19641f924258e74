"""Names that modules had up to November 2026, so that scripts, configurations and exports of that time still open.

An import of an old name gives the module that has taken its place, with a ``DeprecationWarning``.
"""

import importlib
import sys
import warnings
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

MOVED = {
    f"nemo_mtbi.{old}": f"nemo_mtbi.{new}"
    for old, new in {
        "data.alignment": "preparation.word_times",
        "data.array_storage": "io.array_storage",
        "data.cache_features": "preparation.cache_features",
        "data.ctc_vocabulary": "modules.connectors.ctc_vocabulary",
        "data.everyday": "preparation.everyday",
        "data.html": "io.html",
        "data.jsonl": "io.jsonl",
        "data.prepare": "preparation.prepare",
        "data.sentences": "preparation.sentences",
        "data.sources": "preparation.sources",
        "data.synthesis": "preparation.synthesis",
        "export": "checkpoints",
        "export.archive": "checkpoints.archive",
        "export.card": "checkpoints.card",
        "export.round_trip": "checkpoints.round_trip",
        "models.checkpointing": "checkpoints.trained_state",
        "models.dialog": "models.conversation",
        "models.encoder": "modules.perception",
        "modules.attention_decoder": "modules.connectors.whisper_decoder",
        "modules.language_model": "models.language_model",
        "targets.record": "data.target",
        "training.cpu": "process",
        "training.report": "evaluation.run_report",
        "training.run_directory": "checkpoints.run_directory",
    }.items()
}


class MovedModules(MetaPathFinder, Loader):
    """Finds old names."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        return ModuleSpec(fullname, self) if fullname in MOVED else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        new = MOVED[spec.name]
        warnings.warn(f"{spec.name} is now {new}.", DeprecationWarning, stacklevel=2)
        module = importlib.import_module(new)
        self.spec = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        module.__spec__ = self.spec  # the import system has set that of the old name


def install() -> None:
    """Make the old names importable."""
    if not any(isinstance(finder, MovedModules) for finder in sys.meta_path):
        sys.meta_path.insert(0, MovedModules())

"""Paired speech and transcripts to Lhotse CutSets with word times. See conf/prepare.yaml and docs/data.md."""

from omegaconf import DictConfig

from nemo_mtbi.examples._launcher import announce, launcher
from nemo_mtbi.io.typed import typed
from nemo_mtbi.preparation.prepare import Preparation, PrepareConfig


@launcher("prepare", {"prepare_schema": PrepareConfig})
def main(cfg: DictConfig) -> None:
    preparation = Preparation(typed(PrepareConfig, cfg))
    written = preparation.run()
    voices = {} if preparation.describer is None else {"voices": preparation.folder / "voices.html"}
    announce("Prepared cuts", {**written, "report": preparation.folder / "report.json", **voices})


if __name__ == "__main__":
    main()

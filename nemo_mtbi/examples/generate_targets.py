"""The text LLM's answers to task prompts on the transcripts. See conf/targets.yaml and docs/targets.md."""

from pathlib import Path

from omegaconf import DictConfig

from nemo_mtbi.examples._launcher import announce, launcher
from nemo_mtbi.io.typed import typed
from nemo_mtbi.targets.config import TargetsConfig


@launcher("targets", {"targets_schema": TargetsConfig})
def main(cfg: DictConfig) -> None:
    from nemo_mtbi import registration  # noqa: F401  registers the prompt formats
    from nemo_mtbi.process import tune
    from nemo_mtbi.targets import workers

    tune()
    config = typed(TargetsConfig, cfg)
    written = workers.run(config)
    folder = Path(config.output_dir)
    announce(
        "Cuts with targets",
        {
            **written,
            "manifest": folder / "manifest.json",
            "report": folder / "report.html",
            "rejected": folder / "rejected",
        },
    )


if __name__ == "__main__":
    main()

"""The text LLM's answers to task prompts on the transcripts. See conf/targets.yaml and docs/targets.md."""

from omegaconf import DictConfig

from nemo_mtbi.examples._launcher import announce, launcher, typed
from nemo_mtbi.targets.config import TargetsConfig


@launcher("targets", {"targets_schema": TargetsConfig})
def main(cfg: DictConfig) -> None:
    from nemo_mtbi import models  # noqa: F401  registers the prompt formats
    from nemo_mtbi.targets.generate import TargetGenerator
    from nemo_mtbi.training.cpu import tune

    tune()
    generator = TargetGenerator(typed(TargetsConfig, cfg))
    written = generator.run()
    announce(
        "Cuts with targets",
        {**written, "manifest": generator.folder / "manifest.json", "report": generator.folder / "report.html"},
    )


if __name__ == "__main__":
    main()

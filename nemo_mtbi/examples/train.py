"""Train a speech LLM by behavior imitation. See conf/train.yaml and docs/training.md."""

import sys

from omegaconf import DictConfig

from nemo_mtbi import console
from nemo_mtbi.config import ModelConfig
from nemo_mtbi.examples._launcher import announce, launcher


@launcher("train", {"speech_llm/schema": ModelConfig})
def main(cfg: DictConfig) -> None:
    from nemo_mtbi import registration  # noqa: F401  registers the plugin with NeMo
    from nemo_mtbi.process import tune
    from nemo_mtbi.training.stages import Stopped, train

    tune(cfg.threads)
    try:
        run = train(cfg)
    except Stopped as stop:
        console.tell(f"\nStopped. {stop}")
        sys.exit(1 if console.within_step() else 0)  # 0: the job that follows goes on
    announce(
        "Training finished",
        {
            "trained tensors": run.weights(run.last_stage()),
            "seen tasks and prompts": run.root / "seen.json",
            "curves": f"tensorboard --logdir {run.root}",
        },
    )


if __name__ == "__main__":
    main()

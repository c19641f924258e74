"""Generalization to unseen prompts and tasks: systems beside the text topline and the cascade.

See conf/benchmark.yaml.
"""

import shlex
import sys

from omegaconf import DictConfig

from nemo_mtbi import console
from nemo_mtbi.examples._launcher import announce, launcher


@launcher("benchmark")
def main(cfg: DictConfig) -> None:
    from nemo_mtbi.evaluation.benchmark import Benchmark
    from nemo_mtbi.process import tune

    tune(cfg.threads)
    paths = Benchmark(cfg).run(shlex.join(["python", "-m", "nemo_mtbi.examples.benchmark", *sys.argv[1:]]))
    if not console.within_step():
        console.say("\n" + paths["md"].read_text())
    announce("Results", dict(paths))


if __name__ == "__main__":
    main()

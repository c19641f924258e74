"""Several worker processes on one machine, with CUDA each on a GPU of its own; or those of a Ray cluster."""

import multiprocessing.context
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from nemo_mtbi import console
from nemo_mtbi.corpus.execution import RAY, spread
from nemo_mtbi.corpus.failures import explained
from nemo_mtbi.corpus.processes import end_with_parent
from nemo_mtbi.corpus.shards import Shard
from nemo_mtbi.errors import ConfigError, DataError, MTBIError
from nemo_mtbi.targets.config import TargetsConfig

PAUSE_SECONDS = 2.0  # between two looks at what is finished


def run(config: TargetsConfig) -> dict[str, Path]:
    """Generate targets with ``config.workers`` processes and merge; returns the written manifests by name.

    Raises:
        DataError: workers died and their shards are not finished.
    """
    from nemo_mtbi.targets.generate import TargetGenerator  # start-up: imports NeMo

    generator = TargetGenerator(config)  # the plan and the index are made once, and errors come from one process
    if config.executor == RAY:
        shards = [s for own in generator.shards.values() for s in own if generator.writer.status(s) is None]
        cluster = config.ray
        if config.engine == "vllm" and cluster.gpus is None and config.vllm.tensor_parallel_size > 1:
            cluster = replace(cluster, gpus=float(config.vllm.tensor_parallel_size))
        done = spread(partial(answering, config), shards, RAY, config.workers, cluster)
        for _ in console.progress(done, total=len(shards), desc="targets", unit="shard"):
            pass
        with explained(generator.folder):
            return generator.merge()
    if config.engine == "vllm":  # a number of GPUs that there are not is said before anything starts
        visible_gpus(config.workers - 1, config.vllm.tensor_parallel_size, gpu_count())
    if config.workers == 1:
        return generator.run()
    context = worker_context()
    alone = config.engine != "vllm"  # vLLM has processes of its own, which a daemon may not have
    answered: Any = context.Array("d", config.workers, lock=False)  # cuts of its shard that each has answered
    processes = [
        context.Process(target=work, args=(config, rank, answered), daemon=alone) for rank in range(config.workers)
    ]
    try:
        for process in processes:
            process.start()
        wait(processes, generator, answered)
    finally:
        for process in processes:  # a process that is no daemon would be waited for
            if process.is_alive():
                process.terminate()
    codes = [p.exitcode for p in processes]
    if any(generator.writer.status(s) is None for shards in generator.shards.values() for s in shards):
        raise DataError(
            f"Workers ended with {codes} before all shards were finished; their messages are in "
            f"{console.log_file() or 'the output above'}. The same command continues."
        )
    if any(codes):
        console.tell(f"Workers ended with {codes}; the others finished their shards.")
    with explained(generator.folder):
        return generator.merge()


def answering(config: TargetsConfig, worker: int) -> Callable[[Shard], str]:
    """What a worker of a Ray cluster does with a shard; Ray gives it the GPU that it may use as its first."""
    from nemo_mtbi import registration  # noqa: F401  the prompt formats; start-up: imports NeMo
    from nemo_mtbi.process import tune
    from nemo_mtbi.targets.generate import TargetGenerator

    os.environ["TQDM_DISABLE"] = "1"
    tune(max(1, round(config.ray.cpus)))
    generator = TargetGenerator(config)

    def answer(shard: Shard) -> str:
        with explained(generator.folder):
            generator.take(shard, wait=True)
        return shard.label

    return answer


def wait(processes: list[Any], generator: Any, done: Sequence[float]) -> None:
    """Until all processes have ended; one bar counts the cuts of all of them.

    Args:
        processes: that work.
        generator: a :class:`nemo_mtbi.targets.generate.TargetGenerator` of their configuration.
        done: cuts of the shard that each works on.
    """
    shards = [shard for own in generator.shards.values() for shard in own]
    total, unfinished = sum(shard.lines for shard in shards), shards
    with console.progress(total=total, desc="targets", unit="cut") as bar:
        while any(p.exitcode is None for p in processes):
            begun = sum(done)  # before the shards: one that is finished in between would count twice
            unfinished = [shard for shard in unfinished if generator.writer.status(shard) is None]
            finished = total - sum(shard.lines for shard in unfinished)
            bar.update(max(0, min(total, int(finished + begun)) - bar.n))
            for process in processes:
                process.join(PAUSE_SECONDS / len(processes))


def worker_context() -> multiprocessing.context.ForkServerContext:
    """Processes that start with everything imported (NeMo takes 10 s) and nothing computed (no threads, no CUDA)."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["nemo_mtbi.registration", "nemo_mtbi.targets.generate"])
    return context


def work(config: TargetsConfig, rank: int, done: Any = None) -> None:
    """One worker process; ``done[rank]`` is where it says how many cuts of its shard are answered."""
    import torch

    from nemo_mtbi import registration  # noqa: F401  the prompt formats; start-up: imports NeMo
    from nemo_mtbi.process import tune
    from nemo_mtbi.targets.generate import TargetGenerator

    end_with_parent()
    gpus = torch.cuda.device_count()
    if config.engine == "vllm":  # its processes use the GPUs that they see, from the first on
        os.environ |= visible_gpus(rank, config.vllm.tensor_parallel_size, gpus)
    elif gpus:
        torch.cuda.set_device(rank % gpus)
    os.environ["TQDM_DISABLE"] = "1"  # the first process has a bar for all
    tune(max(1, (os.cpu_count() or 1) // config.workers))
    try:
        with explained(Path(config.output_dir)):
            generator = TargetGenerator(config)
            if done is not None:
                generator.writer.advance = partial(done.__setitem__, rank)
            generator.work()
    except MTBIError as error:
        print(f"\nError in worker {rank}: {error}", file=sys.stderr)
        sys.exit(1)


def gpu_count() -> int:
    """GPUs that this process sees; it does not begin to use them."""
    import torch  # start-up

    return torch.cuda.device_count()


def visible_gpus(rank: int, size: int, gpus: int) -> dict[str, str]:
    """The environment in which the worker ``rank`` sees ``size`` of the ``gpus`` GPUs that this process sees.

    Raises:
        ConfigError: there are not so many.
    """
    if not gpus:
        return {}
    if gpus < (rank + 1) * size:
        raise ConfigError(
            f"Worker {rank} needs the GPUs {rank * size} to {(rank + 1) * size - 1}, and there are {gpus}. "
            "workers times vllm.tensor_parallel_size must not exceed them."
        )
    seen = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = seen.split(",") if seen else [str(i) for i in range(gpus)]
    return {"CUDA_VISIBLE_DEVICES": ",".join(names[rank * size : (rank + 1) * size])}

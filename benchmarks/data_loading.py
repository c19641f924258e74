"""The training data stream: CPU time of the sampler by ranks, and batches a second, beside NeMo's own.

    python benchmarks/data_loading.py [--quick] [--json FILE]

Cuts of 4 s with 18 targets each (12 kB a line), batches of 16, tokenizer of SmolLM2.

- ``sampler_ms_per_example``: CPU time that rank 0 spends on an example of its own, by the number of data-parallel
  ranks: with a share of the manifest for each rank (ours), and where every rank draws the batches of all (NeMo's way).
- ``drawing_again_ms_per_example``: CPU time that a resumed run needs for each example that it draws again, of a
  manifest and of Shar, and of Shar if its audio were read again.
- ``resumed_shar_cpu_seconds``: to the first batch of a run on Shar, by the batches before it: with the place that its
  checkpoint holds, and drawn from the beginning.
- ``examples_per_s``: of the whole loader by worker processes, over whole passes of 2,000 cuts (SALM's reader loads a
  manifest at the beginning of each), for recordings, cached features and Shar, and of NeMo's
  SALM data set (the same recordings, prompts and answers as multimodal conversations).
- ``examples_per_s_over_salm``: recordings over SALM by worker processes, the median of three pairs that were measured
  one after the other; ``slowest_vs_salm``: the least of them.
- ``training_process_ms_per_batch``: CPU time that a batch of recordings takes in the process that trains, which nothing
  hides: with two workers that read what it draws, and with two that draw too (``force_iterable_dataset``).
- ``share_of_7b_step``: of a step of 16 such examples of 120 positions through a frozen 7B LLM, forward and backward (4
  FLOP a weight and position), at 40 % of 989 TFLOP/s: the whole loader with two workers, and the training process.
"""

import argparse
import copy
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import soundfile
import torch
from lhotse import CutSet
from lhotse.shar import SharWriter
from omegaconf import OmegaConf
from results_file import finish

RATE, SECONDS, BATCH, TARGETS, RECORDINGS = 16_000, 4.0, 16, 18, 64
TEXT = "the quick brown fox jumps over the lazy dog and runs away"
PAIRS, PASS = 3, 2000
STEP_SECONDS = 4 * 7e9 * BATCH * 120 / (0.4 * 989e12)


def write_data(folder: Path, count: int, model: Any) -> dict[str, Path]:
    """A manifest with targets, the same as Shar, and as NeMo's conversations, and fewer of these."""
    from nemo.collections.common.prompts import PromptFormatter

    from nemo_mtbi.data.messages import user_message
    from nemo_mtbi.data.rendering import PromptRenderer, Spoken
    from nemo_mtbi.data.target import TARGETS_FIELD, Target
    from nemo_mtbi.preparation.sources import utterance_cut

    rng = np.random.default_rng(0)
    for i in range(RECORDINGS):
        soundfile.write(folder / f"{i}.flac", 0.1 * rng.standard_normal(round(SECONDS * RATE)), RATE)
    answer = "A fox that is quick and brown jumps over a dog that is lazy, and then it runs away."
    ids = model.tokenizer.tokenizer(answer, add_special_tokens=False)["input_ids"]
    renderer = PromptRenderer(model.tokenizer, PromptFormatter.resolve("chatml"))
    rendering = Target.rendering_of("chatml", "after", model.references["llm"])
    targets = []
    for n in range(TARGETS):
        prompt = f"Please do number {n} with what is said here."
        known = renderer.render([user_message(prompt, Spoken(TEXT), "after")]).positions
        what = f"k{n}", f"task{n}", f"task{n}-0", prompt, answer, ids
        targets.append(Target(*what, rendering=rendering, positions=known))
    custom = {TARGETS_FIELD: [t.to_dict() for t in targets]}
    cuts, talks = [], []
    for i in range(count):
        path = folder / f"{i % RECORDINGS}.flac"
        cuts.append(utterance_cut(f"utt{i:07d}", path, TEXT, "s", "en", custom))
        turns = [
            {"from": "User", "value": targets[i % TARGETS].prompt, "type": "text"},
            {"from": "User", "value": str(path), "duration": SECONDS, "type": "audio"},
            {"from": "Assistant", "value": answer, "type": "text"},
        ]
        talks.append(json.dumps({"id": f"utt{i:07d}", "conversations": turns}))
    CutSet(cuts).to_file(folder / "cuts.jsonl")
    CutSet(cuts[:PASS]).to_file(folder / "few_cuts.jsonl")
    (folder / "few_talks.jsonl").write_text("\n".join(talks[:PASS]) + "\n")
    (folder / "shar").mkdir()
    with SharWriter(str(folder / "shar"), {"recording": "flac"}, shard_size=200) as shar:
        for cut in cuts[:1000]:
            shar.write(cut)
    files = {name: folder / f"{name}.jsonl" for name in ("cuts", "few_cuts", "few_talks")}
    return files | {"shar": folder / "shar"}


def with_features(cfg: dict[str, Any], manifest: Path, folder: Path) -> Path:
    """The manifest with the encoder's features of its recordings."""
    from nemo_mtbi.preparation.cache_features import cache_features
    from nemo_mtbi.preparation.frozen_encoder import FrozenEncoder

    cuts = list(CutSet.from_file(manifest))
    CutSet(cuts[:RECORDINGS]).to_file(folder / "few.jsonl")
    cache_features(FrozenEncoder(OmegaConf.create(cfg)), folder / "few.jsonl")
    encoded = list(CutSet.from_file(folder / "few.jsonl"))
    cuts = [encoded[i % RECORDINGS].with_id(cut.id) for i, cut in enumerate(cuts)]
    CutSet(cuts).to_file(folder / "cached.jsonl")
    return folder / "cached.jsonl"


def section(entry: dict[str, Any], workers: int) -> dict[str, Any]:
    return {
        "input_cfg": [entry],
        "shuffle": True,
        "seed": 0,
        "shard_seed": 0,
        "num_workers": workers,
        "use_multimodal_sampling": True,
        "measure_total_length": True,
        "batch_size": BATCH,
        "use_bucketing": True,
        "num_buckets": 16,
        "bucket_buffer_size": 500,
        "num_cuts_for_bins_estimate": 500,
        "shuffle_buffer_size": 500,
        "concurrent_bucketing": False,
    }


def ours(model: Any, entry: dict[str, Any], workers: int = 0, cached: bool = False, drawing: bool = False) -> Any:
    from nemo_mtbi.training.data_module import data_module

    train = section({"type": "mtbi", **entry}, workers) | {"force_iterable_dataset": drawing}
    cfg = {"cached_features": cached, "train_ds": train}
    return data_module(OmegaConf.create(cfg), model)


def salm(model: Any, talks: Path, workers: int) -> Any:
    from nemo.collections.speechlm2.data import DataModule, SALMDataset

    entry = {"type": "multimodal_conversation", "manifest_filepath": str(talks), "audio_locator_tag": "<|audio|>"}
    cfg = {
        "train_ds": section(entry, workers)
        | {"prompt_format": "chatml", "audio_locator_tag": "<|audio|>", "token_equivalent_duration": 0.16}
    }
    data = DataModule(OmegaConf.create(cfg), tokenizer=model.tokenizer, dataset=SALMDataset(model.tokenizer))
    return data.train_dataloader()


def sampler_cost(model: Any, manifest: Path, ranks: int, shared: bool, batches: int) -> float:
    """CPU milliseconds of rank 0 for each of its examples."""
    data = ours(model, {"cuts_path": str(manifest)})
    data.shared = data.in_segments = shared
    data._get_dp_rank, data._get_world_size = lambda: 0, lambda: ranks
    drawn = iter(data.train_dataloader()._source.sampler)
    return milliseconds_to_draw(drawn, batches)


def milliseconds_to_draw(drawn: Any, batches: int) -> float:
    """CPU milliseconds for an example, after the buffers are full."""
    next(drawn)  # not islice: a Lhotse sampler starts anew at every iter()
    return 1000 * least(time.process_time, lambda: sum(len(next(drawn)) for _ in range(batches)))


def least(clock: Callable[[], float], work: Callable[[], int]) -> float:
    """Seconds for each unit that the work counts: the least of three, on machines that others use."""
    found = []
    for _ in range(3):
        begin = clock()
        count = work()
        found.append((clock() - begin) / count)
    return min(found)


def place_cost(model: Any, entry: dict[str, Any], read: bool, batches: int) -> float:
    """CPU milliseconds for each example that is drawn and dropped."""
    from nemo_mtbi.data.shar import without_data

    data = ours(model, entry)
    data._get_dp_rank, data._get_world_size = lambda: 0, lambda: 1
    loader = data.train_dataloader()._source
    drawn = iter(loader.dataset.sources[0] if "shar_path" in entry else loader.sampler)
    with nullcontext() if read else without_data():
        return milliseconds_to_draw(drawn, batches)


def resumed_cost(model: Any, entry: dict[str, Any], steps: tuple[int, ...]) -> dict[str, dict[int, float]]:
    """CPU seconds of a resumed run before its first batch, by the batches that came before."""
    from nemo_mtbi.data.shar import without_data

    found: dict[str, dict[int, float]] = {"place_kept": {}, "drawn_again": {}}
    for step in steps:
        stopped = ours(model, entry)
        drawn = stopped.train_dataloader()._source.dataset.sources[0]
        with without_data():
            batches = iter(drawn)
            for _ in range(step):
                next(batches)
        stopped.places = {0: drawn.places}
        stopped.trainer = SimpleNamespace(global_step=step)
        for kind, kept in (("place_kept", stopped.state_dict()), ("drawn_again", None)):
            resumed = ours(model, entry)
            resumed.skip, resumed.kept = step, kept
            begin = time.process_time()
            next(iter(resumed.train_dataloader()))
            found[kind][step] = time.process_time() - begin
    return found


def seconds_a_batch(clock: Callable[[], float], loader: Any, batches: int) -> float:
    """After the buffers are full: the least of three times ``batches``."""
    read = iter(loader)
    for _ in range(4):
        next(read)
    return least(clock, lambda: sum(1 for _ in islice(read, batches)))


def rate(loader: Any, batches: int) -> float:
    """Examples a second."""
    return BATCH / seconds_a_batch(time.perf_counter, loader, batches)


def rates_beside_salm(model: Any, data: dict[str, Path], workers: int, batches: int) -> tuple[dict[str, float], float]:
    """The best of :data:`PAIRS` rates of recordings and of SALM, measured in turns, and the median of their ratios."""
    pairs = []
    for _ in range(PAIRS):
        theirs = rate(salm(model, data["few_talks"], workers), batches)
        own = ours(model, {"cuts_path": str(data["few_cuts"])}, workers).train_dataloader()
        pairs.append((rate(own, batches), theirs))
    best = {name: max(pair[i] for pair in pairs) for i, name in enumerate(("recordings", "salm"))}
    return best, statistics.median(own / theirs for own, theirs in pairs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer cuts and batches")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    from nemo_mtbi.models import MTBISALM
    from nemo_mtbi.process import tune

    tune(1)
    count, batches, ranks = (1000, 10, (1, 4)) if arguments.quick else (12_000, 40, (1, 8, 64))
    read = 12 if arguments.quick else PASS // BATCH
    torch.manual_seed(0)
    adapter = {"_target_": "nemo_mtbi.modules.connectors.StackMLPConnector", "factor": 8}
    cfg = {
        "pretrained_llm": "offline:smollm2-135m-instruct",
        "pretrained_asr": "offline:whisper-tiny.en",
        "prompt_format": "chatml",
        "perception": {"input_length": "own", "modality_adapter": adapter},
        "imitation": {"teacher": "online"},
    }
    model = MTBISALM(copy.deepcopy(cfg))
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        data = write_data(folder, count, model)
        cached = with_features(cfg, data["few_cuts"], folder)
        cost: dict[str, dict[int, float]] = {"own_share": {}, "every_rank_draws_all": {}}
        for size in ranks:
            cost["own_share"][size] = sampler_cost(model, data["cuts"], size, True, batches)
            few = max(2, batches // size)
            cost["every_rank_draws_all"][size] = sampler_cost(model, data["cuts"], size, False, few)
        shar = {"shar_path": str(data["shar"])}
        place = {
            "manifest": place_cost(model, {"cuts_path": str(data["cuts"])}, False, batches),
            "shar": place_cost(model, shar, False, batches),
            "shar_read_again": place_cost(model, shar, True, batches),
        }
        resumed = resumed_cost(model, shar, (1100, 2100) if arguments.quick else (1100, 4100, 16_100))
        rates: dict[str, dict[int, float]] = {name: {} for name in ("recordings", "cached_features", "shar", "salm")}
        versus = {}
        for workers in (0, 1, 2):
            beside, versus[workers] = rates_beside_salm(model, data, workers, read)
            for name, best in beside.items():
                rates[name][workers] = best
            loader = ours(model, {"cuts_path": str(cached)}, workers, cached=True).train_dataloader()
            rates["cached_features"][workers] = rate(loader, read)
            rates["shar"][workers] = rate(ours(model, shar, workers).train_dataloader(), read)
        here = {}
        for name, drawing in (("drawn_here", False), ("drawn_by_workers", True)):
            loader = ours(model, {"cuts_path": str(data["cuts"])}, 2, drawing=drawing).train_dataloader()
            here[name] = 1000 * seconds_a_batch(time.process_time, loader, read)
            del loader  # its workers read ahead
    result = {
        "cuts": count,
        "sampler_ms_per_example": cost,
        "drawing_again_ms_per_example": place,
        "resumed_shar_cpu_seconds": resumed,
        "examples_per_s": rates,
        "examples_per_s_over_salm": versus,
        "slowest_vs_salm": min(versus.values()),
        "training_process_ms_per_batch": here,
        "share_of_7b_step": {
            "whole_loader": BATCH / rates["recordings"][2] / STEP_SECONDS,
            **{name: milliseconds / 1000 / STEP_SECONDS for name, milliseconds in here.items()},
        },
    }
    finish(result, arguments.json)


if __name__ == "__main__":
    main()

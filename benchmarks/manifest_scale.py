"""Target generation on a manifest of 1,000,000 lines, without a model: start, memory and resume check.

    python benchmarks/manifest_scale.py [--quick] [--json FILE]

``start_seconds``: from the generator's construction to the first rendered prompt. ``peak_gb``: resident memory of the
process while ``--shards`` shards are drawn, answered by an engine that returns one fixed token, filtered and written.
``resume_check_seconds``: finding out that every shard is finished. ``merge_seconds``: shards to the final manifest.
Shards beyond ``--shards`` get the files of the first ones under their own digests, so that resume and merge work on
the whole million.
"""

import argparse
import json
import resource
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from results_file import finish
from tqdm import tqdm


def write_manifest(path: Path, lines: int) -> None:
    """Short cuts, as prepare_data writes them, one line each."""
    from lhotse import MonoCut, SupervisionSegment
    from lhotse.testing.dummies import dummy_recording

    cut = MonoCut("ID", 0, 1.0, 0, recording=dummy_recording(0))
    cut.supervisions = [SupervisionSegment("ID", "dummy-recording-0000", 0, 1.0, text="TEXT", language="en")]
    template = json.dumps(cut.to_dict())
    with open(path, "w") as out:
        for i in tqdm(range(lines), desc="manifest", unit="line"):
            out.write(template.replace("ID", f"utt{i:07d}").replace("TEXT", f"this is sentence number {i}") + "\n")


class OneToken:
    """An engine whose answers are one token."""

    independent = False

    def generate(self, requests: Sequence[Any], top_k: int = 0, temperature: float = 1.0) -> Iterator[Any]:
        from nemo_mtbi.targets.decoder import Answer

        for request in requests:
            yield Answer(request.key, [42, 2], True)


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="100,000 lines")
    parser.add_argument("--shards", type=int, default=20, help="shards that are really drawn and written")
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


def main() -> None:
    from nemo_mtbi import registration as registration
    from nemo_mtbi.pretrained.offline import resolve_pretrained
    from nemo_mtbi.targets.config import TargetsConfig
    from nemo_mtbi.targets.generate import TargetGenerator

    args = arguments()
    lines = 100_000 if args.quick else 1_000_000
    folder = Path(tempfile.mkdtemp(prefix="manifest_scale"))
    try:
        write_manifest(folder / "cuts.jsonl", lines)
        config = TargetsConfig(
            cuts={"train": str(folder / "cuts.jsonl")},
            output_dir=str(folder / "targets"),
            prompt_format="chatml",
            llm=resolve_pretrained("offline:smollm2-135m-instruct"),
            task_names=["repeat", "about", "rewrite", "keywords"],
        )
        before = peak_gb()
        begin = time.perf_counter()
        generator = TargetGenerator(config)
        shards = generator.shards["train"]
        drawer = generator.drawer
        first = next(iter(shards[0].cuts()))
        drawer.jobs(first, "train", drawer.prepare([first], "train", lambda _: {}))
        start = time.perf_counter() - begin
        generator.engine.engine = OneToken()
        begin = time.perf_counter()
        real = shards[: args.shards]
        statuses = [generator.writer.write(shard) for shard in real]
        per_shard = (time.perf_counter() - begin) / len(real)
        link_the_rest(generator, shards, statuses)
        begin = time.perf_counter()
        again = TargetGenerator(config)
        again.work()
        check = time.perf_counter() - begin
        begin = time.perf_counter()
        again.merge()
        merge = time.perf_counter() - begin
        result = {
            "command": " ".join(["python", *sys.argv]),
            "lines": lines,
            "manifest_mb": round((folder / "cuts.jsonl").stat().st_size / 2**20, 1),
            "start_seconds": round(start, 2),
            "peak_gb": round(peak_gb(), 3),
            "peak_gb_before": round(before, 3),
            "resume_check_seconds": round(check, 2),
            "merge_seconds": round(merge, 1),
            "cuts_per_s_drawn_and_written": round(config.shard_cuts / per_shard, 1),
        }
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    finish(result, args.json)


def link_the_rest(generator: Any, shards: list[Any], statuses: list[Any]) -> None:
    """Give the shards after the written ones the files of those, under their own digests."""
    from nemo_mtbi.io import jsonl

    for shard in shards[len(statuses) :]:
        place = shard.index % len(statuses)
        source, own = generator.writer.paths(shards[place]), generator.writer.paths(shard)
        for kind in ("answers.jsonl", "cuts.jsonl", "rejected.jsonl"):
            own[kind].hardlink_to(source[kind])
        jsonl.write_json(own["json"], asdict(statuses[place]) | {"digest": generator.writer.digest(shard)})


def peak_gb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


if __name__ == "__main__":
    main()

"""Runs the frozen encoder once over a manifest and attaches its features to the cuts; with a frozen recognizer, also
what it writes of them.

In ``<manifest>.features`` each shard of the manifest has its ``.bin`` (Lhotse array storage, bfloat16) and
``.records.jsonl`` (progress). At the end the manifest's lines are rewritten with ``encoder_features``. A killed run
continues, features are found again when lines move; a cut whose audio or encoder changed is encoded again.
"""

import logging
import os
import uuid
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TextIO

import torch
from omegaconf import DictConfig, OmegaConf

from nemo_mtbi import console
from nemo_mtbi.config import plain
from nemo_mtbi.corpus.execution import LOCAL, check_execution, spread
from nemo_mtbi.corpus.failures import alone, explained
from nemo_mtbi.corpus.index import RecordIndex
from nemo_mtbi.corpus.ray_data import RayConfig
from nemo_mtbi.corpus.shards import Shard, plan_manifest
from nemo_mtbi.data.conversation import check_manifest
from nemo_mtbi.data.perturbation import speed_factors
from nemo_mtbi.errors import ConfigError, DataError
from nemo_mtbi.io import jsonl
from nemo_mtbi.preparation.feature_shards import LEFT_OUT, LINES, CacheReport, ShardEncoder, part_of
from nemo_mtbi.preparation.frozen_encoder import FrozenEncoder
from nemo_mtbi.process import tune

SHARD_CUTS = 1024  # of one unit of work: they are in memory, and batches of like lengths are made of them
log = logging.getLogger(__name__)


def cache_features(
    encoder: FrozenEncoder | DictConfig,
    manifest: Path,
    batch_seconds: float = 120.0,
    perturb_speed: Iterable[float] = (),
    executor: str = LOCAL,
    workers: int = 1,
    ray: RayConfig | None = None,
) -> CacheReport:
    """Attach encoder features to every cut of a manifest (see the module's description).

    Args:
        encoder: whose features; as the ``model`` section of its configuration, each worker builds its own.
        manifest: CutSet (.jsonl or .jsonl.gz), rewritten in place under a temporary name.
        batch_seconds: audio encoded together.
        perturb_speed: factors of speed at which every cut is encoded too, for ``perturb_speed`` of training.
        executor, workers, ray: who works (:func:`nemo_mtbi.corpus.execution.spread`); the result is the same.

    Raises:
        ConfigError: an impossible factor or executor.
        DataError: there is no such manifest, no cut is left, or another command works on it.
    """
    speeds = (1.0, *speed_factors(perturb_speed))
    check_execution(executor, workers)
    check_manifest(str(manifest))
    if not manifest.name.endswith((".jsonl", ".jsonl.gz")):
        raise ConfigError(
            f"{manifest}: features are attached to manifests of lines, .jsonl or .jsonl.gz, which are written anew "
            "under their name. Write this one so first (CutSet.to_file)."
        )
    manifest = manifest.resolve()  # what a link points to
    folder = manifest.with_suffix(".features")
    folder.mkdir(exist_ok=True)
    with explained(folder), alone(folder, "cache"):
        before = version_of(manifest)
        shards = plan_manifest(manifest.stem, str(manifest), folder, SHARD_CUTS)
        if not shards:
            raise DataError(f"The manifest {manifest} is empty. Did the step that writes it finish?")
        for kind in (LINES, LEFT_OUT):  # of a run that was killed
            for old in folder.glob(f"*.{kind}.jsonl"):
                old.unlink()
        earlier = [file for file in (manifest.with_suffix(".features.jsonl"),) if file.exists()]  # before shards
        if earlier or any(folder.glob("*.records.jsonl")):
            RecordIndex(folder, lambda: [*earlier, *folder.glob("*.records.jsonl")]).open()
        report, workers = CacheReport(), min(workers, len(shards))
        total = sum(shard.lines for shard in shards) * len(speeds)
        with console.progress(total=total, desc="encoder features", unit="utt") as bar:
            if executor == LOCAL and workers == 1:
                own = FrozenEncoder(encoder) if isinstance(encoder, DictConfig) else encoder
                for shard in shards:
                    report.add(ShardEncoder(own, folder, speeds, batch_seconds, bar.update)(shard))
            else:
                model = encoder if isinstance(encoder, DictConfig) else encoder.given
                threads = max(1, (os.cpu_count() or 1) // workers) if executor == LOCAL else None
                make = partial(_worker, plain(model), folder, speeds, batch_seconds, threads)
                for found in spread(make, shards, executor, workers, ray or RayConfig(), fresh=True):
                    report.add(found)
                    bar.update(found.encoded + found.cached + found.skipped)
        _join(manifest, folder, shards, before)
    if report.skipped:
        log.warning(f"{report.skipped} left out of {manifest}; the reasons: {folder / f'{LEFT_OUT}.jsonl'}")
    return report


def _worker(
    model: dict[str, Any],
    folder: Path,
    speeds: Sequence[float],
    batch_seconds: float,
    threads: int | None,
    number: int,
) -> ShardEncoder:
    from nemo_mtbi import registration  # noqa: F401  our classes as targets of the configuration

    tune(threads)
    if torch.cuda.device_count():
        torch.cuda.set_device(number % torch.cuda.device_count())
    return ShardEncoder(FrozenEncoder(OmegaConf.create(model)), folder, speeds, batch_seconds)


def version_of(manifest: Path) -> tuple[int, int]:
    """Size and time of change."""
    status = manifest.stat()
    return status.st_size, status.st_mtime_ns


def _join(manifest: Path, folder: Path, shards: list[Shard], before: tuple[int, int]) -> None:
    """The manifest, and the list of what is left out, from its shards' parts.

    Raises:
        DataError: nothing is left, or the manifest has been changed meanwhile; it stays as it is.
    """
    left_out = folder / f"{LEFT_OUT}.jsonl"
    lines = [part_of(folder, shard, LINES) for shard in shards]
    _add(left_out, [part_of(folder, shard, LEFT_OUT) for shard in shards], lines)
    if not any(part.stat().st_size for part in lines):
        raise DataError(
            f"Of {manifest} no cut could be encoded, so it stays as it was. The reasons: {left_out}; are the "
            "recordings where the manifest says?"
        )
    if version_of(manifest) != before:
        raise DataError(f"{manifest} has changed while it was worked on. Run the same command again.")
    _concatenate(manifest, lines)


def _add(left_out: Path, parts: list[Path], lines: list[Path]) -> None:
    """What runs have left out, the lines of cuts included, which the manifest has no more; but for those that it has
    again.
    """
    earlier = list(jsonl.read(left_out)) if left_out.is_file() else []
    names = {record["id"] for record in earlier}
    seen = (record["id"] for part in [*parts, *lines] for record in jsonl.read(part)) if names else ()
    now = {name for name in seen if name in names}
    with jsonl.replacing(left_out, uuid.uuid4().hex) as out:
        out.writelines(jsonl.dumps(record) + "\n" for record in earlier if record["id"] not in now)
        _copy(parts, out)
    _remove(parts)


def _concatenate(path: Path, parts: list[Path]) -> None:
    with jsonl.replacing(path, uuid.uuid4().hex) as out:
        _copy(parts, out)
    _remove(parts)


def _copy(parts: list[Path], out: TextIO) -> None:
    for part in parts:
        with open(part, encoding="utf-8") as lines:
            out.writelines(lines)


def _remove(parts: list[Path]) -> None:
    for part in parts:
        part.unlink()

"""Runs the frozen encoder once over a manifest and attaches its features to the cuts.

Files: ``<manifest>.features.bin`` (Lhotse array storage, bfloat16), ``<manifest>.features.jsonl`` (progress) beside the
manifest, whose lines are then rewritten with ``encoder_features``. A killed run continues; a cut whose audio or encoder
changed is encoded again.
"""

import logging
import uuid
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import torch
from lhotse import CutSet
from lhotse.cut import Cut
from nemo.collections.speechlm2.modules import AudioPerceptionModule
from omegaconf import DictConfig
from torch import Tensor

from nemo_mtbi import console
from nemo_mtbi.config import model_config, plain
from nemo_mtbi.data.audio import collate_waveforms, mono_samples
from nemo_mtbi.data.audio_windows import WINDOW_SECONDS
from nemo_mtbi.data.conversation import check_manifest
from nemo_mtbi.data.feature_cache import (
    AUDIO_FIELD,
    KEY_FIELD,
    WINDOWS,
    audio_identity,
    features_key,
    is_features,
    windows_field,
)
from nemo_mtbi.data.perturbation import features_field, perturbed, speed_factors
from nemo_mtbi.io import jsonl
from nemo_mtbi.io.array_storage import RawChunkyWriter
from nemo_mtbi.models.speech import cut_windows, encode
from nemo_mtbi.modules.perception import encoder_key, freeze, require_fixed_features, setup_perception
from nemo_mtbi.pretrained.fingerprint import fingerprint
from nemo_mtbi.pretrained.offline import resolve_pretrained

FILE_BYTES = 8 * 2**30  # about the size of a file of features
CUTS_TOGETHER = 4096  # cuts that are in memory, from which batches of like lengths are made
log = logging.getLogger(__name__)


class FrozenEncoder:
    """Preprocessor and encoder alone, without the LLM: what fills the feature cache.

    Args:
        cfg: the ``model`` section of a configuration; its connector and LLM are not built.
    """

    def __init__(self, cfg: DictConfig) -> None:
        config = model_config(cfg)
        self.cfg = DictConfig(plain(cfg))
        self.cfg.pretrained_weights = True
        self.cfg.perception.pop("fusion", None)  # what is cached comes before it
        self.cfg.perception.modality_adapter = {
            "_target_": "nemo.collections.speechlm2.modules.perception.IdentityConnector"
        }
        self.llm = SimpleNamespace(config=SimpleNamespace(hidden_size=1))
        self.perception: Any = None
        setup_perception(self)
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.perception = cast(AudioPerceptionModule, self.perception).to(self.device).eval()
        freeze(self.perception.named_parameters(prefix="perception"), config)
        require_fixed_features(self.perception)
        self.perception.encoder.to(getattr(torch, config.encoder_dtype))
        self.key = encoder_key(
            self.cfg.perception, fingerprint(resolve_pretrained(config.pretrained_asr)), config.encoder_dtype
        )
        self.sampling_rate: int = self.perception.preprocessor.featurizer.sample_rate

    def encode(self, audios: Tensor, audio_lens: Tensor) -> tuple[Tensor, Tensor]:
        return encode(self.perception, audios.to(self.device), audio_lens.to(self.device))


@dataclass(frozen=True)
class Version:
    """A cut at one speed, and the key of its features."""

    cut: Cut
    key: str


@dataclass
class CacheReport:
    """What a run did: utterances encoded now, found in the cache, left out; bytes and hours of speech in the cache."""

    encoded: int = 0
    cached: int = 0
    skipped: int = 0
    bytes: int = 0
    hours: float = 0.0

    def count(self, versions: list[Version], records: list[dict[str, Any]]) -> None:
        """A cut whose features are there."""
        self.bytes += sum(2 * int(np.prod(record["array"]["shape"])) for record in records)
        self.hours += sum(version.cut.duration for version in versions) / 3600


def cache_features(
    encoder: FrozenEncoder, manifest: Path, batch_seconds: float = 120.0, perturb_speed: Iterable[float] = ()
) -> CacheReport:
    """Attach encoder features to every cut of a manifest (see the module's description).

    Args:
        encoder: whose features.
        manifest: CutSet (.jsonl), rewritten in place under a temporary name.
        batch_seconds: audio encoded together.
        perturb_speed: factors of speed at which every cut is encoded too, for ``perturb_speed`` of training.

    Raises:
        ConfigError: an impossible factor.
        DataError: there is no such manifest.
    """
    speeds = (1.0, *speed_factors(perturb_speed))
    check_manifest(str(manifest))
    report = CacheReport()
    with jsonl.Journal(manifest.with_suffix(".features.jsonl"), lambda record: True, "key") as journal:
        _fill(encoder, manifest, speeds, batch_seconds, journal, report)
        with jsonl.replacing(manifest, uuid.uuid4().hex) as out:
            for cut in CutSet.from_file(manifest):
                versions = _versions(cut, speeds, encoder.key)
                if all(version.key in journal for version in versions):
                    records = [journal[version.key] for version in versions]
                    report.count(versions, records)
                    out.write(jsonl.dumps(_with_features(cut, speeds, versions, records)) + "\n")
    return report


def _fill(
    encoder: FrozenEncoder,
    manifest: Path,
    speeds: Sequence[float],
    batch_seconds: float,
    journal: jsonl.Journal,
    report: CacheReport,
) -> None:
    """Encode what the journal does not have, some thousand cuts at a time."""
    cuts = iter(CutSet.from_file(manifest))
    with open(manifest, "rb") as lines:
        total = sum(1 for _ in lines) * len(speeds)
    with (
        RawChunkyWriter(manifest.with_suffix(".features.bin"), max_bytes=FILE_BYTES) as writer,
        console.progress(total=total, desc="encoder features", unit="utt") as bar,
    ):
        while some := list(islice(cuts, CUTS_TOGETHER)):
            versions = [version for cut in some for version in _versions(cut, speeds, encoder.key)]
            missing = [version for version in versions if version.key not in journal]
            report.cached += len(versions) - len(missing)
            bar.update(len(versions) - len(missing))
            for batch in _batches(missing, batch_seconds):
                for version, features, begins in _encode(encoder, batch, report):
                    array = writer.store_array(version.cut.id, features)
                    writer.flush()
                    record = {"key": version.key, "array": array.to_dict()}
                    if len(begins) > 1 or version.cut.duration > WINDOW_SECONDS:
                        record["windows"] = begins
                    journal.write(record)
                    report.encoded += 1
                bar.update(len(batch))


def _versions(cut: Cut, speeds: Sequence[float], encoder_key: str) -> list[Version]:
    own = [perturbed(cut, factor) for factor in speeds]
    return [Version(version, features_key(version, encoder_key)) for version in own]


def _with_features(
    cut: Cut, speeds: Sequence[float], versions: list[Version], records: list[dict[str, Any]]
) -> dict[str, Any]:
    """The cut's line with the features of its versions, and without those that it had."""
    line = cut.to_dict()
    custom = {k: v for k, v in line.get("custom", {}).items() if not is_features(k.removesuffix(WINDOWS))}
    for speed, record in zip(speeds, records, strict=True):
        custom[features_field(speed)] = record["array"]
        if "windows" in record:
            custom[windows_field(features_field(speed))] = record["windows"]
    line["custom"] = custom | {KEY_FIELD: versions[0].key, AUDIO_FIELD: audio_identity(cut)}
    return line


def _batches(versions: list[Version], seconds: float) -> Iterator[list[Version]]:
    batch: list[Version] = []
    for version in sorted(versions, key=lambda v: v.cut.duration):
        if batch and version.cut.duration * (len(batch) + 1) > seconds:
            yield batch
            batch = []
        batch.append(version)
    if batch:
        yield batch


def _encode(
    encoder: FrozenEncoder, versions: list[Version], report: CacheReport
) -> Iterator[tuple[Version, torch.Tensor, list[int]]]:
    """Features (T, D) and the frames at which their windows begin, of each version that can be read."""
    waveforms: list[Any] = []
    kept: list[Version] = []
    for version in versions:
        try:
            waveforms.append(mono_samples(version.cut, encoder.sampling_rate))
            kept.append(version)
        except Exception as error:  # one broken recording must not stop the run
            report.skipped += 1
            log.warning(f"{version.cut.id} left out: {type(error).__name__}: {str(error)[:200]}")
    if not kept:
        return
    audios, lengths, windows = cut_windows(encoder.perception, *collate_waveforms(waveforms))
    features, counts = encoder.encode(audios, lengths)
    rows = [row[:count].to("cpu", torch.bfloat16) for row, count in zip(features, counts.tolist(), strict=True)]
    owners = range(len(kept)) if windows is None else windows.owners
    parts: list[list[torch.Tensor]] = [[] for _ in kept]
    for owner, row in zip(owners, rows, strict=True):
        parts[owner].append(row)
    for version, own in zip(kept, parts, strict=True):
        yield version, torch.cat(own), [0, *np.cumsum([len(row) for row in own[:-1]]).tolist()]

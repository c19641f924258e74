"""NeMo's data module over our dataset: options that follow from the model, resuming, counts of whole steps."""

import logging
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from lhotse.dataset import DynamicBucketingSampler
from lhotse.serialization import open_best
from nemo.collections.common.data.lhotse import get_lhotse_dataloader_from_config
from nemo.collections.common.data.lhotse.broadcasting import BroadcastingDataLoader, is_dp_source_rank
from nemo.collections.common.data.lhotse.dataloader import (
    get_lhotse_sampler_from_config,
    make_structured_with_schema_warnings,
)
from nemo.collections.speechlm2.data import DataModule
from omegaconf import DictConfig, OmegaConf

from nemo_mtbi.checkpoints.run_directory import ALIGNMENT
from nemo_mtbi.data.conversation import INPUT_TYPE
from nemo_mtbi.data.cut_lines import has_lines
from nemo_mtbi.data.dataset import MTBIDataset
from nemo_mtbi.data.messages import require_same_rendering
from nemo_mtbi.data.shar import without_data
from nemo_mtbi.errors import ConfigError, DataError
from nemo_mtbi.models.mtbi_salm import MTBISALM
from nemo_mtbi.models.objective import WINDOW_COUNTS, term_counts
from nemo_mtbi.modules.connectors.base import Connector
from nemo_mtbi.modules.perception import connector_of, writing_key
from nemo_mtbi.training.resume import Dealt, Wrapped, skip_batches, spare_workers, with_sampler
from nemo_mtbi.training.segments import SEGMENT_BATCHES, Place, Segments

log = logging.getLogger(__name__)

# In examples, of NeMo's samplers. Lhotse adds the second one to the first.
BUFFERS = ("bucket_buffer_size", "shuffle_buffer_size", "num_cuts_for_bins_estimate")
SHUFFLE_BUFFER = 10_000  # NeMo's default
SHAR_SHUFFLE_BUFFER = 500
UNREADABLE_BATCHES = 10
SEEDS_APART = 1_000_003


class WindowedLoader(Wrapped):
    """Batches that know the counts of all micro-batches of their optimizer step (``window_counts``).

    Each term of the loss is divided by its own count over the step, which its first micro-batch must know already.

    Args:
        loader: of training batches.
        accumulated: micro-batches of a step.
        connector: counts transcript tokens.
    """

    def __init__(self, loader: Iterable[dict[str, Any]], accumulated: int, connector: Connector | None) -> None:
        super().__init__(loader)
        self.accumulated, self.connector = accumulated, connector

    def __iter__(self) -> Iterator[dict[str, Any]]:
        batches = iter(self.source)
        while window := list(islice(batches, self.accumulated)):
            total: Counter[str] = Counter()
            for batch in window:
                total.update(term_counts(batch["examples"], self.connector))
            for batch in window:
                yield {**batch, WINDOW_COUNTS: dict(total)}


class Readable(Wrapped):
    """A loader without the batches in which no recording could be read (None): another one comes in their place, so
    that all ranks make their steps.

    Args:
        loader: of batches.
        dropped: such batches before its first one.

    Raises:
        DataError: there were :data:`UNREADABLE_BATCHES` of them in a row.
    """

    def __init__(self, loader: Any, dropped: int = 0) -> None:
        super().__init__(loader)
        self.before, self.places = dropped, list[int]()

    def dropped_before(self, given: int) -> int:
        """Batches left out before the ``given``-th one (from 0) was read; others may have been since, read ahead."""
        return self.before + sum(place < given for place in self.places)

    def __iter__(self) -> Iterator[Any]:
        self.places = []  # of each that was left out, the number of those that were given before
        return self._read(iter(self.source), self.places)

    def _read(self, batches: Iterator[Any], places: list[int]) -> Iterator[Any]:
        in_a_row = given = 0
        for batch in batches:
            in_a_row = 0 if batch is not None else in_a_row + 1
            if in_a_row == UNREADABLE_BATCHES:
                raise DataError(
                    f"No recording of {in_a_row} batches one after the other could be read (the log names them). Is "
                    "the storage there?"
                )
            if batch is None:
                places.append(given)
            else:
                given += 1
                yield batch


class Waited(Wrapped):
    """A loader that counts the ``seconds`` in which its batches were waited for."""

    def __init__(self, loader: Any) -> None:
        super().__init__(loader)
        self.seconds = 0.0

    def __iter__(self) -> Iterator[Any]:
        return self._counted(iter(self.source))

    def _counted(self, batches: Iterator[Any]) -> Iterator[Any]:
        while True:
            begin = time.monotonic()
            try:
                batch = next(batches)
            except StopIteration:
                return
            self.seconds += time.monotonic() - begin
            yield batch


class ResumableData(DataModule):
    """NeMo's data module, whose training data goes on after ``skip`` batches.

    With ``shared``, a data-parallel rank draws its batches from its own share of the cuts. NeMo lets every rank draw
    the batches of all, so that the cost of one grows with their number. With ``in_segments``, it begins close to its
    place (:mod:`nemo_mtbi.training.segments`), which is part of the checkpoints.
    """

    skip = 0
    in_segments = False
    kept: dict[str, Any] | None = None  # of a checkpoint, what ``state_dict`` gave
    readable = Readable(())  # before there is a loader
    segments: Segments | None = None
    segment_batches = SEGMENT_BATCHES
    drawing_workers = 0
    accumulated = 1
    seed = 0
    shared = False
    connector: Connector | None = None
    waited = Waited(())  # before there is a loader

    def train_dataloader(self) -> Any:
        if self.drawing_workers and not self.cfg.train_ds.get("num_workers"):  # "randomized" is every rank's there
            self.cfg.train_ds.shard_seed = self.seed + SEEDS_APART * self._get_dp_rank()
        for entry in input_entries(self.cfg.train_ds):
            entry.rank, entry.world_size = self._get_dp_rank(), self._get_world_size()
            entry.by_worker = self.drawing_workers > 0  # NeMo lets them all read a manifest from its first line
            entry.whole = "shar_path" in entry
        with without_data():  # from which NeMo estimates the buckets
            loader = self._loader()
        own = self._kept_of_rank()
        dropped = own.get("dropped", 0)
        skip = self.skip + dropped
        if self.in_segments and loader._source is not None:
            skip -= self._begin(loader._source.sampler, skip, own) * self.segment_batches
            loader._source = with_sampler(loader._source, self.segments)
        if loader._source is not None:
            spare_workers(loader._source)
        self.readable = Readable(skip_batches(loader, skip, self.drawing_workers), dropped)
        loader = self.readable
        loader = WindowedLoader(loader, self.accumulated, self.connector) if self.accumulated > 1 else loader
        self.waited = Waited(loader)
        return self.waited

    def _build_test_dataloader(self, cfg: DictConfig) -> Any:
        """NeMo's, in which every example is in one batch of one rank."""
        if "datasets" in cfg:
            return super()._build_test_dataloader(cfg)
        mesh, source = self._get_device_mesh(), None
        if is_dp_source_rank(mesh):
            source = get_lhotse_dataloader_from_config(
                cfg, global_rank=0, world_size=1, dataset=self.dataset, tokenizer=self.tokenizer
            )
            source = with_sampler(source, Dealt(source.sampler, self._get_dp_rank(), self._get_world_size()))
            spare_workers(source)
        return BroadcastingDataLoader(source=source, device_mesh=mesh)

    def _begin(self, whole: Any, skip: int, kept: dict[str, Any]) -> int:
        """Make the segments from a batch on; returns the number of the first one. ``whole``: NeMo's sampler."""
        section = self.cfg.train_ds
        entries = len(list(input_entries(section)))
        bins = None
        if isinstance(whole, DynamicBucketingSampler) and section.get("bucket_duration_bins") is None:
            bins = [float(bin) for bin in whole.duration_bins]  # estimated once

        def sampler_of(number: int, place: Place | None) -> Any:
            own = section.copy()
            own.shard_seed = order_seed(section) + SEEDS_APART * number
            if bins is not None:
                own.bucket_duration_bins = bins
            for entry in input_entries(own):
                entry.place = place and place.of_entry(entry.entry)
            own = make_structured_with_schema_warnings(own)  # not NeMo's loader, which seeds all generators anew
            return get_lhotse_sampler_from_config(own, global_rank=0, world_size=1, tokenizer=self.tokenizer)[0]

        place = None
        self.sources = [str(entry.cuts_path) for entry in input_entries(section)]
        number = skip // self.segment_batches
        if kept.get("place") and kept["sources"] != self.sources:
            log.warning("The manifests to train on are others than before, so their data is drawn up to its place.")
        elif kept.get("place") and (kept["number"], kept["batches"]) == (number, self.segment_batches):
            place = Place(**kept["place"])
        first = (0, None) if place is None else (kept["number"], place)
        self.segments = Segments(sampler_of, entries, first, self.segment_batches)
        return first[0]

    def _kept_of_rank(self) -> dict[str, Any]:
        """What this rank's module kept in the checkpoint; nothing where there were more or fewer ranks."""
        ranks = (self.kept or {}).get("ranks", [])
        return ranks[self._get_dp_rank()] if len(ranks) == self._get_world_size() else {}

    def state_dict(self) -> dict[str, Any]:
        """Of each data-parallel rank the batches that could not be read, and the place of the segment that it is in
        (:class:`~nemo_mtbi.training.segments.Place`)."""
        if self.trainer is None:
            return {}
        given = self.trainer.global_step * self.accumulated
        dropped = self.readable.dropped_before(given - self.skip)
        number = (given + dropped) // self.segment_batches
        own: dict[str, Any] = {"dropped": dropped}
        place = self.segments.places.get(number) if self.segments is not None else None
        if place is not None:
            own |= {"number": number, "batches": self.segment_batches, "place": vars(place), "sources": self.sources}
        found: list[Any] = [(self._get_dp_rank(), own)]
        if torch.distributed.is_initialized():
            found *= torch.distributed.get_world_size()
            torch.distributed.all_gather_object(found, (self._get_dp_rank(), own))
        by_rank: dict[int, dict[str, Any]] = {}
        for rank, kept in found:  # ranks that hold the LLM together have one source of batches
            by_rank[rank] = max(by_rank.get(rank, {}), kept, key=len)
        return {"ranks": [by_rank[rank] for rank in sorted(by_rank)]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """What is needed of it was read before the loaders were made (``resume.state_of_data``)."""

    def _loader(self) -> BroadcastingDataLoader:
        """NeMo's, with batches in which nothing could be read as they are: its own are then the ones before again."""
        mesh, source = self._get_device_mesh(), None
        if is_dp_source_rank(mesh):
            rank, count = (0, 1) if self.shared else (self._get_dp_rank(), self._get_world_size())
            source = get_lhotse_dataloader_from_config(
                self.cfg.train_ds, global_rank=rank, world_size=count, dataset=self.dataset, tokenizer=self.tokenizer
            )
        return BroadcastingDataLoader(source=source, device_mesh=mesh)


def data_module(
    data_cfg: DictConfig, model: MTBISALM, step: int = 0, accumulated: int = 1, kept: dict[str, Any] | None = None
) -> ResumableData:
    """NeMo's data module over our dataset; options that follow from the model are filled in.

    Args:
        step: optimizer step at which training goes on, after ``accumulated`` batches each: with the very next batch.
        kept: state of the module in the checkpoint of that step. Without one, and where batches are not drawn in
            segments, the data is drawn up to its place again, without reading audio.
    """
    cfg = DictConfig(OmegaConf.to_container(data_cfg, resolve=True))
    cached = cfg.pop("cached_features")
    connector = connector_of(model.perception)
    emits_tokens = connector is not None and connector.emits_tokens
    drawing_workers = workers_that_draw(cfg.get("train_ds"))
    shared = drawing_workers == 0
    seed = order_seed(cfg.get("train_ds") or OmegaConf.create())
    in_segments = False
    if "train_ds" in cfg and cfg.train_ds.get("shuffle") and not reads_shar(cfg.train_ds):
        in_segments = order_lines(cfg.train_ds) and shared
        in_segments &= not (cfg.train_ds.get("concurrent_bucketing", True) or cfg.train_ds.get("multi_config"))
    if "train_ds" in cfg and cfg.train_ds.get("use_bucketing") and cfg.train_ds.get("concurrent_bucketing", True):
        log.warning(
            "data.train_ds.concurrent_bucketing=true: no run, and no resumed one, draws the same batches again."
        )
    for section in ("train_ds", "validation_ds"):
        if section in cfg:
            cfg[section].prompt_format = model.cfg.prompt_format
            cfg[section].audio_locator_tag = model.audio_locator_tag
            cfg[section].token_equivalent_duration = None if emits_tokens else model.token_equivalent_duration
            cfg[section].sample_rate = model.sampling_rate
            cfg[section].setdefault("pin_memory", torch.cuda.is_available())
            if cfg[section].get("shuffle"):
                cfg[section].setdefault("shuffle_buffer_size", shuffle_buffer(cfg[section]))
            for key in BUFFERS:
                if cfg[section].get(key):
                    cfg[section][key] = enough(cfg[section], cfg[section][key])
            if section == "validation_ds":  # all ranks draw the same, and each keeps its share
                cfg[section].setdefault("shard_seed", order_seed(cfg[section]))
            elif drawing_workers > 0:
                cfg[section].shard_seed = "randomized"  # an integer would give every rank and worker the same data
            for entry in input_entries(cfg[section]):
                if section == "train_ds":  # tasks, wordings and speeds of the visits
                    entry.setdefault("seed", seed_of(cfg[section]))
                entry.speech_position = model.config.speech_position
                entry.shared_prefix = model.prefixes is not None
                if connector is not None:
                    entry.acoustic = {
                        "per_second": connector.positions_per_second,
                        "per_window": connector.positions_per_window,
                        "per_audio": 0 if model.prefixes is not None else connector.positions_per_audio,  # kept
                        "window_seconds": model.perception.window_seconds,
                    }
                entry.every_cut = model.stage == ALIGNMENT
                entry.with_ids = any(key in part for part in parts_of(cfg[section]) for key in ("min_tpt", "max_tpt"))
    dataset = targets_dataset(model, cached)
    require_same_rendering(dataset.renderer, model.audio_locator_tag, model.config.speech_position)
    data = ResumableData(cfg, tokenizer=model.tokenizer, dataset=dataset)
    data.skip = step * accumulated
    data.drawing_workers = drawing_workers
    data.shared, data.seed = shared, seed
    data.in_segments, data.kept = in_segments, kept
    data.accumulated, data.connector = accumulated, connector
    return data


def targets_dataset(model: MTBISALM, cached_features: bool = False) -> MTBIDataset:
    """What a model reads of conversations."""
    imitation = model.config.imitation
    return MTBIDataset(
        model.tokenizer,
        model.cfg.prompt_format,
        cached_features=cached_features,
        teacher_temperature=imitation.temperature if imitation.teacher == "cached" and imitation.w_kl > 0 else None,
        encoder_key=model.encoder_key,
        writing_key=writing_key(model.perception) if cached_features else None,
        llm_key=model.references["llm"],
        sampling_rate=model.sampling_rate,
    )


def order_lines(section: DictConfig) -> bool:
    """Let the lines of a section's manifests come in random order; NeMo's buffer is for what is read through.

    Returns:
        Whether all are manifests whose lines can be read where they stand.
    """
    entries = list(input_entries(section))
    for number, entry in enumerate(entries):  # two entries may read the same cuts
        entry.order_seed = order_seed(section) + SEEDS_APART * number
        entry.dealt = section.get("batch_size") or 1
        entry.entry = number
    if not all(has_lines(entry.get("cuts_path")) for entry in entries):
        return False
    section.shuffle, section.shuffle_buffer_size = False, None
    return True


def order_seed(section: DictConfig) -> int:
    """Of the order of a manifest's lines, on which all ranks must agree."""
    return seed_of(section, "shard_seed", "seed")


def seed_of(section: DictConfig, *keys: str) -> int:
    """The first of the section's ``keys`` (default: ``seed``) that is a number; 0 without one."""
    seeds = (section.get(key) for key in keys or ("seed",))
    return next((seed for seed in seeds if isinstance(seed, int) and seed >= 0), 0)


def enough(section: DictConfig, most: int) -> int:
    """Examples that a buffer of ``most`` needs: those of small manifests go round and round in it before the first
    batch. At least some batches of every bucket; all of ``most`` for Shar and pipes.
    """
    found = 0
    for entry in input_entries(section):
        path = entry.get("cuts_path")
        if not isinstance(path, str) or not Path(path).is_file():
            return most
        with open_best(path) as lines:
            found += sum(1 for _ in islice(lines, most - found))
    batches = (section.get("num_buckets") or 1) * (section.get("batch_size") or 16)
    return min(most, max(found, batches))


def shuffle_buffer(section: DictConfig) -> int | None:
    """Examples that every process that draws holds for shuffling, beside those for buckets.

    Shar's shards are shuffled as such, and its cuts come with their audio or features.
    """
    if not reads_shar(section):
        return SHUFFLE_BUFFER
    return None if section.get("use_bucketing") else SHAR_SHUFFLE_BUFFER


def workers_that_draw(section: DictConfig | None) -> int:
    """Processes that draw batches and read them, in turns (Shar, ``force_iterable_dataset``); 0 otherwise.

    Raises:
        ConfigError: there are none to do it, or Shar is to be read by others.
    """
    if section is None:
        return 0
    if section.get("force_iterable_dataset") and not section.get("num_workers"):
        raise ConfigError(
            "data.train_ds.force_iterable_dataset=true lets the loader's workers draw the batches; set "
            "data.train_ds.num_workers to at least 1."
        )
    shar = reads_shar(section)
    if shar and section.get("force_map_dataset"):
        raise ConfigError(
            "data.train_ds.force_map_dataset=true: Shar is read by the processes that draw the batches. Leave it out."
        )
    return max(section.get("num_workers") or 0, 1) if shar or section.get("force_iterable_dataset") else 0


def reads_shar(section: DictConfig) -> bool:
    return any("shar_path" in entry for entry in input_entries(section))


def parts_of(section: DictConfig) -> list[DictConfig]:
    """A section and the data sets in it, which have options of their own."""
    return [section, *section.get("datasets", {}).values()]


def input_entries(section: DictConfig) -> Iterator[DictConfig]:
    """``input_cfg`` entries of our type in a train or validation section, groups included."""
    for part in parts_of(section):
        queue = list(part.get("input_cfg") or [])
        while queue:
            entry = queue.pop()
            queue += list(entry.get("input_cfg") or [])
            if entry.get("type") == INPUT_TYPE:
                yield entry

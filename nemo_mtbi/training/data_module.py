"""NeMo's data module over our dataset: options that follow from the model, resuming, counts of whole steps."""

import logging
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any

import torch
from lhotse.dataset import DynamicBucketingSampler
from nemo.collections.common.data.lhotse import get_lhotse_dataloader_from_config
from nemo.collections.common.data.lhotse.broadcasting import BroadcastingDataLoader, is_dp_source_rank
from nemo.collections.speechlm2.data import DataModule
from omegaconf import DictConfig, OmegaConf

from nemo_mtbi.checkpoints.run_directory import ALIGNMENT
from nemo_mtbi.data.dataset import MTBIDataset
from nemo_mtbi.data.messages import require_same_rendering
from nemo_mtbi.data.shar import without_data
from nemo_mtbi.errors import DataError
from nemo_mtbi.models.mtbi_salm import MTBISALM
from nemo_mtbi.models.objective import WINDOW_COUNTS, term_counts
from nemo_mtbi.modules.connectors.base import Connector
from nemo_mtbi.modules.perception import connector_of, writing_key
from nemo_mtbi.training.resume import Dealt, LaterBatches, Wrapped, spare_workers, with_dataset, with_sampler
from nemo_mtbi.training.sections import (
    BUFFERS,
    SEEDS_APART,
    enough,
    identity,
    input_entries,
    number_entries,
    numbers_of,
    order_seed,
    parts_of,
    seed_of,
    shuffle_buffer,
    workers_of,
    workers_that_draw,
)
from nemo_mtbi.training.segments import (
    KEPT_PLACES,
    SEGMENT_BATCHES,
    DrawnByWorkers,
    Place,
    SectionSampler,
    Segments,
)

log = logging.getLogger(__name__)

SECTIONS = ("train_ds", "validation_ds")
UNREADABLE_BATCHES = 10


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


class Placed(Wrapped):
    """Batches of a loader whose workers draw (:class:`DrawnByWorkers`); the places that they tell go to ``places``."""

    def __init__(self, loader: Any, places: dict[int, dict[int, Place | None]]) -> None:
        super().__init__(loader)
        self.places = places

    def __iter__(self) -> Iterator[Any]:
        return self._placed(iter(self.source))

    def _placed(self, told: Iterator[Any]) -> Iterator[Any]:
        for batch, new in told:
            if new is not None:
                own = self.places[new.worker]
                own.update(new.places)
                for number in sorted(own)[:-KEPT_PLACES]:
                    del own[number]
            yield batch


class Begun(Wrapped):
    """A loader whose iterator is given again if nothing was taken from it: Lightning makes one, and drops it, before
    that with which it trains, and the loader's workers may have drawn the first batches."""

    def __init__(self, loader: Any) -> None:
        super().__init__(loader)
        self.waiting: Iterator[Any] | None = None

    def __iter__(self) -> Iterator[Any]:
        if self.waiting is None:
            self.waiting = iter(self.source)
        return self._taken(self.waiting)

    def _taken(self, batches: Iterator[Any]) -> Iterator[Any]:
        self.waiting = None
        yield from batches


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
    place (:mod:`nemo_mtbi.training.segments`), which is part of the checkpoints. ``drawing_workers``: processes that
    draw batches and read them, in turns (Shar, ``force_iterable_dataset``); 0: this process draws, others read.
    """

    skip = 0
    in_segments = False
    kept: dict[str, Any] | None = None  # of a checkpoint, what ``state_dict`` gave
    readable = Readable(())  # before there is a loader
    places: dict[int, dict[int, Place | None]]  # of each process that draws, of the segments that it has come to
    segment_batches, first_segment = SEGMENT_BATCHES, 0
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
            if entry.whole:
                entry.order_seed = entry.get("shard_seed", self.cfg.train_ds.shard_seed)
        with without_data():  # from which NeMo estimates the buckets
            loader = self._loader()
        own = self._kept_of_rank()
        dropped = own.get("dropped", 0)
        loader = self.readable = Readable(self._draw(loader, self.skip + dropped, own), dropped)
        loader = WindowedLoader(loader, self.accumulated, self.connector) if self.accumulated > 1 else loader
        self.waited = Waited(Begun(loader))
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

    def _draw(self, loader: BroadcastingDataLoader, skip: int, kept: dict[str, Any]) -> Any:
        """NeMo's loader, whose batches are drawn as ours are, from the ``skip``-th one on.

        Workers that draw give batches in turns: each leaves out its share, and what is left is read and dropped.
        """
        source, workers = loader._source, max(self.drawing_workers, 1)
        each, rest = divmod(skip, workers)
        first, places = self._begin(each, kept)
        self.first_segment = first
        self.places = {worker: {first: place} for worker, place in enumerate(places)}
        if source is not None:
            sampler = source.dataset.sampler if self.drawing_workers else source.sampler
            drawn = [sampler] * workers
            if self.in_segments:
                sampler_of = self._sampler_of(sampler)
                entries = sum(len(numbers_of(entry)) for entry in input_entries(self.cfg.train_ds))
                drawn = [Segments(sampler_of, entries, (first, place), self.segment_batches) for place in places]
            later = [LaterBatches(own, each - first * self.segment_batches) for own in drawn]
            if self.drawing_workers:
                loader._source = with_dataset(source, DrawnByWorkers(self.dataset, later))
            else:
                loader._source = with_sampler(source, later[0])
                if self.in_segments:
                    self.places = {0: drawn[0].places}
            spare_workers(loader._source)
        return LaterBatches(Placed(loader, self.places), rest) if self.drawing_workers else loader

    def _begin(self, batches: int, kept: dict[str, Any]) -> tuple[int, list[Place | None]]:
        """Segment to begin with where each process that draws has drawn as many, and the places of these processes."""
        workers = max(self.drawing_workers, 1)
        self.sources = identity(self.cfg.train_ds)
        layout = {"number": batches // self.segment_batches, "batches": self.segment_batches}
        if self.in_segments and kept.get("places") and kept["sources"] != self.sources:
            log.warning("The data to train on, or its seeds, are other than before, so it is drawn up to its place.")
        elif self.in_segments and len(kept.get("places", [])) == workers and layout.items() <= kept.items():
            return kept["number"], [Place.unpacked(own) for own in kept["places"]]
        return 0, [None] * workers

    def _sampler_of(self, whole: Any) -> SectionSampler:
        """``whole``: NeMo's, of the data from its beginning on."""
        section, bins = self.cfg.train_ds, None
        if isinstance(whole, DynamicBucketingSampler) and section.get("bucket_duration_bins") is None:
            bins = [float(bin) for bin in whole.duration_bins]  # estimated once
        seed = section.shard_seed if self.drawing_workers else order_seed(section)
        return SectionSampler(section, self.tokenizer, seed, bins)

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
        number = (given + dropped) // max(self.drawing_workers, 1) // self.segment_batches
        own: dict[str, Any] = {"dropped": dropped}
        places = [place.packed() for worker in self.places.values() if (place := worker.get(number)) is not None]
        if places and len(places) == len(self.places):
            own |= {"number": number, "batches": self.segment_batches, "places": places, "sources": self.sources}
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
    for section in (name for name in SECTIONS if name in cfg):
        cfg[section].num_workers = workers_of(cfg[section])
    drawing_workers = workers_that_draw(cfg.get("train_ds"))
    shared = drawing_workers == 0
    seed = order_seed(cfg.get("train_ds") or OmegaConf.create())
    in_segments = False
    if "train_ds" in cfg and cfg.train_ds.get("shuffle"):
        in_segments = number_entries(cfg.train_ds)
        in_segments &= not (cfg.train_ds.get("concurrent_bucketing", True) or cfg.train_ds.get("multi_config"))
    if "train_ds" in cfg and cfg.train_ds.get("use_bucketing") and cfg.train_ds.get("concurrent_bucketing", True):
        log.warning(
            "data.train_ds.concurrent_bucketing=true: no run, and no resumed one, draws the same batches again."
        )
    for section in SECTIONS:
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
    data.places = {}
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

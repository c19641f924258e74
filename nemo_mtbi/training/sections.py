"""What follows from a training or validation section of the data: its entries, seeds, buffers, and who draws."""

from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import torch
from lhotse.serialization import open_best
from omegaconf import DictConfig, OmegaConf

from nemo_mtbi.data.conversation import INPUT_TYPE, weighted_shars
from nemo_mtbi.data.cut_lines import count_lines, has_lines
from nemo_mtbi.errors import ConfigError

# In examples, of NeMo's samplers. Lhotse adds the second one to the first.
BUFFERS = ("bucket_buffer_size", "shuffle_buffer_size", "num_cuts_for_bins_estimate")
SHUFFLE_BUFFER = 10_000  # NeMo's default
SHAR_SHUFFLE_BUFFER = 500
SEEDS_APART = 1_000_003
WORKERS_BESIDE_GPU = 4
# NeMo's options by which cuts come from places that nobody knows, or the same ones twice.
WITHOUT_PLACES = ("slice_length", "max_open_streams")


def number_entries(section: DictConfig) -> bool:
    """Let the lines of a section's manifests come in random order; NeMo's buffer is for what is read through.

    Returns:
        Whether all that is read can be begun at any place: lines of manifests, and Shar.
    """
    entries, number = list(input_entries(section)), 0
    for entry in entries:
        entry.entry = number
        if "shar_path" not in entry:  # two entries may read the same cuts
            entry.order_seed = order_seed(section) + SEEDS_APART * number
            entry.dealt = section.get("batch_size") or 1
        number += len(numbers_of(entry))
    if entries and all(has_lines(entry.get("cuts_path")) and "shar_path" not in entry for entry in entries):
        section.shuffle, section.shuffle_buffer_size = False, None
    whole = not any(part.get(key) for part in parts_with_groups(section) for key in WITHOUT_PLACES)
    return len(entries) == len(list(sources(section))) and all(map(has_places, entries)) and whole


def has_places(entry: DictConfig) -> bool:
    """Whether an entry can be read from any place on: not a pipe or compressed lines, or several Shars in the shares of
    their sizes."""
    shar = entry.get("shar_path")
    if shar is None:
        return has_lines(entry.get("cuts_path"))
    alone = not OmegaConf.is_list(shar) or len(shar) == 1
    return alone or bool(weighted_shars(entry))


def identity(section: DictConfig) -> list[str]:
    """What decides where examples stand in the order of a training section: its sources with their numbers of lines or
    shards, and seeds."""
    found = [f"seeds {section.get('seed')} {section.get('shard_seed')}"]
    for entry in input_entries(section):
        shar, cuts = entry.get("shar_path"), entry.get("cuts_path")
        size = len(list(Path(shar).glob("cuts.*"))) if isinstance(shar, str) else count_lines(cuts) if cuts else ""
        found.append(f"{shar or cuts} {size} {entry.get('order_seed')} {entry.get('dealt')}")
    return found


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


def workers_of(section: DictConfig) -> int:
    """``num_workers`` of a section; ``auto``: some where steps run on a GPU, whose batches are then read beside them.
    The same number on every machine with GPUs, as resumed runs need.

    Raises:
        ConfigError: neither ``auto`` nor a number of processes.
    """
    given = section.get("num_workers")
    if given == "auto":
        return WORKERS_BESIDE_GPU if torch.cuda.is_available() else 0
    if given is not None and (type(given) is not int or given < 0):
        raise ConfigError(f"num_workers={given!r}: a number of processes that read the data (0: none), or auto.")
    return given or 0


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
    return (entry for entry in sources(section) if entry.get("type") == INPUT_TYPE)


def sources(section: DictConfig) -> Iterator[DictConfig]:
    """``input_cfg`` entries of any type, groups excepted."""
    return (part for part in parts_with_groups(section) if part.get("type") and not part.get("input_cfg"))


def parts_with_groups(section: DictConfig) -> Iterator[DictConfig]:
    """A section, the data sets in it, their groups and the entries of these."""
    queue = parts_of(section)
    while queue:
        part = queue.pop(0)
        yield part
        queue += list(part.get("input_cfg") or [])


def numbers_of(entry: DictConfig) -> range:
    """Of an entry that was numbered, or of its Shars."""
    first = entry.get("entry") or 0
    return range(first, first + max(len(weighted_shars(entry)), 1))

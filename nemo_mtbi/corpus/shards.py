"""A manifest as shards.

Ranges of lines that workers take one at a time, found without holding the manifest in memory.
"""

import hashlib
import json
import zlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path

from filelock import FileLock
from lhotse import CutSet
from lhotse.cut import Cut
from lhotse.serialization import deserialize_item

from nemo_mtbi import console
from nemo_mtbi.errors import DataError, ShardError
from nemo_mtbi.io import jsonl

SHARDS = 8  # about, of a small manifest: workers, of whatever number, end at about the same time
FEWEST_LINES = 64  # of such a shard, or a multiple of them: batches of like lengths are made of them


@dataclass(frozen=True)
class Shard:
    """``lines`` manifest lines from byte ``offset`` of ``path``; ``digest`` is of their bytes."""

    name: str
    index: int
    path: str
    offset: int
    lines: int
    digest: str

    @property
    def label(self) -> str:
        return f"{self.index:06d}"

    def cuts(self) -> Iterator[Cut]:
        """
        Raises:
            DataError: a line is not a cut.
        """
        digest = hashlib.blake2b(digest_size=12)
        with open(self.path, "rb") as stream:
            stream.seek(self.offset)
            for number in range(self.lines):
                line = stream.readline()
                digest.update(line)
                if not line.strip():
                    continue
                try:
                    item = deserialize_item(json.loads(line))
                except Exception as error:
                    raise ShardError(
                        f"Cut {number} after byte {self.offset} of {self.path} cannot be read "
                        f"({type(error).__name__}: {error})."
                    ) from error
                if not isinstance(item, Cut):
                    raise ShardError(f"{self.path} holds a {type(item).__name__}, which is no cut.")
                yield item
        if digest.hexdigest() != self.digest:
            raise DataError(f"{self.path} has changed since the run began. Run the same command again.")


def plan_manifest(name: str, manifest: str, folder: Path, shard_cuts: int) -> list[Shard]:
    """Shards of a manifest; kept in ``<folder>/plan.json`` and made anew when the manifest or ``shard_cuts`` changes.

    Of at most ``shard_cuts`` lines, less where there would be fewer than :data:`SHARDS` (not by the number of workers:
    a run may be continued with others).
    One pass over the bytes: nothing is parsed. A compressed manifest is written out to ``<folder>/input.jsonl`` first.
    """
    source = Path(manifest).resolve()
    if not source.is_file():
        raise DataError(f"{manifest} is no file; corpus steps read manifests from files.")
    status = source.stat()
    identity = {
        "input": str(source),
        "size": status.st_size,
        "time": status.st_mtime_ns,
        "shard_cuts": shard_cuts,
    }
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "plan.json"
    lines = source if manifest.endswith(".jsonl") else (folder / "input.jsonl").resolve()
    with FileLock(folder / "plan.lock"):
        if file.is_file():
            plan = json.loads(file.read_text())
            if plan["identity"] == identity:
                return [Shard(**{**s, "path": str(lines)}) for s in plan["shards"]]
        if lines != source:
            partial = folder / "partial.jsonl"
            try:
                cuts = CutSet.from_file(manifest)
                if cuts is None:  # Lhotse's of an empty archive
                    raise EOFError("there is nothing in it")
                cuts.to_file(partial)
            except (EOFError, OSError, ValueError, zlib.error) as error:
                raise DataError(f"{manifest} cannot be read ({type(error).__name__}: {error}).") from error
            partial.replace(lines)
        shards = list(_shards(name, lines, shard_cuts))
        jsonl.write_json(file, {"identity": identity, "shards": [asdict(s) for s in shards]})
    return shards


def _shards(name: str, path: Path, shard_cuts: int) -> Iterator[Shard]:
    with open(path, "rb") as stream:
        known = sum(1 for _ in islice(stream, SHARDS * shard_cuts))
    multiple = max(1, -(-known // (SHARDS * FEWEST_LINES)))  # so that a few more lines leave the shards as they are
    shard_cuts = min(shard_cuts, multiple * FEWEST_LINES)
    index = begin = offset = lines = 0
    digest = hashlib.blake2b(digest_size=12)
    with (
        open(path, "rb") as stream,
        console.progress(total=path.stat().st_size, desc=f"plan ({name})", unit="B", unit_scale=True) as bar,
    ):
        for line in stream:
            digest.update(line)
            offset += len(line)
            lines += 1
            if lines == shard_cuts:
                yield Shard(name, index, str(path), begin, lines, digest.hexdigest())
                bar.update(offset - begin)
                index, begin, lines, digest = index + 1, offset, 0, hashlib.blake2b(digest_size=12)
        if lines:
            yield Shard(name, index, str(path), begin, lines, digest.hexdigest())
            bar.update(offset - begin)

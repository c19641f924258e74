"""Training examples: one utterance, one task prompt, and the text LLM's answer to the transcript.

The ``input_cfg`` type ``mtbi`` (registered in :mod:`nemo_mtbi.registration`) reads a CutSet or Shar whose cuts carry
``custom["targets"]`` (see :mod:`nemo_mtbi.data.target`) and yields one :class:`MTBIConversation` per visit to a cut.
"""

import copy
import gzip
import json
import math
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import count, islice
from pathlib import Path
from typing import Any, NamedTuple

from lhotse import CutSet
from lhotse.cut import Cut
from lhotse.cut.data import DataCut
from nemo.collections.common.data.lhotse.cutset import read_cutset_from_config
from nemo.collections.common.data.lhotse.text_adapters import AudioTurn, NeMoMultimodalConversation, TextTurn
from omegaconf import DictConfig, OmegaConf

from nemo_mtbi.data.alignments import transcript, utterances
from nemo_mtbi.data.audio_windows import EARLIEST_SHARE
from nemo_mtbi.data.cut_lines import Share
from nemo_mtbi.data.messages import NOTHING_HEARD, user_message
from nemo_mtbi.data.perturbation import SpeedPerturbation
from nemo_mtbi.data.rendering import Message, RenderedPrompt, Spoken, TimedWord, match_words
from nemo_mtbi.data.shar import PROMISE_FIELD, PromisedCut, promise_of, with_visits
from nemo_mtbi.data.target import TARGETS_FIELD, Target
from nemo_mtbi.errors import ConfigError, DataError

INPUT_TYPE = "mtbi"
# What the alignment stage reads of every cut: it needs the transcript alone, so cuts without answers serve it too.
NO_TARGET = Target("", "alignment", "none", "Repeat.", "", [0])


@dataclass(frozen=True)
class AcousticPositions:
    """Positions of a connector that emits tokens, beside them: of a second, a window of the encoder, an audio."""

    per_second: float = 0.0
    per_window: int = 0
    window_seconds: float = 30.0
    per_audio: int = 0

    def __call__(self, seconds: float) -> int:
        windows = 1 if seconds <= self.window_seconds else math.ceil(seconds / (EARLIEST_SHARE * self.window_seconds))
        return math.ceil(seconds * self.per_second) + self.per_window * windows + self.per_audio


class Origin(NamedTuple):
    """Where an example was drawn: number of its ``input_cfg`` entry, pass, place in that pass's order, line of the
    manifest (or place in the Shar), and number among the targets that this visit uses of the cut."""

    entry: int
    visit: int
    at: int
    line: int
    target: int


@dataclass
class MTBIConversation(NeMoMultimodalConversation):
    """A conversation that also knows its target, its visit number and (once tokenized) its rendered prompt.

    ``shared_prefix``: the prompt before the utterance is computed once for all examples, so it takes no positions.
    ``read_cut``: gives the cut with its data, if it was drawn without. ``with_ids``: NeMo's filters look at token ids.
    ``origin``: where it was drawn.
    """

    target: Target | None = None
    visit: int = 0
    speech_position: str = "after"
    shared_prefix: bool = False
    acoustic: AcousticPositions = AcousticPositions()
    rendered: RenderedPrompt | None = field(default=None, repr=False)
    read_cut: Callable[[], Cut] | None = field(default=None, repr=False)
    with_ids: bool = False
    origin: Origin | None = None

    def read(self) -> None:
        """Give a cut that was drawn without its data (:mod:`nemo_mtbi.data.shar`) the data."""
        if self.read_cut is None:
            return
        [turn] = [turn for turn in self.turns if isinstance(turn, AudioTurn)]
        turn.cut, self.read_cut = self.read_cut().resample(turn.cut.sampling_rate), None

    @property
    def input_length(self) -> int:
        """Positions of the prompt: the text LLM's input with the transcript's tokens replaced by the connector's
        positions; by as many positions where a connector compresses to tokens, and those of its acoustic channel."""
        assert self.positions, f"{self.id} is not tokenized"  # NeMo says then what is missing
        tokens, begin, end = self.positions
        if self.token_equivalent_duration:
            speech = math.ceil(self.cut.duration / self.token_equivalent_duration)
        else:
            speech = end - begin + self.acoustic(self.cut.duration)
        return tokens - (end - begin) + speech - (begin if self.shared_prefix else 0)

    @property
    def output_length(self) -> int:
        """Tokens of the answer."""
        assert self.target is not None
        return len(self.target.response_ids)

    @property
    def total_length(self) -> int:
        """Positions of the example, for bucketing."""
        return self.input_length + self.output_length

    @property
    def positions(self) -> list[int]:
        """See :class:`~nemo_mtbi.data.target.Target`; of the rendered prompt, once it is."""
        if self.rendered is not None:
            return self.rendered.positions
        return self.target.positions if self.target and not self.target.history else []

    @property
    def source_id(self) -> str:
        """Id of the cut in its manifest."""
        return self.id.rsplit("/", 2)[0]

    @property
    def cut(self) -> Cut:
        """The only spoken turn's cut."""
        return self.list_cuts()[0]

    def messages(self, spoken: Spoken | None = None) -> list[Message]:
        """The dialog up to the answer, with the speech as transcript and word times (or as another transcript)."""
        assert self.target is not None
        spoken = spoken or spoken_part(self.cut)
        history = [{"role": m["role"], "content": [m["content"]]} for m in self.target.history]
        return [*history, user_message(self.target.prompt, spoken, self.speech_position)]


def without_targets(cut: Cut) -> Cut:
    """The cut without all that it may be asked, which would travel to the loader's workers with it."""
    if not {TARGETS_FIELD, PROMISE_FIELD} & (cut.custom or {}).keys():
        return cut
    cut = copy.copy(cut) if isinstance(cut, DataCut) else copy.deepcopy(cut)  # of a mixed one, the first track has it
    cut.custom = {key: value for key, value in (cut.custom or {}).items() if key not in (TARGETS_FIELD, PROMISE_FIELD)}
    return cut


def spoken_part(cut: Cut) -> Spoken:
    """Transcript, word times (relative to the cut) and duration of a cut."""
    words: list[TimedWord] = []
    for supervision, timed in utterances(cut):  # a word is looked for among those of its own utterance
        words += match_words((supervision.text or "").split(), tuple(timed))
    return Spoken(transcript(cut) or NOTHING_HEARD, tuple(words), cut.duration)


@dataclass(frozen=True)
class TargetSelection:
    """Which of a cut's targets a visit uses.

    Attributes:
        tasks: sampling weight of each task; None: every task that the data holds, equally.
        temperature: tasks are drawn with probability proportional to weight ** temperature: among those of a cut, and
            by passing over cuts whose tasks weigh less than the heaviest one (cuts that have a single task each).
        every_target: yield all targets at every visit instead of one (evaluation).
        seed: decides the draw together with the cut's id and the visit number.
    """

    tasks: dict[str, float] | None = None
    temperature: float = 1.0
    every_target: bool = False
    seed: int = 0

    def select(self, cut_id: str, targets: list[dict[str, Any]], visit: int) -> list[Target]:
        """One target (or all of them): the task by weight, then the next wording of a shuffle that each cut has."""
        by_task: dict[str, list[dict[str, Any]]] = {}
        for target in targets:
            if self.tasks is None or self.tasks.get(target["task"], 0) > 0:
                by_task.setdefault(target["task"], []).append(target)
        if not by_task:
            return []
        if self.every_target:
            return [Target(**t) for group in by_task.values() for t in group]
        rng = random.Random(f"{self.seed}/{cut_id}/{visit}")
        names = sorted(by_task)
        weights = [self._weight(name) for name in names]
        heaviest = max(map(self._weight, self.tasks)) if self.tasks else 1.0
        if (
            sum(weights) < heaviest
            and random.Random(f"{self.seed}/{cut_id}/{visit}/pass").random() >= sum(weights) / heaviest
        ):
            return []
        wordings = by_task[rng.choices(names, weights)[0]]
        place = 0
        if len(wordings) > 1:
            order = random.Random(f"{self.seed}/{cut_id}").sample(range(len(wordings)), len(wordings))
            place = order[visit % len(order)]
        return [Target(**wordings[place])]

    def has_any(self, cut: Cut) -> bool:
        """Whether a cut has a target of these tasks at all."""
        targets = (cut.custom or {}).get(TARGETS_FIELD, [])
        return any(self.tasks is None or self.tasks.get(t["task"], 0) > 0 for t in targets)

    def _weight(self, task: str) -> float:
        return 1.0 if self.tasks is None else self.tasks[task] ** self.temperature


class ConversationIterator:
    """Infinite (or one-pass) stream of conversations over a rank's cuts; ``visit`` counts the passes.

    With ``config.place``, a JSON object by the number of the entry, it goes on after the one that was ``last`` ([pass,
    at, target]), or consists of those that are ``waiting`` ([pass, at, line, target] each).
    """

    def __init__(self, share: Share, selection: TargetSelection, config: DictConfig) -> None:
        self.share = share
        self.selection = selection
        self.speed = SpeedPerturbation(config.get("perturb_speed"), selection.seed)
        self.audio_locator_tag = config.audio_locator_tag
        self.token_equivalent_duration = config.get("token_equivalent_duration")
        self.speech_position = config.get("speech_position", "after")
        self.shared_prefix = config.get("shared_prefix", False)
        self.acoustic = AcousticPositions(**config.get("acoustic", {}))
        self.every_cut = config.get("every_cut", False)
        self.with_ids = config.get("with_ids", False)
        self.finite = config.get("force_finite", False)
        self.entry = config.get("entry", 0)
        place = json.loads(config.place)[str(self.entry)] if config.get("place") else {}
        self.waiting: list[list[int]] | None = place.get("waiting")
        self.last: list[int] | None = place.get("last")

    def __iter__(self) -> Iterator[MTBIConversation]:
        if self.waiting is not None:
            yield from self._waiting(self.waiting)
            return
        looked = False
        first, begin, done = self.last or (0, 0, -1)
        for visit in count(first):
            usable = begin > 0  # else what was left out was looked at
            for at, line, cut in self.share.placed(visit, begin):
                usable = usable or self.every_cut or self.selection.has_any(cut)
                yield from islice(self.conversations(cut, visit, at, line), done + 1, None)
                done = -1
            begin, done = 0, -1
            if not usable and not looked:  # perhaps other ranks have what is asked for, and this one later
                looked = any(self.selection.has_any(cut) for cut in self.share.cuts)
            if not usable and not looked:
                raise DataError(
                    "No cut has a target for the requested tasks "
                    f"({'all' if self.selection.tasks is None else ', '.join(self.selection.tasks)}). "
                    "Run generate_targets.py on these cuts, or change the tasks of input_cfg."
                )
            if self.finite:
                return

    def _waiting(self, waiting: list[list[int]]) -> Iterator[MTBIConversation]:
        cuts = self.share.at(line for _, _, line, _ in waiting) if waiting else ()
        for (number, at, line, index), cut in zip(waiting, cuts, strict=True):
            yield from islice(self.conversations(cut, number, at, line), index, index + 1)

    def conversations(self, cut: Cut, number: int, at: int = 0, line: int = 0) -> Iterator[MTBIConversation]:
        """Examples of a cut in the ``number``-th pass."""
        visit = self.share.drawn_visit(number)
        targets = (cut.custom or {}).get(TARGETS_FIELD, [])
        chosen = [NO_TARGET] if self.every_cut else self.selection.select(cut.id, targets, visit)
        promise = promise_of(cut)
        cut = self._heard(cut, visit)
        for index, target in enumerate(chosen):
            own, text = _numbered(cut, index), transcript(cut)
            yield MTBIConversation(
                id=f"{cut.id}/{target.task}/{target.prompt_id}",
                turns=[
                    TextTurn(target.prompt, "user"),
                    AudioTurn(own, "user", self.audio_locator_tag, text),
                    TextTurn(target.response, "assistant"),
                ],
                token_equivalent_duration=self.token_equivalent_duration,
                target=target,
                visit=visit,
                speech_position=self.speech_position,
                shared_prefix=self.shared_prefix,
                acoustic=self.acoustic,
                with_ids=self.with_ids,
                origin=Origin(self.entry, number, at, line, index),
                read_cut=None if promise is None else partial(self._read, promise, visit, index),
            )

    def _heard(self, cut: Cut, visit: int) -> Cut:
        return without_targets(self.speed(cut, visit))

    def _read(self, promise: PromisedCut, visit: int, index: int) -> Cut:
        return _numbered(self._heard(promise.read(), visit), index)


def _numbered(cut: Cut, index: int) -> Cut:
    """Ids must be unique within a batch; the same cut may come with several targets."""
    return cut if index == 0 else cut.with_id(f"{cut.id}#{index}")


ENTRY_KEYS = (  # what a user writes
    "type",
    "cuts_path",
    "shar_path",
    "weight",
    "tags",
    "tasks",
    "task_temperature",
    "every_target",
    "seed",
    "perturb_speed",
    "input_cfg",
)
SHARED_KEYS = ("rank", "world_size", "dealt", "by_worker", "whole")
KNOWN_KEYS = {
    *SHARED_KEYS,
    *(set(ENTRY_KEYS) - {"input_cfg"}),
    "speech_position",
    "shared_prefix",
    "acoustic",
    "every_cut",
    "with_ids",
    "order_seed",
    "entry",
    "place",
}


def task_weights(tasks: Any) -> dict[str, float] | None:
    """``tasks`` of an ``input_cfg`` entry, a list or a mapping to weights, as weights; None: all tasks.

    Raises:
        ConfigError: a weight below 0.
    """
    if tasks is None:
        return None
    tasks = OmegaConf.to_container(tasks) if OmegaConf.is_config(tasks) else tasks
    weights = {str(k): float(v) for k, v in tasks.items()} if isinstance(tasks, dict) else dict.fromkeys(tasks, 1.0)
    if below := [task for task, weight in weights.items() if weight < 0]:
        raise ConfigError(f"input_cfg.tasks: the weight of {', '.join(below)} is below 0.")
    return weights


def read_mtbi(config: DictConfig) -> tuple[CutSet, bool]:
    """NeMo data-type parser of ``type: mtbi``. Other keys go to NeMo's reader.

    Keys: ``cuts_path`` or ``shar_path``; ``tasks`` (list, or mapping to weights; default all), ``task_temperature``,
    ``every_target``, ``seed``, ``speech_position``, ``perturb_speed``
    (:class:`nemo_mtbi.data.perturbation.SpeedPerturbation`).

    Raises:
        ConfigError: neither path, or an impossible factor.
        DataError: the manifest does not exist.
    """
    reader = OmegaConf.create({k: v for k, v in config.items() if k not in KNOWN_KEYS - {"cuts_path", "shar_path"}})
    path = config.get("cuts_path") or config.get("shar_path")
    if path is None:
        raise ConfigError("An input_cfg entry of type mtbi needs cuts_path or shar_path.")
    weighted = weighted_shars(config)
    # Shares of the examples, as NeMo means them; one visit has all.
    if weighted and not (config.get("force_finite") and config.get("place") is None):
        first = config.get("entry", 0)
        parts = [
            read_mtbi(OmegaConf.merge(config, {"shar_path": own, "entry": number}))[0]  # type: ignore[arg-type]
            for number, (own, _) in enumerate(weighted, first)
        ]
        return CutSet.mux(
            *parts, weights=[weight for _, weight in weighted], seed=config.get("shard_seed", "trng")
        ), True
    check_manifest(path)
    reader.force_finite = True  # we repeat by ourselves, to count the visits
    cuts, is_tarred = read_cutset_from_config(reader)
    cuts, shars = with_visits(cuts, config.get("order_seed"))
    tasks = task_weights(config.get("tasks"))
    selection = TargetSelection(
        tasks, config.get("task_temperature", 1.0), config.get("every_target", False), config.get("seed", 0)
    )
    own = {key: config.get(key) for key in SHARED_KEYS if config.get(key) is not None}
    share = Share(cuts, path, **own, seed=config.get("order_seed"), shars=shars)
    return CutSet(ConversationIterator(share, selection, config)), is_tarred


def weighted_shars(config: DictConfig) -> list[tuple[str, float]]:
    """Several Shars with a weight each: ``shar_path: [[FOLDER, WEIGHT], ...]``; empty for other forms."""
    path = config.get("shar_path")
    pairs = OmegaConf.is_list(path) and len(path) > 1 and all(OmegaConf.is_list(own) and len(own) == 2 for own in path)
    return [(str(own[0]), float(own[1])) for own in path] if pairs else []


def nothing_in(archive: Path) -> bool:
    """Whether there is no byte in an archive; what cannot be unpacked is said where it is read."""
    try:
        with gzip.open(archive, "rb") as stream:
            return not stream.read(1)
    except (OSError, EOFError):
        return False


def check_manifest(path: Any) -> None:
    """Fail early, with the path, where a local manifest is missing or empty."""
    if not isinstance(path, str) or "://" in path or path.startswith("pipe:"):
        return
    file = Path(path)
    if not file.exists():
        raise DataError(f"There is no manifest {path}. Run prepare_data.py and generate_targets.py, or fix the path.")
    if file.is_file() and (file.stat().st_size == 0 or (path.endswith(".jsonl.gz") and nothing_in(file))):
        raise DataError(f"The manifest {path} is empty. Did the step that writes it finish?")


def require_cuts(path: str) -> None:
    """:func:`check_manifest`, and that Lhotse can read the first cut.

    Raises:
        DataError: it cannot.
    """
    check_manifest(path)
    with reading_cuts(path):
        next(iter(CutSet.from_file(path)), None)


@contextmanager
def reading_cuts(path: str) -> Iterator[None]:
    """
    Raises:
        DataError: what Lhotse says of a manifest that it cannot read, with its name.
    """
    try:
        yield
    except Exception as error:  # of any kind, from Lhotse and what it reads with
        said = f"{type(error).__name__}: {error}".splitlines()[0]
        raise DataError(f"{path} cannot be read as a manifest of cuts ({said[:200]}).") from error

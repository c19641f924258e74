"""Descriptions of voices: labels of attributes from what is known of the speaker and what is measured of the signal.

The rules are a YAML file (``conf/voice/attributes.yaml``). A supervision gets ``custom["voice"]``, its measures, and
``custom["description"]``, its labels; an attribute of which nothing is known is left out, and counted.
"""

import dataclasses
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from lhotse.cut import Cut

from nemo_mtbi.data.alignments import utterances
from nemo_mtbi.data.description import DESCRIPTION_FIELD
from nemo_mtbi.data.rendering import TimedWord, match_words
from nemo_mtbi.errors import ConfigError, DataError
from nemo_mtbi.io.tables import read_table
from nemo_mtbi.preparation.voice_measures import MEASURES, measure

ATTRIBUTES = Path(__file__).parents[1] / "conf" / "voice" / "attributes.yaml"
VOICE_FIELD = "voice"
UNKNOWN = ("", "?", "-", "unknown", "none", "null", "nan", "na", "n/a")
OTHER = "other"  # group of ``by`` without cut points of its own
ENOUGH, PLENTY = 3, 200  # utterances of a speaker, to say that a voice is not what it is said to be


@dataclass
class DescribeConfig:
    """``describe`` of ``conf/prepare.yaml``.

    Attributes:
        enabled: whether voices are described.
        attributes: YAML file of the rules; null: the package's.
        speakers: table with a column ``speaker`` and others (gender, age, ...) that hold for all of a speaker's cuts;
            null: what the sources say alone.
    """

    enabled: bool = False
    attributes: str | None = None
    speakers: str | None = None


@dataclass(frozen=True)
class Attribute:
    """One rule.

    Attributes:
        name: as the text LLM reads it.
        field: of the supervision (``gender``, or one of ``custom``) or of the speaker's line; None: measured.
        measure: one of ``MEASURES``; None: a field.
        values: label -> spellings of the field; empty: as it is written. Case does not matter.
        labels, cuts: of a number: one label more than ascending cut points; on a cut point it is the label above. A
            field that says a label has it.
        by: attributes; the first of them whose label has cut points of its own chooses (``other``: for all others).
        plausible: of labels in ``by``, lowest and highest median of the measure over a speaker's utterances. A speaker
            beyond them is not what the corpus says, so the attributes in ``by`` are left out.
        within: lowest and highest number that a field can hold.
        unless: labels of other attributes beside which nothing is said of this one.
    """

    name: str
    field: str | None = None
    measure: str | None = None
    values: dict[str, list[str]] = dataclasses.field(default_factory=dict)
    labels: list[str] = dataclasses.field(default_factory=list)
    cuts: Any = None
    by: list[str] = dataclasses.field(default_factory=list)
    plausible: dict[str, list[float]] = dataclasses.field(default_factory=dict)
    within: list[float] | None = None
    unless: dict[str, list[str]] = dataclasses.field(default_factory=dict)

    def group(self, known: dict[str, str]) -> str:
        """The label of an attribute in ``by`` that chooses the cut points; ``other`` where none does."""
        return next((known[name] for name in self.by if known.get(name) in self.cuts), OTHER)

    def points(self, known: dict[str, str]) -> list[float] | None:
        """Cut points for a voice of which other labels are known; None: there are none for it."""
        if not self.by:
            return list(self.cuts or [])
        return self.cuts.get(self.group(known))

    def label(self, value: Any, known: dict[str, str]) -> str | None:
        """The label of a value; None where it says nothing.

        ``known``: labels of the attributes in ``by``.

        Raises:
            DataError: a value that the rule does not know.
        """
        if value is None or str(value).strip().casefold() in UNKNOWN:
            return None
        if self.labels:
            points = self.points(known)
            if (written := str(value).strip().lower()) in self.labels:  # "adult" in a column of ages
                return written
            for label, spellings in self.values.items():
                if written in {str(s).lower() for s in spellings}:
                    return label
            try:
                number = float(value)
            except (TypeError, ValueError):
                raise DataError(f"{self.name}: {value!r} is no number") from None
            if np.isnan(number):
                return None
            if self.within is not None and not self.within[0] <= number <= self.within[1]:
                raise DataError(f"{self.name}: {value!r} is not from {self.within[0]:g} to {self.within[1]:g}")
            return None if points is None or not np.isfinite(number) else self.labels[sum(number >= p for p in points)]
        if not self.values:
            return str(value).strip().lower()
        for label, spellings in self.values.items():
            if str(value).strip().lower() in {label.lower(), *(str(s).lower() for s in spellings)}:
                return label
        raise DataError(f"{self.name}: {value!r} is none of {', '.join(self.values)}")

    @property
    def choices(self) -> list[str]:
        """Labels that it can give, where the rule names them."""
        return self.labels or list(self.values)


def load_attributes(path: str | Path | None = None) -> dict[str, Attribute]:
    """Rules by name, those that others depend on first.

    Raises:
        ConfigError: names the file, the attribute and what is wrong with it.
    """
    file = Path(path or ATTRIBUTES)
    try:
        raw = yaml.safe_load(file.read_text(encoding="utf-8"))
        rules = {name: Attribute(name, **options) for name, options in raw.items()}
    except (OSError, yaml.YAMLError, TypeError, AttributeError, UnicodeDecodeError) as error:
        raise ConfigError(f"describe.attributes={file}: {type(error).__name__}: {error}") from error
    for check in (_type_problem, partial(_problem, rules=rules)):  # rules read each other's values
        for name, rule in rules.items():
            if problem := check(rule):
                raise ConfigError(f"describe.attributes={file}, {name}: {problem}")
    try:
        order = list(TopologicalSorter({name: rule.by for name, rule in rules.items()}).static_order())
    except CycleError as error:
        raise ConfigError(f"describe.attributes={file}: {', '.join(error.args[1])} depend on each other.") from error
    return {name: rules[name] for name in sorted(rules, key=order.index)}


def _problem(rule: Attribute, rules: dict[str, Attribute]) -> str | None:
    if (rule.field is None) == (rule.measure is None):
        return "give field or measure"
    if rule.measure is not None and rule.measure not in MEASURES:
        return f"there is no measure {rule.measure!r}; there are {', '.join(MEASURES)}"
    if rule.measure is not None and not rule.labels:
        return "a measure needs labels and cuts"
    if rule.by and not (set(rule.by) <= set(rules) and isinstance(rule.cuts, dict)):
        return f"by: {rule.by} needs those attributes, and cuts for their labels"
    for other, labels in rule.unless.items():
        if other not in rules or not labels or not set(labels) <= set(rules[other].choices):
            return f"unless: {other} has no labels {', '.join(labels) or labels}"
    for label, bounds in rule.plausible.items():
        numbers = isinstance(bounds, list) and all(isinstance(b, int | float) for b in bounds)
        if rule.measure is None or label not in (rule.cuts or {}) or not rule.by:
            return f"plausible: {label} needs a measure, by, and cuts of its own"
        if not numbers or len(bounds) != 2 or bounds[0] >= bounds[1]:
            return f"plausible: {label} needs a lowest and a highest number, not {bounds}"
    for points in (rule.cuts or {}).values() if rule.by else [rule.cuts or []]:
        if rule.labels and (len(points) != len(rule.labels) - 1 or sorted(points) != list(points)):
            return f"{len(rule.labels)} labels need {len(rule.labels) - 1} ascending cuts, not {points}"
    return None


def _type_problem(rule: Attribute) -> str | None:
    """What YAML has made of a value that was meant otherwise."""
    for name, value in {"labels": rule.labels, "by": rule.by}.items():
        if not isinstance(value, list) or not all(isinstance(own, str) for own in value):
            return f"{name} is {value!r}; give a list of strings, with words such as yes and no in quotes"
    if not isinstance(rule.values, dict):
        return f"values is {rule.values!r}, no mapping of labels to lists of spellings"
    for label, spellings in rule.values.items():
        listed = isinstance(spellings, list) and all(type(own) in (str, int, float) for own in spellings)
        if not isinstance(label, str) or not listed:
            return (
                f"values: {label!r} has {spellings!r}; give a list of spellings, and put yes, no, true, false in quotes"
            )
    if not isinstance(rule.unless, dict) or not all(
        isinstance(own, list) and all(isinstance(label, str) for label in own) for own in rule.unless.values()
    ):
        return f"unless is {rule.unless!r}, no mapping of attributes to lists of their labels"
    if not isinstance(rule.plausible, dict):
        return f"plausible is {rule.plausible!r}, no mapping of labels to a lowest and a highest number"
    cuts = rule.cuts.values() if isinstance(rule.cuts, dict) else [rule.cuts or []]
    for points in [*cuts, rule.within or []]:
        if not isinstance(points, list) or not all(type(p) in (int, float) and np.isfinite(p) for p in points):
            return f"cuts and within hold lists of numbers, not {points!r}"
    if rule.within is not None and (len(rule.within) != 2 or rule.within[0] > rule.within[1]):
        return f"within is {rule.within!r}; give a lowest and a highest number"
    return None


def all_words(text: str, timed: list[TimedWord]) -> list[TimedWord]:
    """The words of a transcript, timed or not; the aligned ones alone where they are others, as in scripts without
    spaces.
    """

    def known(words: list[TimedWord]) -> int:
        return sum(word.start_seconds is not None for word in words)

    words = match_words(text.split(), tuple(timed))
    return words if known(words) >= known(timed) else timed


class Describer:
    """Describes the voices of cuts by a :class:`DescribeConfig`.

    Raises:
        ConfigError: the rules cannot work.
        DataError: the table of speakers cannot be read, or says two things of one speaker.
    """

    def __init__(self, config: DescribeConfig) -> None:
        self.rules = load_attributes(config.attributes)
        self.speakers = read_speakers(config.speakers) if config.speakers else {}

    def measure(self, cut: Cut, samples: np.ndarray, rate: int, clean: np.ndarray | None = None) -> None:
        """Note the measures of each supervision of a cut, whose samples (S,) these are; ``clean``: before noise."""
        for supervision, timed in utterances(cut):
            begin, end = max(0.0, supervision.start), min(supervision.end, cut.duration)
            words = [
                None
                if w.start_seconds is None or w.end_seconds is None
                else (w.start_seconds - begin, w.end_seconds - begin)
                for w in all_words(supervision.text or "", timed)
            ]
            place = slice(round(begin * rate), round(end * rate))
            part, voice = samples[place], None if clean is None else clean[place]
            found = measure(part, rate, words, supervision.text or "", voice) if len(part) else {}
            supervision.custom = {**(supervision.custom or {}), VOICE_FIELD: found}

    def describe(
        self,
        supervision: dict[str, Any],
        missing: Counter[str],
        problems: Counter[str],
        contradicting: dict[str, str] | None = None,
    ) -> dict[str, str]:
        """Labels of a supervision (as a manifest holds it) from its measures and fields.

        Args:
            supervision: read alone.
            missing: counts attributes of which nothing is known, or to be said.
            problems: counts values that no rule understands, and what is left out by the next.
            contradicting: attributes that are left out, and why.
        """
        custom = supervision.get("custom") or {}
        known = {**custom, **{k: v for k, v in supervision.items() if v is not None}}
        known |= self.speakers.get(str(supervision.get("speaker")), {})
        found: dict[str, str] = {}
        for name, rule in self.rules.items():
            value = custom.get(VOICE_FIELD, {}).get(rule.measure) if rule.measure else known.get(rule.field or "")
            try:
                label = rule.label(value, found)
            except DataError as error:
                problems[str(error)] += 1
                continue
            if label is None:
                missing[name] += 1
            elif contradicting and name in contradicting:
                problems[f"{name}: speaker {supervision['speaker']} {contradicting[name]}"] += 1
            else:
                found[name] = label
        unsaid = {
            name
            for name in found
            if any(found.get(other) in labels for other, labels in self.rules[name].unless.items())
        }
        missing.update(unsaid)
        return {name: label for name, label in found.items() if name not in unsaid}

    def rewrite(self, cut: dict[str, Any], contradicting: dict[str, dict[str, str]], tally: "Tally") -> None:
        """Give a cut (as a manifest holds it) its descriptions.

        Args:
            contradicting: of :meth:`contradictions`; these attributes are left out.
            tally: counts.
        """
        for supervision in cut["supervisions"]:
            own = contradicting.get(str(supervision.get("speaker")))
            labels = self.describe(supervision, tally.missing, tally.problems, own)
            supervision["custom"] = {**(supervision.get("custom") or {}), DESCRIPTION_FIELD: labels}
            for name, label in labels.items():
                tally.counts[name][label] += 1

    def report(self, tally: "Tally") -> dict[str, Any]:
        """What there is, by which rules."""
        return {
            "attributes": {name: dict(own.most_common()) for name, own in tally.counts.items()},
            "rules": {
                r.name: {"from": r.field or r.measure, "labels": r.choices, "cuts": r.cuts}
                | ({"unless": r.unless} if r.unless else {})
                for r in self.rules.values()
            },
            "missing": dict(tally.missing.most_common()),
            "problems": dict(tally.problems.most_common(50)),
        }

    def contradictions(self, cuts: Iterable[dict[str, Any]]) -> dict[str, dict[str, str]]:
        """By speaker, attributes that are left out of all utterances, and why.

        A speaker's utterances (and their labels) say different things, or the voice is not what they say.
        """
        said: dict[str, dict[str, set[str]]] = defaultdict(lambda: defaultdict(set))
        measured: dict[tuple[str, str, str], list[float]] = defaultdict(list)  # by speaker, rule and group
        constant = [r.name for r in self.rules.values() if r.field in ("gender", "accent")]
        for supervision in (s for cut in cuts for s in cut["supervisions"]):
            if supervision.get("speaker") is None:
                continue
            speaker, labels = str(supervision["speaker"]), self.describe(supervision, Counter(), Counter())
            for name in constant:
                said[speaker][name] |= {labels[name]} if name in labels else set()
            measures = (supervision.get("custom") or {}).get(VOICE_FIELD, {})
            for rule in (r for r in self.rules.values() if r.plausible and r.measure in measures):
                values = measured[speaker, rule.name, rule.group(labels)]
                if len(values) < PLENTY:
                    values.append(measures[rule.measure])
        found: dict[str, dict[str, str]] = defaultdict(dict)
        for speaker, own in said.items():
            found[speaker] |= {name: "has several" for name, labels in own.items() if len(labels) > 1}
        for (speaker, name, group), values in measured.items():
            rule, median = self.rules[name], float(np.median(values))
            low, high = rule.plausible.get(group, (-np.inf, np.inf))
            if len(values) >= ENOUGH and not low <= median <= high:
                reason = f"has a median {rule.measure} of {median:.0f}, which is not {group}"
                found[speaker] = {attribute: reason for attribute in rule.by} | found[speaker]
        return {speaker: names for speaker, names in found.items() if names}


@dataclass
class Tally:
    """What a description of many cuts counts.

    Attributes:
        missing: attributes of which nothing is known.
        problems: values that no rule understands, and speakers who contradict themselves.
        counts: labels of each attribute.
    """

    missing: Counter[str] = dataclasses.field(default_factory=Counter)
    problems: Counter[str] = dataclasses.field(default_factory=Counter)
    counts: dict[str, Counter[str]] = dataclasses.field(default_factory=lambda: defaultdict(Counter))


def read_speakers(path: str) -> dict[str, dict[str, str]]:
    """The other columns of a table by its column ``speaker``.

    Raises:
        DataError: no such column, or two lines about one speaker that differ.
    """
    found: dict[str, dict[str, str]] = {}
    for row in read_table(Path(path), {"speaker"}, None):
        if row.problem:
            raise DataError(f"{path}, line {row.line}: {row.problem}.")
        speaker = row.cells.get("speaker", "")
        own = {k: v for k, v in row.cells.items() if k != "speaker" and v}
        if speaker and found.setdefault(speaker, own) != own:
            raise DataError(f"{path}, line {row.line}: speaker {speaker} has other values than in an earlier line.")
    return found

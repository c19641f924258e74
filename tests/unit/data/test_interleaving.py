"""Which words are text: every word once, shares, spans, seeds, schedules."""

import math
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nemo_mtbi.data.interleaving import (
    OVERLAP_SECONDS,
    InterleavingPolicy,
    Schedule,
    SpeechSpan,
    Unit,
    Word,
    merge,
    timeline,
)
from nemo_mtbi.errors import ConfigError

pytestmark = pytest.mark.unit


@st.composite
def utterances(draw):
    """Words with gaps, overlaps, missing times, times outside the audio, and tokens that cross words."""
    count = draw(st.integers(1, 25))
    duration = draw(st.floats(0.3, 20))
    words, token = [], draw(st.integers(0, 5))
    for _ in range(count):
        size = draw(st.integers(1, 3))
        timed = draw(st.booleans())
        start = draw(st.floats(-1, 25)) if timed else None
        end = start + draw(st.floats(-0.1, 1)) if start is not None else None
        words.append(Word(token, token + size, start, end, draw(st.booleans())))
        token += size
    return words, duration


def even_units(count):
    return timeline([Word(i, i + 1, float(i), i + 0.9) for i in range(count)], float(count))


@given(utterances(), st.floats(0, 1), st.floats(1, 6), st.integers(0, 5))
@settings(max_examples=200, deadline=None)
def test_every_word_and_moment_exactly_once(utterance, share, span, seed):
    words, duration = utterance
    units = timeline(words, duration)
    assert units[0].start_seconds == 0 and units[-1].end_seconds == duration
    assert units[0].token_begin == words[0].token_begin and units[-1].token_end == words[-1].token_end
    assert sum(u.words for u in units) == len(words)
    for before, after in zip(units, units[1:], strict=False):
        assert before.token_end == after.token_begin and before.end_seconds == after.start_seconds
        assert before.start_seconds < before.end_seconds
    owner = iter(unit for unit in units for _ in range(unit.words))
    for word, unit in zip(words, owner, strict=True):
        if word.start_seconds is not None and 0 <= word.start_seconds and word.end_seconds <= duration:
            assert unit.start_seconds - OVERLAP_SECONDS <= word.start_seconds + 1e-9
            assert word.end_seconds <= unit.end_seconds + OVERLAP_SECONDS + 1e-9
    plan = InterleavingPolicy(1.0, share, span, seed=seed).plan(units, "key", 0, 0)
    tokens, time = [], 0.0
    for piece in merge(units, plan, audio=0):
        if isinstance(piece, SpeechSpan):
            assert piece.start_seconds >= time
            time = piece.end_seconds
        else:
            tokens += range(*piece)
    spoken = [t for u, text in zip(units, plan, strict=True) if not text for t in range(u.token_begin, u.token_end)]
    assert sorted(tokens + spoken) == list(range(words[0].token_begin, words[-1].token_end))
    assert tokens == sorted(tokens)


def test_a_misplaced_word_costs_its_own_neighbours_alone():
    words = [Word(i, i + 1, float(i), i + 0.9) for i in range(10)]
    words[3] = Word(3, 4, 6.2, 6.7)
    assert [(u.words, u.start_seconds) for u in timeline(words, 10.0)] == [
        (1, 0.0),
        (1, pytest.approx(0.95)),
        (1, pytest.approx(1.95)),
        (4, pytest.approx(3.45)),
        (1, pytest.approx(6.95)),
        (1, pytest.approx(7.95)),
        (1, pytest.approx(8.95)),
    ]


def test_a_word_without_times_is_in_one_unit_with_its_neighbours():
    """Aligners that did not see it give its speech to them."""
    times = [(0.0, 0.4), (0.5, 1.2), None, (1.9, 2.3), (2.4, 2.8)]
    words = [Word(i, i + 1, *(own or (None, None))) for i, own in enumerate(times)]
    assert [(u.token_begin, u.token_end) for u in timeline(words, 3.0)] == [(0, 1), (1, 4), (4, 5)]
    assert len(timeline([Word(i, i + 1) for i in range(3)], 3.0)) == 1
    at_the_ends = [Word(0, 1), *words[3:], Word(5, 6)]
    units = timeline([Word(i, i + 1, w.start_seconds, w.end_seconds) for i, w in enumerate(at_the_ends)], 3.0)
    assert [u.words for u in units] == [2, 2]


def test_people_who_talk_at_once_are_one_unit():
    first = [Word(i, i + 1, float(i), i + 0.9) for i in range(6)]
    second = [Word(6 + i, 7 + i, 3.5 + i, 4.4 + i) for i in range(5)]
    units = timeline(first + second, 9.0)
    assert [u.words for u in units] == [
        1,
        1,
        1,
        6,
        1,
        1,
    ]  # from 3.5 s on, where the second begins


@pytest.mark.parametrize("distribution", ["geometric", "uniform", "fixed"])
def test_share_and_span_length_are_what_was_asked_for(distribution):
    policy = InterleavingPolicy(1.0, 0.4, 3.0, distribution)
    units = even_units(40)
    text, spans = 0, 0
    for visit in range(300):
        plan = policy.plan(units, "utt", visit, 0)
        text += sum(plan)
        spans += sum(a and not b for a, b in zip([*plan, False], [False, *plan], strict=True))
    assert text / (300 * 40) == pytest.approx(0.4, abs=0.04)
    assert text / spans == pytest.approx(3.0, rel=0.15)  # spans are cut short by the ends of the utterance


@pytest.mark.parametrize("distribution", ["geometric", "uniform", "fixed"])
@pytest.mark.parametrize("share", [0.25, 0.5])  # of which spans have whole words
def test_short_utterances_have_the_same_share(distribution, share):
    """An utterance begins anywhere in a long alternation of spans."""
    policy = InterleavingPolicy(1.0, share, 3.0, distribution)
    text = sum(sum(policy.plan(even_units(6), "utt", visit, 0)) for visit in range(4000))
    assert text / (4000 * 6) == pytest.approx(share, abs=0.02)


def test_plans_depend_on_seed_example_and_visit_only():
    units, policy = even_units(30), InterleavingPolicy(0.9, 0.5)
    assert policy.plan(units, "a", 3, 0) == policy.plan(units, "a", 3, 0)
    others = [policy.plan(units, "a", v, 0) for v in range(8)] + [policy.plan(units, "b", 3, 0)]
    assert len({tuple(p) for p in others}) > 5
    assert policy.plan(units, "a", 3, 0) == policy.plan(units, "a", 3, 10**6)  # a constant schedule
    seeds = [InterleavingPolicy(0.9, 0.5, seed=seed).plan(units, "a", 3, 0) for seed in range(8)]
    assert len({tuple(plan) for plan in seeds}) > 5


@pytest.mark.parametrize("share", [0.25, 0.5])
def test_shares_and_spans_are_counted_in_words(share):
    """Of units of one to four words."""
    units, token = [], 0
    for number in range(40):
        count = 1 + number % 4
        units.append(Unit(token, token + count, float(number), number + 1.0, count))
        token += count
    policy = InterleavingPolicy(1.0, share, span_words=3.0)
    plans = [policy.plan(units, "a", visit, 0) for visit in range(400)]
    given = sum(unit.words for plan in plans for unit, text in zip(units, plan, strict=True) if text)
    assert given / (400 * token) == pytest.approx(share, abs=0.03)
    spans = sum(1 for plan in plans for before, text in pairwise([False, *plan]) if text and not before)
    assert 3.0 < given / spans < 6.5  # a unit is not cut; without counting words it would be 7.5


def test_words_that_rounding_lets_overlap_are_units_of_their_own():
    def units(overlap):
        words = [Word(i, i + 1, i - overlap * (i > 0), i + 1.0) for i in range(4)]
        return len(timeline(words, 4.0))

    assert units(0.0) == units(0.02) == units(OVERLAP_SECONDS) == 4
    assert units(OVERLAP_SECONDS + 0.2) == 1


def test_share_zero_and_one():
    units = even_units(10)
    assert not any(InterleavingPolicy(1.0, 0.0).plan(units, "a", 0, 0))
    assert all(InterleavingPolicy(1.0, 1.0).plan(units, "a", 0, 0))
    assert not any(InterleavingPolicy(0.0, 1.0).plan(units, "a", 0, 0))


def test_schedule_moves_towards_pure_speech():
    schedule = Schedule({0: 1.0, 100: 0.2})
    assert [schedule(s) for s in (0, 50, 100, 1000)] == pytest.approx([1.0, 0.6, 0.2, 0.2])
    policy = InterleavingPolicy(1.0, 1.0, schedule=Schedule({0: 1.0, 10: 0.0}))
    units = even_units(3)
    assert all(policy.plan(units, "a", 0, 0)) and not any(policy.plan(units, "a", 0, 10))


@pytest.mark.parametrize(
    "values",
    [
        {"probability": 1.5},
        {"text_share": -0.1},
        {"span_words": 0.5},
        {"span_distribution": "normal"},
        {"level": "token"},
    ],
)
def test_bad_policies_are_refused(values):
    with pytest.raises(ConfigError, match="interleaving"):
        InterleavingPolicy(**values)


def test_bad_schedule_is_refused():
    with pytest.raises(ConfigError, match="schedule"):
        Schedule({-1: 1.0})
    assert math.isclose(Schedule()(10**6), 1.0)


@pytest.mark.parametrize("share", [0.8, 0.9])
def test_large_shares_are_reached(share):
    policy, units = InterleavingPolicy(1.0, share, 3.0), even_units(60)
    text = sum(sum(policy.plan(units, "utt", v, 0)) for v in range(300))
    assert text / (300 * 60) == pytest.approx(share, abs=0.04)


@pytest.mark.parametrize("distribution", ["geometric", "uniform", "fixed"])
@pytest.mark.parametrize("span, share", [(3.0, 0.7), (3.0, 0.65), (2.0, 0.55), (1.2, 0.3)])
def test_shares_between_whole_spans_are_met(distribution, span, share):
    policy, units = InterleavingPolicy(1.0, share, span, distribution), even_units(2000)
    text = sum(sum(policy.plan(units, "utt", v, 0)) for v in range(40))
    assert text / (40 * 2000) == pytest.approx(share, abs=0.012)

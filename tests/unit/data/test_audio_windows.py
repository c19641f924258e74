"""Where long audio is cut."""

import numpy as np
import pytest

from nemo_mtbi.data.audio_windows import Windows, audio_windows

pytestmark = pytest.mark.unit
RATE, LONGEST, GRID = 16_000, 30 * 16_000, 320


def speech_like(seconds, pauses, seed=0):
    """Noise that is silent for 0.4 s around each pause (in seconds)."""
    samples = np.random.default_rng(seed).standard_normal(round(seconds * RATE)).astype(np.float32)
    for pause in pauses:
        samples[round((pause - 0.2) * RATE) : round((pause + 0.2) * RATE)] *= 0.01
    return samples


def cut(samples, sizes=None):
    ends = np.cumsum(sizes or [len(samples)])
    return list(audio_windows(np.split(samples, ends[:-1]), RATE, LONGEST, GRID))


@pytest.mark.parametrize("seconds", [0.0, 0.01, 12.3, 30.0])
def test_what_fits_is_one_window(seconds):
    samples = speech_like(seconds, [])
    (window,) = cut(samples)
    assert window.begin == 0 and np.array_equal(window.samples, samples)


@pytest.mark.parametrize("seconds", [30.0001, 31.0, 37.4, 59.9, 61.0, 200.0])
def test_windows_hold_everything_once(seconds):
    samples = speech_like(seconds, [])
    windows = cut(samples)
    assert np.array_equal(np.concatenate([w.samples for w in windows]), samples)
    assert [w.begin for w in windows] == np.cumsum([0] + [len(w.samples) for w in windows[:-1]]).tolist()
    assert all(w.begin % GRID == 0 for w in windows)
    assert max(len(w.samples) for w in windows) <= LONGEST
    assert min(len(w.samples) for w in windows) >= LONGEST // 4 - GRID


def test_cuts_are_made_in_pauses():
    pauses = [22.5, 28.0, 49.0, 71.0]
    begins = [w.begin / RATE for w in cut(speech_like(80, pauses))][1:]
    assert begins == pytest.approx([28.0, 49.0, 71.0], abs=0.2) or begins == pytest.approx([22.5, 49.0, 71.0], abs=0.2)


def test_the_cut_is_in_the_middle_of_a_pause_of_its_length():
    samples = speech_like(40, [])
    samples[round(20.9 * RATE) : round(21.1 * RATE)] = 0
    assert cut(samples)[1].begin / RATE == pytest.approx(21.0, abs=0.011)


def test_silence_is_cut_as_late_as_possible():
    assert [w.begin / RATE for w in cut(np.zeros(70 * RATE, np.float32))] == [0, 30, 60]


@pytest.mark.parametrize("size", [1, 4_000, 160_001, 10**7])
def test_cuts_do_not_depend_on_the_blocks(size):
    samples = speech_like(95.7 if size > 1 else 31.0, [25.0, 50.0])
    if size == 1:
        samples = samples[: 31 * RATE]
        sizes = [1] * 50 + [len(samples) - 50]
    else:
        sizes = [size] * (len(samples) // size) + [len(samples) % size]
    expected, found = cut(samples), cut(samples, sizes)
    assert [w.begin for w in found] == [w.begin for w in expected]
    assert all(np.array_equal(a.samples, b.samples) for a, b in zip(found, expected, strict=True))


def test_little_is_held():
    read = 0

    def blocks():
        nonlocal read
        for _ in range(100):
            read += RATE
            yield np.ones(RATE, np.float32)

    windows = audio_windows(blocks(), RATE, LONGEST, GRID)
    for number in range(1, 4):
        next(windows)
        assert read <= number * LONGEST + LONGEST // 4 + RATE


def test_rows_know_whose_they_are():
    windows = Windows.of([[0, 700], [0], [0, 500, 900]])
    assert windows.owners == [0, 0, 1, 2, 2, 2] and windows.begins == [0, 700, 0, 0, 500, 900]
    assert windows.starts == [True, False, True, True, False, False] and windows.firsts == [0, 2, 3]
    assert windows.alone == [False, True, False]
    assert Windows.of([[0], [0]]) is None

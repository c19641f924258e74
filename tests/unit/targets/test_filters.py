"""Filters of targets."""

from dataclasses import replace

import pytest

from nemo_mtbi import registration as registration
from nemo_mtbi.data.description import Description
from nemo_mtbi.errors import ConfigError
from nemo_mtbi.targets.config import TargetsConfig
from nemo_mtbi.targets.filters import (
    Candidate,
    NearDuplicates,
    choose_filters,
    empty,
    language,
    refusal,
    repetition,
    truncated,
    unasked,
)
from nemo_mtbi.tasks.forms import form_error, items
from nemo_mtbi.tasks.library import load_library

pytestmark = pytest.mark.unit


def candidate(response, transcript="the cat sat on the mat", finished=True):
    return Candidate(load_library()["about"], transcript, response, [1, 2, 3], finished)


def test_filters():
    assert empty(candidate("  ")) and not empty(candidate("a"))
    assert refusal(candidate("I'm sorry, but as an AI I cannot.")) and refusal(candidate("Please provide the text."))
    assert not refusal(candidate("It is about a cat.")) and not refusal(candidate("I'm sorry.", "i'm sorry i am late"))
    assert truncated(candidate("It is", finished=False)) and not truncated(candidate("It is."))
    loop = "a b c d a b c d a b c d"
    assert (
        repetition(candidate(loop)) and not repetition(candidate(loop, loop)) and not repetition(candidate("a b c d"))
    )
    with pytest.raises(ConfigError, match="Unknown filter polite"):
        choose_filters(["empty", "polite"])


def test_the_form_filter_is_off_by_default_and_works_by_name():
    assert "form" not in TargetsConfig().filters
    ((_, check),) = choose_filters(["form"])
    assert check(Candidate(load_library()["sentiment"], "x", "who knows", [1], True))


@pytest.mark.parametrize(
    ("response", "transcript", "refused"),
    [
        ("I\u2019m sorry, but I can\u2019t assist with that.", "how do i pick a lock", True),
        ("I'm sorry, as an AI language model I cannot help.", "i'm sorry", True),
        ("I am sorry about that.", "sorry about that", False),
        ("I'm sorry I'm late.", "i am sorry i am late", False),
        ("Tell her I apologize for the noise.", "apologize to her for the noise", False),
        ("I am so sorry, that is not possible.", "open the door", True),
    ],
)
def test_refusals_are_the_assistants_apologies_may_be_the_speakers(response, transcript, refused):
    assert bool(refusal(candidate(response, transcript))) is refused


def test_what_the_speaker_repeats_may_be_repeated():
    assert not repetition(candidate("no no no no no no", "no no no no no no"))
    dream = "I have a dream, we rise. I have a dream, we sing. I have a dream, we go."
    said = "i have a dream  we rise i have a dream we sing i have a dream we go"
    assert not repetition(candidate(dream, said)) and repetition(candidate(dream))


@pytest.mark.parametrize(
    ("response", "told"),
    [
        ("A female speaker says hi quickly.", True),
        ("The woman is talking fast about her day.", True),
        ("She had a fast car and some tea.", False),
        ("The speaker wants some help with a fast car.", False),
        ("That sounds good, I will bring some cake.", False),
        ("The gender was not given.", True),
    ],
)
def test_what_was_described_is_not_told_unasked(response, told):
    labels = (("gender", "female"), ("speaking rate", "fast"), ("pauses", "some"))
    c = replace(candidate(response, "hi i had a day"), described=Description("...", labels))
    assert bool(unasked(c)) is told


def test_near_duplicates_of_other_scripts():
    task, duplicates = load_library()["repeat"], NearDuplicates(1)
    texts = ("वह लड़का है", "वह लड़की है", "वह लड़की है", "Don't go!", "go don\u2019t 5")
    assert [bool(duplicates.check(task, "p", text)) for text in texts] == [False, False, True, False, True]


def test_near_duplicates_of_numbers():
    task, duplicates = load_library()["repeat"], NearDuplicates(1)
    assert [bool(duplicates.check(task, "p", text)) for text in ("12", "35", "12", "It is 5.", "It is 6.")] == [
        False,
        False,
        True,
        False,
        True,
    ]


@pytest.mark.parametrize(
    ("text", "language", "fits"),
    [
        ("turn off kitchen lights please", "German", False),
        ("good morning, no problem", "Spanish", False),
        ("Schalte bitte das Licht in der K\u00fcche aus", "German", True),
        ("apaga las luces de la cocina", "Spanish", True),
        ("Hola", "Spanish", True),
        ("anything", "Klingon", True),
    ],
)
def test_the_form_language_tells_translations_from_what_was_said(text, language, fits):
    assert (form_error(text, load_library()["translation"], {"language": language}) is None) is fits


def test_marks_of_other_scripts():
    library = load_library()
    assert form_error("\u4f60\u597d\u5417\uff1f", library["question_generation"]) is None
    assert items("\u82f9\u679c\u3001\u9999\u8549\u3001\u6885") == ["\u82f9\u679c", "\u9999\u8549", "\u6885"]


def test_loops_of_other_scripts():
    good = "सरकार ने विश्वविद्यालय खोला और विश्वविद्यालय में छात्र आए तथा विश्वविद्यालय बड़ा हुआ"
    assert not repetition(candidate(good))
    assert repetition(candidate("我们今天去公园吃饭" * 4)) and not repetition(
        candidate("我们今天去公园吃饭,他明天去学校")
    )


@pytest.mark.parametrize(
    "response, languages, kept",
    [
        ("今日は公園に行ってみんなで昼ごはんを食べました", ("en",), False),
        ("今日は公園に行ってみんなで昼ごはんを食べました", ("en", "ja"), True),
        ("Wir gehen heute in den Park und essen dort zu Mittag", ("en",), False),
        ("Em îro diçin parkê û li wir firavînê dixwin", ("en", "kmr"), True),  # not known by that code
    ],
)
def test_the_language_of_an_answer(response, languages, kept):
    assert (language(replace(candidate(response), languages=languages)) is None) is kept

"""Filters of targets."""

import pytest

from nemo_mtbi import registration as registration
from nemo_mtbi.errors import ConfigError
from nemo_mtbi.targets.config import TargetsConfig
from nemo_mtbi.targets.filters import (
    Candidate,
    choose_filters,
    empty,
    refusal,
    repetition,
    truncated,
)
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

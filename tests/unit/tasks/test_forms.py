"""Forms of answers and choices in them."""

import pytest

from nemo_mtbi import registration as registration
from nemo_mtbi.tasks.forms import choose, form_error
from nemo_mtbi.tasks.library import load_library

pytestmark = pytest.mark.unit


@pytest.mark.parametrize(
    "task, good, bad",
    [
        ("sentiment", ["Positive.", "It is negative"], ["happy", "positive or negative", ""]),
        ("entailment", ["Yes.", "No, it does not."], ["maybe", "yes and no"]),
        ("keywords", ["cat, mat, house", "1. cat\n2. mat\n3. hat"], ["a cat on a mat", "cat, mat"]),
        ("title", ["The Cat on the Mat"], ["a b c d e f g h i"]),
        ("question_generation", ["Where is the cat?", '"Who is it?"'], ["The cat.", "? no"]),
        ("translation", ["Die Katze ist auf der Matte."], ["The cat is on the mat."]),
        ("repeat", ["anything at all"], []),
    ],
)
def test_answer_forms(task, good, bad):
    chosen = load_library()[task]
    values = {"language": "German"}
    assert [form_error(t, chosen, values) for t in good] == [None] * len(good)
    assert all(form_error(t, chosen, values) for t in bad)


def test_a_choice_inside_a_longer_one_counts_only_alone():
    drinks = ["coffee", "iced coffee", "mocha"]
    assert choose("An Iced coffee, please", drinks) == "iced coffee" and choose("coffee!", drinks) == "coffee"
    assert choose("coffee or iced coffee", drinks) is None and choose("tea", drinks) is None


def test_choices_that_end_in_a_sign_are_named():
    choices = ["The speaker is angry.", "The speaker is happy.", "C++", "C"]
    assert choose("the speaker is angry.", choices) == "The speaker is angry."
    assert choose("I would say C++, yes", choices) == "C++" and choose("C", choices) == "C"
    assert choose("Cat", ["C"]) is None

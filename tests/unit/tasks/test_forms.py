"""Forms of answers and choices in them."""

import pytest

from nemo_mtbi import registration as registration
from nemo_mtbi.tasks.forms import choose, form_error, form_kept
from nemo_mtbi.tasks.library import load_library

pytestmark = pytest.mark.unit


@pytest.mark.parametrize(
    "task, good, bad",
    [
        ("sentiment", ["Positive.", "It is negative"], ["happy", "positive or negative", ""]),
        ("entailment", ["Yes.", "No, it does not."], ["maybe", "yes and no"]),
        (
            "keywords",
            [
                "cat, mat, house",
                "1. cat\n2. mat\n3. hat",
                "cat, mat and house",
                "cat, mat, and house",
                "Keywords:\na, b, c",
            ],
            [
                "a cat on a mat",
                "cat, mat",
                "a, b, c, d",
                "The speaker says that the cat is, in fact, on the mat.",
                "...",
            ],
        ),
        ("named_entities", ["Anna, New York City", "none"], ["There is a man who walks around and talks a lot.", ""]),
        (
            "title",
            ["The Cat on the Mat", "Cat \u2013 a life on the old mat"],
            ["a b c d e f g h i", "", "...", "\u5929" * 40],
        ),
        (
            "question_generation",
            ["Where is the cat?", '"Who is it?"', "\u201cWhat is it?\u201d", "**What is it?**"],
            ["The cat.", "? no", ""],
        ),
        ("translation", ["Die Katze ist auf der Matte."], ["The cat is on the mat.", "", "..."]),
        ("repeat", ["anything at all", ""], []),
    ],
)
def test_answer_forms(task, good, bad):
    chosen = load_library()[task]
    values = {"language": "German"}
    assert [form_error(t, chosen, values) for t in good] == [None] * len(good)
    assert all(form_error(t, chosen, values) for t in bad)


def test_what_cannot_be_judged_is_neither_kept_nor_broken():
    library = load_library()
    assert form_kept("", library["repeat"]) is None
    assert form_kept("This is plain English.", library["translation"], {"language": "Kurdish"}) is None
    assert form_kept("This is plain English.", library["translation"], {"language": "German"}) is False
    assert form_kept("", library["title"]) is False and form_kept("A Cat", library["title"]) is True


def test_a_choice_inside_a_longer_one_counts_only_alone():
    drinks = ["coffee", "iced coffee", "mocha"]
    assert choose("An Iced coffee, please", drinks) == "iced coffee" and choose("coffee!", drinks) == "coffee"
    assert choose("coffee or iced coffee", drinks) is None and choose("tea", drinks) is None


def test_choices_that_end_in_a_sign_are_named():
    choices = ["The speaker is angry.", "The speaker is happy.", "C++", "C"]
    assert choose("the speaker is angry.", choices) == "The speaker is angry."
    assert choose("I would say C++, yes", choices) == "C++" and choose("C", choices) == "C"
    assert choose("Cat", ["C"]) is None

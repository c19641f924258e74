"""Described transcripts: what the text LLM reads in the place of the words."""

import re

import pytest
from lhotse import MonoCut, SupervisionSegment

from nemo_mtbi.data.description import DESCRIPTION_FIELD, DescribedText
from nemo_mtbi.errors import ConfigError

pytestmark = pytest.mark.unit
LABELS = {"gender": "female", "age": "child", "speaking rate": "fast", "pitch": "low"}


def cut(*labels):
    supervisions = [
        SupervisionSegment(
            f"s{i}",
            "r",
            2.0 * i,
            2.0,
            text=f"words {i} {{{{ text }}}}",
            speaker=f"sp{i}",
            custom={DESCRIPTION_FIELD: own},
        )
        for i, own in enumerate(labels)
    ]
    return MonoCut("c", 0, 2.0 * len(labels), 0, supervisions=supervisions)


def test_attributes_and_their_order_are_drawn_for_each_key():
    describe = DescribedText()
    found = [describe(cut(LABELS), str(key)) for key in range(200)]
    assert found == [describe(cut(LABELS), str(key)) for key in range(200)]
    read = [
        re.fullmatch(r"The transcript of a recording:\nwords 0 \{\{ text \}\}\n(.*)", f.text, re.DOTALL)[1]
        for f in found
    ]
    drawn = [text.splitlines() for text in read]
    assert {len(own) for own in drawn} == {1, 2, 3, 4} and len({tuple(own) for own in drawn}) > 40
    assert {line for own in drawn for line in own} == {f"The {k} is {v}." for k, v in LABELS.items()}
    assert all([f"The {k} is {v}." for k, v in f.labels] == own for f, own in zip(found, drawn, strict=True))
    assert all(len(set(own)) == len(own) for own in drawn)


def test_what_is_asked_for_is_always_said():
    describe = DescribedText()
    for key in range(50):
        found = describe(cut(LABELS), str(key), ["pitch", "age"])
        assert "The pitch is low." in found.text and ("age", "child") in found.labels
    assert describe(cut(LABELS), "k", ["emotion"]) is None
    assert describe(cut(LABELS, {"age": "adult"}), "k", ["gender"]) is None
    assert describe(cut({}), "k") is None


def test_every_utterance_has_its_line():
    found = DescribedText(
        "{{ speaker }} {{ start }}: {{ text }}{% if described %} <{{ attributes }}>{% endif %}", least=9
    )(cut({"age": "adult"}, {}, {"gender": "male"}), "k")
    lines = found.text.splitlines()
    assert [line.split(":")[0] for line in lines] == ["sp0 00", "sp1 00", "sp2 00"]
    assert lines[0].endswith("<age: adult>") and lines[1].endswith("}}") and lines[2].endswith("<gender: male>")
    assert found.labels == (("age", "adult"), ("gender", "male"))


@pytest.mark.parametrize(
    ("template", "least", "message"),
    [
        ("{{ text }} {{ colour }}", 1, "names colour; there are start, end, text"),
        ("{{ attributes }}", 1, "does not say"),
        ("{{ text", 1, "description.template"),
        ("{{ text }}", -1, "least=-1"),
        ("{{ text }}", 1.5, "least=1.5"),
    ],
)
def test_impossible_templates_are_refused(template, least, message):
    with pytest.raises(ConfigError, match=message):
        DescribedText(template, least)


def test_templates_are_sandboxed():
    with pytest.raises(ConfigError, match="unsafe|template"):
        DescribedText("{{ text.__class__.__mro__ }}")(cut(LABELS), "k")
    with pytest.raises(ConfigError, match="colour"):
        DescribedText("{{ text }} {{ described['colour'] }}")(cut(LABELS), "k")


def test_a_text_that_others_keep_under_our_name_is_no_description():
    one = cut({})
    for kept in ("A man speaks quickly.", ["male"], None):
        one.supervisions[0].custom = {DESCRIPTION_FIELD: kept}
        assert DescribedText()(one, "key") is None and DescribedText()(one, "key", ["gender"]) is None

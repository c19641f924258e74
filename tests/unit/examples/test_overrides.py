"""Python values through Hydra's grammar and back."""

from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hypothesis import example, given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from nemo_mtbi.cli import CONF
from nemo_mtbi.errors import ConfigError
from nemo_mtbi.examples._overrides import as_typed, inline, override, overrides, read

pytestmark = pytest.mark.unit

SPECIAL = list("'\"\\${}[]():=,#~ \n\t%@+-.0aäß🙂")
TEXT = st.text(
    st.one_of(st.sampled_from(SPECIAL), st.characters(blacklist_categories=["Cs"], blacklist_characters="\0"))
)
PARTS = [
    "a, b",
    "it's",
    '"quoted"',
    "k: v",
    "x=1",
    "{x}",
    "${HOME}",
    "\\${a}",
    "'${oc.env:HOME}'",
    "ärger",
    "007",
    "🙂",
    "\n",
    "\\",
    "null",
    "[1]",
]
PROMPTS = st.one_of(TEXT, st.lists(st.sampled_from(PARTS), max_size=5).map("".join))


def expressible(key):
    try:
        return inline({key: 0}) is not None
    except ConfigError:
        return False


KEYS = st.text("abz09_/-\\+.$%*@?|()[]{}:=, \t", min_size=1).filter(expressible)
VALUES = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False), PROMPTS),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(KEYS, inner, max_size=4)),
    max_leaves=8,
)


@settings(deadline=None, max_examples=300)
@example("\\\n")
@given(VALUES)
def test_what_goes_in_comes_out(value):
    assert read(inline(value)) == value and type(read(inline(value))) is type(value)


@settings(deadline=None, max_examples=15)
@given(PROMPTS)
def test_a_prompt_reaches_the_launcher_letter_by_letter(text):
    with initialize_config_dir(str(CONF.resolve()), version_base="1.3"):
        for prompt in (text, [text, "b"]):
            given = overrides({"prompt": prompt, "audio": [text, Path("a b/rec (1).wav")], "model": text})
            cfg = compose("generate", [as_typed(o) for o in given])  # as_typed leaves what is written properly
            assert OmegaConf.to_container(cfg)["max_new_tokens"] == 128
            assert (cfg.prompt if isinstance(prompt, str) else list(cfg.prompt)) == prompt
            assert cfg.model == text and list(cfg.audio) == [text, "a b/rec (1).wav"]


@pytest.mark.parametrize(
    "argument, value",
    [
        ("model=runs/mtbi-step=200.ckpt", "runs/mtbi-step=200.ckpt"),
        ("audio=recording (1).wav", "recording (1).wav"),
        ("audio=C:\\a b\\c.wav", "C:\\a b\\c.wav"),
        ("prompt=In short, what is it?", "In short, what is it?"),
        ("prompt=Was heißt „Größe“? {x}", "Was heißt „Größe“? {x}"),
        ("prompt=it's", "it's"),
        ('prompt="a, b"', "a, b"),
        ("audio=[a.wav, b.wav]", ["a.wav", "b.wav"]),
        ("trainer.max_steps=5", 5),
        ("+a.b={c: 1}", {"c": 1}),
    ],
)
def test_values_that_hydra_refuses_are_text(argument, value):
    assert read(as_typed(argument).partition("=")[2]) == value


def test_arguments_that_are_no_assignments_stay():
    for argument in ("--cfg", "job", "~a", "-m"):
        assert as_typed(argument) == argument


def test_names_that_the_grammar_lacks_are_an_error():
    with pytest.raises(ConfigError, match="größe"):
        override("cuts", {"größe": "a"})
    for text in ("a,b", "${absent}", "{a"):
        with pytest.raises(ConfigError, match="several values|cannot be read"):
            read(text)


@pytest.mark.parametrize("argument", ["sources=[{kind: tsv, path: Müller/t.tsv}]", "cuts={train: a (1).jsonl}"])
def test_lists_that_cannot_be_read_are_no_text(argument):
    with pytest.raises(ConfigError, match="need quotes inside"):
        as_typed(argument)
    assert as_typed("prompt=[what (1]") == 'prompt="[what (1]"'

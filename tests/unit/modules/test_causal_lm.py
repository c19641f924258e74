"""What ends an answer: one function for targets, inference and benchmark."""

from types import SimpleNamespace

import pytest
from transformers import AutoTokenizer

from nemo_mtbi.errors import ConfigError
from nemo_mtbi.modules.causal_lm import end_of_turn, stop_ids

pytestmark = pytest.mark.unit


@pytest.mark.parametrize(
    "tokenizer, llm, expected",
    [(2, 5, [2, 5]), (2, [7, 5], [2, 5, 7]), (None, 5, [5]), (2, None, [2]), (2, 2, [2])],
)
def test_tokenizer_and_llm_both_count(tokenizer, llm, expected):
    found = stop_ids(SimpleNamespace(eos_token_id=tokenizer), SimpleNamespace(eos_token_id=llm))
    assert found == expected
    assert end_of_turn(SimpleNamespace(eos_token_id=tokenizer), SimpleNamespace(eos_token_id=llm)) in expected


def test_nothing_that_ends_is_an_error():
    with pytest.raises(ConfigError, match="eos_token_id"):
        stop_ids(SimpleNamespace(eos_token_id=None), SimpleNamespace(eos_token_id=None))


def test_the_turn_ends_with_what_the_template_writes(smollm2):
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    other = tokenizer.convert_tokens_to_ids("<|endoftext|>")
    config = SimpleNamespace(eos_token_id=[other, tokenizer.eos_token_id, 48_000])  # not the highest, nor the first
    assert end_of_turn(tokenizer, config) == tokenizer.convert_tokens_to_ids("<|im_end|>")

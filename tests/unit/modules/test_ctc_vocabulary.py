"""Transcripts as CTC labels over a part of the LLM's tokens."""

import pytest
from nemo.collections.common.tokenizers import AutoTokenizer

from nemo_mtbi import registration as registration
from nemo_mtbi.errors import DataError
from nemo_mtbi.modules.connectors.ctc_vocabulary import CTCVocabulary, choose_tokens, count_tokens

pytestmark = pytest.mark.unit


def test_ctc_vocabulary_spells_what_it_does_not_hold(smollm2):
    tokenizer = AutoTokenizer(smollm2, use_fast=True).tokenizer
    texts = ["the cat sat on the mat", "the cat ate", "a zebra"]
    counts = count_tokens(texts, tokenizer)
    small = CTCVocabulary(choose_tokens(counts, tokenizer, max_size=20, min_count=2), tokenizer)
    for text in texts:
        assert small.decode(small.encode(text)) == text  # rare words by their letters
    full = CTCVocabulary(choose_tokens(counts, tokenizer, 10_000, 1), tokenizer)
    assert len(full.encode(texts[0])) == len(tokenizer(texts[0])["input_ids"]) < len(small.encode(texts[2])) + 6
    with pytest.raises(DataError, match="no transcript"):
        choose_tokens(count_tokens([], tokenizer), tokenizer, 10, 1)

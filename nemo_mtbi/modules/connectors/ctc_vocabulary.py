"""The LLM tokens that a CTC connector can emit, and transcripts as sequences of them."""

from collections import Counter
from collections.abc import Iterable
from typing import Any

from nemo_mtbi.data.literal import literal_encoding
from nemo_mtbi.errors import DataError


class CTCVocabulary:
    """Maps transcripts to CTC labels (1-based; 0 is blank) over a subset of the LLM's tokens.

    A token outside the subset is spelled by the longest pieces inside it, so rare words stay reachable.

    Args:
        token_ids: LLM token ids; label ``i + 1`` is the i-th in ascending order.
        tokenizer: fast Hugging Face tokenizer of the LLM.
    """

    def __init__(self, token_ids: Iterable[int], tokenizer: Any) -> None:
        self.token_ids = sorted(token_ids)
        self.tokenizer = tokenizer
        self.labels = {token: index + 1 for index, token in enumerate(self.token_ids)}
        self._pieces = {tokenizer.convert_ids_to_tokens(t): c for t, c in self.labels.items()}
        self._longest = max(map(len, self._pieces))
        self._spelled: dict[int, list[int]] = {}

    def encode(self, transcript: str) -> list[int]:
        """CTC labels of a transcript; characters that no kept token covers are left out."""
        return self.labels_of(literal_encoding(self.tokenizer, transcript)[0])

    def labels_of(self, tokens: Iterable[int]) -> list[int]:
        """CTC labels of LLM tokens."""
        labels: list[int] = []
        for token in tokens:
            own = self.labels.get(token)
            labels += [own] if own is not None else self._spell(token)
        return labels

    def decode(self, labels: Iterable[int]) -> str:
        """Text of CTC labels."""
        return self.tokenizer.decode([self.token_ids[c - 1] for c in labels])

    def _spell(self, token: int) -> list[int]:
        if token not in self._spelled:
            text, position, out = self.tokenizer.convert_ids_to_tokens(token), 0, []
            while position < len(text):
                for size in range(min(self._longest, len(text) - position), 0, -1):
                    found = self._pieces.get(text[position : position + size])
                    if found is not None:
                        out.append(found)
                        break
                position += size
            self._spelled[token] = out
        return self._spelled[token]


def count_tokens(transcripts: Iterable[str], tokenizer: Any) -> Counter[int]:
    """How often each LLM token occurs in the transcripts."""
    counts: Counter[int] = Counter()
    for text in transcripts:
        counts.update(literal_encoding(tokenizer, text)[0])
    return counts


def choose_tokens(counts: Counter[int], tokenizer: Any, max_size: int, min_count: int) -> list[int]:
    """The kept token ids: single characters that occur (to spell the rest), then the most frequent tokens.

    Raises:
        DataError: no transcript had a token.
    """
    if not counts:
        raise DataError("The training manifests hold no transcript, so the CTC connector has no vocabulary.")
    characters = {c for token in counts for c in tokenizer.convert_ids_to_tokens(token)}
    kept = {
        i for i in tokenizer.convert_tokens_to_ids(sorted(characters)) if i is not None and i != tokenizer.unk_token_id
    }
    for token, count in counts.most_common():
        if len(kept) >= max_size or count < min_count:
            break
        kept.add(token)
    return sorted(kept)

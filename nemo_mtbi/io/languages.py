"""What language a text is in, by py3langid."""

from functools import lru_cache
from typing import Any


def identified(text: str, languages: tuple[str, ...] = ()) -> tuple[str, float]:
    """The likeliest ISO 639-1 code and its probability; ``languages``: of these alone."""
    return _identifier(languages).classify(text)


def known_languages() -> frozenset[str]:
    """Codes that can be told."""
    return frozenset(_identifier(()).nb_classes)


@lru_cache
def _identifier(languages: tuple[str, ...]) -> Any:
    from py3langid.langid import MODEL_FILE, LanguageIdentifier  # start-up

    identifier = LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
    if languages:
        identifier.set_languages(list(languages))
    return identifier

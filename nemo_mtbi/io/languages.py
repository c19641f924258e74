"""What language a text is in, by py3langid."""

from functools import lru_cache
from typing import Any

from nemo_mtbi.errors import ConfigError


def identified(text: str, languages: tuple[str, ...] = ()) -> tuple[str, float]:
    """The likeliest ISO 639-1 code and its probability; ``languages``: of these alone.

    Raises:
        ConfigError: py3langid is not installed.
    """
    return _identifier(languages).classify(text)


def known_languages() -> frozenset[str]:
    """Codes that can be told."""
    return frozenset(_identifier(()).nb_classes)


@lru_cache
def _identifier(languages: tuple[str, ...]) -> Any:
    try:
        from py3langid.langid import MODEL_FILE, LanguageIdentifier
    except ImportError as error:
        raise ConfigError("To tell languages takes py3langid: pip install 'nemo-mtbi[targets]'.") from error
    identifier = LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
    if languages:
        identifier.set_languages(list(languages))
    return identifier

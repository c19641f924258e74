"""Everyday sentences from a small grammar (statements, commands, questions), for the quickstart's own speech."""

import random
import re
from collections.abc import Iterator
from pathlib import Path

import yaml

from nemo_mtbi.errors import ConfigError

GRAMMAR = Path(__file__).parents[1] / "conf" / "sentences" / "everyday.yaml"
_SLOT = re.compile(r"\{(\w+)\}")


def everyday_sentences(count: int, seed: int = 0, grammar: Path = GRAMMAR) -> list[str]:
    """``count`` different sentences, drawn from the grammar's templates.

    Raises:
        ConfigError: the grammar names an unknown slot or has fewer sentences than asked for.
    """
    spec = yaml.safe_load(grammar.read_text(encoding="utf-8"))
    rng = random.Random(seed)
    sentences: dict[str, None] = {}
    for sentence in _draw(spec["templates"], spec["slots"], rng, attempts=count * 20):
        sentences[sentence] = None
        if len(sentences) == count:
            return list(sentences)
    raise ConfigError(f"{grammar} gives only {len(sentences)} different sentences; {count} were asked for.")


def _draw(templates: list[str], slots: dict[str, list[str]], rng: random.Random, attempts: int) -> Iterator[str]:
    for _ in range(attempts):
        text = rng.choice(templates)
        while match := _SLOT.search(text):
            if match.group(1) not in slots:
                raise ConfigError(f"Unknown slot {match.group()} in {text!r}; known slots: {', '.join(slots)}.")
            text = text[: match.start()] + rng.choice(slots[match.group(1)]) + text[match.end() :]
        yield text[0].upper() + text[1:]

"""What the text LLM reads beside the words: a description of each voice (DeSTA, arXiv 2406.18871, 2507.02768).

The student never sees it: it hears the voice. Attributes and their order are drawn for each prompt, so that no form of
the description is learned.
"""

import random
from collections.abc import Sequence
from typing import Any

from jinja2 import meta
from lhotse.cut import Cut

from nemo_mtbi.data.time_marks import clock
from nemo_mtbi.errors import ConfigError
from nemo_mtbi.tasks.library import SANDBOX

DESCRIPTION_FIELD = "description"  # in a supervision's custom fields
TEMPLATE = "[{{ start }}-{{ end }}] {{ text }} ({{ attributes }})"
VARIABLES = ("start", "end", "text", "speaker", "attributes", "described")


class DescribedText:
    """Renders a cut's utterances, one a line, each with its description.

    Args:
        template: Jinja2, sandboxed, for one utterance. ``start`` and ``end`` are minutes and seconds, ``attributes`` is
            ``name: label, ...`` of those that are drawn, ``described`` the same as a mapping.
        least: attributes of an utterance that are drawn at least, as far as there are any; the number is drawn too.

    Raises:
        ConfigError: a template that cannot be rendered, or names something that there is not.
    """

    def __init__(self, template: str = TEMPLATE, least: int = 1) -> None:
        try:
            named = meta.find_undeclared_variables(SANDBOX.parse(template))
            self.template = SANDBOX.from_string(template)
        except Exception as error:  # Jinja's
            raise ConfigError(f"description.template={template!r}: {error}.") from error
        if unknown := sorted(named - set(VARIABLES)):
            raise ConfigError(
                f"description.template names {', '.join(unknown)}; there are {', '.join(VARIABLES)} "
                "(an attribute: described['name'])."
            )
        if "text" not in named:
            raise ConfigError(f"description.template={template!r} does not say {{{{ text }}}}.")
        if type(least) is not int or least < 0:
            raise ConfigError(f"description.least={least}: give a whole number of attributes.")
        self.text, self.least = template, least

    def __call__(self, cut: Cut, key: str, needed: Sequence[str] = ()) -> str | None:
        """The text; None if some utterance lacks an attribute that is needed, or none has any.

        Args:
            cut: with descriptions.
            key: decides the draw.
            needed: attributes that every utterance must have, and that are always said.
        """
        rng, lines, any_described = random.Random(f"{key}/description"), [], False
        for supervision in sorted((s for s in cut.supervisions if s.text), key=lambda s: s.start):
            known = (supervision.custom or {}).get(DESCRIPTION_FIELD, {})
            if any(name not in known for name in needed):
                return None
            others = [name for name in known if name not in needed]
            count = rng.randint(min(len(others), max(0, self.least - len(needed))), len(others)) if others else 0
            drawn = [*needed, *rng.sample(others, count)]
            rng.shuffle(drawn)
            any_described |= bool(drawn)
            lines.append(self._line(supervision, {name: str(known[name]) for name in drawn}))
        return "\n".join(lines) if any_described else None

    def _line(self, supervision: Any, described: dict[str, str]) -> str:
        values = {
            "start": clock(round(max(0.0, supervision.start))),
            "end": clock(round(max(0.0, supervision.end))),
            "text": supervision.text.strip(),
            "speaker": supervision.speaker or "",
            "attributes": ", ".join(f"{name}: {label}" for name, label in described.items()),
            "described": described,
        }
        try:
            return str(self.template.render(values)).strip()
        except Exception as error:  # a template's expressions may raise anything
            raise ConfigError(f"description.template={self.text!r}: {error}.") from error

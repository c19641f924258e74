"""What the text LLM reads beside the words: a description of each voice (DeSTA, arXiv 2406.18871, 2507.02768).

The student never sees it: it hears the voice. Attributes and their order are drawn for each prompt, so that no form of
the description is learned.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from jinja2 import meta
from lhotse.cut import Cut

from nemo_mtbi.data.time_marks import clock
from nemo_mtbi.errors import ConfigError
from nemo_mtbi.tasks.library import SANDBOX

DESCRIPTION_FIELD = "description"  # in a supervision's custom fields
TEMPLATE = (  # of those that were tried, what small LLMs read best (docs/results.md, Voices)
    "The transcript of a recording{% if several %} from {{ start }} to {{ end }}{% endif %}:\n{{ text }}"
    "{% for name, label in described.items() %}\nThe {{ name }} is {{ label }}.{% endfor %}"
)
VARIABLES = ("start", "end", "text", "speaker", "several", "attributes", "described")


@dataclass(frozen=True)
class Description:
    """What the text LLM reads in the transcript's place.

    Attributes:
        text: all of it.
        labels: attributes and their labels, as they are said.
    """

    text: str
    labels: tuple[tuple[str, str], ...]


def labels_of(supervision: Any) -> dict[str, Any]:
    """Labels by attribute, as ``prepare`` wrote them; what others keep under that name (a text) is none."""
    found = (supervision.custom or {}).get(DESCRIPTION_FIELD)
    return found if isinstance(found, dict) else {}


class DescribedText:
    """Renders a cut's utterances one after the other, each with its description.

    Args:
        template: Jinja2, sandboxed, for one utterance. ``start`` and ``end`` are minutes and seconds, ``attributes`` is
            ``name: label, ...`` of those that are drawn, ``described`` the same as a mapping, ``several`` whether there
            are other utterances.
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

    def __call__(self, cut: Cut, key: str, needed: Sequence[str] = ()) -> Description | None:
        """The description; None if some utterance lacks an attribute that is needed, or none has any.

        Args:
            cut: with descriptions.
            key: decides the draw.
            needed: attributes that every utterance must have, and that are always said.
        """
        rng, lines, said = random.Random(f"{key}/description"), [], list[tuple[str, str]]()
        spoken = sorted((s for s in cut.supervisions if s.text), key=lambda s: s.start)
        for supervision in spoken:
            known = labels_of(supervision)
            if any(name not in known for name in needed):
                return None
            others = [name for name in known if name not in needed]
            count = rng.randint(min(len(others), max(0, self.least - len(needed))), len(others)) if others else 0
            drawn = [*needed, *rng.sample(others, count)]
            rng.shuffle(drawn)
            labels = {name: str(known[name]) for name in drawn}
            said += labels.items()
            lines.append(self._line(supervision, labels, len(spoken) > 1))
        return Description("\n".join(lines), tuple(dict.fromkeys(said))) if said else None

    def _line(self, supervision: Any, described: dict[str, str], several: bool) -> str:
        values = {
            "start": clock(round(max(0.0, supervision.start))),
            "end": clock(round(max(0.0, supervision.end))),
            "text": supervision.text.strip(),
            "speaker": supervision.speaker or "",
            "several": several,
            "attributes": ", ".join(f"{name}: {label}" for name, label in described.items()),
            "described": described,
        }
        try:
            return str(self.template.render(values)).strip()
        except Exception as error:  # a template's expressions may raise anything
            raise ConfigError(f"description.template={self.text!r}: {error}.") from error

"""What a connector that writes text heard, and whether a model notices that nothing is said."""

from pathlib import Path

from lhotse import CutSet

from nemo_mtbi.data.target import is_no_speech
from nemo_mtbi.errors import ConfigError
from nemo_mtbi.evaluation.systems import EvaluationSet, SpeechSystem, system_batches
from nemo_mtbi.models.mtbi_salm import MTBISALM
from nemo_mtbi.modules.connectors.base import Connector
from nemo_mtbi.modules.perception import connector_of


def spoken_cuts(path: str | Path) -> CutSet:
    """The cuts of a manifest but for those in which nothing is said, which ``no_speech`` is for."""
    return CutSet.from_file(path).filter(lambda cut: not is_no_speech(cut))


def require_spoken(name: str, path: str | Path) -> None:
    """
    Raises:
        ConfigError: there is nothing to score.
    """
    if next(iter(spoken_cuts(path)), None) is None:
        raise ConfigError(f"cuts.{name}: nothing is said in any recording of {path}. Give it as no_speech.")


def writes_text(model: MTBISALM) -> bool:
    """Whether the model's connector writes what it hears."""
    connector = connector_of(model.perception)
    return connector is not None and type(connector).transcribe is not Connector.transcribe


def own_transcripts(
    system: SpeechSystem, questions: EvaluationSet, batch_size: int, title: str
) -> list[tuple[str, str]]:
    """What the connector wrote of each cut, and the cut's transcript; nothing for connectors without text."""
    if not writes_text(system.model):
        return []
    once = list({c.source_id: c for c in questions.conversations}.values())
    result = []
    for reading in system_batches(system, questions, once, batch_size, f"{title}: transcribe"):
        texts = system.transcripts(reading) or []
        result += [(text, e.transcript) for text, e in zip(texts, reading.examples, strict=True)]
    return result


def nothing_heard(
    system: SpeechSystem, cuts: CutSet, cached_features: bool, batch_size: int, title: str
) -> float | None:
    """Share of cuts, with targets or without, of which the connector writes nothing.

    With a connector without text: share that the LLM, asked to repeat, answers with ``model.nothing_heard_answer``;
    None where that is null.
    """
    questions = EvaluationSet(system.model, cuts, cached_features, every_cut=True)
    if writes_text(system.model):
        return empty_share([text for text, _ in own_transcripts(system, questions, batch_size, title)])
    answer = system.model.config.nothing_heard_answer
    if answer is None:
        return None
    longest = len(system.model.nothing_heard_ids())
    batches = system_batches(system, questions, questions.conversations, batch_size, f"{title}: answer")
    answers = [text for reading in batches for text in system.answers(reading, [longest] * len(reading.examples))]
    return sum(text.strip() == answer for text in answers) / len(answers) if answers else None


def empty_share(texts: list[str]) -> float | None:
    """Share of texts without a letter or digit; None of none."""
    return sum(not any(c.isalnum() for c in text) for text in texts) / len(texts) if texts else None

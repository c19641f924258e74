"""Do the first targets of each manifest fit the run? Asked before training, not at the first imitation step."""

from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from nemo_mtbi import console
from nemo_mtbi.config import misspelled
from nemo_mtbi.data.chat_template import ChatTemplateFormat, template_digest
from nemo_mtbi.data.conversation import task_weights
from nemo_mtbi.data.cut_lines import has_lines
from nemo_mtbi.data.target import NO_SPEECH, TARGETS_FIELD, Target, said_beside
from nemo_mtbi.errors import ConfigError, DataError
from nemo_mtbi.io import jsonl
from nemo_mtbi.models.mtbi_salm import MTBISALM
from nemo_mtbi.modules.perception import connector_of
from nemo_mtbi.tasks.library import load_library
from nemo_mtbi.training.data_module import targets_dataset
from nemo_mtbi.training.sections import input_entries

PEEKED_LINES = 200
Lines = list[dict[str, Any]]


def first_lines(manifest: Any) -> Iterator[dict[str, Any]]:
    """The first cuts of a manifest of lines on this machine; none of others, which are not peeked at."""
    if not has_lines(manifest):
        return
    with open(manifest, "rb") as file:
        for number, line in zip(range(1, PEEKED_LINES + 1), file, strict=False):
            if line.strip():
                yield jsonl.parsed(Path(manifest), number, line)


def check_targets(data: DictConfig, model: MTBISALM) -> None:
    """A task that looks misspelled is said, since it may stand further down.

    Args:
        data: of the imitation stage.
        model: that is to be trained on it.

    Raises:
        ConfigError: a term that the connector cannot have, or for which no manifest has word times.
        DataError: answers of another LLM, under another prompt format or chat template, without the teacher's
            log-probabilities or with those of another temperature.
    """
    imitation, connector = model.config.imitation, connector_of(model.perception)
    if imitation.w_ctc > 0 and (connector is None or not connector.emits_tokens):
        raise ConfigError(
            f"model.imitation.w_ctc={imitation.w_ctc} needs a connector that emits tokens (CTCCompressConnector, "
            "WhisperDecoderConnector, TwoChannelConnector). Set it to 0."
        )
    sections = {key: list(input_entries(data[key])) for key in ("train_ds", "validation_ds") if key in data}
    read = [(key, entry, list(first_lines(entry.get("cuts_path")))) for key, own in sections.items() for entry in own]
    for _, entry, _ in read:
        require_same_template(entry.get("cuts_path"), model)
    dataset, tasks = targets_dataset(model), set(load_library())
    for _, _, lines in read:
        tasks |= {target["task"] for line in lines for target in _targets(line)}
    doubtful = misspelled("model.imitation.task_weights", imitation.task_weights, sorted(tasks))
    for section, entry, lines in read:
        asked = task_weights(entry.get("tasks"))
        doubtful += misspelled(f"data.{section}.tasks", asked, sorted(tasks))
        for line in lines:
            for target in _targets(line):
                if asked is None or asked.get(target["task"], 0) > 0:
                    dataset.require_fitting(line["id"], Target(**target), model.config.speech_position)
    for problem in dict.fromkeys(doubtful):
        console.say(problem)
    require_word_times(data, "imitation.w_align", imitation.w_align)


def require_same_template(cuts: Any, model: MTBISALM) -> None:
    """Of the LLM that has answered and of the one that is trained with; fingerprints are of weights.

    Args:
        cuts: a manifest, beside which target generation says which template it was.
        model: that is to be trained on it.

    Raises:
        DataError: another one.
    """
    if model.cfg.prompt_format != ChatTemplateFormat.NAME or not has_lines(cuts):
        return
    theirs, own = said_beside(cuts, "tokenizer").get("chat_template_digest"), template_digest(model.tokenizer.tokenizer)
    if theirs not in (None, own):
        raise DataError(
            f"The answers in {cuts} were given under another chat template of the LLM ({theirs}, now {own}): was it "
            "updated meanwhile? Generate them again."
        )


def require_word_times(data: DictConfig, name: str, weight: float) -> None:
    """Of the first cuts to train on, where a stage's ``w_align`` is set.

    Args:
        data: of the stage.
        name: of the weight, below ``model``.
        weight: the weight.

    Raises:
        ConfigError: none has any, so that the term would teach nothing.
    """
    if weight <= 0:
        return
    entries = list(input_entries(data.train_ds)) if "train_ds" in data else []
    read = [list(first_lines(entry.get("cuts_path"))) for entry in entries]
    spoken = [[line for line in lines if not _custom(line).get(NO_SPEECH)] for lines in read]
    if spoken and all(spoken) and not any(map(_has_word_times, chain(*spoken))):
        raise ConfigError(
            f"model.{name}={weight} needs word times (supervision.alignment['word']), which the first cuts of "
            f"{', '.join(str(e.cuts_path) for e in entries)} do not have. Prepare with an aligner, or set it to 0."
        )


def _custom(line: dict[str, Any]) -> dict[str, Any]:
    return line.get("custom") or {}


def _targets(line: dict[str, Any]) -> Lines:
    return _custom(line).get(TARGETS_FIELD, [])


def _has_word_times(line: dict[str, Any]) -> bool:
    cuts = [line, *(track["cut"] for track in line.get("tracks", []))]
    return any((s.get("alignment") or {}).get("word") for cut in cuts for s in cut.get("supervisions", []))

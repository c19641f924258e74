"""Do the first targets of each manifest fit the run? Asked before training, not at the first imitation step."""

import json
from collections.abc import Iterator
from itertools import islice
from typing import Any

from omegaconf import DictConfig

from nemo_mtbi.config import misspelled
from nemo_mtbi.data.conversation import task_weights
from nemo_mtbi.data.target import TARGETS_FIELD, Target
from nemo_mtbi.errors import ConfigError
from nemo_mtbi.models.mtbi_salm import MTBISALM
from nemo_mtbi.modules.perception import connector_of
from nemo_mtbi.tasks.library import load_library
from nemo_mtbi.training.data_module import input_entries, targets_dataset

PEEKED_LINES = 200


def first_lines(manifest: Any) -> Iterator[dict[str, Any]]:
    """The first cuts of a manifest of lines; none of others, which are not peeked at."""
    if isinstance(manifest, str) and manifest.endswith(".jsonl"):
        with open(manifest, encoding="utf-8") as lines:
            yield from map(json.loads, islice(lines, PEEKED_LINES))


def check_targets(data: DictConfig, model: MTBISALM) -> None:
    """
    Args:
        data: of the imitation stage.
        model: that is to be trained on it.

    Raises:
        ConfigError: a term that the connector cannot have, a manifest without word times, a misspelled task.
        DataError: answers of another LLM, under another prompt format, without the teacher's log-probabilities or
            with those of another temperature.
    """
    imitation, connector = model.config.imitation, connector_of(model.perception)
    if imitation.w_ctc > 0 and (connector is None or not connector.emits_tokens):
        raise ConfigError(
            f"model.imitation.w_ctc={imitation.w_ctc} needs a connector that emits tokens (CTCCompressConnector, "
            "WhisperDecoderConnector, TwoChannelConnector). Set it to 0."
        )
    dataset, known = targets_dataset(model), set(load_library())
    for section in ("train_ds", "validation_ds"):
        for entry in input_entries(data[section]) if section in data else ():
            lines = list(first_lines(entry.get("cuts_path")))
            if not lines:
                continue
            targets = [t for line in lines for t in (line.get("custom") or {}).get(TARGETS_FIELD, [])]
            tasks = known | {t["task"] for t in targets}
            asked = task_weights(entry.get("tasks"))
            problems = misspelled(f"{section}: tasks", asked, sorted(tasks))
            problems += misspelled("model.imitation.task_weights", imitation.task_weights, sorted(tasks))
            if problems:
                raise ConfigError("; ".join(problems))
            for line in lines:
                for target in (line.get("custom") or {}).get(TARGETS_FIELD, []):
                    if asked is None or target["task"] in asked:
                        dataset.require_fitting(line["id"], Target(**target), model.config.speech_position)
            if section == "train_ds" and imitation.w_align > 0 and not any(map(_has_word_times, lines)):
                raise ConfigError(
                    f"model.imitation.w_align={imitation.w_align} needs word times (supervision.alignment['word']), "
                    f"which the first {len(lines)} cuts of {entry.cuts_path} do not have. Prepare with an "
                    "aligner, or set it to 0."
                )


def _has_word_times(line: dict[str, Any]) -> bool:
    return any((s.get("alignment") or {}).get("word") for s in line.get("supervisions", []))

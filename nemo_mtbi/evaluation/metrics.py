"""Measures of one answer, each as (numerator, denominator): a set's score is the ratio of sums, so it can be resampled.

| measure | of an answer |
| --- | --- |
| ``token_agreement``, ``kl_per_token`` | under teacher forcing, against the text LLM on the reference transcript |
| ``rouge_l``, ``chrf`` | generated text against the text LLM's (rouge_score's F, sacrebleu's sentence chrF / 100) |
| ``form`` | the answer has the form that its prompt asked for |
| ``accuracy_text`` | the choice that the answer names is the text LLM's; where the text LLM names one |
| ``accuracy_likelihood`` | the most likely choice is the text LLM's most likely one |
| ``wer``, ``wer_to_text_llm`` | of "repeat": against the transcript, and against the text LLM's own answer |

WER counts words after Whisper's English normalizer (Transformers), for other languages its basic one.
"""

import re
from functools import cache
from typing import Any

import jiwer

from nemo_mtbi.tasks.forms import choose, form_error
from nemo_mtbi.tasks.library import Task

Measure = tuple[float, float]
LIBRARIES = ("jiwer", "rouge_score", "sacrebleu", "transformers", "torch", "nemo_toolkit", "lhotse")


def measures(record: dict[str, Any], reference: dict[str, Any], task: Task) -> dict[str, Measure]:
    """Measures of one prediction.

    Args:
        record: of the system; keys ``answer``, ``prompt``, and as far as it has them ``tokens``, ``agreed``, ``kl``, ``choice``.
        reference: the text topline's record of the same conversation.
        task: of the conversation.
    """
    answer, own = record["answer"], reference["answer"]
    result = text_measures(own, answer)
    if record.get("tokens"):
        result["token_agreement"] = (record["agreed"], record["tokens"])
        result["kl_per_token"] = (record["kl"], record["tokens"])
    if task.form["kind"] != "any":
        result["form"] = (float(form_error(answer, task, filled_values(task, record["prompt"])) is None), 1)
    if task.choices:
        named = choose(own, task.choices)
        if named is not None:
            result["accuracy_text"] = (float(choose(answer, task.choices) == named), 1)
        if record.get("choice") and reference.get("choice"):
            result["accuracy_likelihood"] = (float(record["choice"] == reference["choice"]), 1)
    if task.metric == "wer":
        result["wer"] = word_errors(record["transcript"], answer, record["language"])
        result["wer_to_text_llm"] = word_errors(own, answer, record["language"])
    return {k: v for k, v in result.items() if v[1] > 0}


def text_measures(reference: str, answer: str) -> dict[str, Measure]:
    """ROUGE-L and chrF of a text."""
    return {
        "rouge_l": (_rouge().score(reference, answer)["rougeL"].fmeasure, 1),
        "chrf": (_chrf().sentence_score(answer, [reference]).score / 100, 1),
    }


def filled_values(task: Task, prompt: str) -> dict[str, str]:
    """The values of the task's variables that a filled prompt names."""
    return {name: next((v for v in values if v in prompt), values[0]) for name, values in task.variables.items()}


def word_errors(reference: str, hypothesis: str, language: str = "en") -> Measure:
    """(substitutions + deletions + insertions, words of the reference), both normalized."""
    normalize = normalizer(language.split("-")[0].lower())
    reference, hypothesis = normalize(reference), normalize(hypothesis)
    if not reference:
        return 0.0, 0.0
    alignment = jiwer.process_words(reference, hypothesis)
    errors = alignment.substitutions + alignment.deletions + alignment.insertions
    return float(errors), float(len(reference.split()))


@cache
def normalizer(language: str) -> Any:
    """Whisper's text normalizer of a language."""
    from transformers.models.whisper.english_normalizer import BasicTextNormalizer, EnglishTextNormalizer

    return EnglishTextNormalizer({}) if language == "en" else BasicTextNormalizer()


@cache
def _rouge() -> Any:
    from rouge_score.rouge_scorer import RougeScorer

    class AnyScript:  # rouge_score's own keeps a-z and 0-9 alone
        def tokenize(self, text: str) -> list[str]:
            return re.findall(r"\w+", text.lower())

    return RougeScorer(["rougeL"], tokenizer=AnyScript())


@cache
def _chrf() -> Any:
    from sacrebleu.metrics.chrf import CHRF

    return CHRF()

"""Measures of one answer as values that add up over answers, so that a set's score can be resampled.

Most are (numerator, denominator), and the score is the ratio of the sums. BLEU adds n-gram counts and lengths, macro
F1 the counts of each class (:data:`SCORES`).

| measure | of an answer |
| --- | --- |
| ``token_agreement``, ``kl_per_token`` | under teacher forcing, against the text LLM on the reference transcript |
| ``rouge_l``, ``chrf`` | generated text against the text LLM's (rouge_score's F, sacrebleu's sentence chrF / 100) |
| ``form`` | the answer has the form that its prompt asked for |
| ``accuracy_text`` | the choice that the answer names is the text LLM's; where the text LLM names one |
| ``accuracy_likelihood`` | the most likely choice is the text LLM's most likely one |
| ``wer``, ``wer_to_text_llm`` | of "repeat": against the transcript, and against the text LLM's own answer |
| ``f1_text``, ``f1_likelihood`` | macro F1 of a labelled choice, over the classes that occur |
| ``bleu`` | sacrebleu's corpus BLEU / 100, of translations (and ``chrf``) |
| ``exact_match``, ``answer_f1`` | SQuAD's, of answers in few words (torchmetrics) |
| ``contains_label`` | the answer contains the label, both normalized |
| ``instructions``, ``prompts`` | IFEval's strict shares of instructions followed, and of answers that follow all of
them |

WER counts words after Whisper's English normalizer (Transformers; without its table of British and American spellings),
for other languages its basic one.
"""

import re
from functools import cache
from typing import Any

import jiwer
import numpy as np

from nemo_mtbi.errors import ConfigError
from nemo_mtbi.evaluation.statistics import Score, Sums, ratio
from nemo_mtbi.io.text import UNSPACED, language_code, normalized, words_of
from nemo_mtbi.tasks.forms import choose, form_kept
from nemo_mtbi.tasks.library import Task

Measure = (
    tuple[float, ...] | dict[tuple[str, ...], float]
)  # positional values, or named ones where answers have different ones
BRACKETS = re.compile(r"[\[\](){}<>]")
REMARKS = re.compile(r"[<\[][^>\]]*[>\]]|\([^)]+?\)")  # what Whisper's normalizers leave out
LIBRARIES = ("jiwer", "rouge_score", "sacrebleu", "torchmetrics", "transformers", "torch", "nemo_toolkit", "lhotse")


def measures(record: dict[str, Any], reference: dict[str, Any], task: Task) -> dict[str, Measure]:
    """Measures of one prediction.

    Args:
        record: of the system; keys ``answer``, ``prompt``, and as far as it has them ``tokens``, ``agreed``, ``kl``,
            ``choice``.
        reference: the text topline's record of the same conversation.
        task: of the conversation.
    """
    answer, own = record["answer"], reference["answer"]
    result: dict[str, tuple[float, float]] = {}
    if record.get("tokens"):
        result["token_agreement"] = (record["agreed"], record["tokens"])
        result["kl_per_token"] = (record["kl"], record["tokens"])
    if task.choices and record.get("choice") and reference.get("choice"):
        result["accuracy_likelihood"] = (float(record["choice"] == reference["choice"]), 1)
    if answer is None or own is None:
        return {**result}
    result |= text_measures(own, answer)
    if (kept := form_kept(answer, task, filled_values(task, record["prompt"]))) is not None:
        result["form"] = (float(kept), 1)
    if task.choices:
        named = choose(own, task.choices)
        if named is not None:
            result["accuracy_text"] = (float(choose(answer, task.choices) == named), 1)
    if task.metric == "wer" and record.get("ended", True):  # what the limit of tokens cut off is nobody's error
        result["wer"] = word_errors(record["transcript"], answer, record["language"])
        result["wer_to_text_llm"] = word_errors(own, answer, record["language"])
    return {k: v for k, v in result.items() if v[1] > 0}


def sums_of(measure: str, rows: dict[str, list[Measure]]) -> Sums:
    """The values of one measure by utterance, added up.

    Args:
        measure: its name.
        rows: the values of each utterance's answers.
    """
    names = sorted({name for values in rows.values() for v in values if isinstance(v, dict) for name in v})
    added = {}
    for utterance, values in rows.items():
        plain = [tuple(v.get(n, 0.0) for n in names) if isinstance(v, dict) else v for v in values]
        added[utterance] = tuple(map(sum, zip(*plain, strict=True)))
    return Sums.of(added, SCORES.get(measure, ratio))  # type: ignore[arg-type]


def class_counts(label: str, predicted: str | None, task: str = "") -> dict[tuple[str, ...], float]:
    """What one answer adds to true positives, false positives and false negatives of the classes, which are the labels
    of its kind of question: "medium" of a pitch is not that of a rate.
    """
    if predicted == label:
        return _counts(task, label, tp=1.0)
    return _counts(task, label, fn=1.0) | ({} if predicted is None else _counts(task, predicted, fp=1.0))


def _counts(task: str, label: str, **found: float) -> dict[tuple[str, ...], float]:
    return {(task, label, kind): found.get(kind, 0.0) for kind in ("fn", "fp", "tp")}


def macro_f1(sums: np.ndarray) -> np.ndarray:
    """Sums (..., 3 C) of (fn, fp, tp) of each class -> mean F1 over the classes that occur."""
    missed, wrong, right = (sums[..., i::3] for i in range(3))  # names are sorted: fn, fp, tp
    below = 2 * right + wrong + missed
    scores = np.divide(2 * right, below, out=np.zeros_like(below), where=below > 0)
    classes = (below > 0).sum(-1)
    return np.divide(scores.sum(-1), classes, out=np.full(sums.shape[:-1], np.nan), where=classes > 0)


def bleu_counts(reference: str, answer: str, language: str) -> Measure:
    """Matching and all n-grams (1 to 4), lengths of answer and reference, after sacrebleu's tokenizer of the
    language.
    """
    score = _bleu(language_code(language)).sentence_score(answer, [reference])
    return (*map(float, score.counts), *map(float, score.totals), float(score.sys_len), float(score.ref_len))


def corpus_bleu(sums: np.ndarray) -> np.ndarray:
    """Sums (..., 10) of :func:`bleu_counts` -> corpus BLEU in [0, 1]."""
    from sacrebleu.metrics.bleu import BLEU

    flat = [
        BLEU.compute_bleu(list(map(int, r[:4])), list(map(int, r[4:8])), int(r[8]), int(r[9]), "exp").score / 100
        for r in sums.reshape(-1, 10)
    ]
    return np.array(flat).reshape(sums.shape[:-1])


SCORES: dict[str, Score] = {"f1_text": macro_f1, "f1_likelihood": macro_f1, "bleu": corpus_bleu}


def squad_measures(references: list[str], answer: str) -> dict[str, Measure]:
    """SQuAD's exact match and token F1 with the best of several right answers."""
    from torchmetrics.functional.text import squad

    target = {"answers": {"text": references, "answer_start": [0] * len(references)}, "id": "0"}
    scores = squad([{"prediction_text": answer, "id": "0"}], [target])  # type: ignore[list-item]
    return {"exact_match": (float(scores["exact_match"]) / 100, 1), "answer_f1": (float(scores["f1"]) / 100, 1)}


def instruction_measures(instructions: list[dict[str, Any]], prompt: str, answer: str) -> dict[str, Measure]:
    """Which verifiable instructions of IFEval the answer follows, strictly.

    Args:
        instructions: ``{"id": ..., "kwargs": {...}}`` each.
        prompt: of the question.
        answer: to it.
    """
    try:
        import langdetect
        from if_verifiable import IFEvalSample, evaluate_output_for_sample
    except ImportError as error:
        raise ConfigError("Instructions are checked by if-verifiable: pip install nemo-mtbi[ifeval].") from error
    langdetect.DetectorFactory.seed = 0  # it guesses at random otherwise
    sample = IFEvalSample(
        key=0,
        prompt=prompt,
        instruction_id_list=[i["id"] for i in instructions],
        kwargs=[i["kwargs"] for i in instructions],
    )
    results, scores = evaluate_output_for_sample("ifeval", sample, answer)
    return {"instructions": (scores.partial_strict * len(results), len(results)), "prompts": (scores.binary_strict, 1)}


def contains(label: str, answer: str, language: str = "en") -> Measure:
    """Whether the words of the label stand in the answer, in order, both normalized. Brackets are no reason to leave
    words out here, as Whisper's normalizer does; scripts without spaces are compared without any."""
    normalize = normalizer(language_code(language))
    wanted, said = (f" {normalize(BRACKETS.sub(' ', text)).strip()} " for text in (label, answer))
    if UNSPACED.search(label):
        wanted, said = wanted.replace(" ", ""), said.replace(" ", "")
    return float(bool(wanted.strip()) and wanted in said), 1.0


def text_measures(reference: str, answer: str) -> dict[str, tuple[float, float]]:
    """ROUGE-L and chrF of a text."""
    return {
        "rouge_l": (_rouge().score(reference, answer)["rougeL"].fmeasure, 1),
        "chrf": (_chrf().sentence_score(answer, [reference]).score / 100, 1),
    }


def filled_values(task: Task, prompt: str) -> dict[str, str]:
    """The values of the task's variables that a filled prompt names."""
    return {name: next((v for v in values if v in prompt), values[0]) for name, values in task.variables.items()}


def word_errors(reference: str, hypothesis: str, language: str = "en") -> tuple[float, float]:
    """(substitutions + deletions + insertions, words of the reference), both normalized; of scripts without spaces,
    characters."""
    normalize = normalizer(language_code(language))
    said, written = words_of(normalize(reference)), words_of(normalize(hypothesis))
    if not said:
        return 0.0, 0.0
    alignment = jiwer.process_words(" ".join(said), " ".join(written))
    errors = alignment.substitutions + alignment.deletions + alignment.insertions
    return float(errors), float(len(said))


@cache
def normalizer(language: str) -> Any:
    """Whisper's text normalizer for English; else what it does, but for vowel signs and accents, which stay."""
    from transformers.models.whisper.english_normalizer import EnglishTextNormalizer

    return EnglishTextNormalizer({}) if language == "en" else _of_any_language


def _of_any_language(text: str) -> str:
    return normalized(REMARKS.sub("", text))


@cache
def _rouge() -> Any:
    from rouge_score.rouge_scorer import RougeScorer

    class AnyScript:  # rouge_score's own keeps a-z and 0-9 alone
        def tokenize(self, text: str) -> list[str]:
            return words_of(normalized(text))

    return RougeScorer(["rougeL"], tokenizer=AnyScript())


@cache
def _bleu(language: str) -> Any:
    from sacrebleu.metrics.bleu import BLEU

    tokenize = {"zh": "zh", "ja": "char", "ko": "char"}.get(language, "13a")  # ja-mecab and ko-mecab need MeCab
    return BLEU(effective_order=True, tokenize=tokenize)


@cache
def _chrf() -> Any:
    from sacrebleu.metrics.chrf import CHRF

    return CHRF()

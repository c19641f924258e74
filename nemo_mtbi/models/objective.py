"""Everything that is summed into the loss of a micro-batch, each term with its count.

Letters: R response tokens, W words with a time, B utterances, P connector positions, H LLM width.
"""

import itertools
import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from nemo.collections.speechlm2.modules import AudioPerceptionModule
from torch import Tensor, nn

from nemo_mtbi.config import ImitationConfig
from nemo_mtbi.data.example import Example
from nemo_mtbi.data.interleaving import Unit
from nemo_mtbi.data.target import no_log_probabilities
from nemo_mtbi.errors import DataError
from nemo_mtbi.io.transfer import to_device
from nemo_mtbi.losses.alignment import word_alignment_loss
from nemo_mtbi.losses.head import Head
from nemo_mtbi.losses.imitation import ImitationLoss, imitation_loss
from nemo_mtbi.losses.objective import CachedTeacher
from nemo_mtbi.models.layout import BatchLayout
from nemo_mtbi.models.speech import SpeechInput, batch_features, connect, connector_dtype, windows_start
from nemo_mtbi.modules.connectors.base import Connector, SpeechEmbeddings, frame_mask
from nemo_mtbi.modules.connectors.windows import whole_utterances
from nemo_mtbi.modules.perception import connector_of, encoder_frame_seconds
from nemo_mtbi.parallel.ranks import summed

KINDS = ("response_tokens", "transcript_tokens", "words", "utterances")
RESPONSE_TOKENS, TRANSCRIPT_TOKENS, WORDS, UTTERANCES = KINDS
ENERGY_ROWS = 8192  # embeddings read together
WINDOW_COUNTS = "window_counts"  # key of a batch: the counts of its whole optimizer step on this rank


@dataclass
class StudentOutput:
    """What a student's forward pass gives the objective.

    Attributes:
        hidden: (R, H) at the positions before each response token.
        layout: of the batch.
        spoken: what of the batch is speech.
    """

    hidden: Tensor
    layout: BatchLayout
    spoken: SpeechInput


@dataclass(frozen=True)
class StepLoss:
    """One micro-batch: the sum that is differentiated, the count that it is divided by, and what is logged."""

    total: Tensor
    count: int
    metrics: dict[str, Tensor]


def imitation_terms(
    batch: dict[str, Any], student: StudentOutput, head: Head, config: ImitationConfig, teacher_hidden: Tensor | None
) -> ImitationLoss:
    """CE and KL of a batch.

    Args:
        batch: of :class:`nemo_mtbi.data.dataset.MTBIDataset`.
        student: its forward pass.
        head: the LLM's output layer.
        config: weights and teacher.
        teacher_hidden: (R, H) of an online teacher; None for the cached one, or none.

    Raises:
        DataError: the cached teacher is asked for, and the batch has none.
    """
    examples: list[Example] = batch["examples"]
    cached = None
    if teacher_hidden is None and config.w_kl > 0:
        if "teacher_ids" not in batch:
            raise DataError(no_log_probabilities(f"{examples[0].id} or a neighbour"))
        cached = CachedTeacher(batch["teacher_ids"], batch["teacher_log_probs"])
    return imitation_loss(
        student.hidden,
        head,
        student.layout.response_ids,
        config.objective(),
        teacher_hidden=teacher_hidden,
        cached_teacher=cached,
        token_weights=_token_weights(examples, student.layout, config),
    )


def _token_weights(examples: list[Example], layout: BatchLayout, config: ImitationConfig) -> Tensor | None:
    if not config.task_weights and not config.by_answer:
        return None
    counts = list(zip(examples, layout.response_counts, strict=True))
    weights = [config.task_weights.get(e.task, 1.0) / (max(1, n) if config.by_answer else 1) for e, n in counts]
    return to_device([w for w, (_, n) in zip(weights, counts, strict=True) for _ in range(n)], layout.index.device)


@dataclass(frozen=True)
class Term:
    """A sum over tokens, words or utterances that enters the loss as ``weight * total / count``, by ``kind``."""

    weight: float
    total: Tensor
    kind: str


def transcript_terms(
    batch: dict[str, Any],
    speech: SpeechEmbeddings | None,
    perception: AudioPerceptionModule,
    embed_tokens: nn.Module,
    weights: Any,
) -> list[Term]:
    """The connector's own terms: the transcription loss (w_ctc), and ALIGN (w_align).

    Args:
        batch: of :class:`nemo_mtbi.data.dataset.MTBIDataset`.
        speech: of the batch, if the connector ran; only w_align needs it.
        perception: encoder and connector.
        embed_tokens: of the LLM.
        weights: with ``w_ctc`` and ``w_align``.
    """
    if weights.w_ctc == 0 and weights.w_align == 0:
        return []
    examples: list[Example] = batch["examples"]
    features, lengths, windows, written = batch_features(perception, batch)
    connector = connector_of(perception) or Connector()
    terms = []
    if weights.w_ctc > 0:
        features = connector_dtype(perception, features)
        own, _ = connector.transcription_loss(speech, features, lengths, [e.transcript for e in examples], windows)
        terms.append(Term(weights.w_ctc, own, TRANSCRIPT_TOKENS))
    if weights.w_align > 0:
        seconds = encoder_frame_seconds(perception)
        if speech is None:
            speech = connect(perception, features, lengths, windows, written)
            speech.centers = connector.word_centers(speech, examples, seconds)  # as where the LLM reads it
        spoken, text = pooled_words(examples, speech, seconds, embed_tokens)
        terms.append(Term(weights.w_align, word_alignment_loss(spoken, text, embedding_energy(embed_tokens)), WORDS))
    return terms


def risk_term(
    batch: dict[str, Any],
    perception: AudioPerceptionModule,
    config: ImitationConfig,
    answer_losses: Callable[[SpeechEmbeddings, list[int]], Tensor],
) -> Term:
    """Minimum risk over the connector's hypotheses (w_risk): an utterance's risk is the mean loss of a response token.

    Utterances of several windows count, and add none. A text that was drawn twice is read once.

    Args:
        batch: of :class:`nemo_mtbi.data.dataset.MTBIDataset`.
        perception: encoder and connector.
        config: number and temperature of the samples.
        answer_losses: losses (N,) of the answers of N examples, where the LLM reads a hypothesis of each.
    """
    features, lengths, windows, _ = batch_features(perception, batch)
    features, connector = connector_dtype(perception, features), connector_of(perception) or Connector()
    starts, count = windows_start(windows), config.risk_samples
    readings = connector.hypotheses(features, lengths, count, config.risk_temperature, starts)
    utterances = len(lengths) if windows is None else len(windows.firsts)
    first = readings.first_alike()
    if windows is not None:
        first = [[alike[window] for window in windows.firsts] for alike in first]
    with torch.no_grad():
        risks = torch.zeros(utterances, count, device=features.device)
        for s, reading in enumerate(readings.speech):
            if rows := [
                row for row, own in enumerate(first[s]) if own == s and (windows is None or windows.alone[row])
            ]:
                losses = answer_losses(whole_utterances(reading, windows).rows(rows), rows)
                risks[to_device(rows, risks.device), s] = losses.float()
        risks = risks.gather(1, to_device(first, risks.device).t())
    if windows is not None:
        risks = torch.where(to_device(windows.alone, risks.device)[:, None], risks, 0.0)
        firsts = to_device(windows.firsts, features.device)
        features, lengths = features[firsts], lengths[firsts]
        readings.tokens = [[sample[row] for row in windows.firsts] for sample in readings.tokens]
    return Term(config.w_risk, connector.risk_loss(features, lengths, readings, risks), UTTERANCES)


def of_rows(batch: dict[str, Any], teacher: Tensor | None, rows: list[int]) -> tuple[dict[str, Any], Tensor | None]:
    """Some examples of a batch, with their rows of what the teacher says: (R, H) online, (R, K) cached."""
    examples: list[Example] = batch["examples"]
    if len(rows) == len(examples):
        return batch, teacher
    ends = list(itertools.accumulate((len(e.response_ids) for e in examples), initial=0))
    places = [place for row in rows for place in range(ends[row], ends[row + 1])]
    named = {name: batch[name] for name in ("teacher_ids", "teacher_log_probs") if name in batch}
    device = next((t.device for t in (teacher, *named.values()) if t is not None), torch.device("cpu"))
    chosen = to_device(places, device)
    own: dict[str, Any] = {"examples": [examples[row] for row in rows]}
    own |= {name: value[chosen] for name, value in named.items()}
    return own, None if teacher is None else teacher[chosen]


def losses_of_answers(loss: ImitationLoss, counts: list[int], config: ImitationConfig) -> Tensor:
    """Mean loss (B,) of each answer's response tokens, of which there are ``counts``."""
    per_token = loss.per_token
    owner = to_device(torch.arange(len(counts)).repeat_interleave(torch.tensor(counts)), per_token.device)
    sums = per_token.new_zeros(len(counts)).index_add(0, owner, per_token)
    return sums if config.by_answer else sums / to_device([max(1, n) for n in counts], per_token.device)


def term_counts(examples: list[Example], connector: Connector | None) -> dict[str, int]:
    """What the terms of a micro-batch are divided by, by kind.

    Transcript tokens: of the utterances that the transcription loss learns from (CTC: of all, also where there are too
    few frames for them, which are not known yet). Words: those with times; one without a
    position of its own adds nothing to the term.
    """
    connector = connector or Connector()
    alone = [e.duration_seconds <= connector.window_seconds for e in examples]
    return {
        RESPONSE_TOKENS: sum(len(e.response_ids) for e in examples),
        TRANSCRIPT_TOKENS: connector.transcript_tokens([e.transcript for e in examples], alone),
        WORDS: sum(has_word(e, u) for e in examples for u in e.units),
        UTTERANCES: len(examples),
    }


def has_word(example: Example, unit: Unit) -> bool:
    """Whether a unit has tokens, and a time of its own."""
    return unit.token_end > unit.token_begin and (len(example.units) > 1 or unit.words == 1)


def embedding_energy(embed_tokens: nn.Module) -> float:
    """Mean square of the LLM's (frozen) token embeddings, as it reads them: the unit of the word-level alignment term.

    Computed once. Under tensor parallelism all ranks of the LLM call this together.
    """
    energy = getattr(embed_tokens, "mtbi_energy", None)
    if energy is None:
        weight, total = next(embed_tokens.parameters()), 0.0
        rows = int(getattr(embed_tokens, "vocabulary", embed_tokens.num_embeddings))  # type: ignore[arg-type]
        with torch.no_grad():
            for begin in range(0, rows, ENERGY_ROWS):
                ids = torch.arange(begin, min(begin + ENERGY_ROWS, rows), device=weight.device)
                total += float(embed_tokens(ids).double().square().sum())
        energy = total / (rows * weight.shape[1])
        embed_tokens.mtbi_energy = energy  # type: ignore[assignment]
    return energy


def pooled_words(
    examples: list[Example], speech: SpeechEmbeddings, frame_seconds: float, embed_tokens: nn.Module
) -> tuple[Tensor, Tensor]:
    """Mean speech embedding and mean token embedding of every unit. -> (W, H), (W, H).

    Both are zero for a unit without a position, without tokens, or without a time of its own.
    """
    device, width = speech.centers.device, max(len(e.units) for e in examples)
    rows, ends = len(examples) * width, torch.full((len(examples), width), math.inf)
    for row, example in enumerate(examples):
        within = max(0, len(example.units) - 1)  # the last one takes what is left
        ends[row, :within] = torch.tensor([unit.end_seconds for unit in example.units[:within]])
    words = [
        (row * width + place, example.prompt_ids[unit.token_begin : unit.token_end])
        for row, example in enumerate(examples)
        for place, unit in enumerate(example.units)
        if has_word(example, unit)
    ]
    ids = to_device([token for _, own in words for token in own], device, torch.long)
    owners = to_device([place for place, own in words for _ in own], device, torch.long)

    def mean(values: Tensor, owner: Tensor) -> tuple[Tensor, Tensor]:
        """Of (N, H) values by their unit (N,), ``rows`` for those of none; and which units have any."""
        wide = torch.promote_types(values.dtype, torch.float32)  # sums of many positions
        sums = values.new_zeros(rows + 1, values.shape[-1], dtype=wide).index_add(0, owner, values.to(wide))[:rows]
        counts = sums.new_zeros(rows + 1).index_add(0, owner, torch.ones_like(owner, dtype=wide))[:rows]
        return (sums / counts.clamp_min(1)[:, None]).to(values.dtype), counts[:, None] > 0

    text, asked = mean(embed_tokens(ids).detach().to(speech.embeddings.dtype), owners)
    seconds = ((speech.centers + 0.5) * frame_seconds).to(ends.dtype).contiguous()
    place = torch.searchsorted(to_device(ends, device), seconds, right=True)  # units follow each other without gaps
    inside = frame_mask(speech.lengths, place.shape[1]) & (place < width)
    place = place + width * torch.arange(len(examples), device=device)[:, None]
    place = torch.where(inside, place, rows)
    spoken, heard = mean(speech.embeddings.flatten(0, 1), place.flatten())
    both = asked & heard
    return torch.where(both, spoken, 0.0), torch.where(both, text, 0.0)


def batch_counts(
    batch: dict[str, Any], connector: Connector | None, device: torch.device, training: bool, group: Any
) -> tuple[dict[str, int], Tensor]:
    """Counts of a micro-batch, and (4,) in the order of KINDS of its whole optimizer step.

    Args:
        batch: with ``window_counts`` where a step has several micro-batches.
        connector: counts transcript tokens.
        device: of the counts.
        training: outside of it a micro-batch stands alone.
        group: data-parallel ranks of the step.
    """
    own = term_counts(batch["examples"], connector)
    window = batch.get(WINDOW_COUNTS, own) if training else own
    counts = to_device([float(window[kind]) for kind in KINDS], device)
    return own, summed(counts, group) if training else counts


def combined(
    terms: list[Term], own: dict[str, int], counts: Tensor, reference: str
) -> tuple[Tensor, dict[str, Tensor]]:
    """Terms in units of one count, and the mean of each for the log.

    The gradient of a step is divided by one count N, so a term with another count is brought to it:
    ``w * S / N_term = (w * S * N / N_term) / N``.

    Args:
        terms: at least one.
        own: counts of this micro-batch.
        counts: (4,) in the order of KINDS, of the whole optimizer step, over all micro-batches and ranks.
        reference: kind of N.
    """
    size = counts[KINDS.index(reference)].clamp_min(1)  # as the divisor: other terms stay where a step has none of it
    scaled = [t.weight * t.total * (size / counts[KINDS.index(t.kind)].clamp_min(1)) for t in terms]
    names = {TRANSCRIPT_TOKENS: "transcription", WORDS: "word_alignment", UTTERANCES: "risk"}
    metrics = {names[t.kind]: t.total.detach() / max(1, own[t.kind]) for t in terms}
    return torch.stack(scaled).sum(), metrics


def alignment_loss(terms: list[Term], own: dict[str, int], counts: Tensor) -> StepLoss:
    """A micro-batch of the alignment stage, per transcript token (per word with w_align alone)."""
    reference = TRANSCRIPT_TOKENS if any(t.kind == TRANSCRIPT_TOKENS for t in terms) else WORDS
    total, metrics = combined(terms, own, counts, reference)
    return StepLoss(total, own[reference], metrics | {"loss": total.detach() / max(1, own[reference])})


def reference(config: ImitationConfig) -> str:
    """Kind of the count by which a step's loss is divided."""
    return UTTERANCES if config.by_answer else RESPONSE_TOKENS


def step_loss(
    batch: dict[str, Any],
    student: StudentOutput,
    loss: ImitationLoss,
    extra: tuple[Tensor, dict[str, Tensor]] | None,
    config: ImitationConfig,
) -> StepLoss:
    """The sum of all terms of an imitation step; its loss per response token or answer, CE and KL per token.

    Args:
        batch: of :class:`nemo_mtbi.data.dataset.MTBIDataset`.
        student: its forward pass.
        loss: CE and KL.
        extra: :func:`combined` further terms in units of ``reference(config)``, if any.
        config: what the loss is a mean over.
    """
    layout, tokens = student.layout, len(student.layout.response_ids)
    count = len(batch["examples"]) if config.by_answer else tokens
    total = loss.loss if extra is None else loss.loss + extra[0]
    sums = {"ce": loss.ce, "kl": loss.kl, "agreement": loss.agreed.float().sum()}
    metrics = {name: own / max(1, tokens) for name, own in sums.items()}
    metrics |= extra[1] if extra else {}
    metrics["loss"] = total.detach() / max(1, count)
    metrics["padding_fraction"] = 1 - layout.lengths.sum() / layout.index.numel()
    metrics["empty_spans"] = torch.tensor(float(layout.empty_spans))  # their words were lost to the LLM
    by_task = sums_by_task(batch["examples"], layout, loss, config)
    metrics |= {f"loss_by_task/{task}": own[0] / own[3].clamp_min(1) for task, own in by_task.items()}
    return StepLoss(total, count, metrics)


def sums_by_task(
    examples: list[Example], layout: BatchLayout, loss: ImitationLoss, config: ImitationConfig
) -> dict[str, Tensor]:
    """Sums over the response tokens of each task: (loss, agreed, tokens, what the loss is divided by)."""
    tasks = list(dict.fromkeys(e.task for e in examples))
    places = [tasks.index(e.task) for e, n in zip(examples, layout.response_counts, strict=True) for _ in range(n)]
    tokens = Counter(places)
    counted = Counter(tasks.index(e.task) for e in examples) if config.by_answer else tokens
    values = loss.per_token.detach()
    rows = torch.stack([values, loss.agreed.to(values.dtype)], 1)
    sums = rows.new_zeros(len(tasks), 2).index_add(0, to_device(places, rows.device, torch.long), rows)
    counts = to_device([[float(tokens[place]), float(counted[place])] for place in range(len(tasks))], rows.device)
    return dict(zip(tasks, torch.cat([sums, counts.to(sums.dtype)], 1), strict=True))

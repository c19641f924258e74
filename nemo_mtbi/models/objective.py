"""Everything that is summed into the loss of a micro-batch, each term with its count.

Letters: R response tokens, W words with a time, B utterances, P connector positions, H LLM width.
"""

from dataclasses import dataclass
from typing import Any

import torch
from nemo.collections.speechlm2.modules import AudioPerceptionModule
from torch import Tensor, nn

from nemo_mtbi.config import ImitationConfig
from nemo_mtbi.data.example import Example
from nemo_mtbi.errors import DataError
from nemo_mtbi.losses.alignment import word_alignment_loss
from nemo_mtbi.losses.head import Head
from nemo_mtbi.losses.imitation import ImitationLoss, imitation_loss
from nemo_mtbi.losses.objective import CachedTeacher
from nemo_mtbi.models.layout import BatchLayout
from nemo_mtbi.models.speech import batch_features, connect, connector_dtype
from nemo_mtbi.modules.connectors.base import Connector, SpeechEmbeddings
from nemo_mtbi.modules.perception import connector_of, encoder_frame_seconds


@dataclass
class StudentOutput:
    """What a student's forward pass gives the objective.

    Attributes:
        hidden: (R, H) at the positions before each response token.
        layout: of the batch.
        speech: the connector's output.
    """

    hidden: Tensor
    layout: BatchLayout
    speech: SpeechEmbeddings


@dataclass(frozen=True)
class StepLoss:
    """One micro-batch: the sum that is differentiated, the tokens that it is divided by, and what is logged."""

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
            raise DataError(
                f"model.imitation.teacher=cached, but {examples[0].id} or a neighbour has no teacher "
                f"log-probabilities. "
                "Set top_k in generate_targets.py and run it again, or use teacher=online."
            )
        cached = CachedTeacher(batch["teacher_ids"], batch["teacher_log_probs"])
    return imitation_loss(
        student.hidden,
        head,
        student.layout.response_ids,
        config.objective(),
        teacher_hidden=teacher_hidden,
        cached_teacher=cached,
        token_weights=_token_weights(examples, student.layout, config.task_weights),
    )


def _token_weights(examples: list[Example], layout: BatchLayout, weights: dict[str, float]) -> Tensor | None:
    if not weights:
        return None
    counts = zip(examples, layout.response_counts, strict=True)
    return torch.tensor([weights.get(e.task, 1.0) for e, n in counts for _ in range(n)], device=layout.index.device)


def transcript_terms(
    batch: dict[str, Any],
    speech: SpeechEmbeddings | None,
    perception: AudioPerceptionModule,
    embed_tokens: nn.Module,
    weights: Any,
) -> tuple[Tensor, int]:
    """``w_ctc * transcription loss + w_align * ALIGN`` as a sum, and its target tokens (1 a word with w_align alone).

    Args:
        batch: of :class:`nemo_mtbi.data.dataset.MTBIDataset`.
        speech: of the batch, if the connector ran; only w_align needs it.
        perception: encoder and connector.
        embed_tokens: of the LLM.
        weights: with ``w_ctc`` and ``w_align``.
    """
    examples: list[Example] = batch["examples"]
    features, lengths = batch_features(perception, batch)
    connector = connector_of(perception) or Connector()
    loss, count = torch.zeros((), device=features.device), 0
    if weights.w_ctc > 0:
        features = connector_dtype(perception, features)
        own, count = connector.transcription_loss(speech, features, lengths, [e.transcript for e in examples])
        loss = loss + weights.w_ctc * own
    if weights.w_align > 0:
        seconds = encoder_frame_seconds(perception)
        if speech is None:
            speech = connect(perception, features, lengths)
            if speech.ctc_log_probs is None:  # CTC frames have times of their own
                speech.centers = connector.word_centers(speech, examples, seconds)
        spoken, text = pooled_words(examples, speech, seconds, embed_tokens)
        loss = loss + weights.w_align * word_alignment_loss(spoken, text, embedding_energy(embed_tokens))
        count = count or len(text)
    return loss, count


def embedding_energy(embed_tokens: nn.Module) -> float:
    """Mean square of the LLM's (frozen) token embeddings, the unit of the word-level alignment term."""
    energy = getattr(embed_tokens, "mtbi_energy", None)
    if energy is None:
        energy = float(next(embed_tokens.parameters()).detach().float().square().mean())
        embed_tokens.mtbi_energy = energy  # type: ignore[assignment]
    return energy


def pooled_words(
    examples: list[Example], speech: SpeechEmbeddings, frame_seconds: float, embed_tokens: nn.Module
) -> tuple[Tensor, Tensor]:
    """Mean speech embedding and mean token embedding of every unit that has both. -> (W, H), (W, H)."""
    spoken, text = [], []
    centers = (speech.centers + 0.5) * frame_seconds
    device = centers.device
    valid = torch.arange(centers.shape[1], device=device) < speech.lengths[:, None]
    for row, example in enumerate(examples):
        for unit in example.units:
            inside = valid[row] & (centers[row] >= unit.start_seconds) & (centers[row] < unit.end_seconds)
            if unit.token_end > unit.token_begin and inside.any():
                spoken.append(speech.embeddings[row, inside].mean(0))
                ids = torch.tensor(example.prompt_ids[unit.token_begin : unit.token_end], device=device)
                text.append(embed_tokens(ids).detach().to(speech.embeddings.dtype).mean(0))
    if not text:
        empty = speech.embeddings.new_zeros(0, speech.embeddings.shape[-1])
        return empty, empty
    return torch.stack(spoken), torch.stack(text)


def step_loss(
    batch: dict[str, Any], student: StudentOutput, loss: ImitationLoss, extra: Tensor | None = None
) -> StepLoss:
    """The sum of all terms of an imitation step, and its metrics per response token.

    Args:
        batch: of :class:`nemo_mtbi.data.dataset.MTBIDataset`.
        student: its forward pass.
        loss: CE and KL.
        extra: sum of :func:`transcript_terms`, if any.
    """
    count, layout = len(student.layout.response_ids), student.layout
    total = loss.loss if extra is None else loss.loss + extra
    metrics = {"ce": loss.ce / count, "kl": loss.kl / count, "agreement": loss.agreed.float().mean()}
    if extra is not None:
        metrics["alignment"] = extra.detach() / count
    metrics["loss"] = total.detach() / count
    metrics["padding_fraction"] = 1 - layout.lengths.sum() / layout.index.numel()
    metrics["empty_spans"] = torch.tensor(float(layout.empty_spans))  # their words were lost to the LLM
    sums = sums_by_task(batch["examples"], layout, loss)
    metrics |= {f"loss_by_task/{task}": own[0] / own[2] for task, own in sums.items()}
    return StepLoss(total, count, metrics)


def sums_by_task(examples: list[Example], layout: BatchLayout, loss: ImitationLoss) -> dict[str, Tensor]:
    """Sums over the response tokens of each task: (loss, agreed, tokens)."""
    tasks = list(dict.fromkeys(e.task for e in examples))
    places = [tasks.index(e.task) for e, n in zip(examples, layout.response_counts, strict=True) for _ in range(n)]
    values = loss.per_token.detach()
    rows = torch.stack([values, loss.agreed.to(values.dtype), torch.ones_like(values)], 1)
    sums = rows.new_zeros(len(tasks), 3).index_add(0, torch.tensor(places, device=rows.device), rows)
    return dict(zip(tasks, sums, strict=True))

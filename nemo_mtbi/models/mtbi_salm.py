"""MTBISALM: NeMo's SALM trained by behavior imitation with speech-text interleaving (arXiv 2505.18644).

A batch walks through ``training_step`` once: ``data/example.py`` plans pieces of text and speech, ``speech.py``
encodes and connects the audio, ``layout.py`` joins both to the LLM's input, ``language_model.py`` gives hidden states
of student and teacher, ``objective.py`` sums the loss.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning import LightningModule
from nemo.collections.common.prompts import PromptFormatter
from nemo.collections.speechlm2.models.salm import SALM
from torch import Tensor

from nemo_mtbi import registration as registration
from nemo_mtbi.checkpoints.trained_state import TrainableCheckpoint
from nemo_mtbi.config import model_config
from nemo_mtbi.data.example import Example, plan_batch
from nemo_mtbi.losses.head import Head
from nemo_mtbi.losses.imitation import ImitationLoss
from nemo_mtbi.losses.vocabulary import WHOLE_VOCABULARY, VocabularyShard
from nemo_mtbi.models import speech
from nemo_mtbi.models.generation import SpeechLLM
from nemo_mtbi.models.gradients import GradientMixin
from nemo_mtbi.models.language_model import PrefixStore, hidden_states, packs, teacher_hidden_states
from nemo_mtbi.models.layout import build_inputs
from nemo_mtbi.models.objective import (
    StepLoss,
    StudentOutput,
    alignment_loss,
    batch_counts,
    combined,
    imitation_terms,
    losses_of_answers,
    of_rows,
    reference,
    risk_term,
    step_loss,
    sums_by_task,
    transcript_terms,
)
from nemo_mtbi.models.optimization import build_optimizer
from nemo_mtbi.models.packing import Prefix
from nemo_mtbi.models.persistence import PersistenceMixin
from nemo_mtbi.models.seen import SeenRecord
from nemo_mtbi.models.setup import setup_parts
from nemo_mtbi.models.validation import ValidationSums
from nemo_mtbi.models.work import Work
from nemo_mtbi.modules.causal_lm import causal_lm, checkpoint_activations, is_frozen, output_head
from nemo_mtbi.modules.connectors.base import SpeechEmbeddings, evaluation_mode
from nemo_mtbi.modules.perception import connector_of, encoder_frame_seconds, encoder_key
from nemo_mtbi.parallel.loading import load_shards
from nemo_mtbi.parallel.sharding import shard_llm


class MTBISALM(TrainableCheckpoint, PersistenceMixin, SpeechLLM, GradientMixin, SALM):
    """Frozen speech encoder, trainable connector, frozen LLM.

    The module names and ``cfg`` fields are SALM's (``perception``, ``embed_tokens``, ``llm``), so SALM's export and
    NeMo's data module work unchanged. Steps, objective, batches and checkpoints are ours.

    Args:
        cfg: plain dictionary with the fields of :class:`nemo_mtbi.config.ModelConfig`.

    Raises:
        ConfigError: before any weight is loaded, if the configuration cannot work.
    """

    cfg: Any
    llm_weights: str | Path
    references: dict[str, str]
    prefixes: PrefixStore | None
    _packs: bool | None

    def __init__(self, cfg: dict[str, Any]) -> None:
        null = {"nothing_heard_answer"}  # says something; of others NeMo asks whether they are there
        cfg = {key: value for key, value in cfg.items() if value is not None or key in null}
        config = model_config(cfg)
        cfg |= {"llm_dtype": config.llm_dtype, "encoder_dtype": config.encoder_dtype}  # what "auto" is here
        LightningModule.__init__(self)
        # save_hyperparameters() walks the call stack and stumbles over from_pretrained's class methods.
        self.hparams.update({"cfg": cfg})
        self.config = config
        self.interleaving = config.interleaving.policy()
        self.vocabulary_shard: VocabularyShard = WHOLE_VOCABULARY
        setup_parts(self, cfg, config)
        self.frame_seconds = encoder_frame_seconds(self.perception)
        self.stage = "imitation"
        self.seed = 0
        self.earlier_moments: Callable[[], dict[str, Tensor]] = dict  # of an earlier stage's optimizer
        self.seen = SeenRecord()
        self.work = Work()
        self._use_fsdp = self._use_tp = False
        self.register_load_state_dict_post_hook(lambda module, _: module.bind_connector())
        self.bind_connector()

    def configure_model(self) -> None:
        """Give this rank its shard of the LLM, read from the files; nothing to do without tensor parallelism.

        SALM's own tensor parallelism (DTensor) is replaced by :mod:`nemo_mtbi.parallel`.
        """
        if self.config.tensor_model_parallel_size == 1 or self.vocabulary_shard.group is not None:
            return
        body = causal_lm(self.llm).model
        body.embed_tokens = self.embed_tokens
        self.vocabulary_shard = shard_llm(self.llm, self.config.sequence_parallel)
        device = self.device if self._trainer is None else self.trainer.strategy.root_device
        load_shards(self.llm, self.llm_weights, device)
        self.embed_tokens = body.embed_tokens
        del body.embed_tokens
        if (connector := connector_of(self.perception)) is not None:
            connector.choice_group = self.vocabulary_shard.group
        self.bind_connector()

    def bind_connector(self) -> None:
        """Refresh what is derived from the LLM's weights; runs after every load."""
        self._packs = None
        if self.prefixes is not None:
            self.prefixes.clear()
        connector = connector_of(self.perception)
        if connector is not None:
            connector.bind_language_model(self.tokenizer.tokenizer, self.embed_tokens)

    def set_ctc_vocabulary(self, token_ids: list[int]) -> None:
        """Give a CTC connector the tokens of the training transcripts (see
        ``modules/connectors/ctc_vocabulary.py``).
        """
        connector = connector_of(self.perception)
        assert connector is not None
        connector.set_vocabulary(token_ids)  # type: ignore[operator]
        self.bind_connector()

    def prompt_formatter(self) -> type[PromptFormatter]:
        return PromptFormatter.resolve(self.cfg.prompt_format)

    @property
    def packs(self) -> bool:
        """Whether the LLM computes no padding; found out when it is first asked, on all ranks of an LLM together."""
        if self._packs is None:
            self._packs = self.config.packing and packs(self.llm, self.embed_tokens)
        return self._packs

    @property
    def encoder_key(self) -> str:
        """Key of cached features that this model accepts."""
        return encoder_key(self.cfg.perception, self.references["encoder"], self.config.encoder_dtype)

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, Tensor]:
        """One micro-batch. The returned loss is a *sum*; the gradient is normalized by :class:`GradientMixin`."""
        self.keep_frozen_parts_in_evaluation_mode()
        if self.perception.fusion is not None:
            self.perception.fusion.draw(f"{self.seed}/{self.global_step if self._trainer is not None else 0}")
        if self.stage == "alignment":
            step = self.alignment(batch, self.config.alignment_stage)
        else:
            unfused = self.config.imitation.teacher == "unfused" and self.config.imitation.w_kl > 0
            teacher = None if unfused else self.teacher_hidden(batch)
            student = self.student(batch, interleave=True)
            teacher = self.unfused_hidden(batch, student) if unfused else teacher
            loss = self.imitation(batch, student, teacher)
            extra = self.further_terms(batch, student.spoken.unfused, teacher)
            step = step_loss(batch, student, loss, extra, self.config.imitation)
        self.count_tokens(step.count)
        self.seen.add(batch["examples"], self.stage)
        size = len(batch["examples"])
        self.log("loss", step.metrics.pop("loss"), on_step=True, prog_bar=True, batch_size=size)
        self.log_dict(step.metrics, on_step=True, batch_size=size)
        return {"loss": step.total}

    def student(self, batch: dict[str, Any], interleave: bool) -> StudentOutput:
        """The speech LLM on a batch, without logits."""
        examples: list[Example] = batch["examples"]
        policy = self.interleaving if interleave else None
        step = self.global_step if self._trainer is not None else 0
        pieces = plan_batch(examples, policy, step, self.opening)
        level = policy.level if policy else None
        if level == "waveform" and self.interleaving.probability == 0:  # nothing is cut
            level = "embedding"
        return self.answering(examples, speech.speech_input(self.perception, batch, pieces, level))

    def answering(self, examples: list[Example], spoken: speech.SpeechInput) -> StudentOutput:
        """The LLM on the examples' prompts, speech and responses."""
        first = 0 if self.prefixes is None else 1  # constant beginnings are not computed again
        inputs, layout = build_inputs(
            [row[first:] for row in spoken.pieces],
            [e.response_ids for e in examples],
            spoken.embeddings,
            spoken.seconds,
            self.frame_seconds,
            self.embed_tokens,
        )
        prefix = None
        if self.prefixes is not None:
            prefix = self.prefixes.get(self.llm, self.embed_tokens, [row[0] for row in spoken.pieces])  # type: ignore[misc]
        hidden = self.hidden(inputs, prefix, layout.row_lengths if self.packs else None)
        self.work.add(
            self.llm, sum(layout.row_lengths) if self.packs else layout.index.numel(), len(layout.response_ids)
        )
        return StudentOutput(hidden.flatten(0, 1)[layout.response_rows], layout, spoken)

    @torch.no_grad()
    def teacher_hidden(self, batch: dict[str, Any]) -> Tensor | None:
        """The online teacher's hidden states (R, H) before the response tokens; None where the teacher is another."""
        config, examples = self.config.imitation, batch["examples"]
        if config.w_kl == 0 or config.teacher not in ("online", "unfused"):
            return None
        responses, beginnings = [e.response_ids for e in examples], [e.units[0].token_begin for e in examples]
        prompts = [e.teacher_prompt for e in examples]
        kept = 0 if self.prefixes is None else sum(beginnings)
        tokens = sum(map(len, responses))
        self.work.add(self.llm, sum(map(len, prompts)) - kept + tokens - len(examples), tokens)
        with evaluation_mode(self.llm):  # where LoRA is trained, the LLM's dropout is on
            return teacher_hidden_states(
                self.llm, self.embed_tokens, prompts, responses, self.prefixes, beginnings, packed=self.packs
            )

    @torch.no_grad()
    def unfused_hidden(self, batch: dict[str, Any], student: StudentOutput) -> Tensor:
        """Hidden states (R, H) of the student itself on all positions, its teacher on fewer ones."""
        spoken = student.spoken
        if spoken.unfused is spoken.embeddings:
            return student.hidden.detach()
        with evaluation_mode(self.llm):
            return self.answering(batch["examples"], replace(spoken, embeddings=spoken.unfused)).hidden

    def imitation(self, batch: dict[str, Any], student: StudentOutput, teacher: Tensor | None = None) -> ImitationLoss:
        """CE and KL of a batch; ``teacher``: what :meth:`teacher_hidden` gave for it, if it was called."""
        teacher = self.teacher_hidden(batch) if teacher is None else teacher
        return imitation_terms(batch, student, self.head(), self.config.imitation, teacher)

    def further_terms(
        self, batch: dict[str, Any], spoken: SpeechEmbeddings, teacher: Tensor | None
    ) -> tuple[Tensor, dict[str, Tensor]] | None:
        """The terms beside CE and KL, in units of what the loss is a mean over; None without such.

        ``spoken``: what the connector gave, before any fusion.
        """
        weights = self.config.imitation
        terms = transcript_terms(batch, spoken, self.perception, self.embed_tokens, weights)
        if weights.w_risk > 0:
            losses = partial(self.answer_losses, batch, teacher=teacher)
            terms.append(risk_term(batch, self.perception, weights, losses))
        return combined(terms, *self.counts(batch), reference(weights)) if terms else None

    def answer_losses(
        self, batch: dict[str, Any], heard: SpeechEmbeddings, rows: list[int], teacher: Tensor | None = None
    ) -> Tensor:
        """Mean CE and KL (N,) of the response tokens, as weighted, where the LLM reads ``heard`` of N examples, which
        are the batch's ``rows``."""
        batch, teacher = of_rows(batch, teacher, rows)
        examples: list[Example] = batch["examples"]
        seconds = [e.duration_seconds for e in examples]
        with evaluation_mode(self.llm):  # dropout of LoRA would tell equal hypotheses apart
            fused = speech.fused(self.perception, heard, seconds)
            pieces = plan_batch(examples, None, 0, self.opening)
            student = self.answering(examples, speech.SpeechInput(pieces, fused, seconds, heard))
        loss = self.imitation(batch, student, teacher)
        return losses_of_answers(loss, student.layout.response_counts, self.config.imitation)

    def counts(self, batch: dict[str, Any]) -> tuple[dict[str, int], Tensor]:
        """Of a micro-batch, and (4,) of its whole optimizer step over the data-parallel ranks."""
        group = self.data_parallel_group() if self.training else None
        return batch_counts(batch, connector_of(self.perception), self.device, self.training, group)

    def alignment(self, batch: dict[str, Any], weights: Any) -> StepLoss:
        """The connector's own terms alone."""
        terms = transcript_terms(batch, None, self.perception, self.embed_tokens, weights)
        return alignment_loss(terms, *self.counts(batch))

    def hidden(self, inputs: Tensor, prefix: Prefix | None = None, lengths: list[int] | None = None) -> Tensor:
        """Last hidden states (B, L, H) of right-padded input embeddings (B, L, H); of ``lengths``, those alone."""
        return hidden_states(self.llm, inputs, prefix, lengths)

    def head(self) -> Head:
        """The LLM's output layer."""
        return output_head(self.llm, self.vocabulary_shard)

    def encode(self, audios: Tensor, audio_lens: Tensor) -> tuple[Tensor, Tensor]:
        """Frozen encoder. audios (B, S) at ``sampling_rate``, audio_lens (B,) -> features (B, T, D), lengths (B,)."""
        return speech.encode(self.perception, audios, audio_lens)

    def configure_optimizers(self) -> Any:
        return build_optimizer(self)

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """Tensors move; the examples stay, as plain Python values."""
        if isinstance(batch, dict):
            return {k: self.transfer_batch_to_device(v, device, dataloader_idx) for k, v in batch.items()}
        return batch.to(device, non_blocking=True) if isinstance(batch, Tensor) else batch

    def keep_frozen_parts_in_evaluation_mode(self) -> None:
        """Lightning puts the whole module in training mode: also layers that keep statistics or drop values, and are
        not trained."""
        for module in (self.perception, self.llm):
            if is_frozen(module):
                module.eval()
        for module in self.perception.modules():
            own = list(module.parameters())  # modules without follow those that they are part of
            if own and not any(parameter.requires_grad for parameter in own):
                module.eval()
        if self.config.activation_checkpointing:
            checkpoint_activations(self.llm)

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        loss.backward(*args, **kwargs)

    def on_train_start(self) -> None:
        imitates = self.stage == "imitation" and self.config.imitation.by_the_llm
        if imitates and (connector := connector_of(self.perception)) is not None:
            connector.begin_imitation()

    def on_validation_epoch_start(self) -> None:
        self.validation = ValidationSums()

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Pure speech, no interleaving; one part of ``batch`` for each data set."""
        for name, part in batch.items():
            self.validation.visit(name)
            if part is None:
                continue
            if self.stage == "alignment":
                step = self.alignment(part, self.config.alignment_stage)
                self.validation.add_alignment(name, step.total, step.count)
                continue
            student = self.student(part, interleave=False)
            loss = self.imitation(part, student)
            by_task = sums_by_task(part["examples"], student.layout, loss, self.config.imitation)
            self.validation.add(name, loss, by_task)

    def on_validation_epoch_end(self) -> None:
        self.validation.log(self.log, self.stage == "imitation", self.device, self.data_parallel_group())

"""MTBISALM: NeMo's SALM trained by behavior imitation with speech-text interleaving (arXiv 2505.18644)."""

import hashlib
import json
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning import LightningModule
from nemo.collections.common.tokenizers import AutoTokenizer
from nemo.collections.speechlm2.models.salm import SALM
from nemo.collections.speechlm2.parts.hf_hub import LLM_BACKBONE_DIR
from nemo.collections.speechlm2.parts.lora import maybe_install_lora
from nemo.collections.speechlm2.parts.optim_setup import is_frozen
from nemo.collections.speechlm2.parts.pretrained import load_pretrained_hf, move_embedding
from nemo.utils import logging
from omegaconf import DictConfig, OmegaConf, open_dict
from safetensors import safe_open
from torch import Tensor
from transformers import AutoConfig

from nemo_mtbi.config import model_config
from nemo_mtbi.data.dataset import Example
from nemo_mtbi.errors import ConfigError, DataError
from nemo_mtbi.losses.alignment import word_alignment_loss
from nemo_mtbi.losses.imitation import CachedTeacher, Head, ImitationLoss, imitation_loss
from nemo_mtbi.losses.vocabulary import WHOLE_VOCABULARY, VocabularyShard
from nemo_mtbi.models.assembly import Assembled, Piece, assemble, plan_batch
from nemo_mtbi.models.checkpointing import TrainableCheckpoint
from nemo_mtbi.models.encoder import (
    connector_of,
    encode,
    encoder_frame_seconds,
    encoder_key,
    freeze,
    input_length_reference,
    setup_perception,
)
from nemo_mtbi.models.generation import GenerationMixin
from nemo_mtbi.models.token_order import centers_by_order
from nemo_mtbi.models.waveform import cut_speech_spans
from nemo_mtbi.modules.connectors import Connector, SpeechEmbeddings, uniform_centers
from nemo_mtbi.modules.fused_norm import fuse_norms, rms_norm_class
from nemo_mtbi.modules.language_model import (
    Prefix,
    PrefixStore,
    causal_lm,
    checkpoint_activations,
    hidden_states,
    output_head,
    teacher_hidden_states,
)
from nemo_mtbi.parallel.parts import gradient_norm, reduce_gradients
from nemo_mtbi.parallel.sharding import empty_llm, load_shards, materialize_adapters, shard_llm
from nemo_mtbi.pretrained.fingerprint import fingerprint
from nemo_mtbi.pretrained.offline import resolve_pretrained


def seed_step(*parts: Any) -> None:
    """Seed PyTorch from what identifies a step."""
    digest = hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=7).digest()
    torch.manual_seed(int.from_bytes(digest, "big"))


@dataclass
class StudentOutput:
    """What a student's forward pass gives the objective.

    Attributes:
        hidden: (R, H) at the positions before each response token.
        assembled: the layout of the batch.
        speech: the connector's output.
    """

    hidden: Tensor
    assembled: Assembled
    speech: SpeechEmbeddings


class MTBISALM(TrainableCheckpoint, GenerationMixin, SALM):
    """Frozen speech encoder, trainable connector, frozen LLM.

    The module names and ``cfg`` fields are SALM's (``perception``, ``embed_tokens``, ``llm``), so SALM's export and NeMo's
    data module work unchanged. Steps, objective, batches and checkpoints are ours.

    Args:
        cfg: plain dictionary with the fields of :class:`nemo_mtbi.config.ModelConfig`.

    Raises:
        ConfigError: before any weight is loaded, if the configuration cannot work.
    """

    def __init__(self, cfg: dict[str, Any]) -> None:
        cfg = {key: value for key, value in cfg.items() if value is not None}  # NeMo asks whether a key is there
        config = model_config(cfg)
        # SALM.__init__ would load every encoder as a NeMo ASR model and the LLM in fp32, so its steps are taken here.
        LightningModule.__init__(self)
        # save_hyperparameters() walks the call stack and stumbles over from_pretrained's class methods.
        self.hparams.update({"cfg": cfg})
        self.config = config
        self.cfg = DictConfig(cfg)
        for key in (
            "pretrained_weights",
            "audio_locator_tag",
            "prompt_format",
            "freeze_params",
            "prevent_freeze_params",
        ):
            self.cfg[key] = getattr(config, key)
        self.audio_locator_tag = config.audio_locator_tag
        llm_path = resolve_pretrained(config.pretrained_llm)
        self.tokenizer = AutoTokenizer(
            config.tokenizer_path or llm_path, use_fast=True, trust_remote_code=config.trust_remote_code
        )
        self.tokenizer.add_special_tokens({"additional_special_tokens": [self.audio_locator_tag]})
        self.llm_weights: str | Path = llm_path  # where a rank reads its shard
        llm_dtype = getattr(torch, config.llm_dtype)
        if config.tensor_model_parallel_size > 1:  # read in configure_model, when the ranks know each other
            self.llm = empty_llm(
                AutoConfig.from_pretrained(llm_path, trust_remote_code=config.trust_remote_code), llm_dtype
            )
        else:
            self.llm = load_pretrained_hf(llm_path, config.pretrained_weights, llm_dtype, config.trust_remote_code)
        self.embed_tokens = self.llm.model.embed_tokens
        del self.llm.model.embed_tokens
        if config.fused_norms:
            count = fuse_norms(self.llm)
            logging.info(f"{count} norms of the LLM are {rms_norm_class().__module__}'s")
        maybe_install_lora(self)
        if config.tensor_model_parallel_size > 1:
            materialize_adapters(self.llm)
        setup_perception(self)
        self.perception.encoder.to(getattr(torch, config.encoder_dtype))
        self.frame_seconds = encoder_frame_seconds(self.perception)
        self.vocabulary_shard: VocabularyShard = WHOLE_VOCABULARY
        self.interleaving = config.interleaving.policy()
        self.objective = config.imitation.objective()
        self.references = config.references or {
            "llm": fingerprint(llm_path),
            "encoder": fingerprint(resolve_pretrained(config.pretrained_asr)),
            **input_length_reference(self.cfg.perception),
        }
        self.stage = "imitation"
        self.seed = 0
        self.seen: Counter[str] = Counter()
        self.bad_steps = 0
        self._window_count: Tensor | None = None
        self._embedding_energy: float | None = None
        self._use_fsdp = self._use_tp = False
        self.register_load_state_dict_post_hook(lambda module, _: module.bind_connector())
        # Now rather than with the optimizer, so that evaluation tools see it too.
        freeze(self.named_parameters(), config)
        trained = [
            name for name, p in self.named_parameters()
            if p.requires_grad and name.startswith(("llm.", "embed_tokens.")) and "lora_" not in name
        ]  # fmt: skip
        if trained and config.tensor_model_parallel_size > 1:
            raise ConfigError(
                f"model.freeze_params leaves {trained[0]} trainable; with trainer.tensor_model_parallel_size > 1 only LoRA "
                "(model.lora) can train in the LLM."
            )
        frozen_llm = all("lora_" in n or not p.requires_grad for n, p in self.llm.named_parameters())
        if not (frozen_llm and is_frozen(self.embed_tokens)) and config.imitation.teacher == "online":
            raise ConfigError(
                "teacher=online reads the LLM that is being trained here (model.freeze_params leaves some of it trainable). "
                "Use teacher=cached, or train LoRA adapters instead (model.lora), which the teacher does without."
            )
        # With LoRA the LLM changes, and so do the keys and values of the prompts; a layer that is computed twice would add its
        # own to the kept ones twice.
        frozen = is_frozen(self.llm) and is_frozen(self.embed_tokens) and not config.activation_checkpointing
        keep = config.prefix_cache_tokens if frozen else 0
        self.prefixes = PrefixStore(keep) if keep else None
        self.bind_connector()

    # -- set-up ---------------------------------------------------------------------------------------------------

    def set_ctc_vocabulary(self, token_ids: list[int]) -> None:
        """Give a CTC connector the tokens of the training transcripts (see ``data/ctc_vocabulary.py``)."""
        connector = connector_of(self.perception)
        assert connector is not None
        connector.set_vocabulary(token_ids)  # type: ignore[operator]
        self.bind_connector()

    def bind_connector(self) -> None:
        """Refresh what is derived from the LLM's weights; runs after every load."""
        if self.prefixes is not None:
            self.prefixes.clear()
        connector = connector_of(self.perception)
        if connector is not None and connector.emits_tokens:
            connector.bind_language_model(self.tokenizer.tokenizer, self.embed_tokens)

    @property
    def encoder_key(self) -> str:
        """Key of cached features that this model accepts."""
        return encoder_key(self.cfg.perception, self.references["encoder"], self.config.encoder_dtype)

    # -- forward --------------------------------------------------------------------------------------------------

    def encode(self, audios: Tensor, audio_lens: Tensor) -> tuple[Tensor, Tensor]:
        """Frozen encoder. audios (B, S) at ``sampling_rate``, audio_lens (B,) -> features (B, T, D), lengths (B,)."""
        return encode(self.perception, audios, audio_lens)

    def batch_features(self, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Encoder features of a batch; the batch keeps them, if it does not bring them from the cache."""
        if "encoder_features" not in batch:
            features = self.encode(batch["audios"], batch["audio_lens"])
            batch["encoder_features"], batch["encoder_feature_lens"] = features
        return batch["encoder_features"], batch["encoder_feature_lens"]

    def connect(self, features: Tensor, lengths: Tensor) -> SpeechEmbeddings:
        """Connector. features (B, T, D), lengths (B,) -> :class:`SpeechEmbeddings` in the connector's precision."""
        features = self.connector_dtype(features)
        connector = connector_of(self.perception)
        if connector is not None:
            return connector.connect(features, lengths)
        encoded, counts = self.perception.modality_adapter(audio_signal=features.transpose(1, 2), length=lengths)
        embeddings = self.perception.proj(encoded.transpose(1, 2))
        factor = round(features.shape[1] / embeddings.shape[1])
        return SpeechEmbeddings(embeddings, counts, uniform_centers(embeddings.shape[1], factor, embeddings))

    def connector_dtype(self, features: Tensor) -> Tensor:
        """Features in the connector's precision."""
        trained = [*self.perception.modality_adapter.parameters(), *self.perception.proj.parameters()]
        return features.to(trained[0].dtype if trained else torch.float32)

    def lay_out(self, examples_pieces: list[list[Piece]], responses: list[list[int]], speech: SpeechEmbeddings,
                speech_seconds: list[float]) -> tuple[Tensor, Assembled]:  # fmt: skip
        """Text and speech embeddings in order. -> inputs (B, L, H) in the LLM's dtype, right-padded, and the layout."""
        layout = assemble(
            examples_pieces, responses, speech.lengths.tolist(), speech.centers.tolist(), speech_seconds,
            self.frame_seconds, self.device,
        )  # fmt: skip
        text = self.embed_tokens(layout.text_ids)
        valid = torch.arange(speech.embeddings.shape[1], device=self.device) < speech.lengths[:, None]
        rows = torch.cat([text, speech.embeddings[valid].to(text.dtype)])
        # index_select: the backward of rows[index] is serial on CPUs.
        return rows.index_select(0, layout.index.flatten()).unflatten(0, layout.index.shape), layout

    def student(self, batch: dict[str, Any], interleave: bool) -> StudentOutput:
        """The speech LLM on a batch, without logits."""
        examples: list[Example] = batch["examples"]
        pieces = plan_batch(examples, self.interleaving if interleave else None, self.global_step_or_zero)
        seconds = [e.duration_seconds for e in examples]
        if interleave and self.interleaving.level == "waveform":
            if "encoder_features" in batch:
                raise ConfigError("interleaving.level=waveform encodes pieces of the audio; set cached_features=false.")
            pieces, batch, seconds = cut_speech_spans(pieces, batch, self.sampling_rate)
        speech = self.connect(*self.batch_features(batch))
        connector = connector_of(self.perception)
        by_order = interleave and self.interleaving.level == "embedding"
        if by_order and connector is not None and connector.emits_tokens:
            speech.centers = centers_by_order(examples, speech, connector.classes_of, self.frame_seconds)
        prefix = None
        if self.prefixes is not None:
            prefix = self.prefixes.get(self.llm, self.embed_tokens, [row[0] for row in pieces])  # type: ignore[misc]
            pieces = [row[1:] for row in pieces]
        inputs, layout = self.lay_out(pieces, [e.response_ids for e in examples], speech, seconds)
        hidden = self.hidden(inputs, prefix)
        return StudentOutput(hidden.flatten(0, 1)[layout.response_rows], layout, speech)

    def hidden(self, inputs: Tensor, prefix: Prefix | None = None) -> Tensor:
        """Last hidden states (B, L, H) of right-padded input embeddings (B, L, H)."""
        return hidden_states(self.llm, inputs, prefix)

    def head(self) -> Head:
        """The LLM's output layer."""
        return output_head(self.llm, self.vocabulary_shard)

    @property
    def global_step_or_zero(self) -> int:
        return self.global_step if self._trainer is not None else 0

    # -- objective ------------------------------------------------------------------------------------------------

    def imitation(self, batch: dict[str, Any], student: StudentOutput, full_teacher: bool = False) -> ImitationLoss:
        """CE and KL of a batch; ``full_teacher`` asks for the online teacher whatever the configuration says."""
        examples: list[Example] = batch["examples"]
        teacher: dict[str, Any] = {}
        kind = "online" if full_teacher else self.config.imitation.teacher
        if (self.objective.w_kl > 0 or full_teacher) and kind == "online":
            teacher["teacher_hidden"] = teacher_hidden_states(
                self.llm, self.embed_tokens, [e.prompt_ids for e in examples], [e.response_ids for e in examples],
                self.prefixes, [e.units[0].token_begin for e in examples],
            )  # fmt: skip
        elif self.objective.w_kl > 0:
            if "teacher_ids" not in batch:
                raise DataError(
                    f"model.imitation.teacher=cached, but {examples[0].id} or a neighbour has no teacher log-probabilities. "
                    "Set top_k in generate_targets.py and run it again, or use teacher=online."
                )
            teacher["cached_teacher"] = CachedTeacher(batch["teacher_ids"], batch["teacher_log_probs"])
        return imitation_loss(
            student.hidden, self.head(), student.assembled.response_ids, self.objective,
            token_weights=self._token_weights(examples, student.assembled), **teacher,
        )  # fmt: skip

    def _token_weights(self, examples: list[Example], layout: Assembled) -> Tensor | None:
        weights = self.config.imitation.task_weights
        if not weights:
            return None
        rows = [
            weights.get(e.task, 1.0) for e, n in zip(examples, layout.response_counts, strict=True) for _ in range(n)
        ]
        return torch.tensor(rows, device=self.device)

    def alignment_terms(
        self, batch: dict[str, Any], speech: SpeechEmbeddings | None, w_ctc: float, w_align: float
    ) -> tuple[Tensor, int]:
        """``w_ctc * transcription loss + w_align * ALIGN`` as a sum, and its target tokens (1 a word with w_align alone).

        Args:
            speech: of the batch, if the connector ran; only w_align needs it.
        """
        examples: list[Example] = batch["examples"]
        features, lengths = self.batch_features(batch)
        loss, count = torch.zeros((), device=self.device), 0
        if w_ctc > 0:
            connector = connector_of(self.perception) or Connector()
            features = self.connector_dtype(features)
            own, count = connector.transcription_loss(speech, features, lengths, [e.transcript for e in examples])
            loss = loss + w_ctc * own
        if w_align > 0:
            if speech is None:
                speech = self.connect(features, lengths)
                reader = connector_of(self.perception)
                if reader is not None and reader.emits_tokens and speech.ctc_log_probs is None:  # no times of its own
                    speech.centers = centers_by_order(examples, speech, reader.classes_of, self.frame_seconds)
            spoken, text = self._pooled_words(examples, speech)
            loss = loss + w_align * word_alignment_loss(spoken, text, self.embedding_energy())
            count = count or len(text)
        return loss, count

    def embedding_energy(self) -> float:
        """Mean square of the LLM's token embeddings, the unit of the word-level alignment term."""
        if self._embedding_energy is None:
            self._embedding_energy = float(self.embed_tokens.weight.detach().float().square().mean())
        return self._embedding_energy

    def _pooled_words(self, examples: list[Example], speech: SpeechEmbeddings) -> tuple[Tensor, Tensor]:
        """Mean speech embedding and mean token embedding of every unit that has both. -> (W, H), (W, H)."""
        spoken, text = [], []
        centers = (speech.centers + 0.5) * self.frame_seconds
        valid = torch.arange(centers.shape[1], device=self.device) < speech.lengths[:, None]
        for row, example in enumerate(examples):
            for unit in example.units:
                inside = valid[row] & (centers[row] >= unit.start_seconds) & (centers[row] < unit.end_seconds)
                if unit.token_end > unit.token_begin and inside.any():
                    spoken.append(speech.embeddings[row, inside].mean(0))
                    ids = torch.tensor(example.prompt_ids[unit.token_begin : unit.token_end], device=self.device)
                    text.append(self.embed_tokens(ids).detach().to(speech.embeddings.dtype).mean(0))
        if not text:
            empty = speech.embeddings.new_zeros(0, speech.embeddings.shape[-1])
            return empty, empty
        return torch.stack(spoken), torch.stack(text)

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """Tensors move; the examples stay, as plain Python values."""
        if isinstance(batch, dict):
            return {k: self.transfer_batch_to_device(v, device, dataloader_idx) for k, v in batch.items()}
        return batch.to(device, non_blocking=True) if isinstance(batch, Tensor) else batch

    # -- steps ----------------------------------------------------------------------------------------------------

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Dropout depends on the step and the place of the batch in it alone: not on the layout, nor on interruptions."""
        rank, ranks = 0, 1
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            group = self.data_parallel_group()
            rank, ranks = torch.distributed.get_rank(group), torch.distributed.get_world_size(group)
        place = batch_idx % self.trainer.accumulate_grad_batches * ranks + rank
        seed_step(self.seed, self.stage, self.global_step, place)

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, Tensor]:
        """One micro-batch. The returned loss is a *sum*; gradients are normalized in :meth:`on_before_optimizer_step`."""
        for module in (self.perception.preprocessor, self.perception.encoder, self.llm):
            if is_frozen(module):
                module.eval()
        if self.config.activation_checkpointing:
            checkpoint_activations(self.llm)
        examples: list[Example] = batch["examples"]
        if self.stage == "alignment":
            settings = self.config.alignment_stage
            total, count = self.alignment_terms(batch, None, settings.w_ctc, settings.w_align)
            metrics = {"loss": total.detach() / max(1, count)}
        else:
            student = self.student(batch, interleave=True)
            loss = self.imitation(batch, student)
            count = len(student.assembled.response_ids)
            settings_i = self.config.imitation
            total = loss.loss
            metrics = {"ce": loss.ce / count, "kl": loss.kl / count, "agreement": loss.agreed.float().mean()}
            if settings_i.w_ctc > 0 or settings_i.w_align > 0:
                extra, _ = self.alignment_terms(batch, student.speech, settings_i.w_ctc, settings_i.w_align)
                total = total + extra
                metrics["alignment"] = extra.detach() / count
            metrics["loss"] = total.detach() / count
            index = student.assembled.index
            metrics["padding_fraction"] = 1 - student.assembled.lengths.sum() / index.numel()
            metrics |= {f"loss_by_task/{t}": v[0] / v[2] for t, v in by_task(examples, student.assembled, loss).items()}
            for example in examples:
                key = f"{example.task}/{example.prompt_id}"
                self.seen[f"{key}/examples"] += 1
                self.seen[f"{key}/response_tokens"] += len(example.response_ids)
        self._window_count = torch.tensor(float(count), device=self.device) + (
            0 if self._window_count is None else self._window_count
        )
        self.seen["alignment_examples" if self.stage == "alignment" else "examples"] += len(examples)
        self.log("loss", metrics.pop("loss"), on_step=True, prog_bar=True, batch_size=len(examples))
        self.log_dict(metrics, on_step=True, batch_size=len(examples))
        return {"loss": total}

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Divide the accumulated gradients by the number of response tokens over all data-parallel ranks.

        Lightning has divided each micro-batch by ``accumulate_grad_batches`` and DDP has averaged over ranks, so both
        are undone here. A step with a non-finite gradient is skipped and counted.
        """
        assert self._window_count is not None
        count, ranks = self._window_count, 1
        self._window_count = None
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            group = self.data_parallel_group()
            ranks = torch.distributed.get_world_size(group)
            torch.distributed.all_reduce(count, group=group)
        scale = self.trainer.accumulate_grad_batches * ranks / count.clamp_min(1)
        parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        for parameter in parameters:
            parameter.grad *= scale.to(parameter.grad.dtype)
        group = self.vocabulary_shard.group
        if group is not None:
            reduce_gradients(parameters, group, torch.distributed.get_global_rank(group, 0))
        self._gradient_norm = norm = gradient_norm(parameters, group)
        self.log("gradient_norm", norm, on_step=True, batch_size=1)
        if not torch.isfinite(norm):
            self.bad_steps += 1
            logging.warning(f"Step {self.global_step} skipped: gradient norm is {norm} ({self.bad_steps} so far)")
            for parameter in parameters:
                parameter.grad = None
            if self.bad_steps > self.config.max_bad_steps:
                raise RuntimeError(
                    f"{self.bad_steps} steps had a non-finite loss or gradient; max_bad_steps={self.config.max_bad_steps}. "
                    "Lower the learning rate, or look at the examples of the last steps."
                )

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip by the norm that :meth:`on_before_optimizer_step` has computed; it counts what is spread over ranks."""
        if not gradient_clip_val or gradient_clip_algorithm == "value":
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)
            return
        parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        torch.nn.utils.clip_grads_with_norm_(parameters, gradient_clip_val, self._gradient_norm)

    def data_parallel_group(self) -> Any:
        """Process group over which a step's response tokens are counted (None: all ranks)."""
        mesh = self.device_mesh
        return None if mesh is None else mesh["data_parallel"].get_group()

    def on_validation_epoch_start(self) -> None:
        self._sums: dict[str, Tensor] = defaultdict(lambda: torch.zeros(4, dtype=torch.float64))
        self._task_sums: dict[str, Tensor] = defaultdict(lambda: torch.zeros(3, dtype=torch.float64))

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Sums over response tokens of pure speech (no interleaving), so that epoch means weigh every token alike."""
        for name, dataset_batch in batch.items():
            self._sums[name] += (
                0.0  # a rank whose batches are all unreadable takes part in the sums of every data set too
            )
            if dataset_batch is None:
                continue
            if self.stage == "alignment":
                settings = self.config.alignment_stage
                loss, count = self.alignment_terms(dataset_batch, None, settings.w_ctc, settings.w_align)
                self._sums[name] += torch.tensor([float(loss), 0.0, 0.0, float(count)], dtype=torch.float64)
                continue
            student = self.student(dataset_batch, interleave=False)
            loss_ = self.imitation(dataset_batch, student)
            self._sums[name] += torch.stack(
                [loss_.loss, loss_.kl, loss_.agreed.sum(), torch.tensor(len(loss_.agreed))]
            ).to("cpu", torch.float64)
            for task, sums in by_task(dataset_batch["examples"], student.assembled, loss_).items():
                self._task_sums[task] += sums.to("cpu", torch.float64)

    def on_validation_epoch_end(self) -> None:
        names = sorted(self._sums)
        total = torch.zeros(4, dtype=torch.float64)
        for name in names:
            sums = self._sums[name].to(self.device, torch.float32)
            if torch.distributed.is_available() and torch.distributed.is_initialized():
                torch.distributed.all_reduce(sums, group=self.data_parallel_group())
            total += sums.cpu()
            self._log_sums(f"_{name}", sums.cpu())
        if names:
            self._log_sums("", total)
        self._sums.clear()
        for task, (loss, agreed, count) in sorted(self._gathered(self._task_sums).items()):
            self.log(f"val_loss_by_task/{task}", loss / max(1.0, count), on_epoch=True)
            self.log(f"val_agreement_by_task/{task}", agreed / max(1.0, count), on_epoch=True)

    def _gathered(self, sums: dict[str, Tensor]) -> dict[str, list[float]]:
        """Sums over the data-parallel ranks, which may have met different keys."""
        total: dict[str, Tensor] = defaultdict(lambda: torch.zeros(3, dtype=torch.float64))
        for part in self._from_all_ranks(dict(sums)):
            for key, value in part.items():
                total[key] += value
        return {key: value.tolist() for key, value in total.items()}

    def _from_all_ranks(self, value: Any) -> list[Any]:
        """A picklable value of every data-parallel rank."""
        if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
            return [value]
        group = self.data_parallel_group()
        parts: list[Any] = [None] * torch.distributed.get_world_size(group)
        torch.distributed.all_gather_object(parts, value, group=group)
        return parts

    def _log_sums(self, suffix: str, sums: Tensor) -> None:
        loss, kl, agreed, count = sums.tolist()
        self.log(f"val_loss{suffix}", loss / max(1.0, count), on_epoch=True, prog_bar=not suffix)
        if self.stage == "imitation":
            self.log(f"val_kl{suffix}", kl / max(1.0, count), on_epoch=True)
            self.log(f"val_agreement{suffix}", agreed / max(1.0, count), on_epoch=True, prog_bar=not suffix)

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        loss.backward(*args, **kwargs)

    def configure_model(self) -> None:
        """Give this rank its shard of the LLM, read from the files; nothing to do without tensor parallelism.

        SALM's own tensor parallelism (DTensor) is replaced by :mod:`nemo_mtbi.parallel`.
        """
        if self.config.tensor_model_parallel_size == 1 or self.vocabulary_shard.group is not None:
            return
        body = causal_lm(self.llm).model
        body.embed_tokens = self.embed_tokens
        self.vocabulary_shard = shard_llm(self.llm, self.config.sequence_parallel)
        load_shards(
            self.llm, self.llm_weights, self.device if self._trainer is None else self.trainer.strategy.root_device
        )
        self.embed_tokens = body.embed_tokens
        del body.embed_tokens
        self.bind_connector()

    @property
    def oomptimizer_schema(self) -> dict[str, Any]:
        raise NotImplementedError("Batches of MTBISALM hold planned examples; set data.train_ds.batch_tokens instead.")

    @classmethod
    def restore_from(
        cls, path: str | Path, map_location: str = "cpu", tensor_model_parallel_size: int = 1
    ) -> "MTBISALM":
        """Open a ``.nemo`` file or a directory that ``export.py`` wrote; nothing else is needed.

        A training run, or an export of what was trained alone, is opened too; that needs the LLM and the encoder by the names
        that its ``model.json`` gives.

        Args:
            tensor_model_parallel_size: ranks that hold the LLM together, in a job that
                :func:`nemo_mtbi.parallel.launch.join_ranks` has joined.

        Raises:
            CheckpointError: missing, damaged, hostile, or another kind of model.
        """
        from nemo_mtbi.export.archive import load_directory, load_nemo

        path = Path(path)
        if (path / "model.json").is_file():
            from nemo_mtbi.training.run_directory import RunDirectory

            return RunDirectory(path).load_model(tensor_model_parallel_size=tensor_model_parallel_size).to(map_location)
        load = load_directory if path.is_dir() else load_nemo
        return load(cls, path, map_location, tensor_model_parallel_size)

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | Path, map_location: str = "cpu", **hub: Any
    ) -> "MTBISALM":
        """Open an exported directory, or one that was pushed to a hub; ``hub`` goes to ``snapshot_download``.

        The checks are those of :meth:`restore_from`: every weight there, safetensors only, no code from the model.
        """
        from huggingface_hub import snapshot_download

        from nemo_mtbi.export.archive import load_directory

        folder = Path(pretrained_model_name_or_path)
        if not folder.is_dir():
            patterns = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt"]
            folder = Path(snapshot_download(str(pretrained_model_name_or_path), allow_patterns=patterns, **hub))
        return load_directory(cls, folder, map_location)

    @classmethod
    def _from_checked_directory(cls, folder: Path, map_location: str, ranks: int = 1) -> "MTBISALM":
        if ranks == 1:
            return super().from_pretrained(str(folder), map_location=map_location, strict=False)
        cfg: dict[str, Any] = json.loads((folder / "config.json").read_text())
        local = {
            "pretrained_llm": str(folder / LLM_BACKBONE_DIR), "tokenizer_path": str(folder), "pretrained_weights": False,
            "tensor_model_parallel_size": ranks,
        }  # fmt: skip
        model = cls(cfg | local)
        model.llm_weights = folder
        model.configure_model()
        with safe_open(folder / "model.safetensors", "pt") as weights:
            rest = [n for n in weights.keys() if "lora_" in n or not n.startswith(("llm.", "embed_tokens."))]
            model.load_trained_state({name: weights.get_tensor(name) for name in rest})
        return model

    def merge_lora(self) -> None:
        """Add the LoRA adapters to the LLM's own weights; the model computes the same without them, up to rounding.

        Raises:
            ConfigError: the model has no LoRA.
        """
        if self.config.lora is None:
            raise ConfigError("The model has no LoRA adapters to merge (model.lora is not set).")
        with move_embedding(self):
            self.llm = self.llm.merge_and_unload()
        self.config.lora = None
        self.references["llm"] += "+lora"  # another LLM from now on: targets and systems of the old one do not fit it
        with open_dict(self.cfg):
            del self.cfg["lora"]

    def save_to(self, path: str | Path) -> Path:
        """Write one self-contained ``.nemo`` file."""
        from nemo_mtbi.export.archive import save_nemo

        return save_nemo(self, Path(path))

    def all_seen(self) -> Counter[str]:
        """The record of what was trained on, summed over the data-parallel ranks."""
        return sum((Counter(p) for p in self._from_all_ranks(dict(self.seen))), Counter())

    def seen_manifest(self) -> dict[str, Any]:
        """How many examples and response tokens of each task and prompt were trained on, over all ranks."""
        seen = self.all_seen()
        manifest: dict[str, Any] = {
            "examples": seen["examples"],
            "alignment_examples": seen["alignment_examples"],
            "tasks": {},
        }
        for key, value in seen.items():
            if key.count("/") == 2:
                task, prompt, kind = key.split("/")
                manifest["tasks"].setdefault(task, {}).setdefault(prompt, {})[kind] = value
        return manifest


def by_task(examples: list[Example], layout: Assembled, loss: ImitationLoss) -> dict[str, Tensor]:
    """Sums over the response tokens of each task: (loss, agreed, tokens)."""
    tasks = list(dict.fromkeys(e.task for e in examples))
    places = [tasks.index(e.task) for e, n in zip(examples, layout.response_counts, strict=True) for _ in range(n)]
    values = loss.per_token.detach()
    rows = torch.stack([values, loss.agreed.to(values.dtype), torch.ones_like(values)], 1)
    sums = rows.new_zeros(len(tasks), 3).index_add(0, torch.tensor(places, device=rows.device), rows)
    return dict(zip(tasks, sums, strict=True))


def container(cfg: DictConfig) -> dict[str, Any]:
    """A model configuration as the plain dictionary that :class:`MTBISALM` takes."""
    return OmegaConf.to_container(cfg, resolve=True)  # type: ignore[return-value]

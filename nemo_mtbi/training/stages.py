"""The two training stages: CTC alignment of the connector (optional), then behavior imitation."""

import json
import logging
import re
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from datetime import timedelta
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from filelock import FileLock
from lightning.pytorch.strategies import DDPStrategy
from nemo.collections.common.data.lhotse.cutset import read_cutset_from_config
from nemo.collections.common.tokenizers import AutoTokenizer
from nemo.utils.exp_manager import exp_manager
from nemo.utils.get_rank import is_global_rank_zero
from nemo.utils.trainer_utils import resolve_trainer_cfg
from omegaconf import DictConfig, OmegaConf, open_dict
from safetensors.torch import load_file

from nemo_mtbi import console
from nemo_mtbi.checkpoints.run_directory import ALIGNMENT, IMITATION, UNTRAINED, RunDirectory
from nemo_mtbi.checkpoints.seen_record import SEEN, seen_prompts
from nemo_mtbi.checkpoints.trained_state import CONNECTOR_PREFIX
from nemo_mtbi.config import AUTO, PERCEPTION_KEYS, ModelConfig, misspelled, model_config, plain
from nemo_mtbi.data.alignments import transcript
from nemo_mtbi.data.conversation import ENTRY_KEYS, INPUT_TYPE, check_manifest
from nemo_mtbi.data.cut_lines import has_lines
from nemo_mtbi.errors import ConfigError
from nemo_mtbi.io import jsonl
from nemo_mtbi.io.tensors import save_tensors
from nemo_mtbi.models.mtbi_salm import MTBISALM
from nemo_mtbi.models.optimization import moments_of
from nemo_mtbi.modules.connectors.ctc_vocabulary import choose_tokens, count_tokens
from nemo_mtbi.modules.perception import require_fixed_features
from nemo_mtbi.parallel.launch import PATIENCE, choose_gpu
from nemo_mtbi.parallel.parts import part_of
from nemo_mtbi.parallel.strategy import OURS, SIZE, TensorParallelStrategy, ddp_options, name_of, requested_size
from nemo_mtbi.pretrained.fingerprint import fingerprint
from nemo_mtbi.pretrained.offline import resolve_pretrained
from nemo_mtbi.process import fast_bfloat16
from nemo_mtbi.training.accelerators import fused_optimizer
from nemo_mtbi.training.best import BestWeights, Ended, LastValidation
from nemo_mtbi.training.data_module import ResumableData
from nemo_mtbi.training.data_module import data_module as data_module
from nemo_mtbi.training.monitor import SampleAnswers, Throughput
from nemo_mtbi.training.options import check_options, named, of_whole_steps
from nemo_mtbi.training.progress import StageProgress
from nemo_mtbi.training.resume import (
    AtomicCheckpointIO,
    ConfiguredSettings,
    Preemption,
    WholeSteps,
    settle_checkpoints,
    state_of_data,
    step_of,
)
from nemo_mtbi.training.sections import input_entries
from nemo_mtbi.training.targets_check import PEEKED_LINES, check_targets, require_word_times

log = logging.getLogger(__name__)

KEPT = ("best", "last")
OF_THE_LAYOUT = ("tensor_model_parallel_size", "shard_optimizer")  # keys of a model that its run does not keep
CTC_TARGET = "CTCCompressConnector"
TOKENS_ALONE = ("WhisperDecoderConnector", "CTCCompressConnector")
COARSE = ("bf16-true", "16-true")
STAGE_KEYS = {"enabled", "trainer", "data", "exp_manager", "optimizer", "lr_scheduler"}
DESCRIBED = re.compile(r'"described": ?"[^"]')


class Stopped(KeyboardInterrupt):
    """A stage that was left before its last step, because its time was over."""

    def __init__(self, stage: str, step: int) -> None:
        super().__init__(f"Stage {stage} stopped at step {step}; the same command continues it.")


def train(cfg: DictConfig) -> RunDirectory:
    """Train as ``conf/train.yaml`` says; stages that are already finished under ``output_dir`` are not repeated."""
    missing = OmegaConf.missing_keys(cfg)
    if missing:
        raise ConfigError(f"These keys need a value: {', '.join(sorted(missing))}.")
    cfg = DictConfig(OmegaConf.to_container(cfg, resolve=True))
    config = model_config(cfg.model)
    choose_types(cfg, config)
    require_parallel(cfg, config)
    if problems := misspelled("model.perception", config.perception, PERCEPTION_KEYS):
        raise ConfigError("; ".join(problems))
    if unknown := sorted(set(cfg.alignment_stage) - STAGE_KEYS):
        raise ConfigError(f"alignment_stage.{unknown[0]}: no such key; there are {', '.join(sorted(STAGE_KEYS))}.")
    if cfg.keep not in KEPT:
        raise ConfigError(
            f"keep={cfg.keep!r}: use {' or '.join(KEPT)}, the weights that a finished stage is used with."
        )
    stages = {name: stage_config(cfg, name) for name in [ALIGNMENT] * bool(cfg.alignment_stage.enabled) + [IMITATION]}
    for stage in stages.values():
        check_data(stage.data, config)
        check_options(stage, config.lora is not None, config.imitation.by_answer, config.shard_optimizer)
    run = RunDirectory(cfg.output_dir)
    pl.seed_everything(cfg.seed, workers=True, verbose=False)
    choose_gpu()
    tokens = ctc_tokens(cfg, config, run)
    model_cfg = plain(cfg.model)
    model_cfg.setdefault("freeze_params", config.freeze_params)
    if tokens is not None:
        model_cfg["perception"]["modality_adapter"]["vocab_size"] = len(tokens)
    model_cfg["tensor_model_parallel_size"] = requested_size(cfg.trainer)
    model = MTBISALM(json.loads(json.dumps(model_cfg)))
    if tokens is not None:
        model.set_ctc_vocabulary(tokens)
    if any(stage.data.cached_features for stage in stages.values()):
        require_fixed_features(model.perception)
    require_fine_types(model)
    own_cfg = {k: v for k, v in model_cfg.items() if k not in OF_THE_LAYOUT}
    begun = run.check_same_model(model, own_cfg)
    if not run.weights(IMITATION).is_file() and is_global_rank_zero():
        run.save_config(model, own_cfg)
        run.save_data_paths(all_data_paths([stage.data for stage in stages.values()]))
    if not (begun and run.weights(UNTRAINED).is_file()):
        run.save_weights(model, UNTRAINED)
    if cfg.init_from is not None:
        start, furthest = RunDirectory.parse(cfg.init_from)
        start.load_weights(model, furthest)
        if furthest == IMITATION:
            model.seen.earlier = {task: sorted(prompts) for task, prompts in seen_prompts(start.root).items()}
    if not run.weights(IMITATION).is_file():
        check_targets(stages[IMITATION].data, model)
    if cfg.alignment_stage.enabled and run.weights(IMITATION).is_file() and not run.weights(ALIGNMENT).is_file():
        raise ConfigError(
            f"{run.root} holds a finished run that had no alignment stage. Use another output_dir, or "
            "alignment_stage.enabled=false."
        )
    if cfg.alignment_stage.enabled:
        require_text_channel(model)
        if not run.weights(ALIGNMENT).is_file():
            require_word_times(stages[ALIGNMENT].data, "alignment_stage.w_align", config.alignment_stage.w_align)
        run_stage(cfg, model, run, ALIGNMENT)
    run_stage(cfg, model, run, IMITATION)
    return run


def require_parallel(cfg: DictConfig, config: ModelConfig) -> None:
    """
    Raises:
        ConfigError: tensor parallelism that the trainer does not have.
    """
    size = requested_size(cfg.trainer)
    if config.tensor_model_parallel_size not in (1, size):
        raise ConfigError(
            f"model.tensor_model_parallel_size={config.tensor_model_parallel_size} is not asked for: set "
            f"trainer.tensor_model_parallel_size, which is {size}."
        )
    if config.sequence_parallel and size == 1:
        raise ConfigError("model.sequence_parallel=true needs trainer.tensor_model_parallel_size above 1.")


def require_fine_types(model: MTBISALM) -> None:
    """
    Raises:
        ConfigError: weights of LLM or encoder are trained in less than float32.
    """
    parts = {"llm_dtype": ("llm.", "embed_tokens."), "encoder_dtype": ("perception.encoder.",)}
    for key, prefixes in parts.items():
        for name, p in model.named_parameters():
            coarse = p.requires_grad and p.dtype != torch.float32 and "lora_" not in name
            if coarse and name.startswith(prefixes):
                raise ConfigError(
                    f"model.freeze_params leaves {name} trainable, and model.{key} keeps it in {p.dtype}, in which "
                    f"most optimizer steps round to nothing. Set model.{key}=float32; trainer.precision says in which "
                    "type it computes."
                )


def require_text_channel(model: MTBISALM) -> None:
    """
    Raises:
        ConfigError: the alignment stage would train nothing.
    """
    stage, acoustic = model.config.alignment_stage, f"{CONNECTOR_PREFIX}acoustic."
    if stage.w_ctc == stage.w_align == 0:
        raise ConfigError("model.alignment_stage: w_ctc and w_align are 0. Set alignment_stage.enabled=false instead.")
    if all(name.startswith(acoustic) for name, p in model.named_parameters() if p.requires_grad):
        raise ConfigError(
            "model.freeze_params leaves the acoustic channel alone trainable, and the transcripts do not reach it: set "
            "alignment_stage.enabled=false."
        )


def choose_types(cfg: DictConfig, config: ModelConfig) -> None:
    """Put this machine's types in the place of ``auto``, so that the run's files say which they were.

    Raises:
        ConfigError: trained weights in half precision.
    """
    cfg.model.llm_dtype, cfg.model.encoder_dtype = config.llm_dtype, config.encoder_dtype
    for trainer in (cfg.trainer, cfg.alignment_stage.get("trainer")):
        if trainer is not None and str(trainer.get("precision")) in COARSE:
            raise ConfigError(
                f"trainer.precision={trainer.precision} keeps the trained weights in half precision, in which most "
                "optimizer steps round to nothing. Use bf16-mixed; model.llm_dtype=bfloat16 and "
                "model.encoder_dtype=bfloat16 keep what is frozen in two bytes."
            )
        if trainer is not None and trainer.get("precision") == AUTO:
            trainer.precision = "bf16-mixed" if fast_bfloat16() else "32-true"


def run_stage(cfg: DictConfig, model: MTBISALM, run: RunDirectory, name: str) -> None:
    """Fit one stage, resuming from its last checkpoint, and keep its trained tensors."""
    if run.weights(name).is_file():
        log.info(f"Stage {name} is finished: {run.weights(name)}")
        run.load_weights(model, name)
        if is_global_rank_zero():  # the record is a sum over ranks, so one of them goes on with it
            model.seen.counts = Counter(jsonl.read_json(run.seen(name)))
        return
    stage = stage_config(cfg, name)
    model.stage = name
    optimizer = fused_optimizer(stage.optimizer, stage.trainer)
    with open_dict(model.cfg):
        model.cfg.optimizer, model.cfg.lr_scheduler = optimizer, stage.lr_scheduler
    together, interval = stage.trainer.get("accumulate_grad_batches") or 1, stage.trainer.get("val_check_interval")
    stage.trainer.val_check_interval = of_whole_steps(interval, together)
    if stage.trainer.val_check_interval != interval:
        log.info(f"val_check_interval={interval} becomes {stage.trainer.val_check_interval}, a multiple of {together}.")
    own_folder = (stage.exp_manager.checkpoint_callback_params or {}).get("dirpath")
    settle_checkpoints(Path(own_folder or Path(stage.exp_manager.explicit_log_dir) / "checkpoints"))
    watched = stage.exp_manager.checkpoint_callback_params or {}
    best = BestWeights(run, name, watched.get("monitor", "val_loss"), watched.get("mode", "min"))
    monitors = [Throughput(), SampleAnswers(run.kept(name), **cfg.sample_answers), best]
    with named():
        imitates = name == IMITATION and model.config.imitation.by_the_llm
        trainer = build_trainer(stage.trainer, name, monitors, find_unused=not imitates)
        exp_manager(trainer, stage.exp_manager)
    ended = Ended()
    trainer.callbacks += [LastValidation(), ended]  # type: ignore[attr-defined]
    if not trainer.ckpt_path and is_global_rank_zero():  # a run begins anew: the best of another one is not its own
        shutil.rmtree(run.kept(name), ignore_errors=True)
    step = step_of(trainer.ckpt_path) if trainer.ckpt_path else 0
    model.seed = cfg.seed
    continued = name == IMITATION and cfg.continue_optimizer and cfg.alignment_stage.enabled
    model.earlier_moments = partial(load_moments, run) if continued else dict
    kept = state_of_data(trainer.ckpt_path, ResumableData.__qualname__) if trainer.ckpt_path else None
    data = data_module(stage.data, model, step, stage.trainer.accumulate_grad_batches, kept)
    watchable = "validation_ds" in stage.data and stage.trainer.get("limit_val_batches", 1) != 0
    # Before fit there is no mesh yet, so several ranks would not see the batches that they see in training.
    if watchable and not trainer.ckpt_path and trainer.world_size == 1:
        trainer.validate(model, data, verbose=False)  # step 0: what training starts from
    trainer.fit(model, data)
    if not (trainer.global_step >= trainer.max_steps or ended.early):
        raise Stopped(name, trainer.global_step)
    if watchable and best.validated != trainer.global_step:  # the last step's validation was interrupted
        trainer.ckpt_path = None
        trainer.validate(model, data, verbose=False)
    seen, counts = model.seen.manifest(model.data_parallel_group()), model.seen.over_ranks(model.data_parallel_group())
    moments = whole_moments(trainer.optimizers[0], model)
    if trainer.is_global_zero:  # before the weights, which say that the stage is finished
        save_tensors(moments, run.moments(name))
        jsonl.write_json(run.seen(name), dict(counts))
        jsonl.write_json(run.root / SEEN, seen)
    run.finish_stage(model, name, cfg.keep)
    log.info(f"Stage {name} wrote {run.weights(name)}")


def whole_moments(optimizer: torch.optim.Optimizer, model: MTBISALM) -> dict[str, torch.Tensor]:
    """Adam's moments for the next stage. Parts under tensor parallelism are left out: LoRA starts anew."""
    whole = [(n, p) for n, p in model.named_parameters() if p.requires_grad and part_of(p) is None]
    return moments_of(optimizer, whole)


def load_moments(run: RunDirectory) -> dict[str, torch.Tensor]:
    """Moments of the alignment stage; none without one."""
    file = run.moments(ALIGNMENT)
    return load_file(file) if file.is_file() else {}


def build_trainer(
    cfg: DictConfig, name: str, callbacks: Sequence[pl.Callback] = (), find_unused: bool = False
) -> pl.Trainer:
    """Lightning's trainer with our strategy, atomic checkpoints and the handling of SIGTERM.

    Args:
        cfg: its section.
        name: of the stage.
        callbacks: come first.
        find_unused: parts of the connector have no gradient: those that the LLM alone reads, where it has no loss.
    """
    size, strategy = requested_size(cfg), cfg.get("strategy", "auto")
    own: dict[str, Any] = {}
    ours = name_of(strategy) in OURS
    if ours:
        if isinstance(strategy, DictConfig):
            own = {str(k): v for k, v in strategy.items() if k not in (SIZE, "_target_")}
        cfg = DictConfig({**cfg, "strategy": "auto"})
    options: Any = resolve_trainer_cfg(cfg)
    options.pop(SIZE, None)
    minutes = options.pop("collective_timeout_minutes", None)
    timeout = PATIENCE if minutes is None else timedelta(minutes=float(minutes))
    if timeout <= timedelta(0):
        raise ConfigError(f"trainer.collective_timeout_minutes={minutes} must be positive.")
    several = options.get("num_nodes", 1) > 1 or str(options.get("devices", 1)) not in ("1", "auto")
    ddp: dict[str, Any] = {"find_unused_parameters": find_unused, "timeout": timeout, **own}
    if ours and size > 1:
        options["strategy"] = TensorParallelStrategy(size, **ddp)
    elif ours and (several or torch.cuda.device_count() > 1):
        options["strategy"] = DDPStrategy(**ddp_options(**ddp))
    bars = [StageProgress(name)] if options.get("enable_progress_bar", True) else []
    options["plugins"] = [*options.get("plugins", []), AtomicCheckpointIO()]
    options["callbacks"] = [
        *options.get("callbacks", []),
        *callbacks,
        *bars,
        Preemption(),
        WholeSteps(),
        ConfiguredSettings(),
    ]
    return pl.Trainer(**options)


def stage_config(cfg: DictConfig, name: str) -> DictConfig:
    """The sections of one stage: the common ones, with the alignment stage's own values over them."""
    sections = {k: cfg[k] for k in ("trainer", "data", "exp_manager")}
    stage = OmegaConf.create({**sections, "optimizer": cfg.model.optimizer, "lr_scheduler": cfg.model.lr_scheduler})
    own = cfg.alignment_stage if name == ALIGNMENT else {}
    OmegaConf.set_struct(stage, False)
    for key in ("trainer", "data", "exp_manager"):
        stage[key] = OmegaConf.merge(stage[key], own.get(key) or {})
    for key in ("optimizer", "lr_scheduler"):
        stage[key] = own[key] if key in own else stage[key]
    if stage.optimizer is None:
        raise ConfigError(f"The stage {name} has no optimizer (null).")
    stage.exp_manager.explicit_log_dir = str(Path(cfg.output_dir) / name)
    params = stage.exp_manager.checkpoint_callback_params or OmegaConf.create()
    if name == ALIGNMENT:  # one example a cut: the task does not matter to CTC
        chosen = (own.get("exp_manager") or {}).get("checkpoint_callback_params") or {}
        params = OmegaConf.merge(params, {"monitor": "val_loss", "mode": "min"}, chosen)
    if "://" in str(params.get("dirpath")):
        raise ConfigError(
            f"exp_manager.checkpoint_callback_params.dirpath={params.dirpath}: give a folder (of a mounted bucket, "
            "say); checkpoints are completed by renaming them."
        )
    if params.get("dirpath"):
        params.dirpath = str(Path(params.dirpath) / name)  # the stages would resume from each other's
    stage.exp_manager.checkpoint_callback_params = params
    return stage


def data_paths(section: DictConfig) -> list[str]:
    """Manifests and Shar folders of a train or validation section."""
    return [str(e[key]) for e in input_entries(section) for key in ("cuts_path", "shar_path") if key in e]


def all_data_paths(sections: Sequence[DictConfig]) -> dict[str, list[str]]:
    """Of the ``data`` sections of all stages: what is trained on, and what is validated on."""
    found: dict[str, list[str]] = {}
    for part in ("train", "validation"):
        own = [data[f"{part}_ds"] for data in sections if f"{part}_ds" in data]
        if own:
            found[part] = list(dict.fromkeys(path for section in own for path in data_paths(section)))
    return found


def check_data(data_cfg: DictConfig, config: ModelConfig) -> None:
    """Manifests exist and settings agree, before any weight is loaded."""
    entries = list(input_entries(data_cfg.train_ds))
    if not entries:
        raise ConfigError(f"data.train_ds.input_cfg has no entry of type {INPUT_TYPE}.")
    for section in ("train_ds", "validation_ds"):
        if section in data_cfg:
            for entry in input_entries(data_cfg[section]):
                if problems := misspelled(f"data.{section}.input_cfg", entry, ENTRY_KEYS):
                    raise ConfigError("; ".join(problems))
                check_manifest(entry.get("cuts_path") or entry.get("shar_path"))
                require_acoustics(entry.get("cuts_path"), config)
    if data_cfg.cached_features and config.interleaving.level == "waveform" and config.interleaving.probability > 0:
        raise ConfigError("interleaving.level=waveform encodes pieces of the audio; set data.cached_features=false.")


def require_acoustics(manifest: Any, config: ModelConfig) -> None:
    """
    Raises:
        ConfigError: answers to descriptions of the voice, and a connector that gives the LLM tokens alone.
    """
    target = str((config.perception.get("modality_adapter") or {}).get("_target_", "")).rpartition(".")[2]
    if target not in TOKENS_ALONE or not has_lines(manifest):
        return
    with open(manifest, encoding="utf-8") as lines:
        if any(DESCRIBED.search(line) for line in islice(lines, PEEKED_LINES)):
            raise ConfigError(
                f"{manifest} holds answers to descriptions of the voice. Through {target} the LLM reads words alone; "
                "use TwoChannelConnector (speech_llm@model=offline_two_channel) or a dense connector."
            )


def ctc_tokens(cfg: DictConfig, config: ModelConfig, run: RunDirectory) -> list[int] | None:
    """LLM tokens of the training transcripts for a CTC connector; None for other connectors.

    They are kept in ``<output_dir>/ctc_tokens.json``, so that a resumed run has the same ones, with the fingerprint of
    the LLM whose they are.

    Raises:
        ConfigError: those that are there are another LLM's.
    """
    if not str(cfg.model.perception.modality_adapter._target_).endswith(CTC_TARGET):
        return None
    file = run.root / "ctc_tokens.json"
    if cfg.init_from is not None:
        # Of the connector that training starts from; a run that starts from this one needs them too.
        given = RunDirectory.parse(cfg.init_from)[0].root / "ctc_tokens.json"
        if given.is_file() and not file.is_file() and is_global_rank_zero():
            jsonl.write_json(file, jsonl.read_json(given))
        file = given if given.is_file() else file
    llm = resolve_pretrained(config.pretrained_llm)
    if file.is_file():  # perhaps in a folder that only can be read
        return tokens_in(file, llm)
    file.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(file.with_name(f".{file.name}.lock")):  # one process of a job counts, the others wait for its file
        if not file.is_file():
            tokenizer = AutoTokenizer(llm, use_fast=True).tokenizer
            settings = config.ctc_vocabulary
            counts = count_tokens(_transcripts(cfg), tokenizer)
            tokens = choose_tokens(counts, tokenizer, settings.max_size, settings.min_count)
            jsonl.write_json(file, {"llm": fingerprint(llm), "tokens": tokens})
        return tokens_in(file, llm)


def tokens_in(file: Path, llm: str) -> list[int]:
    """The LLM's tokens that a run has kept (until version 0.1.0.dev of November 2026 without the LLM's fingerprint).

    Raises:
        ConfigError: they are another LLM's.
    """
    kept = json.loads(file.read_text())
    if isinstance(kept, list):
        return kept
    if kept["llm"] != fingerprint(llm):
        raise ConfigError(f"{file} holds tokens of another LLM than {llm}. Use another output_dir, or remove the file.")
    return kept["tokens"]


def _transcripts(cfg: DictConfig) -> Iterator[str]:
    """Of all that is trained on, the alignment stage's own data too."""
    alignment = cfg.get("alignment_stage") or {}
    own = alignment.get("data") if alignment.get("enabled") else None
    sections = [cfg.data] if own is None else [cfg.data, OmegaConf.merge(cfg.data, own)]
    entries = [entry for data in sections for entry in input_entries(data.train_ds)]
    readers = [{k: entry[k] for k in ("cuts_path", "shar_path") if k in entry} for entry in entries]
    for reader in [own for i, own in enumerate(readers) if own not in readers[:i]]:
        cuts, _ = read_cutset_from_config({**reader, "force_finite": True, "metadata_only": True})
        for cut in console.progress(cuts, desc="CTC vocabulary", unit="cut"):
            yield transcript(cut)

"""Options of NeMo's recipes that cannot work here: refused by name, before anything is loaded."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from hydra.errors import HydraException
from lightning.fabric.utilities.exceptions import MisconfigurationException
from omegaconf import DictConfig, OmegaConf

from nemo_mtbi import console
from nemo_mtbi.errors import ConfigError, MTBIError
from nemo_mtbi.parallel.strategy import requested_size

ENDLESS = "training data is one endless stream: use trainer.max_steps, and trainer.val_check_interval for validation"
# key, whether a value of it is harmless, why others are not
REFUSED: list[tuple[str, Callable[[Any], bool], str]] = [
    (
        "trainer.limit_train_batches",
        lambda v: v is None or (isinstance(v, float) and v == 1.0),
        f"every epoch would begin with the same batches; {ENDLESS}",
    ),
    ("trainer.max_epochs", lambda v: v in (None, -1), ENDLESS),
    ("trainer.min_epochs", lambda v: v in (None, 0), ENDLESS),
    (
        "trainer.max_time",
        lambda v: v is None,
        "a stage that it ends is not finished, and would end at once when it goes on; use exp_manager.max_time_per_run",
    ),
    ("trainer.fast_dev_run", lambda v: not v, "a stage would count as finished after a step; use trainer.max_steps"),
    ("trainer.overfit_batches", lambda v: not v, f"every epoch would begin with the same batches; {ENDLESS}"),
    ("data.train_ds.force_finite", lambda v: not v, f"ranks would end at different batches; {ENDLESS}"),
    ("data.train_ds.metadata_only", lambda v: not v, "there would be nothing to hear"),
    (
        "exp_manager.checkpoint_callback_params.async_save",
        lambda v: not v,
        "a checkpoint holds the connector and its optimizer alone, and must be whole when SIGTERM ends the job",
    ),
    (
        "exp_manager.create_preemption_callback",
        lambda v: not v,
        "SIGTERM is handled already, on GPUs and CPUs (nemo_mtbi.training.resume.Preemption)",
    ),
    *(
        (key, lambda v: v is None or bool(v), "a run that is stopped continues from its last checkpoint")
        for key in ("exp_manager.checkpoint_callback_params.save_last", "exp_manager.create_checkpoint_callback")
    ),
    (
        "trainer.max_steps",
        lambda v: v is None or (v >= 1 and float(v).is_integer()),
        "give a whole number of steps, at least 1",
    ),
    ("trainer.gradient_clip_val", lambda v: v is None or v >= 0, "give a norm; null or 0: gradients stay"),
    (
        "trainer.accumulate_grad_batches",
        lambda v: v is None or (v >= 1 and float(v).is_integer()),
        "give a whole number of micro-batches, at least 1",
    ),
    (
        "trainer.val_check_interval",
        lambda v: v is None or (type(v) is int and v >= 1),
        f"give a whole number of micro-batches; {ENDLESS}",
    ),
    ("optimizer.lr", lambda v: v is None or v >= 0, "a learning rate is at least 0"),
    *(
        (f"data.{section}.{key}", lambda v: v is None or v > 0, "must be above 0")
        for section in ("train_ds", "validation_ds")
        for key in ("batch_size", "batch_tokens")
    ),
]
RISING, FALLING = "val_agreement", ("val_loss", "val_kl")  # what the metrics of a validation begin with


def check_options(cfg: DictConfig, lora: bool = False, by_answer: bool = False, shard: bool = False) -> None:
    """
    Args:
        cfg: with ``trainer``, ``data`` and ``exp_manager``, of one stage.
        lora: whether LoRA is trained.
        by_answer: whether the objective is a mean over answers.
        shard: whether the optimizer's states are spread over ranks.

    Raises:
        ConfigError: names every option that cannot be followed.
    """
    values = [(key, OmegaConf.select(cfg, key), fits, why) for key, fits, why in REFUSED]
    problems = [f"{key}={value}: {why}." for key, value, fits, why in values if not fits(value)]
    monitor, mode = (
        str(OmegaConf.select(cfg, f"exp_manager.checkpoint_callback_params.{key}", default=default))
        for key, default in (("monitor", "val_loss"), ("mode", "min"))
    )
    better = "max" if monitor.startswith(RISING) else "min" if monitor.startswith(FALLING) else mode
    if mode != better:
        problems.append(
            f"exp_manager.checkpoint_callback_params: monitor={monitor} with mode={mode} would keep the worst weights; "
            f"set mode={better} too."
        )
    if OmegaConf.select(cfg, "exp_manager.ema.enable") and lora and requested_size(cfg.trainer) > 1:
        problems.append(
            "exp_manager.ema.enable=true: LoRA that is spread over tensor-parallel ranks cannot be averaged and saved."
        )
    if OmegaConf.select(cfg, "exp_manager.ema.enable") and shard:
        problems.append("exp_manager.ema.enable=true with model.shard_optimizer=true: NeMo's EMA needs whole states.")
    if lora and requested_size(cfg.trainer) > 1 and str(cfg.trainer.get("precision")) == "16-mixed":
        problems.append(
            "trainer.precision=16-mixed: each tensor-parallel rank would scale the loss by the overflows of its own "
            "part of LoRA. Use bf16-mixed."
        )
    if by_answer and str(cfg.trainer.get("precision")) in ("16", "16-mixed"):
        problems.append(
            "trainer.precision=16-mixed with model.imitation.mean_over=answers: the gradients of a long answer would "
            "round to nothing. Use bf16-mixed."
        )
    if problems:
        raise ConfigError("\n".join(problems))
    warmup, steps = (OmegaConf.select(cfg, key) for key in ("lr_scheduler.warmup_steps", "trainer.max_steps"))
    if isinstance(warmup, int) and isinstance(steps, int) and warmup > steps:
        console.say(
            f"lr_scheduler.warmup_steps={warmup} with trainer.max_steps={steps}: the learning rate is never reached."
        )


def of_whole_steps(interval: Any, together: int) -> Any:
    """``val_check_interval`` so that validation, and its checkpoint, never stand within a step: a number of batches
    becomes the next multiple of ``together``, the accumulated ones."""
    return interval if not isinstance(interval, int) else -(-interval // together) * together


@contextmanager
def named() -> Iterator[None]:
    """Errors of Lightning and NeMo about their own options as ours, so that they are one message.

    Raises:
        ConfigError: an option that they refuse, a class that cannot be made, a package that is missing.
    """
    try:
        yield
    except MTBIError:
        raise
    except (ValueError, TypeError, ImportError, HydraException, MisconfigurationException) as error:
        text = " ".join(str(error).split())
        raise ConfigError(f"trainer / exp_manager: {text}") from error

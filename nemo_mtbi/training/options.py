"""Options of NeMo's recipes that cannot work here: refused by name, before anything is loaded."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from hydra.errors import HydraException
from lightning.fabric.utilities.exceptions import MisconfigurationException
from omegaconf import DictConfig, OmegaConf

from nemo_mtbi.errors import ConfigError, MTBIError

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
]


def check_options(cfg: DictConfig) -> None:
    """
    Args:
        cfg: with ``trainer``, ``data`` and ``exp_manager``, of one stage.

    Raises:
        ConfigError: names every option that cannot be followed.
    """
    values = [(key, OmegaConf.select(cfg, key), fits, why) for key, fits, why in REFUSED]
    problems = [f"{key}={value}: {why}." for key, value, fits, why in values if not fits(value)]
    if problems:
        raise ConfigError("\n".join(problems))


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

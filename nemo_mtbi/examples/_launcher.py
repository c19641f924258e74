"""What all launchers share: Hydra with our configuration tree, errors as messages, and typed configurations."""

import functools
import gc
import importlib
import os
import shlex
import signal
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import hydra
import yaml
from hydra.core.config_store import ConfigStore
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf

from nemo_mtbi import console
from nemo_mtbi.errors import ConfigError, MTBIError
from nemo_mtbi.examples._overrides import as_typed, overrides
from nemo_mtbi.examples._steps import run_launcher

FOLDERS = ("output_dir", "run")  # keys; a log goes into the first
# Keys that the YAML leaves open, or null: lists; mappings, of these launchers; those that must name something.
LISTS = ("manifests", "perturbed_manifests", "only", "task_folders", "trained_tasks", "unseen_tasks", "examples")
MAPPINGS, WITH_MAPPINGS = ("cuts", "systems", "labelled", "targets"), ("evaluate", "benchmark", "ablate")
NAMED = ("manifests", "stages", "cuts", "systems", "targets", "only", "languages")
CONTINUED = ("prepare", "cache_features", "targets", "train", "benchmark", "ablate", "quickstart")
CONF = Path(__file__).resolve().parents[1] / "conf"


def launcher(
    config_name: str,
    schemas: dict[str, type] | None = None,
    arguments: Callable[[list[str]], list[str]] = lambda given: given,
) -> Callable[[Callable[[DictConfig], Any]], Callable[[], None]]:
    """Hydra entry point like NeMo's ``hydra_runner``, which also turns our errors into exit code 1 and one message, and
    keeps what other libraries print in the run's log (:mod:`nemo_mtbi.console`).

    Args:
        config_name: YAML under ``conf``.
        schemas: dataclasses whose defaults the YAML builds on (``prepare_schema``, or ``speech_llm/schema`` in a
            group).
        arguments: the command line as Hydra's overrides, where a launcher takes another form too.
    """
    for name, node in (schemas or {}).items():
        group, _, own = name.rpartition("/")
        ConfigStore.instance().store(group=group or None, name=own, node=open_dictionaries(OmegaConf.structured(node)))

    def decorate(function: Callable[[DictConfig], Any]) -> Callable[[], None]:
        def guarded(cfg: DictConfig) -> None:
            for key in FOLDERS:
                if isinstance(name := OmegaConf.select(cfg, key, throw_on_missing=False), int | float):
                    cfg[key] = str(name)  # a folder may be called 2026
            with console.redirected(log_path(cfg, config_name)):
                try:
                    require_kinds(cfg, config_name)
                    require_values(cfg, config_name)
                    function(cfg)
                except MTBIError as error:
                    console.tell(f"\nError: {error}")
                    sys.exit(1)
                except OSError as error:
                    if error.filename is None:
                        raise
                    traceback.print_exc()  # in the log
                    console.tell(f"\nError: {error.filename}: {error.strerror}.")
                    sys.exit(1)
                finally:
                    gc.freeze()  # else Python, when it ends, takes seconds to search all that NeMo has for garbage

        guarded.__name__, guarded.__doc__ = function.__name__, function.__doc__
        guarded.__module__ = function.__module__
        composed: Callable[[], None] = hydra.main(version_base="1.3", config_path=str(CONF), config_name=config_name)(
            guarded
        )

        @functools.wraps(function)
        def entry() -> None:
            try:
                sys.argv[1:] = arguments(without_verbose(sys.argv[1:]))
                if not {"-m", "--multirun"} & set(sys.argv[1:]):
                    sys.argv[1:] = map(as_typed, sys.argv[1:])
            except MTBIError as error:
                console.tell(f"Error: {error}")
                sys.exit(1)
            try:
                composed()
            except KeyboardInterrupt:
                console.tell(f"\nStopped.{' The same command continues.' if config_name in CONTINUED else ''}")
                sys.exit(console.INTERRUPTED)

        entry.config_name = config_name  # type: ignore[attr-defined]
        return entry

    return decorate


def require_kinds(cfg: DictConfig, name: str) -> None:
    """Lone texts where a list belongs become one; other values must be of the kind that the YAML has at their key.

    Raises:
        ConfigError: they are not, or nothing is named.
    """
    for key in FOLDERS:
        if key in cfg and not OmegaConf.is_missing(cfg, key) and cfg[key] == "":
            raise ConfigError(f"{key} is empty: name a folder.")
    defaults = yaml.safe_load((CONF / f"{name}.yaml").read_text(encoding="utf-8"))
    for key, default in defaults.items():
        if key not in cfg or OmegaConf.is_missing(cfg, key):
            continue
        value = cfg[key]
        if value is None:
            if default == "???":
                raise ConfigError(f"{key} is null: it needs a value.")
            continue
        listed = isinstance(default, list) or key in LISTS
        if listed and isinstance(value, str):
            cfg[key] = [value]
            value = cfg[key]
        mapping = isinstance(default, dict) or (key in MAPPINGS and name in WITH_MAPPINGS)
        if (listed and not OmegaConf.is_list(value)) or (mapping and not OmegaConf.is_dict(value)):
            form = "[A, B]" if listed else f"{{NAME: {value if isinstance(value, str) else '...'}}}"
            raise ConfigError(f"{key}={value}: give {key}={form}.")
        if key in NAMED and (listed or mapping) and not len(value):
            raise ConfigError(f"{key}={value} names nothing.")
        if isinstance(default, bool) and not isinstance(value, bool):
            raise ConfigError(f"{key}={value}: true or false.")
        numbers = (int,) if type(default) is int else (int, float)
        if type(default) in (int, float) and type(value) not in numbers:
            raise ConfigError(f"{key}={value}: give a {'whole ' if type(default) is int else ''}number.")


def require_values(cfg: DictConfig, name: str) -> None:
    """
    Raises:
        ConfigError: keys that the YAML leaves to the caller have no value.
    """
    if missing := _missing(OmegaConf.to_container(cfg, resolve=False)):
        raise ConfigError(f"{', '.join(missing)}: no value given. What they are: {CONF / name}.yaml.")


def _missing(node: Any, key: str = "") -> list[str]:
    """Keys under a configuration that are ``???``."""
    if node == "???":
        return [key]
    children = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    return [found for name, child in children for found in _missing(child, f"{key}.{name}".lstrip("."))]


def without_verbose(arguments: list[str]) -> list[str]:
    """Take out ``verbose=true`` (or ``--verbose``), which holds for all steps and worker processes too."""
    own = [a for a in arguments if a == "--verbose" or a.startswith("verbose=")]
    if own:
        os.environ[console.VERBOSE] = "1" if own[-1].lower() in ("--verbose", "verbose=true") else "0"
    return [a for a in arguments if a not in own]


def open_dictionaries(node: DictConfig) -> DictConfig:
    """Let the command line add keys to fields that are mappings by type; other unknown keys stay errors."""
    for key in node:
        if OmegaConf.is_missing(node, key) or not OmegaConf.is_dict(node[key]):
            continue
        if OmegaConf.get_type(node[key]) is dict:
            OmegaConf.set_struct(node[key], False)
        else:
            open_dictionaries(node[key])
    return node


def check_step(name: str, module: str, values: Mapping[str, Any]) -> DictConfig:
    """Find wrong keys of a later step before the first one is run (within a launcher); its configuration.

    Args:
        name, module, values: of :func:`run_step`.

    Raises:
        ConfigError: that launcher has no such key, or a value is of another kind.
    """
    config_name = importlib.import_module(f"nemo_mtbi.examples.{module}").main.config_name
    try:
        composed = hydra.compose(config_name, overrides(values))
        require_kinds(composed, config_name)
        return composed
    except HydraException as error:
        said = " ".join(str(e).splitlines()[0] for e in (error, error.__cause__) if e is not None)
        raise ConfigError(f"Step {name!r}: {said} (keys of {CONF / config_name}.yaml)") from error
    except ConfigError as error:
        raise ConfigError(f"Step {name!r}: {error}") from error


def run_step(name: str, module: str, values: Mapping[str, Any]) -> float:
    """Run another launcher as a process of its own, printed as the command it is; seconds that it took.

    Args:
        name: what is printed.
        module: under ``nemo_mtbi.examples``.
        values: what its configuration is to hold; see :func:`nemo_mtbi.examples._overrides.overrides`.

    Raises:
        MTBIError: it failed.
    """
    begin = time.time()
    arguments = overrides(values)
    console.say(f"=== {name}\n$ python -m nemo_mtbi.examples.{module} {shlex.join(arguments)}")
    code = run_launcher(module, arguments)
    if code < 0:
        how = signal.Signals(-code).name
        memory = " (out of memory?)" if how == "SIGKILL" else ""
        raise MTBIError(f"The step {name!r} was ended by {how}{memory}. The same command continues from here.")
    if code:
        raise MTBIError(f"The step {name!r} failed; its message is above. The same command continues from here.")
    return time.time() - begin


def announce(title: str, paths: dict[str, Path | str]) -> None:
    """Say where results are; a launcher that runs others says it once, at its own end."""
    if console.within_step():
        console.say(title)
    else:
        console.say("\n".join(["", title, *(f"  {name}: {path}" for name, path in paths.items())]))


def log_path(cfg: DictConfig, name: str) -> Path | None:
    """The log of a run, in the folder that it writes to or reads; None without one."""
    for key in FOLDERS:
        folder = OmegaConf.select(cfg, key, throw_on_missing=False)
        if folder is not None and (key == "output_dir" or Path(folder).is_dir()):
            return Path(folder) / "logs" / f"{name}.log"
    return None

"""What all launchers share: Hydra with our configuration tree, errors as messages, and typed configurations."""

import os
import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import hydra
from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from nemo_mtbi.errors import ConfigError, MTBIError

CONF = Path(__file__).resolve().parents[1] / "conf"
T = TypeVar("T")


def launcher(
    config_name: str, schemas: dict[str, type] | None = None
) -> Callable[[Callable[[DictConfig], Any]], Callable[[], None]]:
    """Hydra entry point like NeMo's ``hydra_runner``, which also turns our errors into exit code 1 and one message.

    Args:
        config_name: YAML under ``conf``.
        schemas: dataclasses whose defaults the YAML builds on (``prepare_schema``, or ``speech_llm/schema`` in a
            group).
    """
    for name, node in (schemas or {}).items():
        group, _, own = name.rpartition("/")
        ConfigStore.instance().store(group=group or None, name=own, node=open_dictionaries(OmegaConf.structured(node)))

    def decorate(function: Callable[[DictConfig], Any]) -> Callable[[], None]:
        def guarded(cfg: DictConfig) -> None:
            if os.environ.get("RANK", "0") != "0":
                os.environ["TQDM_DISABLE"] = "1"  # one progress bar a job
            try:
                function(cfg)
            except MTBIError as error:
                print(f"\nError: {error}", file=sys.stderr)
                sys.exit(1)

        guarded.__name__, guarded.__doc__ = function.__name__, function.__doc__
        guarded.__module__ = function.__module__
        return hydra.main(version_base="1.3", config_path=str(CONF), config_name=config_name)(guarded)

    return decorate


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


def typed(schema: type[T], cfg: DictConfig) -> T:
    """A configuration as an instance of a dataclass.

    Raises:
        ConfigError: unknown keys, missing values or wrong types.
    """
    try:
        value = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(schema), cfg))
    except OmegaConfBaseException as error:
        raise ConfigError(f"{schema.__name__}: {str(error).splitlines()[0]} (key: {error.full_key})") from error
    assert isinstance(value, schema)
    return value


def run_step(name: str, module: str, *overrides: str) -> float:
    """Run another launcher as a process of its own, printed as the command it is; seconds that it took.

    Raises:
        MTBIError: it failed.
    """
    begin = time.time()
    command = ["-m", f"nemo_mtbi.examples.{module}", *overrides]
    print(f"\n=== {name}\n$ python {shlex.join(command)}", flush=True)
    if subprocess.run([sys.executable, *command]).returncode != 0:
        raise MTBIError(f"The step {name!r} failed; its message is above. The same command continues from here.")
    return time.time() - begin


def inline(value: Any) -> str:
    """A value in Hydra's override grammar."""
    if OmegaConf.is_config(value):
        value = OmegaConf.to_container(value, resolve=True)
    if isinstance(value, dict):
        return "{" + ",".join(f"{k}:{inline(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ",".join(inline(v) for v in value) + "]"
    if isinstance(value, str):
        return "'" + value.replace("'", "\\'") + "'"
    return str(value).lower() if isinstance(value, bool) else "null" if value is None else str(value)


def announce(title: str, paths: dict[str, Path | str]) -> None:
    """Say where results are."""
    print(f"\n{title}")
    for name, path in paths.items():
        print(f"  {name}: {path}")

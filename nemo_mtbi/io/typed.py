"""Configurations as instances of dataclasses."""

from typing import Any, TypeVar

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from nemo_mtbi.errors import ConfigError

T = TypeVar("T")


def typed(schema: type[T], cfg: DictConfig | dict[str, Any], name: str | None = None) -> T:
    """A configuration as an instance of a dataclass; ``name`` is what messages call it.

    Raises:
        ConfigError: unknown keys, missing values or wrong types.
    """
    try:
        value = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(schema), cfg))
    except OmegaConfBaseException as error:
        said = str(error).splitlines()[0]
        raise ConfigError(f"{name or schema.__name__}: {said} (key: {error.full_key})") from error
    assert isinstance(value, schema)
    return value

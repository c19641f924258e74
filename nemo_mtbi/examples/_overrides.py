"""Python values as Hydra's command line writes them, and back: what one launcher hands to another.

Strings are quoted, so that commas, quotes, colons, ``=``, braces, ``${...}`` and line ends mean themselves. Hydra reads
backslashes as escapes only before a quote, OmegaConf only before ``${``.
The grammar has no quotes for the names in a mapping; one that it cannot express is an error.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from nemo_mtbi.errors import ConfigError

PLAIN = re.compile(r"(?!(null|true|false|inf|nan)$)[A-Za-z_/][\w./-]*", re.ASCII | re.IGNORECASE)
QUOTED_END = re.compile(r'(\\*)("|\Z)')
BEFORE_INTERPOLATION = re.compile(r"(\\*)\$\{")
ESCAPED = re.compile(r"[\\()\[\]{}:=, \t]")
PATHS = "output_dir run model nemo hf trainable_only output init_from warm_start cuts".split()  # keys
ASSIGNMENT = re.compile(r"(\+{0,2}[A-Za-z_][\w./@$-]*)=(.*)", re.DOTALL)


def inline(value: Any) -> str:
    """A value in Hydra's override grammar: null, truth values, numbers, text, paths, and lists and mappings of them.

    Raises:
        ConfigError: a key that the grammar cannot express.
    """
    if OmegaConf.is_config(value):
        value = OmegaConf.to_container(value, resolve=True)
    if isinstance(value, Mapping):
        return "{" + ",".join(f"{_name(k)}:{inline(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ",".join(inline(v) for v in value) + "]"
    if isinstance(value, str | Path):
        return str(value) if PLAIN.fullmatch(str(value)) else quoted(str(value))
    return str(value).lower() if isinstance(value, bool) else "null" if value is None else str(value)


def override(key: str, value: Any) -> str:
    """``key=value`` for a launcher."""
    return f"{key}={inline(value)}"


def overrides(values: Mapping[str, Any]) -> list[str]:
    """One ``key=value`` for each entry; a dotted key is a path in the configuration."""
    return [override(str(key), value) for key, value in values.items()]


def read(text: str) -> Any:
    """The value that a launcher sees for ``key=text``.

    Raises:
        ConfigError: not Hydra's grammar.
    """
    try:
        parsed = OverridesParser.create().parse_override(f"value={text}")
        if parsed.is_sweep_override():
            raise ConfigError(f"{text!r} is several values; put text with commas in quotes.")
        config = OmegaConf.create({"value": parsed.value()})
        return OmegaConf.to_container(config, resolve=True)["value"]  # type: ignore[call-overload,index]
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(f"{text!r} cannot be read: {str(error).splitlines()[0]}") from error


def as_typed(argument: str) -> str:
    """An argument of the command line; a value that Hydra would refuse is text, letter by letter.

    So ``model=mtbi-step=200.ckpt``, ``audio=recording (1).wav`` and ``prompt=In short, what is it?`` need no second
    pair of quotes. What Hydra can read (lists, mappings, numbers, quoted text, ``${...}``) stays as it is.
    """
    match = ASSIGNMENT.fullmatch(argument)
    if match is None:
        return argument
    key, text = match.groups()
    try:
        parsed = OverridesParser.create().parse_override(argument)
        if parsed.is_sweep_override() and not _is_sweep_function(text):
            return override(key, text)
        if key in PATHS and not parsed.is_sweep_override() and isinstance(parsed.value(), int | float):
            return f"{key}={quoted(text)}"  # 2026_12_01, which Hydra reads as a number
    except HydraException as error:
        if key != "prompt" and text.startswith(("[", "{")) and text.endswith(("]", "}")):
            raise ConfigError(
                f"{argument[:200]} cannot be read as a list or mapping. Paths and other text with accents, brackets, "
                "quotes, commas, =, ~, # or & need quotes inside: [{kind: tsv, path: 'M\u00fcller/t (1).tsv'}]."
            ) from error
        return override(key, text)
    return argument


def _is_sweep_function(text: str) -> bool:
    return re.match(r"\s*(choice|range|interval|glob|shuffle|sort|tag)\(", text) is not None


def quoted(text: str) -> str:
    """Text in quotes, read back letter by letter."""
    text = BEFORE_INTERPOLATION.sub(lambda m: m[1] * 2 + "\\${", text)
    return '"' + QUOTED_END.sub(lambda m: m[1] * 2 + ('\\"' if m[2] else ""), text) + '"'


def _name(key: Any) -> str:
    """A key of a mapping; the grammar has no quotes there, so not every text can be one."""
    name = ESCAPED.sub(lambda m: "\\" + m[0], str(key))
    try:
        if OverridesParser.create().parse_override(f"key={{{name}:0}}").value() == {key: 0}:
            return name
    except HydraException:
        pass
    raise ConfigError(
        f"The name {key!r} cannot be written on a command line: use letters without accents, digits, "
        "and no quotes; a name is no number."
    )

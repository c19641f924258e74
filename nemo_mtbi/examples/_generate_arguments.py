"""``mtbi generate MODEL AUDIO... "any text"``: the arguments of a person, as overrides of conf/generate.yaml.

Text is taken letter by letter, whatever it holds. The form ``model=... audio=... prompt=...`` stays for launch files.
"""

import argparse
import os
import re
import sys
from pathlib import Path
from typing import Any

import yaml

from nemo_mtbi.errors import MTBIError
from nemo_mtbi.examples._overrides import override
from nemo_mtbi.io.text import read_text

YAML = Path(__file__).parents[1] / "conf" / "generate.yaml"
STDIN = "-"
USAGE = 'mtbi generate MODEL AUDIO... "any text"   or   mtbi generate key=value ...'
HYDRA_FLAGS = (
    "--help",
    "-h",
    "--cfg",
    "-c",
    "--info",
    "-i",
    "--resolve",
    "--package",
    "-p",
    "--multirun",
    "-m",
    "--hydra-help",
)


def to_overrides(arguments: list[str]) -> list[str]:
    """Overrides for Hydra; arguments that are overrides already come back as they are."""
    if not arguments or _is_hydra(arguments[0]):
        return arguments
    parser = build_parser()
    options = vars(parser.parse_intermixed_args(arguments))
    words = options.pop("words")
    model = options.pop("model") or (words.pop(0) if words else None)
    prompts = [read_stdin() if p == STDIN else p for p in options.pop("prompt")]
    prompts += [read_prompt(parser, file) for file in options.pop("prompt_file")]
    if not prompts and len(words) + len(options["audio"]) > 1:
        prompts = [words.pop()] if words else []
        if prompts and Path(prompts[0]).suffix and os.path.isfile(prompts[0]):
            parser.error(f"the last argument is the question, but {prompts[0]} is a file (or use --prompt)")
        if prompts and _is_override(prompts[0]):
            parser.error(f"the last argument is the question, and {prompts[0]} is a setting: --{_dashed(prompts[0])}")
        foreign = [word for word in words[1:] if not os.path.exists(word) and not Path(word).suffix]
        if prompts and foreign:
            parser.error(f"{foreign[0]!r} is no file: put a question of several words in quotes (or use --prompt)")
    audio = options.pop("audio") + words
    for name, value in (("MODEL", model), ("AUDIO", audio), ("a question", prompts)):
        if not value:
            parser.error(f"{name} is missing")
    values: dict[str, Any] = {"model": model, "audio": audio, "prompt": prompts}
    values |= {key: value for key, value in options.items() if value is not None}
    return [override(key, value) for key, value in values.items()]


def build_parser() -> argparse.ArgumentParser:
    """The options; what they default to is in the YAML."""
    parser = argparse.ArgumentParser("mtbi generate", usage=USAGE, allow_abbrev=False, add_help=False)
    parser.add_argument("words", nargs="*", help="model, recordings, and last the question")
    parser.add_argument("--model", help=".nemo file, exported directory, or training run")
    parser.add_argument("--audio", action="append", default=[], help="file, folder or manifest; may be repeated")
    parser.add_argument(
        "--prompt", action="append", default=[], help="a question; may be repeated; - reads it from standard input"
    )
    parser.add_argument(
        "--prompt-file", action="append", default=[], metavar="FILE", help="a file that holds one question; - as above"
    )
    parser.add_argument("--json", action="store_const", const=True, help="one JSON object for each answer")
    parser.add_argument("--do-sample", action="store_const", const=True, help="draw instead of the likeliest answer")
    for name in ("max-new-tokens", "max-positions", "batch-size"):
        parser.add_argument(f"--{name}", type=int)
    for name in ("positions-per-second", "time-marks"):
        parser.add_argument(f"--{name}", type=float)
    for name in ("device", "output"):
        parser.add_argument(f"--{name}")
    return parser


def read_stdin() -> str:
    return sys.stdin.read().rstrip("\n")


def read_prompt(parser: argparse.ArgumentParser, file: str) -> str:
    """The question that a file holds, without the line end at its end."""
    if file == STDIN:
        return read_stdin()
    try:
        return read_text(Path(file)).rstrip("\r\n")
    except MTBIError as error:
        parser.error(f"the question cannot be read from {file}: {error}")


def _is_hydra(argument: str) -> bool:
    """An override of a key that the YAML has, or a flag of Hydra's."""
    return argument.split("=")[0] in HYDRA_FLAGS or _is_override(argument)


def _is_override(argument: str) -> bool:
    match = re.match(r"[+~]*([\w.]+)=", argument)
    keys = {*yaml.safe_load(YAML.read_text(encoding="utf-8")), "verbose", "hydra"}
    return bool(match and match[1].split(".")[0] in keys)


def _dashed(argument: str) -> str:
    """An override as an option."""
    key, _, value = argument.partition("=")
    return f"{key.replace('_', '-')} {value}"

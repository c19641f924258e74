"""``mtbi COMMAND [key=value ...]``: the launchers under one name.

Nothing heavy is imported before a launcher needs it.
"""

import importlib
import importlib.util
import inspect
import re
import sys
from pathlib import Path

from nemo_mtbi.version import __version__

# mtbi report RUN
FIRST_KEY = {"report": "run", "evaluate": "run", "export": "run", "serve": "model", "inspect": "cuts"}
CONF = Path(__file__).parent / "conf"
# Commands whose YAML builds on a dataclass, which says what the keys are.
SCHEMAS = {
    "prepare": ("nemo_mtbi.preparation.prepare", "PrepareConfig"),
    "targets": ("nemo_mtbi.targets.config", "TargetsConfig"),
    "plan": ("nemo_mtbi.parallel.plan_config", "PlanConfig"),
    "train": ("nemo_mtbi.config", "ModelConfig"),
}
# command: (launcher module, its YAML, what it does)
COMMANDS = {
    "prepare": ("prepare_data", "prepare", "speech or sentences to Lhotse cuts with word times"),
    "cache": ("cache_features", "cache_features", "run the frozen encoder once over all cuts"),
    "targets": ("generate_targets", "targets", "let the text LLM answer task prompts on the transcripts"),
    "inspect": ("inspect_targets", "inspect", "show transcripts, word times, prompts and answers"),
    "train": ("train", "train", "align the connector, then imitate the text LLM"),
    "evaluate": ("evaluate", "evaluate", "compare a run with the text LLM and the cascade"),
    "benchmark": ("benchmark", "benchmark", "generalization to unseen prompts and tasks"),
    "ablate": ("ablate", "ablate", "train variants with one budget and benchmark them"),
    "report": ("report", "report", "one HTML page about a run: curves, results, answers"),
    "export": ("export", "export", "write a .nemo file and a Hugging Face directory"),
    "generate": ("generate", "generate", "ask a model about recordings"),
    "serve": ("serve", "serve", "a web page and an OpenAI-compatible endpoint"),
    "plan": ("plan", "plan", "what a training run would need on GPUs"),
    "quickstart": ("quickstart", "quickstart", "the whole method on this machine, offline"),
}


def main(arguments: list[str] | None = None) -> int:
    """Exit code: 0, 1 after a message, 2 for an unknown command, 130 after Ctrl-C."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(usage())
        return 0
    command, rest = arguments[0], arguments[1:]
    if command in ("-V", "--version"):
        print(f"nemo_mtbi {__version__}")
        return 0
    if command not in COMMANDS:
        print(f"Error: unknown command {command!r}. Commands: {', '.join(COMMANDS)}.", file=sys.stderr)
        return 2
    module, config, _ = COMMANDS[command]
    if any(a in ("-h", "--help") for a in rest[: rest.index("--") if "--" in rest else None]):
        print(command_help(command, config))
        return 0
    sys.argv = [f"mtbi {command}", *named(command, rest)]
    launcher, main_module = f"nemo_mtbi.examples.{module}", sys.modules["__main__"]
    own, main_module.__spec__ = main_module.__spec__, importlib.util.find_spec(launcher)  # what Lightning starts again
    try:
        importlib.import_module(launcher).main()
    except KeyboardInterrupt:
        print("\nStopped.", file=sys.stderr)
        return 130
    finally:
        main_module.__spec__ = own
    return 0


def named(command: str, arguments: list[str]) -> list[str]:
    """The arguments, the first one as ``key=value`` if the command takes it without its key."""
    if command not in FIRST_KEY or not arguments or arguments[0].startswith("-"):
        return arguments
    key, equals, _ = arguments[0].partition("=")
    if equals and re.fullmatch(r"[+~]{0,2}[A-Za-z_][\w.@]*", key):
        return arguments
    return [f"{FIRST_KEY[command]}={arguments[0]}", *arguments[1:]]


def usage() -> str:
    """All commands, on one screen."""
    lines = [f"  {name:12s}{text}" for name, (_, _, text) in COMMANDS.items()]
    return "\n".join(
        [
            "usage: mtbi COMMAND [key=value ...]",
            "",
            *lines,
            "",
            "mtbi COMMAND --help   what it takes",
            "mtbi COMMAND --cfg job   all values, with yours filled in",
            "verbose=true   show what other libraries print, too; otherwise it is in the run's log file",
        ]
    )


def command_help(command: str, config: str) -> str:
    """The YAML of a command, as it is: its comments say what the keys mean."""
    text = (CONF / f"{config}.yaml").read_text(encoding="utf-8").rstrip()
    head = f"mtbi {command} [key=value ...]   ({COMMANDS[command][2]})\nKeys, as in {CONF / config}.yaml:\n\n{text}"
    return head if command not in SCHEMAS else f"{head}\n\n{schema_help(*SCHEMAS[command])}"


def schema_help(module: str, name: str) -> str:
    """What a dataclass says of its fields, and their defaults."""
    from omegaconf import OmegaConf

    schema = getattr(importlib.import_module(module), name)
    whose = " (under model)" if name == "ModelConfig" else ""
    defaults = OmegaConf.to_yaml(OmegaConf.structured(schema)).rstrip()
    return f"{name}{whose}: {inspect.cleandoc(schema.__doc__)}\n\nDefaults:\n\n{defaults}"


if __name__ == "__main__":
    sys.exit(main())

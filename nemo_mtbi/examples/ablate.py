"""Ablations: variants of training with the same budget of examples, benchmarked together. See conf/ablate.yaml."""

import hashlib
import json
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from nemo_mtbi import console
from nemo_mtbi.errors import CheckpointError, ConfigError
from nemo_mtbi.examples._launcher import announce, check_step, launcher, run_step
from nemo_mtbi.examples._overrides import overrides, read
from nemo_mtbi.io import jsonl
from nemo_mtbi.tasks.library import comparable, load_library

STEP_0 = "step_0"  # what training starts from
VARIANT_KEYS = {"tasks", "targets", "data_share", "train", "warm_start"}


@launcher("ablate")
def main(cfg: DictConfig) -> None:
    from nemo_mtbi.data.conversation import check_manifest
    from nemo_mtbi.evaluation.ablation import write_report
    from nemo_mtbi.evaluation.benchmark import check_names

    given: dict[str, Any] = OmegaConf.to_container(cfg.variants, resolve=True)  # type: ignore[assignment]
    variants = {name: variant or {} for name, variant in given.items()}
    names = list(cfg.only) if cfg.only is not None else list(variants)
    for name in names:
        if name not in variants:
            raise ConfigError(f"only: there is no variant {name!r}. Variants: {', '.join(variants)}.")
        if unknown := set(variants[name]) - VARIANT_KEYS:
            raise ConfigError(
                f"variants.{name}: unknown key {sorted(unknown)[0]!r}; known: {', '.join(sorted(VARIANT_KEYS))}."
            )
    for path in [*cfg.targets.values(), *cfg.cuts.values(), *(manifest_of(cfg, variants[name]) for name in names)]:
        check_manifest(str(path))
    if cfg.only is None:
        absent = [name for name in names if not held(cfg, variants[name])]
        names = [name for name in names if name not in absent]
        if absent:
            console.say(f"Left out, since there are no targets of their tasks: {', '.join(absent)}.")
    trained = check_tasks(cfg, {name: variants[name] for name in names})
    root = Path(cfg.output_dir)
    runs = {name: {seed: root / name / f"seed{seed}" for seed in cfg.seeds.get(name, [0])} for name in names}
    systems = {f"{name}.{seed}": str(run) for name, seeds in runs.items() for seed, run in seeds.items()}
    first = next(iter(systems.values()))
    systems = {STEP_0: cfg.warm_start or f"{first}@untrained"} | systems
    benchmark = {
        "output_dir": root / "benchmark",
        "cuts": cfg.cuts,
        "systems": systems,
        "compare_with": [name for name in cfg.compare_with if name in systems],
        **cfg.benchmark,
        "trained_tasks": trained,
    }
    trainings = {
        (name, seed): train_values(cfg, variants[name], run, seed)
        for name, seeds in runs.items()
        for seed, run in seeds.items()
    }
    for (name, seed), values in trainings.items():
        check_step(f"train {name}, seed {seed}", "train", values)
    check_names(check_step("benchmark", "benchmark", benchmark))
    for (name, seed), values in trainings.items():
        if not finished(runs[name][seed], overrides(values), inputs_of(cfg, values)):
            run_step(f"train {name}, seed {seed}", "train", values)
    run_step("benchmark", "benchmark", benchmark)
    paths = write_report(root, json.loads((root / "benchmark" / "benchmark.json").read_text()), runs)
    console.say("\n" + paths["md"].read_text())
    announce("Results", {**paths, "benchmark": root / "benchmark" / "benchmark.md"})


def held(cfg: DictConfig, variant: dict[str, Any]) -> set[str]:
    """Tasks that a variant trains on; empty where its manifest lacks one that it names."""
    there = tasks_of(manifest_of(cfg, variant))
    named = set(variant.get("tasks") or there)
    return named if named <= there else set()


def check_tasks(cfg: DictConfig, variants: dict[str, dict[str, Any]]) -> list[str]:
    """What the benchmark is to call trained: what the variants train on, as far as it can ask it.

    Raises:
        ConfigError: there are no targets, a variant names a task of which its manifest has none, or
            ``benchmark.trained_tasks`` says something else.
    """
    for name, variant in variants.items():
        if not held(cfg, variant):
            path = manifest_of(cfg, variant)
            raise ConfigError(
                f"variants.{name}: tasks {', '.join(variant.get('tasks') or ['(all)'])}, but {path} holds targets of "
                f"{', '.join(sorted(tasks_of(path))) or 'no task'}. Generate targets of all of them."
            )
    trained = tasks_of(Path(cfg.targets.train)).union(*(held(cfg, variant) for variant in variants.values()))
    library = load_library(cfg.benchmark.get("task_folders"))
    asked = set(comparable(library, trained))
    unseen = set(cfg.benchmark.get("unseen_tasks") or (t.name for t in library.values() if t.group == "held_out"))
    if both := trained & unseen:
        raise ConfigError(
            f"The targets to train on hold {sorted(both)[0]}, which benchmark.unseen_tasks is to ask as unseen: leave "
            "it out there, or of the targets."
        )
    called = set(cfg.benchmark.get("trained_tasks") or asked)
    if asked != called or not asked:
        there, said = (", ".join(sorted(names)) or "none" for names in (asked, called))
        raise ConfigError(
            f"The targets to train on are of {there}, but benchmark.trained_tasks is {said}: the columns of seen and "
            "unseen tasks would be wrong. Name what is trained."
        )
    return list(cfg.benchmark.get("trained_tasks") or sorted(asked))


def manifest_of(cfg: DictConfig, variant: dict[str, Any]) -> Path:
    """The manifest with targets that a variant trains on."""
    return Path(variant.get("targets") or cfg.targets.train)


def train_values(cfg: DictConfig, variant: dict[str, Any], run: Path, seed: int) -> dict[str, Any]:
    """What the configuration of one variant's training is to hold."""
    manifest = manifest_of(cfg, variant)
    if "data_share" in variant:
        manifest = subset(manifest, Path(cfg.output_dir) / "data", variant["data_share"])
    source = {"type": "mtbi", "cuts_path": str(manifest)} | (
        {"tasks": variant["tasks"]} if variant.get("tasks") else {}
    )
    return {
        "data.train_ds.input_cfg": [source],  # first: what stands below may add to it
        **cfg.train,
        "output_dir": str(run),
        "seed": seed,
        "data.validation_ds.datasets.held_out.input_cfg.0.cuts_path": cfg.targets.validation,
        "init_from": cfg.warm_start if variant.get("warm_start", True) else None,
        **variant.get("train", {}),
    }


def inputs_of(cfg: DictConfig, values: dict[str, Any]) -> dict[str, str]:
    """Digests of the files that a variant is trained with, by what they are."""
    from nemo_mtbi.checkpoints.run_directory import RunDirectory, split_stage

    sources = [source.get("cuts_path") for source in values["data.train_ds.input_cfg"]]
    names = [f"targets {n}" if n else "targets" for n in range(len(sources))]
    files = {name: Path(path) for name, path in zip(names, sources, strict=True) if path}
    files["validation"] = Path(cfg.targets.validation)
    if values["init_from"]:
        run, stage = split_stage(str(values["init_from"]))
        with suppress(CheckpointError):  # a finished variant does not need it any more
            files["warm start"] = RunDirectory(run).weights(stage or RunDirectory(run).last_stage())
    return {name: digest_of(path) for name, path in files.items() if path.is_file()}


@cache
def digest_of(path: Path) -> str:
    from nemo_mtbi.evaluation.predictions import digest

    return digest(path)


def finished(run: Path, settings: list[str], inputs: dict[str, str]) -> bool:
    """Whether a run is trained.

    Raises:
        ConfigError: with other settings than now, or with files that have changed.
    """
    record, read_then = run / "overrides.json", run / "inputs.json"
    trained = run / "imitation" / "trained.safetensors"
    if not trained.is_file() and not any((run / "imitation" / "checkpoints").glob("*.ckpt")):  # nothing to lose
        record.unlink(missing_ok=True)
        read_then.unlink(missing_ok=True)
    if record.is_file() and values_of(json.loads(record.read_text())) != values_of(settings):
        raise ConfigError(f"{run} was trained with other settings ({record}). Use another output_dir, or remove it.")
    before = json.loads(read_then.read_text()) if read_then.is_file() else {}
    if changed := [name for name, own in inputs.items() if before.get(name, own) != own]:
        raise ConfigError(
            f"{run} was trained with another file of its {changed[0]} ({read_then}). Use another output_dir, or remove "
            "it."
        )
    jsonl.write_json(record, settings)
    jsonl.write_json(read_then, before | inputs)
    return trained.is_file()


def values_of(settings: list[str]) -> dict[str, Any]:
    """What the settings mean, however they are quoted."""
    return {key: read(text) for key, _, text in (s.partition("=") for s in settings)}


@cache
def tasks_of(manifest: Path) -> set[str]:
    """Tasks of a manifest's targets."""
    from lhotse.serialization import open_best  # start-up

    with open_best(manifest) as lines:
        return {t["task"] for line in lines for t in (json.loads(line).get("custom") or {}).get("targets", [])}


def subset(manifest: Path, folder: Path, share: float) -> Path:
    """A manifest of about ``share`` of the cuts, chosen by a hash of their ids.

    Smaller shares lie within larger ones.
    """
    content = hashlib.blake2b(manifest.read_bytes(), digest_size=4).hexdigest()
    path = folder / f"{manifest.stem}.{share:g}.{content}.jsonl"
    if not path.is_file():
        from lhotse.serialization import open_best  # start-up

        with open_best(manifest) as lines, jsonl.replacing(path, "part") as out:
            for line in lines:
                digest = hashlib.blake2b(json.loads(line)["id"].encode(), digest_size=8).digest()
                if int.from_bytes(digest, "big") < share * 2**64:
                    out.write(line)
    return path


if __name__ == "__main__":
    main()

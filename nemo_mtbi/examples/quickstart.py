"""The whole method on this machine, offline: speech, targets, training, evaluation, export. See conf/quickstart.yaml.

Every step is one of the other launchers, printed as the command it is; each continues where it was if interrupted.
"""

import json
import shlex
import shutil
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from nemo_mtbi import console
from nemo_mtbi.evaluation.columns import CASCADE, NORMALIZED_CASCADE
from nemo_mtbi.examples._launcher import announce, check_step, launcher, run_step
from nemo_mtbi.examples._steps import peak_gib
from nemo_mtbi.io import jsonl

STEPS = ("prepare", "cache_features", "targets", "train", "evaluate")  # sections of overrides for other launchers
MEASURES = {
    "token_agreement": "token agreement",
    "kl_per_token": "KL / token",
    "repeat_wer": "repeat WER",
    "transcribe_wer": "transcribe WER",
}
SHOWN = ("text_topline", "untrained", "warm_start", "trained", CASCADE, NORMALIZED_CASCADE)
SYSTEMS = {"untrained": "untrained", "warm_start": "alignment", "trained": "imitation"}


def step_overrides(arguments: list[str]) -> list[str]:
    """Keys of the steps' sections, which may be any that those launchers know, in Hydra's form for new keys."""
    given = []
    for argument in arguments:
        section, _, rest = argument.partition(".")
        key, _, value = rest.partition("=")
        if section not in STEPS:
            given.append(argument)
        elif "@" in key:  # a group of that step's, not of this launcher's
            given.append(f"++{section}={{{key}:{value}}}")
        else:
            given.append(f"++{argument}")
    return given


@launcher("quickstart", arguments=step_overrides)
def main(cfg: DictConfig) -> None:
    start = time.time()
    root = Path(cfg.output_dir)
    targets, run = root / "targets", root / "train"
    splits = list(dict.fromkeys(["train", *cfg.evaluated_splits, cfg.validation_split]))
    cuts = {s: str(root / f"cuts.{s}.jsonl") for s in splits}
    silent = str(root / f"cuts.{cfg.no_speech_split}.jsonl") if cfg.no_speech_split else None
    answered = {s: str(targets / f"{s}.jsonl") for s in splits}
    nemo, hf = root / "model.nemo", root / "hf"
    timings: dict[str, float] = {}
    steps: list[tuple[str, str, Mapping[str, Any]]] = []

    def step(name: str, module: str, values: Mapping[str, Any]) -> None:
        check_step(name, module, values)
        steps.append((name, module, values))

    data = {
        "data.train_ds.input_cfg.0.cuts_path": answered["train"],
        "data.train_ds.input_cfg.0.perturb_speed": cfg.cache_features.get("perturb_speed", []),
        "data.validation_ds.datasets.held_out.input_cfg.0.cuts_path": answered[cfg.validation_split],
        "data.cached_features": True,
    }
    scored = {s: answered[s] for s in cfg.evaluated_splits}
    step("prepare speech and word times", "prepare_data", {"output_dir": root, **cfg.prepare})
    heard = [*cuts.values(), *filter(None, [silent])]
    perturbed = {"perturbed_manifests": [cuts["train"]]}
    step("cache encoder features", "cache_features", {"manifests": heard, **perturbed, **cfg.cache_features})
    answers = dict(cfg.targets)
    if "tasks_per_cut" in answers:  # an experiment may leave splits out
        answers["tasks_per_cut"] = {s: n for s, n in answers["tasks_per_cut"].items() if s in cuts}
    step("text LLM answers (targets)", "generate_targets", {"output_dir": targets, "cuts": cuts, **answers})
    step("train", "train", {"output_dir": run, **data, **cfg.train})
    asked = {"run": run, "cuts": scored, "no_speech": silent, "cached_features": True}
    step("evaluate", "evaluate", {**asked, **cfg.evaluate})
    for name, module, values in steps:
        timings[name] = round(run_step(name, module, values), 1)
    trained = run / "imitation" / "trained.safetensors"
    done = nemo.exists() and hf.exists() and (run / "export.json").exists()
    if not done or trained.stat().st_mtime > nemo.stat().st_mtime:
        shutil.rmtree(hf, ignore_errors=True)
        exported = {"run": run, "nemo": nemo, "hf": hf}
        timings["export"] = round(run_step("export", "export", exported), 1)
    summary = summarize(run, nemo, hf, time.time() - start + float(cfg.seconds_before), timings)
    jsonl.write_json(root / "summary.json", summary)
    print_table(summary)
    wav = json.loads(Path(cuts[splits[1]]).open().readline())["recording"]["sources"][0]["source"]
    announce(
        "Files",
        {
            "summary": root / "summary.json",
            "evaluation": run / "evaluation" / "results.md",
            "picture": run / "evaluation" / "results.png",
            "model (.nemo)": nemo,
            "model (Hugging Face)": hf,
            "curves": f"tensorboard --logdir {run}",
        },
    )
    question = shlex.join([str(nemo), wav, "What is this about? Answer in one sentence."])
    console.say(f"\nAsk the model about a recording:\n  {sys.executable} -m nemo_mtbi.cli generate {question}")


def summarize(run: Path, nemo: Path, hf: Path, seconds: float, timings: dict[str, float]) -> dict[str, Any]:
    """The figures of ``summary.json``."""
    evaluation = json.loads((run / "evaluation" / "results.json").read_text())
    export = json.loads((run / "export.json").read_text())
    seen = json.loads((run / "seen.json").read_text())

    def figures(manifest: dict[str, Any]) -> dict[str, Any]:
        answers = {"text_topline": "text_topline", "cascade": "cascade", "trained": "imitation"}
        heard = {"cascade": "cascade", **SYSTEMS}
        asked = {
            "token_agreement": SYSTEMS,
            "kl_per_token": SYSTEMS,
            "repeat_wer": answers,
            "transcribe_wer": heard,
            "nothing_heard": heard,
        }
        return {
            **{k: {n: manifest[s][k] for n, s in of.items() if k in manifest.get(s, {})} for k, of in asked.items()},
            **{
                cascade: {k: manifest[cascade][k] for k in ("token_agreement", "kl_per_token")}
                for cascade in (CASCADE, NORMALIZED_CASCADE)
                if cascade in manifest
            },
        }

    return {
        "wall_seconds": round(seconds, 1),
        "step_seconds": timings,
        "peak_memory_gib": round(peak_gib(), 2),
        "train_examples_seen": seen["examples"],
        **{split: figures(manifest) for split, manifest in evaluation["results"].items()},
        "no_speech": {
            name: evaluation["no_speech"][s]["nothing_heard"]
            for name, s in SYSTEMS.items()
            if s in evaluation.get("no_speech", {})
        },
        "export": {"nemo": str(nemo), "hf": str(hf), "round_trip_max_abs_diff": export["round_trip_max_abs_diff"]},
    }


def print_table(summary: dict[str, Any]) -> None:
    """The summary for a person."""
    splits = [k for k, v in summary.items() if isinstance(v, dict) and "token_agreement" in v]
    for split in splits:
        scores = summary[split]
        console.say(f"\n{split.replace('_', ' '):24s}" + "".join(f"{title:>18s}" for title in MEASURES.values()))
        for system in SHOWN:
            own = [scores.get(system, {}).get(m, scores.get(m, {}).get(system)) for m in MEASURES]
            if any(value is not None for value in own):
                cells = "".join(f"{'-' if value is None else f'{value:.3f}':>18s}" for value in own)
                console.say(f"{system.replace('_', ' '):24s}{cells}")
    recognized = [(name, share) for name, share in summary["no_speech"].items() if share is not None]
    if recognized:
        shares = ", ".join(f"{name.replace('_', ' ')} {share:.3f}" for name, share in recognized)
        spoken = {s: summary[s]["nothing_heard"].get("trained") for s in splits}
        wrong = ", ".join(f"{v:.3f} of {s.replace('_', ' ')}" for s, v in spoken.items() if v is not None)
        console.say(f"\nNothing heard where nothing is said: {shares}; where somebody speaks (trained): {wrong or '-'}")
    seconds = ", ".join(f"{name} {value:.0f}" for name, value in summary["step_seconds"].items())
    console.say(
        f"\nSeconds: {seconds}; all {summary['wall_seconds']:.0f}. Peak memory {summary['peak_memory_gib']:.1f} GiB"
    )


if __name__ == "__main__":
    main()

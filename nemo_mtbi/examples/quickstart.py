"""The whole method on this machine, offline: speech, targets, training, evaluation, export. See conf/quickstart.yaml.

Every step is one of the other launchers, printed as the command it is; each continues where it was if interrupted.
"""

import json
import resource
import shutil
import sys
import time
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from nemo_mtbi.examples._launcher import announce, inline, launcher, run_step
from nemo_mtbi.io import jsonl

SYSTEMS = {"untrained": "untrained", "warm_start": "alignment", "trained": "imitation"}


@launcher("quickstart")
def main(cfg: DictConfig) -> None:
    start = time.time()
    root = Path(cfg.output_dir)
    targets, run = root / "targets", root / "train"
    splits = list(dict.fromkeys(["train", *cfg.evaluated_splits, cfg.validation_split]))
    cuts = {s: str(root / f"cuts.{s}.jsonl") for s in splits}
    answered = {s: str(targets / f"{s}.jsonl") for s in splits}
    nemo, hf = root / "model.nemo", root / "hf"
    timings: dict[str, float] = {}

    def step(name: str, module: str, *overrides: str) -> None:
        timings[name] = round(run_step(name, module, *overrides), 1)

    data = f"data.train_ds.input_cfg.0.cuts_path={answered['train']}"
    watched = f"data.validation_ds.datasets.held_out.input_cfg.0.cuts_path={answered[cfg.validation_split]}"
    scored = {s: answered[s] for s in cfg.evaluated_splits}
    manifests = f"manifests={inline(list(cuts.values()))}"
    step("prepare speech and word times", "prepare_data", f"output_dir={root}", *overrides(cfg.prepare))
    step("cache encoder features", "cache_features", manifests, *overrides(cfg.cache_features))
    step(
        "text LLM answers (targets)",
        "generate_targets",
        f"output_dir={targets}",
        f"cuts={inline(cuts)}",
        *overrides(cfg.targets),
    )
    step("train", "train", f"output_dir={run}", "data.cached_features=true", data, watched, *overrides(cfg.train))
    step(
        "evaluate", "evaluate", f"run={run}", f"cuts={inline(scored)}", "cached_features=true", *overrides(cfg.evaluate)
    )
    trained = run / "imitation" / "trained.safetensors"
    done = nemo.exists() and hf.exists() and (run / "export.json").exists()
    if not done or trained.stat().st_mtime > nemo.stat().st_mtime:
        shutil.rmtree(hf, ignore_errors=True)
        step("export", "export", f"run={run}", f"nemo={nemo}", f"hf={hf}")
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
    print(
        f"\nAsk the model about a recording:\n  {sys.executable} -m nemo_mtbi.examples.generate model={nemo} "
        f'audio={wav} "prompt=What is this about? Answer in one sentence."'
    )


def overrides(section: DictConfig) -> list[str]:
    """A section of this YAML as overrides of a launcher."""
    return [f"{key!s}={inline(value)}" for key, value in section.items()]


def summarize(run: Path, nemo: Path, hf: Path, seconds: float, timings: dict[str, float]) -> dict[str, Any]:
    """The figures of ``summary.json``."""
    results = json.loads((run / "evaluation" / "results.json").read_text())["results"]
    export = json.loads((run / "export.json").read_text())
    seen = json.loads((run / "seen.json").read_text())

    def figures(manifest: dict[str, Any]) -> dict[str, Any]:
        wer = {"text_topline": "text_topline", "cascade": "cascade", "trained": "imitation"}
        return {
            **{k: {name: manifest[s][k] for name, s in SYSTEMS.items()} for k in ("token_agreement", "kl_per_token")},
            "repeat_wer": {name: manifest[s]["repeat_wer"] for name, s in wer.items()},
            "cascade": {k: manifest["cascade"][k] for k in ("token_agreement", "kl_per_token")},
        }

    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
    return {
        "wall_seconds": round(seconds, 1),
        "step_seconds": timings,
        "peak_memory_gib": round(peak, 2),
        "train_examples_seen": seen["examples"],
        **{split: figures(manifest) for split, manifest in results.items()},
        "export": {"nemo": str(nemo), "hf": str(hf), "round_trip_max_abs_diff": export["round_trip_max_abs_diff"]},
    }


def print_table(summary: dict[str, Any]) -> None:
    """The summary for a person."""
    splits = [k for k, v in summary.items() if isinstance(v, dict) and "token_agreement" in v]
    print(f"\n{'':38s}" + "".join(f"{s.replace('_', ' '):>14s}" for s in splits))
    for key in ("token_agreement", "kl_per_token", "repeat_wer"):
        for name in summary[splits[0]][key]:
            figures = "".join(f"{summary[s][key][name]:14.3f}" for s in splits)
            print(f"{key.replace('_', ' ') + ', ' + name:38s}{figures}")
    for name, seconds in summary["step_seconds"].items():
        print(f"{name + ' (s)':38s}{seconds:14.0f}")
    print(
        f"{'all steps (s)':38s}{summary['wall_seconds']:14.0f}\n"
        f"{'peak memory (GiB)':38s}{summary['peak_memory_gib']:14.1f}"
    )


if __name__ == "__main__":
    main()

"""A trained run as one .nemo file and as a Hugging Face directory. See conf/export.yaml."""

from pathlib import Path

from omegaconf import DictConfig

from nemo_mtbi.examples._launcher import announce, launcher


@launcher("export")
def main(cfg: DictConfig) -> None:
    from nemo_mtbi.data import jsonl
    from nemo_mtbi.export.archive import load_directory, load_nemo, save_directory, save_nemo
    from nemo_mtbi.export.round_trip import max_abs_logit_difference
    from nemo_mtbi.models import MTBISALM
    from nemo_mtbi.training.run_directory import RunDirectory

    model = RunDirectory(cfg.run).load_model(cfg.stage)
    written: dict[str, Path] = {}
    difference = 0.0
    if cfg.nemo:
        written["nemo"] = save_nemo(model, Path(cfg.nemo))
        if cfg.check:
            difference = max(difference, max_abs_logit_difference(model, load_nemo(MTBISALM, written["nemo"])))
    if cfg.hf:
        written["hf"] = save_directory(model, Path(cfg.hf))
        if cfg.check:
            difference = max(difference, max_abs_logit_difference(model, load_directory(MTBISALM, written["hf"])))
    record = {k: str(v) for k, v in written.items()} | ({"round_trip_max_abs_diff": difference} if cfg.check else {})
    jsonl.write_json(Path(cfg.run) / "export.json", record)
    announce(f"Exported (largest difference of logits after reading back: {difference})", dict(written))
    if cfg.nemo:
        print(
            f'\nAsk it: python -m nemo_mtbi.examples.generate model={cfg.nemo} audio=question.wav "prompt=What is this about?"'
        )


if __name__ == "__main__":
    main()

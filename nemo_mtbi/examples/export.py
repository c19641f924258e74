"""A trained run as one .nemo file, a Hugging Face directory, or what was trained alone. See conf/export.yaml."""

import shlex
from collections.abc import Callable
from functools import partial
from pathlib import Path

from omegaconf import DictConfig

from nemo_mtbi import console
from nemo_mtbi.examples._launcher import announce, launcher


@launcher("export")
def main(cfg: DictConfig) -> None:
    from nemo_mtbi.checkpoints.archive import require_size, save_directory, save_nemo, save_trainable
    from nemo_mtbi.checkpoints.card import model_card
    from nemo_mtbi.checkpoints.round_trip import MERGED, TOLERANCE, probe_logits, require_same_logits
    from nemo_mtbi.checkpoints.run_directory import IMITATION, RunDirectory
    from nemo_mtbi.checkpoints.seen_record import record_of
    from nemo_mtbi.errors import ConfigError
    from nemo_mtbi.io import jsonl
    from nemo_mtbi.models import MTBISALM

    if not (cfg.nemo or cfg.hf or cfg.trainable_only):
        raise ConfigError("Say what to write: nemo=FILE, hf=FOLDER or trainable_only=FOLDER.")
    if cfg.merge_lora and not (cfg.nemo or cfg.hf):
        raise ConfigError("merge_lora=true changes the LLM, which trainable_only does not hold: give nemo or hf.")
    require_size(cfg.max_shard_size)
    run = RunDirectory(cfg.run)
    stage = cfg.stage or run.last_stage()
    model, seen = MTBISALM.from_run(run, stage), record_of(run.root) if stage == IMITATION else None
    written: dict[str, Path] = {}
    differences: dict[str, float] = {}
    logits = probe_logits(model) if cfg.check else None

    def card(whole: bool) -> str:
        return model_card(model, run.root, cfg.card.data, cfg.card.licence, whole)

    def check(name: str, what: str, other: Callable[[], MTBISALM], tolerance: float = TOLERANCE) -> None:
        nonlocal logits
        if logits is not None:
            read = probe_logits(other())
            differences[name] = max(differences.get(name, 0.0), require_same_logits(logits, read, what, tolerance))
            logits = read

    def read_back(path: Path) -> None:
        check("round_trip_max_abs_diff", str(path), partial(MTBISALM.restore_from, path, trust_remote_code=True))

    if cfg.trainable_only:
        written["trainable_only"] = save_trainable(model, Path(cfg.trainable_only), stage, card(whole=False), seen)
        read_back(written["trainable_only"])
    if cfg.merge_lora:
        model.merge_lora()
        tolerance = MERGED.get(model.llm.dtype, TOLERANCE)
        check("merge_lora_max_abs_diff", "The model with its LoRA merged", lambda: model, tolerance)
    if cfg.nemo:
        written["nemo"] = save_nemo(model, Path(cfg.nemo), card(whole=True), seen, cfg.max_shard_size)
        read_back(written["nemo"])
    if cfg.hf:
        written["hf"] = save_directory(model, Path(cfg.hf), card(whole=True), seen, cfg.max_shard_size)
        read_back(written["hf"])
    jsonl.write_json(run.root / "export.json", {k: str(v) for k, v in written.items()} | differences)
    found = differences.get("round_trip_max_abs_diff", "not looked at")
    announce(f"Exported the stage {stage} (largest difference of logits after reading back: {found})", dict(written))
    model_path = next(iter(written.values()))
    if console.within_step():
        return
    console.say(f'\nAsk it: mtbi generate {shlex.quote(str(model_path))} question.wav "What is this about?"')


if __name__ == "__main__":
    main()

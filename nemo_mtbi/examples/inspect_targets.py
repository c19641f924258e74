"""Show examples: transcript, word times, prompts, answers, and what interleaving makes of them.

See conf/inspect.yaml.
"""

from typing import Any

from omegaconf import DictConfig

from nemo_mtbi import console
from nemo_mtbi.examples._launcher import launcher


@launcher("inspect")
def main(cfg: DictConfig) -> None:
    from itertools import islice

    from lhotse import CutSet

    from nemo_mtbi.data.conversation import check_manifest, reading_cuts, spoken_part
    from nemo_mtbi.data.target import TARGETS_FIELD, Target
    from nemo_mtbi.errors import ConfigError, DataError

    check_manifest(cfg.cuts)
    if cfg.count < 1 or cfg.visits < 0:
        raise ConfigError(f"count={cfg.count}, visits={cfg.visits}: at least 1 and 0.")
    with reading_cuts(cfg.cuts):
        cuts = CutSet.from_file(cfg.cuts)
        chosen = [c for c in cuts if c.id == str(cfg.id)] if cfg.id is not None else list(islice(cuts, cfg.count))
    if not chosen:
        raise DataError(f"{cfg.cuts} has no cut {cfg.id!r}.")
    for cut in chosen:
        source = cut.recording.sources[0].source if cut.has_recording else "-"
        spoken = spoken_part(cut)
        console.say(f"\n=== {cut.id}  {cut.duration:.2f} s  {source}")
        console.say(spoken.transcript)
        timed = [w for w in spoken.words if w.start_seconds is not None]
        if timed:
            console.say("  " + "  ".join(f"{w.text} {w.start_seconds:.2f}-{w.end_seconds:.2f}" for w in timed))
        for target in (Target(**t) for t in (cut.custom or {}).get(TARGETS_FIELD, [])):
            console.say(
                f"  [{target.task}] {target.prompt}\n    -> "
                f"{target.response}{'' if target.finished else '  (truncated)'}"
            )
        for visit in range(cfg.visits):
            console.say(f"  interleaved, visit {visit}: {interleaved_view(cut, cfg, visit)}")


def interleaved_view(cut: Any, cfg: DictConfig, visit: int) -> str:
    """The utterance as one plan gives it to the LLM: words as text, speech as [start-end]."""
    from nemo_mtbi.config import InterleavingConfig
    from nemo_mtbi.data.conversation import spoken_part
    from nemo_mtbi.data.interleaving import SpeechSpan, Word, merge, timeline
    from nemo_mtbi.data.rendering import match_words
    from nemo_mtbi.io.typed import typed

    spoken = spoken_part(cut)
    texts = spoken.transcript.split()
    timed = match_words(texts, spoken.words)
    words = [Word(i, i + 1, t.start_seconds, t.end_seconds) for i, t in enumerate(timed)]
    units = timeline(words, cut.duration)
    plan = typed(InterleavingConfig, cfg.interleaving).policy().plan(units, cut.id, visit, 0)
    parts = [
        f"[{p.start_seconds:.2f}-{p.end_seconds:.2f} s]" if isinstance(p, SpeechSpan) else " ".join(texts[p[0] : p[1]])
        for p in merge(units, plan, 0)
    ]
    return " ".join(parts)


if __name__ == "__main__":
    main()

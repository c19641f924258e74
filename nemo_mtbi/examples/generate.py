"""Ask an exported speech LLM about recordings. See conf/generate.yaml."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from nemo_mtbi.examples._launcher import announce, launcher


@launcher("generate")
def main(cfg: DictConfig) -> None:
    from nemo_mtbi.data.audio import collate_waveforms, load_waveform
    from nemo_mtbi.errors import DataError
    from nemo_mtbi.io import jsonl
    from nemo_mtbi.models import MTBISALM
    from nemo_mtbi.parallel.launch import is_first_rank, join_ranks

    inputs = list(audio_inputs(cfg.audio))
    size = cfg.tensor_model_parallel_size
    device = join_ranks(size, "generate") if cfg.device == "auto" or size > 1 else cfg.device
    model = MTBISALM.restore_from(cfg.model, tensor_model_parallel_size=size).to(device)

    def show(line: str) -> None:
        if is_first_rank():
            print(line, flush=True)

    records: list[dict[str, Any]] = []
    failed = 0
    for begin in range(0, len(inputs), cfg.batch_size):
        loaded = []
        for path in inputs[begin : begin + cfg.batch_size]:
            try:
                loaded.append((path, load_waveform(path, model.sampling_rate)))
            except DataError as error:
                if len(inputs) == 1:
                    raise
                failed += 1
                show(f"{path}\t(left out: {error})")
        if not loaded:
            continue
        audios, lengths = collate_waveforms([w for _, w in loaded])
        prompts = [[model.user_turn(cfg.prompt)] for _ in loaded]
        ids = model.generate(prompts, audios, lengths, max_new_tokens=cfg.max_new_tokens, do_sample=cfg.do_sample)
        for (path, _), row in zip(loaded, ids, strict=True):
            answer = model.tokenizer.tokenizer.decode(row, skip_special_tokens=True).strip()
            records.append({"audio": str(path), "prompt": cfg.prompt, "answer": answer})
            show(answer if len(inputs) == 1 else f"{path}\t{answer}")
    if cfg.output and is_first_rank():
        jsonl.write_text(Path(cfg.output), "".join(jsonl.dumps(r) + "\n" for r in records))
        announce(f"{len(records)} answers, {failed} left out", {"answers": cfg.output})


def audio_inputs(audio: Any) -> Iterator[Path]:
    """Files, folders, NeMo JSONL manifests, and lists of them.

    Raises:
        DataError: a path that does not exist, or a folder without audio.
    """
    from nemo_mtbi.errors import DataError
    from nemo_mtbi.preparation.sources import AUDIO_SUFFIXES

    for item in [audio] if isinstance(audio, str) else audio:
        path = Path(item)
        if path.is_dir():
            files = sorted(f for f in path.rglob("*") if f.suffix.lower() in AUDIO_SUFFIXES)
            if not files:
                raise DataError(f"No audio file ({', '.join(sorted(AUDIO_SUFFIXES))}) in {path}.")
            yield from files
        elif not path.exists():
            raise DataError(f"There is no audio file {path}.")
        elif path.suffix in (".json", ".jsonl"):
            for line in path.read_text(encoding="utf-8").splitlines():
                file = Path(json.loads(line)["audio_filepath"])
                yield file if file.is_absolute() else path.parent / file
        else:
            yield path


if __name__ == "__main__":
    main()

"""Ask an exported speech LLM about recordings. See conf/generate.yaml."""

from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from nemo_mtbi.examples._launcher import announce, launcher


@launcher("generate")
def main(cfg: DictConfig) -> None:
    from nemo_mtbi.data.audio import collate_waveforms
    from nemo_mtbi.data.audio_inputs import audio_inputs
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
        for source in inputs[begin : begin + cfg.batch_size]:
            try:
                loaded.append((source, source.load(model.sampling_rate)))
            except DataError as error:
                if len(inputs) == 1:
                    raise
                failed += 1
                show(f"{source}\t(left out: {error})")
        if not loaded:
            continue
        audios, lengths = collate_waveforms([w for _, w in loaded])
        prompts = [[model.user_turn(cfg.prompt)] for _ in loaded]
        ids = model.generate(prompts, audios, lengths, max_new_tokens=cfg.max_new_tokens, do_sample=cfg.do_sample)
        for (source, _), row in zip(loaded, ids, strict=True):
            answer = model.tokenizer.tokenizer.decode(row, skip_special_tokens=True).strip()
            records.append({**source.to_dict(), "prompt": cfg.prompt, "answer": answer})
            show(answer if len(inputs) == 1 else f"{source}\t{answer}")
    if not records:
        raise DataError(f"None of the {len(inputs)} recordings can be read; the lines above say why.")
    if cfg.output and is_first_rank():
        jsonl.write_text(Path(cfg.output), "".join(jsonl.dumps(r) + "\n" for r in records))
        announce(f"{len(records)} answers, {failed} left out", {"answers": cfg.output})


if __name__ == "__main__":
    main()

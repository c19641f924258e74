"""What is left of a trained model when its speech positions are fused: agreement by share, beside average pooling.

    python benchmarks/fusion.py RUN CUTS [--json FILE]

RUN: a training run (or RUN@STAGE) with a dense connector; CUTS: a manifest with targets and cached features of it.
``recovery_by_share`` is token agreement with the text LLM over that of all positions; ``average_pooling_by_share`` is
the same where neighbours are averaged in equal groups. ``agreement`` and ``kl_per_token`` stand beside them.
"""

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from lhotse import CutSet
from results_file import finish
from torch import Tensor, nn

from nemo_mtbi.checkpoints.run_directory import RunDirectory
from nemo_mtbi.evaluation.score import Evaluation
from nemo_mtbi.evaluation.systems import SpeechSystem
from nemo_mtbi.models import MTBISALM
from nemo_mtbi.modules.connectors.base import SpeechEmbeddings, frame_mask
from nemo_mtbi.modules.fusion import Fusion
from nemo_mtbi.modules.perception import connector_of

SHARES = (1.0, 0.5, 0.25, 0.125)


class AveragePooling(nn.Module):
    """Equal groups of neighbours, averaged."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size

    def forward(self, speech: SpeechEmbeddings, *_: Any) -> SpeechEmbeddings:
        mask = frame_mask(speech.lengths, speech.embeddings.shape[1]).to(speech.embeddings.dtype)

        def pooled(values: Tensor) -> Tensor:
            padding = -values.shape[1] % self.size
            values = nn.functional.pad(values, (0, 0, 0, padding) if values.ndim == 3 else (0, padding))
            return values.unflatten(1, (-1, self.size)).sum(2)

        count = pooled(mask).clamp_min(1)
        embeddings = pooled(speech.embeddings * mask[..., None]) / count[..., None]
        lengths = (speech.lengths + self.size - 1) // self.size
        return replace(speech, embeddings=embeddings, lengths=lengths, centers=pooled(speech.centers * mask) / count)


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run")
    parser.add_argument("cuts", type=Path)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    run, stage = RunDirectory.parse(arguments.run)
    model = MTBISALM.from_run(run, stage)
    connector = connector_of(model.perception)
    assert connector is not None and not connector.emits_tokens
    per_second = 1 / (connector.subsampling_factor * model.frame_seconds)
    evaluation = Evaluation(model, CutSet.from_file(arguments.cuts), cached_features=True)
    rows: dict[str, dict[str, dict[str, float]]] = {"fusion": {}, "average_pooling": {}}
    for share in SHARES:
        ways = {"fusion": Fusion(per_second=share * per_second), "average_pooling": AveragePooling(round(1 / share))}
        for name, way in ways.items():
            model.perception.fusion = None if share == 1 else way.eval()
            scores = evaluation.score(f"{name} {share:g}", SpeechSystem(model), generate=False).summary()
            rows[name][f"{share:g}"] = {k: scores[k] for k in ("token_agreement", "kl_per_token")}
    whole = rows["fusion"]["1"]["token_agreement"]
    recovery = {
        name: {share: row["token_agreement"] / whole for share, row in found.items()} for name, found in rows.items()
    }
    finish(
        {
            "positions_per_second": per_second,
            "utterances": len(evaluation.questions.cuts),
            "recovery_by_share": recovery["fusion"],
            "average_pooling_by_share": recovery["average_pooling"],
            **rows,
        },
        arguments.json,
    )


if __name__ == "__main__":
    main()

"""One optimizer step of MTBISALM under Lightning, on 1 or 2 ranks; writes the parameters.

Run by test_normalization.py.
"""

import json
import sys
from pathlib import Path

import lightning.pytorch as pl
import torch

sys.path.insert(0, str(Path(__file__).parents[2]))


class Batches(torch.utils.data.Dataset):
    """Rank r of n gets every n-th example, so ranks hold different numbers of response tokens."""

    def __init__(self, model, ranks, rank):
        from tests.helpers import make_batch

        batch = make_batch(model, 6)
        keep = list(range(rank, 6, ranks))
        self.batch = {
            "examples": [batch["examples"][i] for i in keep],
            "audios": batch["audios"][keep],
            "audio_lens": batch["audio_lens"][keep],
        }

    def __len__(self):
        return 1

    def __getitem__(self, index):
        return self.batch


def main(config, ranks, out):
    from nemo_mtbi.models import MTBISALM

    torch.manual_seed(0)
    model = MTBISALM(config)
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=ranks,
        max_steps=1,
        logger=False,
        enable_checkpointing=False,
        use_distributed_sampler=False,
        strategy="ddp" if ranks > 1 else "auto",
        enable_progress_bar=False,
        enable_model_summary=False,
    )

    class Data(pl.LightningDataModule):
        def train_dataloader(self):
            return torch.utils.data.DataLoader(Batches(model, ranks, trainer.global_rank), batch_size=None)

    trainer.fit(model, Data())
    if trainer.is_global_zero:
        torch.save({n: p.detach() for n, p in model.named_parameters() if p.requires_grad}, out)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]), int(sys.argv[2]), sys.argv[3])

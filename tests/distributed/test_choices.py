"""Ranks that hold one LLM together emit the same tokens, whatever rounding does to each."""

import pytest
import torch
import torch.distributed as dist

from nemo_mtbi import registration as registration
from nemo_mtbi.modules.connectors import CTCCompressConnector
from tests.helpers import build
from tests.launching import on_ranks

pytestmark = pytest.mark.distributed
PORT = 29551


def connectors(tiny_llm, tiny_whisper):
    """A CTC and a decoder connector with the language model that they write for."""
    own = {"_target_": "nemo_mtbi.modules.connectors.WhisperDecoderConnector", "dropout": 0.0}
    config = {"pretrained_llm": tiny_llm, "pretrained_asr": tiny_whisper, "prompt_format": "chatml"}
    model = build({**config, "perception": {"input_length": "own", "modality_adapter": own}})
    decoder = model.perception.modality_adapter
    width = next(model.embed_tokens.parameters()).shape[1]
    ctc = CTCCompressConnector(32, width, vocab_size=60, d_model=32, heads=4)
    ctc.set_vocabulary(list(range(300, 360)))
    ctc.bind_language_model(model.tokenizer.tokenizer, model.embed_tokens)
    return {"ctc": ctc.eval(), "decoder": decoder.eval()}


@torch.no_grad()
def worker(rank, parts, results):
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{PORT}", rank=rank, world_size=2)
    found = {}
    for name, connector in connectors(*parts).items():
        generator = torch.Generator().manual_seed(rank)
        for parameter in connector.parameters():  # far more than rounding
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
        features = torch.randn(3, 60, 32, generator=torch.Generator().manual_seed(5))
        for joined in (False, True):
            connector.choice_group = dist.group.WORLD if joined else None
            out = connector.connect(features, torch.tensor([60, 44, 7]))
            found[name, joined] = (out.lengths.tolist(), out.labels.tolist())
    results[rank] = found
    dist.destroy_process_group()


@pytest.mark.slow
def test_every_rank_emits_the_first_ones_tokens(tiny_llm, tiny_whisper):
    first, second = on_ranks(2, worker, (tiny_llm, tiny_whisper))
    for name in ("ctc", "decoder"):
        assert first[name, False] != second[name, False], name  # without agreement they would hang
        assert first[name, True] == second[name, True] == first[name, False], name

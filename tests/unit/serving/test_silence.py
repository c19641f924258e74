"""Requests about audio in which nothing is said, among others."""

import queue

import pytest
import torch

from nemo_mtbi.serving.batching import Batcher
from nemo_mtbi.serving.request import Piece, Request
from tests.helpers import build

pytestmark = pytest.mark.unit


def test_silent_requests_get_their_own_answer_and_the_others_theirs(tiny_llm, tiny_whisper, monkeypatch):
    model = build(
        {
            "pretrained_llm": tiny_llm,
            "pretrained_asr": tiny_whisper,
            "prompt_format": "chatml",
            "perception": {
                "input_length": "own",
                "modality_adapter": {"_target_": "nemo_mtbi.modules.connectors.WhisperDecoderConnector"},
            },
        }
    ).eval()
    audio = 0.1 * torch.randn(8000, generator=torch.Generator().manual_seed(0)).numpy()
    expected = model.chat(audio, "What?", max_new_tokens=5, do_sample=False)
    real = model._nothing_heard
    monkeypatch.setattr(model, "_nothing_heard", lambda s, a: [False, True, True] if len(a) == 3 else real(s, a))
    batcher = Batcher(model)
    told = [queue.Queue() for _ in range(3)]
    questions = [("What?", None), ("Who?", None), ("Repeat.", "")]
    requests = [
        Request([model.user_turn(q)], [[audio]], 30 if i else 5, told[i].put, told[i].put, silence=silence)
        for i, (q, silence) in enumerate(questions)
    ]
    batcher._answer(requests)
    for request in requests:
        request.end("length")
    texts = ["".join(e.text for e in list(t.queue) if isinstance(e, Piece)).strip() for t in told]
    assert texts == [expected, "I did not hear any speech.", ""]
    assert [list(t.queue)[-1] for t in told][1:] == ["stop", "stop"]
    assert all(r.prompt_positions > 10 for r in requests)

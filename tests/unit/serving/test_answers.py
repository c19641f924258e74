"""Drawing tokens, and the text of an answer as it grows, against plain PyTorch and a tokenizer of characters."""

from types import SimpleNamespace

import pytest
import torch

from nemo_mtbi.serving import page
from nemo_mtbi.serving.limits import Limits
from nemo_mtbi.serving.messages import _parts
from nemo_mtbi.serving.protocol import ChatMessage
from nemo_mtbi.serving.request import Piece, Request
from nemo_mtbi.serving.sampling import Draw, Sampling, TokenScore

pytestmark = pytest.mark.unit
SCORES = torch.tensor([0.5, 2.0, -1.0, 1.5, 0.0, float("-inf")])
END = 0


class Bytes:
    """A tokenizer whose tokens are bytes."""

    def decode(self, tokens, skip_special_tokens=True):
        return bytes(tokens).decode(errors="replace")


def drawn(number=4000, **options):
    draw = Draw(Sampling(seed=1, **options))
    return torch.bincount(torch.tensor([draw.token(SCORES) for _ in range(number)]), minlength=6) / number


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_draws_follow_the_softmax(temperature):
    wanted = torch.softmax(SCORES / temperature, 0)
    torch.testing.assert_close(drawn(temperature=temperature), wanted, atol=0.03, rtol=0)


def test_the_nucleus_is_the_smallest_set_with_that_probability():
    probabilities = torch.softmax(SCORES, 0)
    for top_p, kept in ((0.4, [1]), (float(probabilities[1]) + 0.01, [1, 3]), (0.79, [1, 3]), (0.9, [1, 3, 0])):
        wanted = torch.zeros(6)
        wanted[kept] = probabilities[kept] / probabilities[kept].sum()
        torch.testing.assert_close(drawn(temperature=1.0, top_p=top_p), wanted, atol=0.03, rtol=0)


def test_greedy_and_almost_greedy():
    assert drawn(10)[1] == drawn(10, temperature=1e-30)[1] == drawn(10, temperature=2.0, top_p=1e-9)[1] == 1


def test_seeds_and_ordinals():
    def tokens(seed, ordinal):
        draw = Draw(Sampling(1.0, seed=seed), ordinal)
        return [draw.token(SCORES) for _ in range(20)]

    assert tokens(5, 0) == tokens(5, 0) != tokens(5, 1) and tokens(6, 0) != tokens(5, 0)
    assert tokens(None, 0) != tokens(None, 0)


def test_scores_come_before_temperature():
    logprobs = torch.log_softmax(SCORES, 0)
    score = Draw(Sampling(0.1, top_logprobs=2)).score(SCORES, 4)
    assert score.token == 4 and score.logprob == pytest.approx(float(logprobs[4]))
    assert [t for t, _ in score.top] == [1, 3] and score.top[0][1] == pytest.approx(float(logprobs[1]))
    assert Draw(Sampling()).score(SCORES, 4) is None


def answer(text, max_tokens=99, scored=False, **options):
    """The answer of these bytes. -> request, pieces, end."""
    pieces, ends = [], []
    request = Request([], [], max_tokens, pieces.append, ends.append, Sampling(**options))
    for place, byte in enumerate([*text.encode(), END]):
        request.newest = TokenScore(byte, -float(place)) if scored else None
        request.add(byte, Bytes(), {END})
    assert len(ends) == 1
    return request, pieces, ends[0]


def test_stop_texts_never_show():
    for text, stop, wanted in (
        ("one two three", ("two",), "one"),
        ("one twt two", ("two",), "one twt"),
        ("aaab", ("aab",), "a"),
        ("one two", ("wo", "two", "e"), "on"),
        ("Bär, Löwe", ("Lö",), "Bär,"),
        ("stop", ("stop",), ""),
    ):
        request, pieces, end = answer(text, stop=stop)
        assert ("".join(p.text for p in pieces), end) == (wanted, "stop"), text
        assert len(request.tokens) <= len(text.encode())
    _, pieces, end = answer("one tw", stop=("two",))
    assert "".join(p.text for p in pieces) == "one tw" and end == "stop"
    _, pieces, end = answer("one tw", max_tokens=6, stop=("two",))
    assert "".join(p.text for p in pieces) == "one tw" and end == "length"


def test_spaces_wait_for_what_follows_them():
    _, pieces, _ = answer("one  two \n")
    assert [p.text for p in pieces] == ["o", "n", "e", "  t", "w", "o"]


def test_every_piece_carries_the_scores_of_its_tokens():
    _, pieces, _ = answer("Bär, Löwe", scored=True)
    assert [p.text for p in pieces] == ["B", "ä", "r", ",", " L", "ö", "w", "e"]
    assert all(bytes(s.token for s in p.scores).decode() == p.text for p in pieces)
    _, pieces, _ = answer("Bär, Löwe und Wolf", scored=True, stop=(" und",))
    assert b"".join(bytes(s.token for s in p.scores) for p in pieces).decode() == "Bär, Löwe"


def test_a_cancelled_answer_takes_no_more_tokens():
    pieces, ends = [], []
    request = Request([], [], 9, pieces.append, ends.append)
    request.add(65, Bytes(), {END})
    request.cancel()
    request.add(66, Bytes(), {END})
    request.end(request.finished)
    request.end("stop")
    assert (pieces, ends, request.tokens) == ([Piece("A")], ["cancelled"], [65])


def test_tool_arguments_that_are_no_json_are_text():
    for arguments in ("[" * 100_000, "no json", ""):
        call = {"id": "1", "type": "function", "function": {"name": "find", "arguments": arguments}}
        (part,) = _parts(ChatMessage(role="assistant", tool_calls=[call]))
        assert part.startswith("<tool_call>\n{") and part.endswith("}\n</tool_call>")


def test_the_page_gives_its_examples_and_nothing_beside_them(tmp_path, monkeypatch):
    (tmp_path / "a.wav").write_bytes(b"RIFF")
    given = {}
    monkeypatch.setattr(page.gr, "mount_gradio_app", lambda app, blocks, **options: given.update(options))
    monkeypatch.setattr(page, "build", lambda *_: SimpleNamespace())
    page.mount_page(None, None, None, Limits(), None, [str(tmp_path / "a.wav")])
    assert given["allowed_paths"] == [str(tmp_path / "a.wav")] and given["max_file_size"] == Limits().max_body_bytes


def test_the_limit_that_is_told_is_that_of_all_audio():
    import io

    import numpy as np
    import soundfile

    from nemo_mtbi.serving.audio import TooLong, decode_audio

    file = io.BytesIO()
    soundfile.write(file, np.zeros(32_000), 16_000, format="WAV")
    assert decode_audio(file.getvalue(), 16_000, 4.0, before=2.0)
    with pytest.raises(TooLong, match="longer than 3 s together with the 2 s before it"):
        decode_audio(file.getvalue(), 16_000, 3.0, before=2.0)
    with pytest.raises(TooLong, match="longer than 1 s, which"):
        decode_audio(file.getvalue(), 16_000, 1.0)

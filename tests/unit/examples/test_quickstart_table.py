"""The quickstart's closing table, whatever was left out of its steps."""

import json

import pytest

from nemo_mtbi.evaluation.columns import CASCADE
from nemo_mtbi.examples.quickstart import print_table, summarize

pytestmark = pytest.mark.unit
SCORES = {"token_agreement": 0.5, "kl_per_token": 0.25, "transcribe_wer": 0.125, "nothing_heard": 0.0}


@pytest.mark.parametrize("left_out", [None, "alignment", CASCADE, "text_topline", "nothing_heard"])
def test_what_was_left_out_is_missing_from_the_table_alone(tmp_path, capsys, left_out):
    systems = {name: dict(SCORES) for name in ("text_topline", "untrained", "alignment", "imitation", CASCADE)}
    systems.pop(left_out, None)
    for scores in systems.values():
        scores.pop(left_out, None)
    evaluation = {"results": {"held_out": systems}, "no_speech": {"imitation": {"nothing_heard": 1.0}}}
    for name, value in (
        ("evaluation/results.json", evaluation),
        ("export.json", {"round_trip_max_abs_diff": 0.0}),
        ("seen.json", {"examples": 3}),
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(json.dumps(value))
    summary = summarize(tmp_path, tmp_path / "m.nemo", tmp_path / "hf", 1.0, {"train": 1.0})
    assert summary["held_out"]["token_agreement"]["trained"] == 0.5
    assert ("warm_start" in summary["held_out"]["kl_per_token"]) == (left_out != "alignment")
    print_table(summary)
    said = capsys.readouterr().out
    assert "trained" in said and "Nothing heard where nothing is said: trained 1.000" in said

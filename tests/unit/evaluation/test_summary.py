"""Summaries and tables of the benchmark."""

import pytest

from nemo_mtbi.evaluation.ablation import comparison_table, comparisons
from nemo_mtbi.evaluation.benchmark_report import write_report
from nemo_mtbi.evaluation.columns import SEEN_PROMPTS, TOPLINE
from nemo_mtbi.evaluation.summary import summarize
from tests.unit.evaluation_helpers import TASKS, record

pytestmark = pytest.mark.unit


def test_summary_and_report(tmp_path, monkeypatch):
    monkeypatch.setattr("nemo_mtbi.evaluation.statistics.LEAST_UNITS", 1)

    def rows(agreed, answers):
        return {
            f"u{i}": record("repeat", a, f"u{i}", tokens=4, agreed=agreed[i], kl=4.0 - agreed[i])
            for i, a in enumerate(answers)
        }

    records = {
        TOPLINE: {SEEN_PROMPTS: rows([4.0] * 3, ["the cat sat"] * 3)},
        "cascade": {SEEN_PROMPTS: rows([2.0, 3.0, 2.0], ["the cat", "a cat sat", "cat"])},
        "ours": {SEEN_PROMPTS: rows([3.0, 4.0], ["the cat sat", "the cat sat"])},
    }
    summary = summarize(records, TASKS, "cascade", 200)
    ours = summary[SEEN_PROMPTS]["ours"]
    assert ours["scores"]["token_agreement"]["value"] == pytest.approx(7 / 8) and ours["missing"] == 1
    assert summary[SEEN_PROMPTS][TOPLINE]["scores"]["token_agreement"]["value"] == 1.0
    assert ours["against"]["token_agreement"]["difference"] == pytest.approx(7 / 8 - 5 / 8)  # where both answer
    assert "against" not in summary[SEEN_PROMPTS]["cascade"]
    compared = summarize(records, TASKS, "cascade", 200, ["ours", "cascade", "absent"])[SEEN_PROMPTS]
    assert set(compared["ours"]["compared"]) == {"cascade"} and set(compared["cascade"]["compared"]) == {"ours"}
    assert compared["ours"]["compared"]["cascade"] == compared["ours"]["against"]
    rows = comparisons({"held_out": {SEEN_PROMPTS: compared}})
    assert {(r["system"], r["reference"]) for r in rows} >= {("ours", "cascade"), ("cascade", "ours")}
    assert "| held_out | seen prompts | ours | cascade | agreement | +0.250 [" in comparison_table(rows)
    about = {
        "trained_tasks": ["repeat"],
        "unseen_tasks": ["reply"],
        "systems": {},
        "baseline": "cascade",
        "resamples": 200,
        "seconds_to_first_token": {"cascade": 0.5},
    }
    paths = write_report(tmp_path, {"held_out": summary}, about, "python x <y>")
    text = paths["md"].read_text()
    assert "| ours | 0.875 [" in text and "paired difference to cascade" in text and "jiwer 4" in text
    page = paths["html"].read_text()
    assert "data:image/png" in page and "python x &lt;y&gt;" in page and paths["png"].stat().st_size > 5000

"""Benchmarks that prove a claim rather than a speed."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.functional, pytest.mark.slow]
BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


def test_kl_alone_turns_wrong_words_right_by_minimum_risk(tmp_path):
    """8 utterances, w_ce = w_ctc = 0; without the term KL does not reach the choice of words."""
    command = [sys.executable, str(BENCHMARKS / "minimum_risk.py"), "--quick", "--json", str(tmp_path / "r.json")]
    subprocess.run(command, check=True, capture_output=True)
    results = json.loads((tmp_path / "r.json").read_text())
    risk, alone = (results[name]["wrong_words"] for name in ("minimum_risk", "kl_alone"))
    assert risk["0"] == alone["0"] and risk["0"]["substitutions"] >= 10
    assert risk["4"]["substitutions"] <= 0.85 * risk["0"]["substitutions"]
    assert alone["4"]["substitutions"] > risk["4"]["substitutions"]

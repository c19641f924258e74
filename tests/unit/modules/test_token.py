"""Positions of token connectors belong to words by order."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytestmark = pytest.mark.unit


def test_ctc_positions_go_with_their_words_whatever_their_time():
    """Emitted early, with an insertion, a deletion and a substitution: matched tokens stay with their own word."""
    from nemo_mtbi.modules.connectors.token import units_by_order

    spoken = [[1], [2, 3], [4], [5, 6], [7]]
    assert units_by_order([1, 2, 3, 4, 5, 6, 7], spoken) == [0, 1, 1, 2, 3, 3, 4]
    got = units_by_order([1, 2, 3, 9, 5, 6, 8, 7], spoken)  # 4 -> 9, and 8 inserted
    assert [got[i] for i in (0, 1, 2, 4, 5, 7)] == [0, 1, 1, 3, 3, 4] and got == sorted(got)
    assert units_by_order([1, 7], spoken) == [0, 4]
    assert units_by_order([9, 9], spoken) == sorted(units_by_order([9, 9], spoken))
    assert units_by_order([], spoken) == []


@given(
    st.lists(st.lists(st.integers(1, 6), min_size=0, max_size=3), min_size=1, max_size=12),
    st.lists(st.integers(1, 6), max_size=25),
)
@settings(max_examples=200, deadline=None)
def test_token_order_gives_every_position_one_unit_in_order(spoken, emitted):
    from nemo_mtbi.modules.connectors.token import units_by_order

    units = units_by_order(emitted, spoken)
    assert len(units) == len(emitted) and units == sorted(units)
    assert all(0 <= u < len(spoken) for u in units)

"""How a manifest is cut into shards."""

import pytest

from nemo_mtbi.corpus.shards import plan_manifest

pytestmark = pytest.mark.unit


@pytest.mark.parametrize(
    ("lines", "most", "expected"),
    [
        (5, 2, [2, 2, 1]),
        (10, 1000, [10]),  # too few to be worth it
        (100, 1000, [64, 36]),
        (800, 1000, [128] * 6 + [32]),
        (801, 1000, [128] * 6 + [33]),  # those before are not made again
        (2816, 1000, [384] * 7 + [128]),
        (8000, 1000, [1000] * 8),
        (9500, 1000, [1000] * 9 + [500]),
    ],
)
def test_every_line_is_in_one_shard_and_small_manifests_have_several(tmp_path, lines, most, expected):
    manifest = tmp_path / "cuts.jsonl"
    manifest.write_text("".join(f'{{"id": {i}}}\n' for i in range(lines)))
    shards = plan_manifest("train", str(manifest), tmp_path / "plan", most)
    assert [shard.lines for shard in shards] == expected
    whole = manifest.read_bytes()
    ends = [shard.offset for shard in shards[1:]] + [len(whole)]
    assert [whole[s.offset : end].count(b"\n") for s, end in zip(shards, ends, strict=True)] == expected
    assert plan_manifest("train", str(manifest), tmp_path / "plan", most) == shards

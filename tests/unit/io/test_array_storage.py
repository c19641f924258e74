"""Arrays that keep their bits."""

import pytest
import torch

from nemo_mtbi import registration as registration
from nemo_mtbi.io.array_storage import RawChunkyReader, RawChunkyWriter

pytestmark = pytest.mark.unit


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.int32])
def test_array_storage_keeps_the_bits(tmp_path, dtype):
    values = [torch.arange(12).reshape(3, 4).to(dtype), torch.ones(2, 2).to(dtype)]
    with RawChunkyWriter(tmp_path / "a.bin") as writer:
        keys = [writer.write("", v) for v in values]
    with RawChunkyWriter(tmp_path / "a.bin") as writer:  # appends
        keys.append(writer.write("", values[0]))
    reader = RawChunkyReader(tmp_path / "a.bin")
    for key, value in zip(keys, [*values, values[0]], strict=True):
        got = torch.from_numpy(reader.read(key))
        assert torch.equal(got.view(torch.bfloat16) if dtype == torch.bfloat16 else got, value)
    (tmp_path / "a.bin").write_bytes((tmp_path / "a.bin").read_bytes()[:-4])
    with pytest.raises(OSError, match="truncated"):
        reader.read(keys[-1])


def test_a_full_file_is_followed_by_the_next_one(tmp_path):
    values = [torch.full((5, 2), float(i)) for i in range(7)]  # 40 bytes each
    places = []
    for begin in (0, 4):  # interrupted and continued
        with RawChunkyWriter(tmp_path / "a.features.bin", max_bytes=60) as writer:
            for value in values[begin : begin + 4]:
                key = writer.write("", value)
                places.append((writer.storage_path, key))
    names = ["a.features.bin", "a.features.00001.bin", "a.features.00002.bin", "a.features.00003.bin"]
    assert sorted(file.name for file in tmp_path.iterdir()) == sorted(names)
    assert all((tmp_path / name).stat().st_size <= 80 for name in names)
    for (path, key), value in zip(places, values, strict=True):
        assert torch.equal(torch.from_numpy(RawChunkyReader(path).read(key)), value)

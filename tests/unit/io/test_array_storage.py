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

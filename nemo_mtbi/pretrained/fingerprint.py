"""Content hashes of pretrained parts, so that checkpoints and caches can name what they were made with."""

import hashlib
import os
from pathlib import Path

from huggingface_hub import hf_hub_download, try_to_load_from_cache

SAMPLE_BYTES, SAMPLES = 1 << 16, 64


def fingerprint(path: str | Path) -> str:
    """Hash of a model's weight and configuration files: names, sizes, and samples spread over each file.

    Files up to 4 MiB are read whole; of larger ones 64 blocks of 64 KiB, so a 70B model takes a second. A changed
    tensor that lies between the samples goes unnoticed; a different model, revision or export does not.
    Of a hub name the revision is hashed, which does not depend on the files that are in the cache so far; without
    cache and network, the name.
    """
    root = Path(path)
    if not root.exists():
        identity = f"{path}@{_revision(str(path))}"
        return hashlib.blake2b(identity.encode(), digest_size=16).hexdigest()
    files = (
        [root] if root.is_file() else sorted(f for f in root.iterdir() if f.suffix in (".safetensors", ".json", ".bin"))
    )
    digest = hashlib.blake2b(digest_size=16)
    for file in files:
        size = file.stat().st_size
        digest.update(f"{file.name}/{size}".encode())
        with open(file, "rb") as stream:
            if size <= SAMPLE_BYTES * SAMPLES:
                digest.update(stream.read())
                continue
            for index in range(SAMPLES):
                stream.seek(index * (size - SAMPLE_BYTES) // (SAMPLES - 1), os.SEEK_SET)
                digest.update(stream.read(SAMPLE_BYTES))
    return digest.hexdigest()


def _revision(name: str) -> str:
    """Commit of a hub name's snapshot in the cache, fetched if there is none; empty without a network."""
    try:
        cached = try_to_load_from_cache(name, "config.json")
        if not isinstance(cached, str):
            cached = hf_hub_download(name, "config.json")
    except Exception:  # no such name, no network: loading the model says so
        return ""
    return Path(cached).parent.name

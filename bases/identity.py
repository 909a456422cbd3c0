"""Which base this is, for whatever keeps results: a path says nothing once another checkpoint lies under it."""

import hashlib
import re
from pathlib import Path

from bases import checkpoint
from external.progress import progress

SMALL_FILES = ("config.json", "tokenizer.json", "tokenizer.model", "tokenizer_config.json")


def base_sha256(folder: Path, vision: Path | None = None) -> str:
    """One hash over the files that decide what a base computes: weights, config, tokenizer."""
    tensors, vision = checkpoint.checkpoint_tensors(folder, vision)
    weights = {stored.file for stored in tensors.values()}
    small = {folder / name for name in SMALL_FILES if (folder / name).is_file()}
    total = hashlib.sha256()
    for file in progress(sorted(weights | small), "hashing the base"):
        total.update(f"{file.name} {file_sha256(file)}\n".encode())
    return total.hexdigest()


def file_sha256(file: Path) -> str:
    blob = file.resolve()
    if blob.parent.name == "blobs" and re.fullmatch("[0-9a-f]{64}", blob.name):
        return blob.name  # the hub's cache calls a large file by its hash
    with open(blob, "rb") as data:
        return hashlib.file_digest(data, "sha256").hexdigest()

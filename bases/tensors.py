"""Files of weights: safetensors, .bin and their indexes.

Each tensor is mapped, copied and unmapped on its own, because a mapped shard that stays open counts as resident memory.
"""

import pickle
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from external import files
from external.terminal import count

# Types that weights have, as safetensors and as .bin files call them.
FLOATING = ("F64", "F32", "F16", "BF16", "torch.float64", "torch.float32", "torch.float16", "torch.bfloat16")


class Stored(NamedTuple):
    """Where a tensor is."""

    file: Path
    name: str  # in the file
    shape: tuple[int, ...]
    dtype: str  # one of FLOATING, or a type that is refused


def shard_files(folder: Path) -> tuple[list[Path], dict[str, Path]]:
    """The weights files of a folder, and {tensor name: file} where an index says so."""
    for index in ("model.safetensors.index.json", "pytorch_model.bin.index.json"):
        if (folder / index).is_file():
            table = read_index(folder / index)
            absent = sorted({file for file in table.values() if not (folder / file).is_file()})
            if absent:
                raise SystemExit(
                    f"{folder}/{index} names {count(len(absent), 'file')} not there: {', '.join(absent[:10])}. "
                    "Is the download complete?"
                )
            listed = {name: folder / file for name, file in table.items()}
            return sorted(set(listed.values())), listed
    for single in ("model.safetensors", "pytorch_model.bin"):
        if (folder / single).is_file():
            return [folder / single], {}
    raise SystemExit(f"{folder}: no weights (model.safetensors or pytorch_model.bin, or an index and its shards)")


def read_index(file: Path) -> dict[str, str]:
    """tensor name -> file, both plain names: an index does not reach outside its folder."""
    table = files.read_json(file, dict).get("weight_map", {})
    if not table:
        raise SystemExit(f"{file}: weight_map names no tensor; is the download complete?")
    if not isinstance(table, dict):
        raise SystemExit(f"{file}: weight_map is a {type(table).__name__}, expected tensor names and file names")
    for name, value in table.items():
        if not isinstance(value, str) or Path(value).name != value:
            raise SystemExit(f"{file}: {name} is in {value!r}, expected the name of a file beside the index")
    return table


def read_stored(file: Path) -> list[Stored]:
    """Every tensor of a weights file, without reading its numbers."""
    try:
        if file.suffix == ".safetensors":
            with safe_open(file, "pt") as f:
                parts = {name: f.get_slice(name) for name in f.keys()}
                return [Stored(file, name, tuple(p.get_shape()), p.get_dtype()) for name, p in parts.items()]
        return [Stored(file, name, tuple(t.shape), str(t.dtype)) for name, t in open_bin(file).items()]
    except (SafetensorError, RuntimeError, EOFError, OSError, ValueError) as e:
        raise SystemExit(f"{file}: truncated or damaged ({e}); download it again") from None
    except pickle.UnpicklingError:  # torch's own sentence says how to run the code all the same
        raise SystemExit(f"{file}: damaged, or holds more than tensors; not opened") from None


def open_bin(file: Path) -> dict[str, Tensor]:
    """The tensors of a .bin file, mapped, not read. weights_only: a pickle can hold code, and none of it runs."""
    with open(file, "rb") as f:
        mappable = f.read(2) == b"PK"  # torch >= 1.6 writes zip files; older ones must be read whole
    tensors = torch.load(file, map_location="cpu", mmap=mappable, weights_only=True)
    if not isinstance(tensors, dict) or not all(is_stored(*item) for item in tensors.items()):
        raise SystemExit(f"{file}: not a table of tensors by name; not opened")
    return tensors


def is_stored(name, tensor) -> bool:
    """Whether an item of a .bin file is a tensor with numbers, by its name."""
    return isinstance(name, str) and isinstance(tensor, Tensor) and not tensor.is_meta


def read_tensor(stored: Stored, dtype: torch.dtype | None = None, device: torch.device | str = "cpu") -> Tensor:
    """One tensor, mapped, copied to its dtype and device, unmapped. dtype None: as stored."""
    if stored.file.suffix == ".safetensors":
        with safe_open(stored.file, "pt") as f:
            tensor = f.get_tensor(stored.name)
    else:
        tensor = open_bin(stored.file)[stored.name]
    # non_blocking: a GPU casts it there; otherwise the CPU would before it sends
    return tensor.to(device, dtype, non_blocking=True, copy=True)


def check_finite(tensor: Tensor, what: str) -> None:
    """SystemExit if a number is NaN or infinite, where `what` is the tensor."""
    for part in tensor.flatten().split(2**24):  # in parts: a CPU copies to float32 what it sums in float32
        if not part.sum(dtype=torch.float32).isfinite() and not part.isfinite().all():  # a finite part may overflow
            dtype = str(tensor.dtype).removeprefix("torch.")
            raise SystemExit(f"{what} holds numbers that are not finite in {dtype}")


def write_tensors(file: Path, tensors: dict[str, Tensor]) -> None:
    """A safetensors file, whole or not there; read back and compared before it takes its name."""
    try:
        with files.whole(file) as part:
            save_file(tensors, part, metadata={"format": "pt"})
            for name, tensor in tensors.items():
                with safe_open(part, "pt") as f:
                    assert torch.equal(f.get_tensor(name), tensor), f"{file}: {name} read back"
    except (SafetensorError, OSError) as e:
        raise SystemExit(f"{file}: could not be written ({e})") from None

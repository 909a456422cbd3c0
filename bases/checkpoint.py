"""Checkpoints on disk -> our modules, once, straight into their final dtype and place; strict about every name.

A base is a name of SOURCES, or a folder; how tensors are called in it is told by their names (bases/layouts.py).
Weights are read from safetensors or from .bin shards; a vision tower may be in a folder of its own.
Memory: modules are built on the meta device and each tensor is mapped, copied and unmapped on its own, because a mapped
shard that stays open counts as resident memory.
"""

import os
import pickle
import re
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from tqdm import tqdm

from bases.architectures import architecture_of, read_config
from bases.layouts import IGNORED, LAYOUTS, layout_of, our_name, refuse_misfits
from external import files, hub
from model import LLaVA

SOURCES = {  # base: hub repository, size of the download
    "llava-1.5-7b": ("llava-hf/llava-1.5-7b-hf", "14.1 GB"),
    "llava-1.5-13b": ("llava-hf/llava-1.5-13b-hf", "26.7 GB"),
    "bunny-v1.0-3b": ("BAAI/Bunny-v1_0-3B", "6.4 GB"),
}
WEIGHTS_VARIABLE = "NANOMDPO_WEIGHTS"  # a folder that holds a checkpoint folder for each base name
VISION_SIZES = {
    "openai/clip-vit-large-patch14-336": "1.7 GB",
    "google/siglip-so400m-patch14-384": "3.5 GB",
}
SMALL_FILES = ("*.json", "tokenizer.model")  # config and tokenizer
HUB_FILES = (*SMALL_FILES, "*.safetensors", "*.bin")


def load_base(
    base: str,
    weights: Path | None = None,
    vision: Path | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> tuple[LLaVA, Path]:
    """The frozen model of a base name or folder, and the folder it came from."""
    folder = resolve(base, weights)
    return load_model(folder, vision, dtype, device), folder


def load_model(
    folder: Path,
    vision: Path | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> LLaVA:
    """A checkpoint folder of any layout -> frozen model. SystemExit lists what is missing, unexpected, wrong-shaped."""
    tensors, vision = checkpoint_tensors(folder, vision)
    config = read_config(folder, vision)
    with torch.device("meta"):
        model = architecture_of(config).model(config)
    wanted = {name: tuple(p.shape) for name, p in model.named_parameters()}
    check_names(folder, wanted, tensors, config.vision.layers_run)
    for name in tqdm(wanted, f"loading {folder.name}", disable=None):
        parent, _, leaf = name.rpartition(".")
        weight = nn.Parameter(read_tensor(tensors[name], dtype, device), requires_grad=False)
        setattr(model.get_submodule(parent), leaf, weight)
    return model.eval()


# ---- where a base is -----------------------------------------------------------------------------------------------


def resolve(base: str, weights: Path | None = None, patterns: tuple[str, ...] = HUB_FILES) -> Path:
    """Base name or path -> checkpoint folder: `weights`, else $NANOMDPO_WEIGHTS/<base>, else the hub's `patterns`."""
    if weights or base not in SOURCES:
        folder = Path(weights or base)
        if not (folder / "config.json").is_file():
            known = "" if weights else f" Bases known by name: {', '.join(SOURCES)}, toy."
            raise SystemExit(f"{folder}: no checkpoint folder (no config.json in it).{known}")
        return folder
    root = os.environ.get(WEIGHTS_VARIABLE)
    if root and (Path(root) / base / "config.json").is_file():
        return Path(root) / base
    repository, size = SOURCES[base]
    return from_hub(repository, size, patterns)


def from_hub(repository: str, size: str, patterns: tuple[str, ...] = HUB_FILES) -> Path:
    own = "its folder with --weights DIR (--vision-weights DIR for a vision tower)"
    return hub.download(repository, patterns, "model", f"{repository} ({size})", own)


def vision_folder(folder: Path, vision: Path | None) -> Path | None:
    """Where the vision tower's weights are, for layouts that keep them in a folder of their own."""
    name = files.read_json(folder / "config.json", dict).get("mm_vision_tower")
    if vision or not name:
        return vision
    for near in (Path(name), folder / Path(name).name, folder.parent / Path(name).name):
        if (near / "config.json").is_file():
            return near
    return from_hub(name, VISION_SIZES.get(name, "size not known"))


# ---- tensors -------------------------------------------------------------------------------------------------------


class Stored(NamedTuple):
    """Where a tensor is."""

    file: Path
    name: str  # in the file
    shape: tuple[int, ...]


def checkpoint_tensors(folder: Path, vision: Path | None = None) -> tuple[dict[str, Stored], Path | None]:
    """Every tensor of a base, its vision tower from a folder of its own where it must; and that folder."""
    tensors = index_tensors(folder)
    if not vision and any(name.startswith("vision_tower.") for name in tensors):
        return tensors, None
    vision = vision_folder(folder, vision)
    if vision:
        tensors = {name: t for name, t in tensors.items() if not name.startswith("vision_tower.")}
        for name, t in index_tensors(vision).items():
            if name.startswith("vision_tower."):
                tensors[name] = t
    return tensors, vision


def index_tensors(folder: Path) -> dict[str, Stored]:
    """Our name -> where it is, for every tensor of a checkpoint folder."""
    weights_files, listed = shard_files(folder)
    found = []
    for file in weights_files:
        for name, shape in read_shapes(file).items():
            found.append(Stored(file, name, shape))
    there = {(stored.name, stored.file) for stored in found}
    absent = [name for name, file in listed.items() if (name, file) not in there]
    if absent:
        raise SystemExit(f"{folder}: {len(absent)} tensors of the index are in no file: {', '.join(absent[:10])}")
    names = [stored.name for stored in found]
    layout = layout_of(names)
    if layout is None:
        raise SystemExit(f"{folder}: unknown layout, tensors like {names[:1]}. Layouts known: {', '.join(LAYOUTS)}")
    tensors = {our_name(stored.name, layout): stored for stored in found}
    if len(tensors) < len(found):
        raise SystemExit(f"{folder}: {len(found) - len(tensors)} tensors are there twice, by two names or in two files")
    return tensors


def shard_files(folder: Path) -> tuple[list[Path], dict[str, Path]]:
    """The weights files of a folder, and {tensor name: file} where an index says so."""
    for index in ("model.safetensors.index.json", "pytorch_model.bin.index.json"):
        if (folder / index).is_file():
            table = files.read_json(folder / index, dict).get("weight_map", {})
            absent = sorted({file for file in table.values() if not (folder / file).is_file()})
            if absent:
                raise SystemExit(
                    f"{folder}/{index} names {len(absent)} file(s) that are not there: {', '.join(absent[:10])}. "
                    "Is the download complete?"
                )
            listed = {name: folder / file for name, file in table.items()}
            return sorted(set(listed.values())), listed
    for single in ("model.safetensors", "pytorch_model.bin"):
        if (folder / single).is_file():
            return [folder / single], {}
    raise SystemExit(f"{folder}: no weights (model.safetensors or pytorch_model.bin, or an index and its shards)")


def read_shapes(file: Path) -> dict[str, tuple[int, ...]]:
    """name -> shape of every tensor in a weights file, without reading the tensors."""
    try:
        if file.suffix == ".safetensors":
            with safe_open(file, "pt") as f:
                return {name: tuple(f.get_slice(name).get_shape()) for name in f.keys()}
        return {name: tuple(t.shape) for name, t in open_bin(file).items()}
    except (SafetensorError, RuntimeError, EOFError, OSError, ValueError) as e:
        raise SystemExit(f"{file}: truncated or damaged ({e}); download it again") from None
    except pickle.UnpicklingError as e:
        reason = str(e).splitlines()[0]
        raise SystemExit(f"{file}: damaged, or holds more than tensors; not opened ({reason})") from None


def open_bin(file: Path) -> dict[str, Tensor]:
    """The tensors of a .bin file, mapped, not read. weights_only: a pickle can hold code, and none of it runs."""
    with open(file, "rb") as f:
        mappable = f.read(2) == b"PK"  # torch >= 1.6 writes zip files; older ones must be read whole
    tensors = torch.load(file, map_location="cpu", mmap=mappable, weights_only=True)
    if not isinstance(tensors, dict) or not all(isinstance(t, Tensor) for t in tensors.values()):
        raise pickle.UnpicklingError("not a table of tensors by name")
    return tensors


def read_tensor(stored: Stored, dtype: torch.dtype | None = None, device: torch.device | str = "cpu") -> Tensor:
    """One tensor, mapped, copied to its dtype and device, unmapped. dtype None: as stored."""
    if stored.file.suffix == ".safetensors":
        with safe_open(stored.file, "pt") as f:
            tensor = f.get_tensor(stored.name)
    else:
        tensor = open_bin(stored.file)[stored.name]
    # non_blocking: a GPU casts it there; otherwise the CPU would before it sends
    return tensor.to(device, dtype, non_blocking=True, copy=True)


def unused_layer(name: str, vision_layers_run: int) -> bool:
    """Whether a tensor belongs to a vision layer after the selected one."""
    layer = re.match(r"vision_tower\.layers\.(\d+)\.", name)
    return bool(layer) and int(layer[1]) >= vision_layers_run


def check_names(folder: Path, wanted: dict, tensors: dict[str, Stored], vision_layers_run: int) -> None:
    """SystemExit unless every parameter (name -> shape) has its tensor, and every tensor its parameter."""
    missing, unexpected, wrong_shape = [], [], []
    for name, shape in wanted.items():
        if name not in tensors:
            missing.append(name)
        elif tensors[name].shape != shape:
            wrong_shape.append(f"{name} {tensors[name].shape} instead of {shape}")
    for name, stored in tensors.items():
        if name not in wanted and not IGNORED.search(name) and not unused_layer(name, vision_layers_run):
            unexpected.append(stored.name)
    refuse_misfits(f"{folder}: the weights do not fit its config.json", missing, unexpected, wrong_shape)

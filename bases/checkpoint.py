"""Checkpoints on disk -> our modules, once, straight into their final dtype and place; strict about every name.

A base is a name of SOURCES, or a folder; how tensors are called in it is told by their names (bases/layouts.py). A
vision tower may be in a folder of its own. Modules are built on the meta device and take their tensors one by one.
"""

import hashlib
import os
import re
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import nn

from bases.architectures import architecture_of, read_config
from bases.layouts import IGNORED, LAYOUTS, layout_of, our_name, refuse_misfits
from bases.quant import QuantLinear, swap_linears
from bases.tensors import FLOATING, Stored, check_finite, read_stored, read_tensor, shard_files
from external import files, hub
from external.progress import progress
from external.terminal import count
from model import LLaVA

SOURCES = {  # base: hub repository, size of the download
    "llava-1.5-7b": ("llava-hf/llava-1.5-7b-hf", "14.1 GB"),
    "llava-1.5-13b": ("llava-hf/llava-1.5-13b-hf", "26.7 GB"),
    "bunny-v1.0-3b": ("BAAI/Bunny-v1_0-3B", "6.4 GB"),
}
BASE_HELP = f"{', '.join(SOURCES)}, toy, or a checkpoint folder; NAME@REVISION takes that commit of the hub's"
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
    quant: str | None = None,
) -> tuple[LLaVA, Path]:
    """The frozen model of a base name or folder, and the folder it came from. `quant`: of quant.KINDS."""
    folder = resolve(base, weights)
    model = load_model(folder, vision, dtype, device, quant)
    model.source = source_of(base)
    return model, folder


def source_of(base: str) -> str:
    """What an adapter calls its base: the hub repository of a base name, or what was given."""
    name, _, _ = base.partition("@")
    return SOURCES[name][0] if name in SOURCES else base


def load_model(
    folder: Path,
    vision: Path | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    quant: str | None = None,
) -> LLaVA:
    """A checkpoint folder of any layout -> frozen model. SystemExit lists what is missing, unexpected, wrong-shaped."""
    tensors, vision = checkpoint_tensors(folder, vision)
    config = read_config(folder, vision)
    with torch.device("meta"):
        model = architecture_of(config).model(config)
    model.source = str(folder)
    wanted = {name: tuple(p.shape) for name, p in model.named_parameters()}
    check_names(folder, wanted, tensors, config.vision.layers_run)
    if quant:
        swap_linears(model, quant, dtype)
    for name in progress(wanted, f"loading {folder.name}"):
        put(model, name, tensors[name], dtype, device)
    return model.eval()


def put(model: LLaVA, name: str, stored: Stored, dtype: torch.dtype, device: torch.device | str) -> None:
    """One tensor of the file becomes a parameter, or the codes of one."""
    path, _, leaf = name.rpartition(".")
    module = model.get_submodule(path)
    quantised = isinstance(module, QuantLinear) and leaf == "weight"
    tensor = read_tensor(stored, torch.float32 if quantised else dtype, device)
    check_finite(tensor, f"{stored.file}: {stored.name}")
    if quantised:
        module.quantise(tensor)
    else:
        setattr(module, leaf, nn.Parameter(tensor, requires_grad=False))


# ---- where a base is -----------------------------------------------------------------------------------------------


def resolve(base: str, weights: Path | None = None, patterns: tuple[str, ...] = HUB_FILES) -> Path:
    """Base name or path -> checkpoint folder: `weights`, else $NANOMDPO_WEIGHTS/<base>, else the hub's `patterns`.

    <base>@<revision> is that commit, tag or branch of the hub's repository, wherever another one lies.
    """
    name, _, revision = base.partition("@")
    if base == "toy" and not weights:
        return toy_base()
    if weights or name not in SOURCES:
        folder = Path(weights or base)
        if not (folder / "config.json").is_file():
            known = "" if weights else f" Bases known by name: {', '.join(SOURCES)}, toy."
            raise SystemExit(f"{folder}: no checkpoint folder (no config.json in it).{known}")
        return folder
    root = os.environ.get(WEIGHTS_VARIABLE)
    if root and not revision and (Path(root) / name / "config.json").is_file():
        return Path(root) / name
    if root and not Path(root).is_dir():
        raise SystemExit(
            f"{WEIGHTS_VARIABLE}={root}: no such folder; correct it, or unset it to take {name} from the hub"
        )
    repository, size = SOURCES[name]
    return from_hub(repository, size, patterns, revision or None)


def toy_base() -> Path:
    """The base of the small world, made by toy.py. Of several worlds the one with the lowest seed."""
    made = sorted(Path("runs").glob("toy-world-*/base/config.json"), key=lambda file: (len(str(file)), str(file)))
    if not made:
        raise SystemExit("toy: its base is not made yet; `python train.py --base toy` makes it, under runs/")
    return made[0].parent


def from_hub(
    repository: str,
    size: str,
    patterns: tuple[str, ...] = HUB_FILES,
    revision: str | None = None,
) -> Path:
    own = "its folder with --weights DIR (--vision-weights DIR for a vision tower)"
    return hub.download(repository, patterns, "model", f"{repository} ({size})", own, revision)


def vision_folder(folder: Path, vision: Path | None) -> Path | None:
    """Where the vision tower's weights are, for layouts that keep them in a folder of their own."""
    name = files.read_json(folder / "config.json", dict).get("mm_vision_tower")
    if vision or not name:
        return vision
    if not isinstance(name, str):
        raise SystemExit(f"{folder}/config.json: mm_vision_tower is {name!r}, expected a folder or a hub repository")
    for near in (Path(name), folder / Path(name).name, folder.parent / Path(name).name):
        if (near / "config.json").is_file():
            return near
    return from_hub(name, VISION_SIZES.get(name, "size not known"))


# ---- tensors -------------------------------------------------------------------------------------------------------


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
    found = [stored for file in weights_files for stored in read_stored(file)]
    there = {(stored.name, stored.file) for stored in found}
    absent = [name for name, file in listed.items() if (name, file) not in there]
    if absent:
        raise SystemExit(
            f"{folder}: in the index but in no file: {count(len(absent), 'tensor')}, {', '.join(absent[:10])}"
        )
    names = [stored.name for stored in found]
    layout = layout_of(names)
    if layout is None:
        raise SystemExit(f"{folder}: unknown layout, tensors like {names[:1]}. Layouts known: {', '.join(LAYOUTS)}")
    tensors = {our_name(stored.name, layout): stored for stored in found}
    if len(tensors) < len(found):
        raise SystemExit(
            f"{folder}: tensors that are there twice, by two names or in two files: {len(found) - len(tensors)}"
        )
    return tensors


def unused_layer(name: str, vision_layers_run: int) -> bool:
    """Whether a tensor belongs to a vision layer after the selected one."""
    layer = re.match(r"vision_tower\.layers\.(\d+)\.", name)
    return bool(layer) and int(layer[1]) >= vision_layers_run


def check_names(folder: Path, wanted: dict, tensors: dict[str, Stored], vision_layers_run: int) -> None:
    """SystemExit unless every parameter (name -> shape) has its tensor, and every tensor its parameter."""
    missing, unexpected, wrong_shape, wrong_type = [], [], [], []
    for name, shape in wanted.items():
        if name not in tensors:
            missing.append(name)
        elif tensors[name].shape != shape:
            wrong_shape.append(f"{name} {tensors[name].shape} instead of {shape}")
        elif tensors[name].dtype not in FLOATING:
            wrong_type.append(f"{name} {tensors[name].dtype}")
    for name, stored in tensors.items():
        if name not in wanted and not IGNORED.search(name) and not unused_layer(name, vision_layers_run):
            unexpected.append(stored.name)
    refuse_misfits(f"{folder}: the weights do not fit its config.json", missing, unexpected, wrong_shape, wrong_type)


# ---- which base it is ----------------------------------------------------------------------------------------------

DECIDING = ("config.json", "tokenizer.json", "tokenizer.model", "tokenizer_config.json")  # beside the weights


def base_sha256(folder: Path, vision: Path | None = None) -> str:
    """One hash over the files that decide what a base computes. Its path says nothing: another may lie there later."""
    tensors, vision = checkpoint_tensors(folder, vision)
    weights = {stored.file for stored in tensors.values()}
    small = {folder / name for name in DECIDING if (folder / name).is_file()}
    return files_sha256(weights | small, folder)


def files_sha256(deciding: Iterable[Path], folder: Path) -> str:
    """One hash over the names and bytes of files of a folder."""
    total = hashlib.sha256()
    for file in progress(sorted(deciding), f"hashing {folder.name}"):
        total.update(f"{file.name} {file_sha256(file)}\n".encode())
    return total.hexdigest()


def file_sha256(file: Path) -> str:
    blob = file.resolve()
    if blob.parent.name == "blobs" and re.fullmatch("[0-9a-f]{64}", blob.name):
        return blob.name  # the hub's cache calls a large file by its hash
    return files.file_sha256(blob)

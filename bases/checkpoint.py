"""Checkpoints on disk -> our modules, once, straight into their final dtype and place; strict about every name.

A base is a name of SOURCES, or a folder. Layouts read, told by their keys, one name table each:
  hub           llava-hf/llava-1.5-*-hf, and what transformers 5 writes for a freshly built model
  transformers  the in-memory names of transformers >= 4.52, which it writes when it loaded them
  original      liuhaotian/llava-v1.5-* (.bin shards, the vision tower in a CLIP folder) and BAAI/Bunny-v1_0-3B
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

from bases import bunny
from external import files, hub
from model import Config, LLaVA, VisionConfig

SOURCES = {  # base: hub repository, size of the download
    "llava-1.5-7b": ("llava-hf/llava-1.5-7b-hf", "14.1 GB"),
    "llava-1.5-13b": ("llava-hf/llava-1.5-13b-hf", "26.7 GB"),
    "bunny-v1.0-3b": ("BAAI/Bunny-v1_0-3B", "6.4 GB"),
}
WEIGHTS_VARIABLE = "NANOMDPO_WEIGHTS"  # a folder that holds a checkpoint folder for each base name
VISION_SIZES = {"openai/clip-vit-large-patch14-336": "1.7 GB", "google/siglip-so400m-patch14-384": "3.5 GB"}
SMALL_FILES = ("*.json", "tokenizer.model")  # config and tokenizer
HUB_FILES = (*SMALL_FILES, "*.safetensors", "*.bin")

LAYOUTS = {  # layout: (a prefix that only it has, [(the file's prefix, ours)])
    "hub": ("language_model.model.", [
        ("language_model.model.", "language_model."), ("language_model.lm_head.", "lm_head."),
        ("multi_modal_projector.linear_1.", "mm_projector.0."), ("multi_modal_projector.linear_2.", "mm_projector.2."),
    ]),
    "transformers": ("model.language_model.", [
        ("model.language_model.", "language_model."), ("model.vision_tower.", "vision_tower."),
        ("model.multi_modal_projector.linear_1.", "mm_projector.0."),
        ("model.multi_modal_projector.linear_2.", "mm_projector.2."),
    ]),
    "original": ("model.layers.", [
        ("model.mm_projector.", "mm_projector."), ("model.vision_tower.", "vision_tower."),
        ("model.final_layernorm.", "language_model.norm."), ("model.", "language_model."),
    ]),
    "vision": ("vision_model.", [("vision_model.", "vision_tower.")]),  # a CLIP or SigLIP folder of its own
}  # fmt: skip
INSIDE_VISION = re.compile(r"^vision_tower\.((vision_tower|vision_model|embeddings|encoder)\.)*")  # all: vision_tower.
IGNORED = re.compile(  # tensors that never influence the output
    r"rotary_emb\.inv_freq$|position_ids$|^text_model\.|^(visual|text)_projection\.|^logit_(scale|bias)$"
    r"|^vision_tower\.(post_layernorm|head)\."
)


def load_base(base: str, weights: Path | None = None, vision: Path | None = None, dtype=torch.float32,
              device="cpu") -> tuple[LLaVA, Path]:  # fmt: skip
    """The frozen model of a base name or folder, and the folder it came from."""
    folder = resolve(base, weights)
    return load_model(folder, vision, dtype, device), folder


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
    return from_hub(*SOURCES[base], patterns)


def from_hub(repository: str, size: str, patterns: tuple[str, ...] = HUB_FILES) -> Path:
    own = "its folder with --weights DIR (--vision-weights DIR for a vision tower)"
    return hub.download(repository, patterns, "model", f"{repository} ({size})", own)


# ---- config --------------------------------------------------------------------------------------------------------


def vision_config(v: dict, defaults: VisionConfig, feature_layer: int = -2) -> VisionConfig:
    v, d = v.get("vision_config", v), defaults  # a full CLIP or SigLIP config has it one level down
    return VisionConfig(
        v.get("hidden_size", d.width), v.get("num_hidden_layers", d.layers), v.get("num_attention_heads", d.heads),
        v.get("intermediate_size", d.ffn), v.get("image_size", d.image_size), v.get("patch_size", d.patch),
        v.get("layer_norm_eps", d.eps), feature_layer,
    )  # fmt: skip


def read_config(folder: Path, vision: Path | None = None) -> Config | bunny.Config:
    """config.json -> Config. The hub's is sparse: what it leaves out is Llama-7B and CLIP ViT-L."""
    c = files.read_json(folder / "config.json", dict)
    if c.get("model_type") == "bunny-phi":
        return bunny.read_config(c, vision_config, files.read_json(vision / "config.json", dict) if vision else None)
    if c.get("model_type") not in ("llava", "llava_llama"):
        raise SystemExit(f"{folder}/config.json: model_type {c.get('model_type')!r}; supported: llava (LLaVA-1.5), "
                         "llava_llama, bunny-phi")  # fmt: skip
    original = "text_config" not in c  # a flat Llama config with mm_* fields
    t, d = (c if original else c["text_config"]), Config()
    feature_layer = c.get("mm_vision_select_layer" if original else "vision_feature_layer", -2)
    v = c.get("vision_config", {}) if vision is None else files.read_json(vision / "config.json", dict)
    rope = t.get("rope_scaling") or t.get("rope_parameters") or {}
    heads = t.get("num_attention_heads", d.heads)
    unsupported = {
        "hidden_act": t.get("hidden_act", "silu") != "silu",
        "projector": c.get("mm_projector_type", c.get("projector_hidden_act", "gelu")) not in ("gelu", "mlp2x_gelu"),
        "vision hidden_act": v.get("vision_config", v).get("hidden_act", "quick_gelu") != "quick_gelu",
        "tied embeddings": bool(t.get("tie_word_embeddings", False)) and bool(c.get("tie_word_embeddings", False)),
        "attention_bias": t.get("attention_bias", False),
        "head_dim": t.get("head_dim") not in (None, t.get("hidden_size", d.width) // heads),
        "rope scaling": rope.get("rope_type", rope.get("type", "default")) != "default",
        "image start and end tokens": c.get("mm_use_im_start_end", False),
        "several feature layers": not isinstance(feature_layer, int),
        "feature select strategy": c.get("vision_feature_select_strategy", "default") != "default"
        or c.get("mm_vision_select_feature", "patch") != "patch",
    }  # fmt: skip
    if wrong := [name for name, bad in unsupported.items() if bad]:
        raise SystemExit(f"{folder}/config.json: not a LLaVA-1.5: {', '.join(wrong)}")
    return Config(
        vision_config(v, d.vision, feature_layer), t.get("vocab_size", 32000), t.get("hidden_size", d.width),
        t.get("num_hidden_layers", d.layers), heads, t.get("num_key_value_heads") or heads,
        t.get("intermediate_size", d.ffn), t.get("rms_norm_eps", 1e-6),
        t.get("rope_theta", rope.get("rope_theta", 1e4)),
        # the original has no row for <image>: its own placeholder index
        image_id=-200 if original else c.get("image_token_index", c.get("image_token_id", d.image_id)),
        pad_id=c.get("pad_token_id") or 0,  # any row will do: padding is masked
        bos_id=t.get("bos_token_id") or d.bos_id, eos_id=t.get("eos_token_id") or d.eos_id,
    )  # fmt: skip


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


def shard_files(folder: Path) -> dict[str, Path] | list[Path]:
    """{tensor name: file} from an index, or the single weights file of a folder."""
    for index in ("model.safetensors.index.json", "pytorch_model.bin.index.json"):
        if (folder / index).is_file():
            table = files.read_json(folder / index, dict).get("weight_map", {})
            if absent := sorted({f for f in table.values() if not (folder / f).is_file()}):
                raise SystemExit(f"{folder}/{index} names {len(absent)} file(s) that are not there: "
                                 f"{', '.join(absent[:10])}. Is the download complete?")  # fmt: skip
            return {name: folder / file for name, file in table.items()}
    for single in ("model.safetensors", "pytorch_model.bin"):
        if (folder / single).is_file():
            return [folder / single]
    raise SystemExit(f"{folder}: no weights (model.safetensors or pytorch_model.bin, or an index and its shards)")


def open_bin(file: Path) -> dict[str, Tensor]:
    """The tensors of a .bin file, mapped, not read. weights_only: a pickle can hold code, and none of it runs."""
    with open(file, "rb") as f:
        mappable = f.read(2) == b"PK"  # torch >= 1.6 writes zip files; older ones must be read whole
    tensors = torch.load(file, map_location="cpu", mmap=mappable, weights_only=True)
    if not isinstance(tensors, dict) or not all(isinstance(t, Tensor) for t in tensors.values()):
        raise pickle.UnpicklingError("not a table of tensors by name")
    return tensors


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


def read_tensor(stored: Stored, dtype: torch.dtype | None = None, device="cpu") -> Tensor:
    """One tensor, mapped, copied to its dtype and device, unmapped. dtype None: as stored."""
    if stored.file.suffix == ".safetensors":
        with safe_open(stored.file, "pt") as f:
            return f.get_tensor(stored.name).to(device, dtype, copy=True)
    return open_bin(stored.file)[stored.name].to(device, dtype, copy=True)


def our_name(name: str, table: list[tuple[str, str]]) -> str:
    theirs, ours = next((pair for pair in table if name.startswith(pair[0])), ("", ""))
    name = INSIDE_VISION.sub("vision_tower.", ours + name.removeprefix(theirs))
    return name.replace(".mlp.fc", ".fc") if name.startswith("vision_tower.") else name


def index_tensors(folder: Path) -> dict[str, Stored]:
    """Our name -> where it is, for every tensor of a checkpoint folder."""
    listed = shard_files(folder)
    files = sorted(set(listed.values())) if isinstance(listed, dict) else listed
    found = {(name, file): shape for file in files for name, shape in read_shapes(file).items()}
    if isinstance(listed, dict):
        if absent := [name for name, file in listed.items() if (name, file) not in found]:
            raise SystemExit(f"{folder}: {len(absent)} tensors of the index are in no file: {', '.join(absent[:10])}")
    names = [name for name, _ in found]
    tables = [table for telltale, table in LAYOUTS.values() if any(n.startswith(telltale) for n in names)]
    if not tables:
        raise SystemExit(f"{folder}: unknown layout, tensors like {names[:1]}. Layouts known: {', '.join(LAYOUTS)}")
    tensors = {our_name(name, tables[0]): Stored(file, name, shape) for (name, file), shape in found.items()}
    if len(tensors) < len(found):
        raise SystemExit(f"{folder}: {len(found) - len(tensors)} tensors are there twice, by two names or in two files")
    return tensors


def checkpoint_tensors(folder: Path, vision: Path | None = None) -> tuple[dict[str, Stored], Path | None]:
    """Every tensor of a base, its vision tower from a folder of its own where it must; and that folder."""
    tensors = index_tensors(folder)
    if not vision and any(name.startswith("vision_tower.") for name in tensors):
        return tensors, None
    vision = vision_folder(folder, vision)
    if vision:
        tensors = {n: t for n, t in tensors.items() if not n.startswith("vision_tower.")}
        tensors |= {n: t for n, t in index_tensors(vision).items() if n.startswith("vision_tower.")}
    return tensors, vision


def load_model(folder: Path, vision: Path | None = None, dtype=torch.float32, device="cpu") -> LLaVA:
    """A checkpoint folder of any layout -> frozen model. SystemExit lists what is missing, unexpected, wrong-shaped."""
    tensors, vision = checkpoint_tensors(folder, vision)
    config = read_config(folder, vision)
    with torch.device("meta"):
        model = (bunny.Bunny if isinstance(config, bunny.Config) else LLaVA)(config)
    wanted = {name: tuple(p.shape) for name, p in model.named_parameters()}
    check_names(folder, wanted, tensors, config.vision.layers_run)
    for name in tqdm(wanted, f"loading {folder.name}", disable=None):
        parent, _, leaf = name.rpartition(".")
        weight = nn.Parameter(read_tensor(tensors[name], dtype, device), requires_grad=False)
        setattr(model.get_submodule(parent), leaf, weight)
    return model.eval()


def unused_layer(name: str, vision_layers_run: int) -> bool:
    """Whether a tensor belongs to a vision layer after the selected one."""
    layer = re.match(r"vision_tower\.layers\.(\d+)\.", name)
    return bool(layer) and int(layer[1]) >= vision_layers_run


def check_names(folder: Path, wanted: dict, tensors: dict[str, Stored], vision_layers_run: int) -> None:
    wrong = [f"{n} {tensors[n].shape} instead of {shape}" for n, shape in wanted.items()
             if n in tensors and tensors[n].shape != shape]  # fmt: skip
    unexpected = [tensors[n].name for n in tensors if n not in wanted
                  and not IGNORED.search(n) and not unused_layer(n, vision_layers_run)]  # fmt: skip
    lists = {"missing": [n for n in wanted if n not in tensors], "unexpected": unexpected, "of wrong shape": wrong}
    if any(lists.values()):
        lines = [f"  {len(names)} {what}: {', '.join(names[:10])}" for what, names in lists.items() if names]
        raise SystemExit(f"{folder}: the weights do not fit its config.json\n" + "\n".join(lines))

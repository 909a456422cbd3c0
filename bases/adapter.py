"""LoRA adapters on the disk, as PEFT writes them: adapter_model.safetensors and adapter_config.json.

A key is `base_model.model.<layers>.<layer>.<linear>.lora_A.weight`, without an adapter name. Three spellings of
<layers> are in use for one decoder; all are read, and what is written is the base's own (bases/architectures.py):
  language_model.model.layers   llava-hf's checkpoints; every PEFT that knows LLaVA reads it
  model.language_model.layers   what PEFT on transformers >= 4.52 writes
  model.layers                  haotian-liu's LLaVA and Bunny
"""

import pickle
import re
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from bases.architectures import architecture_of
from bases.layouts import refuse_misfits
from external import files
from lora import add_lora, lora_modules

LAYERS = re.compile(r"^base_model\.model\.(?:language_model\.model|model\.language_model|model)\.layers\.")
UNSUPPORTED = ("use_dora", "modules_to_save", "rank_pattern", "alpha_pattern", "fan_in_fan_out")


class Adapter(NamedTuple):
    tensors: dict[str, Tensor]  # by our names: language_model.layers.0.self_attn.q_proj.lora_A
    r: int
    alpha: float
    rslora: bool


# ---- writing -------------------------------------------------------------------------------------------------------


def save_adapter(model: nn.Module, folder: Path, base: str) -> None:
    """Writes both files as PEFT does; the tensors are read back and compared before the file takes its name."""
    state = adapter_state(model)
    with files.whole(folder / "adapter_model.safetensors") as part:
        save_file(state, part, metadata={"format": "pt"})
        back = load_file(part)
        same = back.keys() == state.keys() and all(torch.equal(back[key], state[key]) for key in state)
        assert same, f"{part}: read back"
    files.write_json(folder / "adapter_config.json", adapter_config(model, base), indent=2)


def adapter_state(model: nn.Module) -> dict[str, Tensor]:
    """The adapter's tensors by their names in the file."""
    layers = architecture_of(model).adapter_layers
    state = {}
    for name, m in lora_modules(model).items():
        path = "base_model.model." + name.replace("language_model.layers.", layers, 1)
        state[f"{path}.lora_A.weight"] = m.lora_A.detach().cpu().contiguous()
        state[f"{path}.lora_B.weight"] = m.lora_B.detach().cpu().contiguous()
    return state


def adapter_config(model: nn.Module, base: str) -> dict:
    """What PEFT needs to know beside the tensors. `base`: where it finds the model that the adapter belongs to."""
    linears = sorted({name.rpartition(".")[2] for name in lora_modules(model)})
    scope = architecture_of(model).adapter_scope
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        **model.lora_config,
        # a regex: a list of names would also match the vision tower's q, k, v
        "target_modules": rf"{scope}layers\.\d+\..*({'|'.join(linears)})",
        "bias": "none",
        "lora_dropout": 0.0,
        "use_dora": False,
        "fan_in_fan_out": False,
        "modules_to_save": None,
        "inference_mode": True,
    }


# ---- reading -------------------------------------------------------------------------------------------------------


def load_adapter(model: nn.Module, folder: Path) -> None:
    """Adds LoRA to the model from a PEFT folder, any of the spellings; a key that does not fit is an error."""
    adapter = read_adapter(Path(folder))
    layers = "language_model.layers."
    targets = sorted({name.split(".")[-2] for name in adapter.tensors if name.startswith(layers)})
    add_lora(model, adapter.r, adapter.alpha, adapter.rslora, targets=tuple(targets))
    own = {}
    for name, m in lora_modules(model).items():
        own[f"{name}.lora_A"] = m.lora_A
        own[f"{name}.lora_B"] = m.lora_B
    check_tensors(folder, own, adapter.tensors)
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(adapter.tensors[name])


def check_tensors(folder: Path, own: dict[str, Tensor], read: dict[str, Tensor]) -> None:
    wrong_shape = []
    for name in sorted(own.keys() & read.keys()):
        if read[name].shape != own[name].shape:
            wrong_shape.append(f"{name} {tuple(read[name].shape)}, expected {tuple(own[name].shape)}")
    missing = sorted(own.keys() - read.keys())
    unexpected = sorted(read.keys() - own.keys())
    refuse_misfits(f"{folder}: the adapter does not fit this base.", missing, unexpected, wrong_shape)


def adapter_files(folder: Path) -> tuple[Path, Path]:
    """The weights and the config of a PEFT folder. SystemExit if one is not there."""
    weights = folder / "adapter_model.safetensors"
    if not weights.is_file() and (folder / "adapter_model.bin").is_file():
        weights = folder / "adapter_model.bin"  # PEFT before 0.7, such as both papers' releases
    config = folder / "adapter_config.json"
    for file in (weights, config):
        if not file.is_file():
            raise SystemExit(f"{file}: not there. An adapter folder holds {weights.name} and {config.name}.")
    return weights, config


def read_adapter(folder: Path) -> Adapter:
    """A PEFT folder. SystemExit if it is not whole, or not plain LoRA."""
    weights, config_file = adapter_files(folder)
    config = files.read_json(config_file, dict)
    unsupported = [key for key in UNSUPPORTED if config.get(key)]
    if config.get("peft_type") != "LORA" or config.get("bias", "none") != "none" or unsupported:
        raise SystemExit(
            f"{config_file}: only plain LoRA without bias is read here; found {config.get('peft_type')}, "
            f"bias {config.get('bias')}, {', '.join(unsupported) or 'nothing else'}"
        )
    tensors = {}
    for key, value in read_weights(weights).items():
        name = LAYERS.sub("language_model.layers.", key).replace(".default.", ".").removesuffix(".weight")
        tensors[name] = value
    return Adapter(
        tensors=tensors,
        r=config.get("r", 8),  # 8: what PEFT assumes where the file is silent
        alpha=config.get("lora_alpha", 8),
        rslora=bool(config.get("use_rslora")),
    )


def read_weights(file: Path) -> dict[str, Tensor]:
    try:
        if file.suffix == ".bin":
            return torch.load(file, map_location="cpu", weights_only=True)  # runs no code
        return load_file(file)
    except (SafetensorError, RuntimeError, EOFError, ValueError, pickle.UnpicklingError) as e:
        raise SystemExit(f"{file}: damaged ({str(e).splitlines()[0]})") from None

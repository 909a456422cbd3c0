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
from safetensors.torch import load_file
from torch import Tensor, nn

from bases.architectures import architecture_of
from bases.configs import Fields
from bases.layouts import refuse_misfits
from bases.quant import kind_of
from bases.tensors import check_finite, open_bin, write_tensors
from external import files
from lora import add_lora, lora_modules

LAYERS = re.compile(r"^base_model\.model\.(?:language_model\.model|model\.language_model|model)\.layers\.")
UNSUPPORTED = "use_dora modules_to_save rank_pattern alpha_pattern fan_in_fan_out layer_replication use_qalora".split()
UNSUPPORTED += ["alora_invocation_tokens", "arrow_config"]
CHANGES_THE_BASE = re.compile("pissa|olora|corda|loftq")  # ways to begin that take a part out of the base's weights


class Adapter(NamedTuple):
    tensors: dict[str, Tensor]  # by our names: language_model.layers.0.self_attn.q_proj.lora_A
    r: int
    alpha: float
    rslora: bool
    base: str | None  # what it was made for, as its config says
    quant: str | None  # of quant.KINDS, where it was trained on such weights


# ---- writing -------------------------------------------------------------------------------------------------------


def save_adapter(model: nn.Module, folder: Path, base: str) -> None:
    """Writes both files as PEFT does. SystemExit, and nothing written, if a number is not finite."""
    state = adapter_state(model)
    broken = [name for name, tensor in state.items() if not tensor.isfinite().all()]
    if broken:
        raise SystemExit(
            f"{folder}: not written, {len(broken)} of {len(state)} tensors of the adapter hold numbers that are not "
            f"finite, {broken[0]} first. The last step was too large: try a lower --lr."
        )
    write_tensors(folder / "adapter_model.safetensors", state)
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
    config = {
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
    if kind_of(model):
        config["base_quantization"] = kind_of(model)  # PEFT passes over names that it does not know
    return config


# ---- reading -------------------------------------------------------------------------------------------------------


def load_adapter(model: nn.Module, folder: Path) -> None:
    """Adds LoRA to the model from a PEFT folder, any of the spellings; a key that does not fit is an error."""
    adapter = read_adapter(Path(folder))
    layers = "language_model.layers."
    adapted = {name.split(".")[-2] for name in adapter.tensors if name.startswith(layers)}
    targets = sorted(adapted.intersection(architecture_of(model).lora_targets))  # the rest is unexpected, below
    add_lora(model, adapter.r, adapter.alpha, adapter.rslora, targets=tuple(targets))
    own = {}
    for name, m in lora_modules(model).items():
        own[f"{name}.lora_A"] = m.lora_A
        own[f"{name}.lora_B"] = m.lora_B
    check_tensors(folder, own, adapter.tensors)
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(adapter.tensors[name])
    if adapter.base and not same_base(adapter.base, model.source):
        print(f"{folder}: an adapter of {adapter.base!r}, used on {model.source!r}; the shapes fit")
    if adapter.quant != kind_of(model):
        print(f"{folder}: trained on {adapter.quant or 'full'} weights, used on {kind_of(model) or 'full'} ones")


def same_base(named: str, source: str) -> bool:
    """Whether two names mean one base: a hub repository, and the folder of that name, do."""
    return Path(named).name == Path(source).name


def check_tensors(folder: Path, own: dict[str, Tensor], read: dict[str, Tensor]) -> None:
    wrong_shape, wrong_type = [], []
    for name in sorted(own.keys() & read.keys()):
        if read[name].shape != own[name].shape:
            wrong_shape.append(f"{name} {tuple(read[name].shape)}, expected {tuple(own[name].shape)}")
        elif not read[name].is_floating_point():
            wrong_type.append(f"{name} {read[name].dtype}")
    missing = sorted(own.keys() - read.keys())
    unexpected = sorted(read.keys() - own.keys())
    refuse_misfits(f"{folder}: the adapter does not fit this base.", missing, unexpected, wrong_shape, wrong_type)


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


def adapter_sha256(folder: Path) -> str:
    """One hash over weights and config: r and lora_alpha decide what the weights do."""
    return files.sha256("".join(files.file_sha256(file) for file in adapter_files(folder)).encode())


def read_adapter(folder: Path) -> Adapter:
    """A PEFT folder. SystemExit if it is not whole, or not plain LoRA."""
    weights, config_file = adapter_files(folder)
    config = Fields(files.read_json(config_file, dict), str(config_file))
    unsupported = [key for key in UNSUPPORTED if config.get(key)]
    if CHANGES_THE_BASE.match(str(config.get("init_lora_weights")).lower()):
        unsupported.append(f"init_lora_weights {config.get('init_lora_weights')!r} (convert it to plain LoRA)")
    if config.get("peft_type") != "LORA" or config.get("bias", "none") != "none" or unsupported:
        raise SystemExit(
            f"{config_file}: only plain LoRA without bias is read here; found {config.get('peft_type')}, "
            f"bias {config.get('bias')}, {', '.join(unsupported) or 'nothing else'}"
        )
    beside = folder / "non_lora_trainables.bin"  # LLaVA's and Bunny's own training; the mDPO release's is empty
    if beside.is_file() and read_weights(beside):
        raise SystemExit(f"{beside}: weights trained beside LoRA, which are not read here; remove it to use LoRA alone")
    tensors = {}
    for key, value in read_weights(weights).items():
        name = LAYERS.sub("language_model.layers.", key).replace(".default.", ".").removesuffix(".weight")
        check_finite(value, f"{weights}: {key}")
        tensors[name] = value
    for key in ("r", "lora_alpha"):
        if config.values.get(key, 8) is None:
            config.refuse(key, "a number")
    if config.get("use_rslora", False) not in (True, False):
        config.refuse("use_rslora", "true or false")
    return Adapter(
        tensors=tensors,
        r=config.whole("r", 8, most=2**16),  # 8: what PEFT assumes where the file is silent
        alpha=config.number("lora_alpha", 8, most=1e6),
        rslora=config.get("use_rslora", False),
        base=config.get("base_model_name_or_path"),
        quant=config.get("base_quantization"),
    )


def read_weights(file: Path) -> dict[str, Tensor]:
    """The tensors by their names in the file. SystemExit if it is damaged, or holds code."""
    try:
        if file.suffix == ".bin":
            return open_bin(file)
        return load_file(file)
    except pickle.UnpicklingError:  # torch's own sentence says how to run the code all the same
        raise SystemExit(f"{file}: damaged, or holds more than tensors; not opened") from None
    except (SafetensorError, RuntimeError, EOFError, ValueError) as e:
        raise SystemExit(f"{file}: damaged ({str(e).splitlines()[0]})") from None

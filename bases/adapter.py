"""LoRA adapters on the disk, as PEFT writes them."""

import json
import pickle
import re
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from external import files
from lora import add_lora, lora_modules

# How a decoder layer is called in adapter files; ours is "language_model.layers.".
SPELLINGS = {
    "hub": "language_model.model.layers.",  # llava-hf checkpoints, every PEFT that knows LLaVA: the portable one
    "transformers5": "model.language_model.layers.",  # what PEFT on transformers >= 4.52 writes
    "original": "model.layers.",  # haotian-liu's LLaVA and Bunny
}
PREFIX = re.compile(r"^base_model\.model\.(?:language_model\.model|model\.language_model|model)\.layers\.")


# ---- files ---------------------------------------------------------------------------------------------------------


def adapter_state(model: nn.Module, spelling: str = "hub") -> dict[str, Tensor]:
    state = {}
    for name, m in lora_modules(model).items():
        path = "base_model.model." + name.replace("language_model.layers.", SPELLINGS[spelling], 1)
        state[f"{path}.lora_A.weight"] = m.lora_A.detach().cpu().contiguous()
        state[f"{path}.lora_B.weight"] = m.lora_B.detach().cpu().contiguous()
    return state


def save_adapter(model: nn.Module, folder: Path, base: str, spelling: str | None = None) -> None:
    """Writes adapter_model.safetensors and adapter_config.json as PEFT does, then reads them back and compares.

    spelling: of SPELLINGS; by default the one that other code for this base reads.
    """
    spelling = spelling or getattr(model, "lora_spelling", "hub")
    folder.mkdir(parents=True, exist_ok=True)
    state = adapter_state(model, spelling)
    targets = sorted({name.rpartition(".")[2] for name in lora_modules(model)})
    # A regex, not a list: a list of suffixes would also match the vision tower's q, k, v. Both spellings of
    # transformers get one that fits both, since PEFT renames the keys it reads but not this.
    scope = r"model\." if spelling == "original" else r".*language_model.*"
    config = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base, **model.lora_config,
        "target_modules": rf"{scope}layers\.\d+\..*({'|'.join(targets)})", "bias": "none", "lora_dropout": 0.0,
        "use_dora": False, "fan_in_fan_out": False, "modules_to_save": None, "inference_mode": True,
    }  # fmt: skip
    weights, settings = folder / "adapter_model.safetensors", folder / "adapter_config.json"
    with files.whole(weights) as part:
        save_file(state, part, metadata={"format": "pt"})
        back = load_file(part)
        same = back.keys() == state.keys() and all(torch.equal(back[k], state[k]) for k in state)
        assert same, f"{weights}: read back"
    files.write_json(settings, config, indent=2)


def read_adapter(folder: Path) -> tuple[dict[str, Tensor], int, float, bool]:
    """(tensors by our names, r, alpha, rslora) of a PEFT folder; SystemExit if it is not whole or not plain LoRA."""
    weights, settings = folder / "adapter_model.safetensors", folder / "adapter_config.json"
    if not weights.is_file() and (folder / "adapter_model.bin").is_file():
        weights = folder / "adapter_model.bin"  # PEFT before 0.7, such as both papers' releases
    for file in (weights, settings):
        if not file.is_file():
            raise SystemExit(f"{file}: not there. An adapter folder holds {weights.name} and {settings.name}.")
    try:
        config = json.loads(settings.read_text(encoding="utf-8"))
        unsupported = [k for k in ("use_dora", "modules_to_save", "rank_pattern", "alpha_pattern", "fan_in_fan_out")
                       if config.get(k)]  # fmt: skip
        if weights.suffix == ".bin":
            stored = torch.load(weights, map_location="cpu", weights_only=True)  # runs no code
        else:
            stored = load_file(weights)
    except (ValueError, AttributeError, SafetensorError, RuntimeError, EOFError, pickle.UnpicklingError) as e:
        raise SystemExit(f"{folder}: {weights.name} or {settings.name} is damaged ({str(e).splitlines()[0]})") from None
    if config.get("peft_type") != "LORA" or config.get("bias", "none") != "none" or unsupported:
        raise SystemExit(f"{settings}: only plain LoRA without bias is read here; found {config.get('peft_type')}, "
                         f"bias {config.get('bias')}, {', '.join(unsupported) or 'nothing else'}")  # fmt: skip
    state = {PREFIX.sub("language_model.layers.", key).replace(".default.", ".").removesuffix(".weight"): value
             for key, value in stored.items()}  # fmt: skip
    # r and alpha 8: what PEFT assumes where the file is silent
    return state, config.get("r", 8), config.get("lora_alpha", 8), bool(config.get("use_rslora"))


def load_adapter(model: nn.Module, folder: Path) -> None:
    """Adds LoRA to the model from a PEFT folder, any of the spellings; a key that does not fit is an error."""
    state, *settings = read_adapter(Path(folder))
    targets = tuple(sorted({name.split(".")[-2] for name in state if name.startswith("language_model.layers.")}))
    add_lora(model, *settings, targets=targets)
    own = {f"{name}.{ab}": getattr(m, ab) for name, m in lora_modules(model).items() for ab in ("lora_A", "lora_B")}
    wrong = [f"{k} {tuple(state[k].shape)}, expected {tuple(own[k].shape)}" for k in sorted(own.keys() & state.keys())
             if state[k].shape != own[k].shape]  # fmt: skip
    lists = {"missing": sorted(own.keys() - state.keys()), "unexpected": sorted(state.keys() - own.keys()),
             "of wrong shape": wrong}  # fmt: skip
    if any(lists.values()):
        lines = [f"  {len(names)} {what}: {', '.join(names[:10])}" for what, names in lists.items() if names]
        raise SystemExit(f"{folder}: the adapter does not fit this base.\n" + "\n".join(lines))
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(state[name])

"""Models of transformers, loaded strictly: no code of theirs is run, no weight stays random.

Not from a paper. The library itself warns of missing weights, and goes on with random ones.
"""

from pathlib import Path

import torch

from external import files, hub
from pds import runner

PATTERNS = ("*.json", "*.safetensors", "*.model", "*.jinja", "*.txt")
DECIDING = ("*config.json", "token*", "vocab*", "merges.txt", "*tokens*.json", "chat_template*", "*.safetensors")


def find(name: str, flag: str) -> Path:
    """A folder with a config.json, or what the hub has under this name."""
    if (Path(name) / "config.json").is_file():
        return Path(name)
    if Path(name).exists() or name.count("/") != 1:
        raise SystemExit(f"{flag} {name}: neither a folder with a config.json nor a name on the hub")
    return hub.download(name, PATTERNS, "model", name, f"a folder with {flag}")


def deciding(folder: Path) -> list[Path]:
    """The files of a folder that decide what its model says: weights, configs, tokenizer, chat template."""
    return sorted({file for pattern in DECIDING for file in folder.glob(pattern)})


def load(kind: str, folder: Path, dtype: torch.dtype, device: str):
    """The model of a folder by a class of transformers. SystemExit if it wants remote code or lacks a weight."""
    transformers = runner.optional("transformers")
    transformers.logging.set_verbosity_error()  # what it would warn of is refused below, by name
    config = files.read_json(folder / "config.json", dict)
    if "auto_map" in config:
        raise SystemExit(f"{folder}/config.json wants remote code ({config['auto_map']}), which is not run here")
    classes = {
        "sequence classifier": transformers.AutoModelForSequenceClassification,
        "vision-language model": transformers.AutoModelForImageTextToText,
    }
    try:
        model, info = classes[kind].from_pretrained(
            folder,
            dtype=dtype,
            use_safetensors=True,
            ignore_mismatched_sizes=True,  # they are named below
            output_loading_info=True,
        )
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:400]
        raise SystemExit(f"{folder}: not a {kind} that can be used ({reason})") from None
    lacking = sorted(str(name) for what in ("missing_keys", "mismatched_keys") for name in info[what])
    if lacking:
        raise SystemExit(f"{folder}: no weights for {', '.join(lacking[:10])}; none is left random")
    return model.to(device).eval()


def read_beside(kind: type, folder: Path):
    """What lies beside the weights, by AutoProcessor or AutoTokenizer. SystemExit if it cannot be read."""
    try:
        return kind.from_pretrained(folder)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise SystemExit(
            f"{folder}: no {kind.__name__.removeprefix('Auto').lower()} that can be read ({reason})"
        ) from None

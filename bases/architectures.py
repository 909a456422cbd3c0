"""The two architectures, side by side: everything that differs between LLaVA-1.5 and Bunny is a field of this table."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from bases import bunny, configs
from data import BUNNY, VICUNA, Template
from external import files
from lora import TARGETS
from model import Config, LLaVA


@dataclass(frozen=True)
class Architecture:
    model_types: tuple[str, ...]  # as config.json says
    read_config: Callable
    config: type
    model: type[LLaVA]
    template: Template  # how it was taught to read
    lora_targets: tuple[str, ...]  # the linears of a decoder layer that are trained
    adapter_layers: str  # what its decoder's layers are called in adapter files (bases/adapter.py)
    adapter_scope: str  # a regex of the same: PEFT renames the keys it reads, so LLaVA's fits two spellings
    export_layout: str  # of bases/layouts.py


LLAVA_15 = Architecture(
    model_types=("llava", "llava_llama"),
    read_config=configs.read_llava,
    config=Config,
    model=LLaVA,
    template=VICUNA,
    lora_targets=TARGETS,
    adapter_layers="language_model.model.layers.",  # the portable one: every PEFT that knows LLaVA reads it
    adapter_scope=r".*language_model.*",
    export_layout="hub",
)
BUNNY_3B = Architecture(
    model_types=("bunny-phi",),
    read_config=configs.read_bunny,
    config=bunny.Config,
    model=bunny.Bunny,
    template=BUNNY,
    lora_targets=("q_proj", "k_proj", "v_proj", "dense", "fc1", "fc2"),
    adapter_layers="model.layers.",  # its code has no other
    adapter_scope=r"model\.",
    export_layout="bunny",
)
ARCHITECTURES = (LLAVA_15, BUNNY_3B)


def architecture_of(source: LLaVA | Config | bunny.Config) -> Architecture:
    """The architecture of a model, or of its config."""
    config = source.config if isinstance(source, LLaVA) else source
    return next(a for a in ARCHITECTURES if a.config is type(config))


def read_config(folder: Path, vision: Path | None = None) -> Config | bunny.Config:
    """The config of a checkpoint folder; `vision`: the folder of its vision tower, where it has one of its own."""
    file = folder / "config.json"
    c = configs.Fields(files.read_json(file, dict), str(file))
    v = None
    if vision:
        v = configs.Fields(files.read_json(vision / "config.json", dict), str(vision / "config.json"))
    for architecture in ARCHITECTURES:
        if c.get("model_type") in architecture.model_types:
            return architecture.read_config(c, v)
    known = ", ".join(name for a in ARCHITECTURES for name in a.model_types)
    raise SystemExit(f"{file}: model_type {c.get('model_type')!r}; supported: {known}")

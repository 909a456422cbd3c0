"""The tokenizer of a base, and its Processor: text and pictures -> what the base was tuned to read."""

from pathlib import Path

from tokenizers import Tokenizer

from bases import bunny
from bases.architectures import architecture_of
from bases.sentencepiece import read_sentencepiece
from data import Processor, Template
from model import Config


def load_tokenizer(folder: Path) -> Tokenizer:
    """tokenizer.json, or the sentencepiece tokenizer.model that the original LLaVA ships."""
    if (folder / "tokenizer.json").is_file():
        return Tokenizer.from_file(str(folder / "tokenizer.json"))
    if (folder / "tokenizer.model").is_file():
        return read_sentencepiece(folder / "tokenizer.model")
    raise SystemExit(f"{folder}: no tokenizer.json and no tokenizer.model")


def load_processor(folder: Path, config: Config | bunny.Config, template: Template | None = None) -> Processor:
    """The Processor of a checkpoint folder; `template`: another than its architecture's."""
    return Processor(load_tokenizer(folder), config, template or architecture_of(config).template)

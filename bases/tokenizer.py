"""The tokenizer of a base, and its Processor: text and pictures -> what the base was tuned to read."""

from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor

from bases import bunny
from bases.architectures import architecture_of
from bases.configs import Fields
from bases.sentencepiece import read_sentencepiece
from data import IMAGE_TOKEN, MAX_LENGTH, BadRow, Processor, Template
from external import files
from model import Config

# A few ids of the published vocabularies, by their number of rows: with another model's tokenizer, or the right one
# permuted, everything runs and nothing means anything.
LLAMA = {13: "<0x0A>", 278: "▁the", 450: "▁The", 1939: "▁No", 3869: "▁Yes"}
PHI = {198: "Ċ", 262: "Ġthe", 383: "ĠThe", 464: "The"}
KNOWN_PIECES = {32000: LLAMA, 32064: LLAMA, 50295: PHI}


def load_processor(folder: Path, config: Config | bunny.Config) -> Processor:
    """The Processor of a checkpoint folder, with its architecture's template."""
    template = architecture_of(config).template
    tokenizer = load_tokenizer(folder)
    wrong = misfit(tokenizer, config, template)
    if wrong:
        raise SystemExit(f"{folder}: the tokenizer is not this base's: {wrong}")
    return Processor(tokenizer, config, template)


def context_of(folder: Path) -> int:
    """How many tokens a base was taught to read, by its config.json; MAX_LENGTH where that does not say."""
    file = folder / "config.json"
    config = Fields(files.read_json(file, dict), str(file))
    positions = config.whole("max_position_embeddings", MAX_LENGTH)
    return config.part("text_config").whole("max_position_embeddings", positions)


def prompt_of(processor: Processor, question: str, context: int) -> Tensor:
    """The prompt (T,) of a bare question. BadRow if the base was not taught to read so much, and still answer."""
    ids = processor.prompt_ids(question)
    if len(ids) >= context:
        raise BadRow("prompt too long", f"{len(ids)} tokens with the picture's, the base reads {context}; shorten it")
    return torch.tensor(ids)  # (T,)


def load_tokenizer(folder: Path) -> Tokenizer:
    """tokenizer.json, or the sentencepiece tokenizer.model that the original LLaVA ships."""
    file = folder / "tokenizer.json"
    if file.is_file():
        return read_tokenizer(file)
    if (folder / "tokenizer.model").is_file():
        return read_sentencepiece(folder / "tokenizer.model")
    raise SystemExit(f"{folder}: no tokenizer.json and no tokenizer.model")


def read_tokenizer(file: Path) -> Tokenizer:
    """A tokenizer.json."""
    model = files.read_json(file, dict).get("model")
    if not isinstance(model, dict) or not isinstance(model.get("vocab"), dict | list):
        raise SystemExit(f"{file}: holds no vocabulary; is it the tokenizers library's file?")
    if model.get("dropout"):
        raise SystemExit(
            f"{file}: BPE dropout {model['dropout']}: a text would have other ids each time; set it to null"
        )
    tokenizer = Tokenizer.from_file(str(file))
    tokenizer.no_truncation()  # trainers save theirs in the file: here no text is cut or padded unseen
    tokenizer.no_padding()
    return tokenizer


def misfit(tokenizer: Tokenizer, config: Config | bunny.Config, template: Template) -> str | None:
    """Why this tokenizer cannot be the one that the base was trained with, if it is seen."""
    special = {token: added.content for token, added in tokenizer.get_added_tokens_decoder().items() if added.special}
    pieces = {token: piece for piece, token in tokenizer.get_vocab().items()}
    highest = max(pieces.keys() - special.keys(), default=0)
    if highest >= config.vocab:
        return f"it has ids up to {highest}, the base has {config.vocab} rows"
    if config.eos_id not in special:
        return f"id {config.eos_id}, which ends an answer, is {pieces.get(config.eos_id)!r} and no special token"
    if template.bos and config.bos_id not in special:
        return f"id {config.bos_id}, which begins a text, is {pieces.get(config.bos_id)!r} and no special token"
    image_id = tokenizer.token_to_id(IMAGE_TOKEN)
    if config.image_id >= 0 and image_id != config.image_id and (image_id is not None or config.image_id in pieces):
        return f"{IMAGE_TOKEN} is {image_id} in the tokenizer and {config.image_id} in config.json"
    first = tokenizer.token_to_id("<0x00>")  # Llama's byte pieces stand in a row
    for byte in range(256):
        token = tokenizer.token_to_id(f"<0x{byte:02X}>")
        if first is not None and token not in (None, first + byte):
            return f"<0x{byte:02X}> is {token}, and <0x00> is {first}"
    for token, piece in KNOWN_PIECES.get(config.vocab, {}).items():
        if pieces.get(token) != piece:
            return f"id {token} is {pieces.get(token)!r}, not {piece!r}"
    return None

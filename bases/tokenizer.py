"""The tokenizer of a base: tokenizer.json, or the sentencepiece file of the original LLaVA."""

import struct
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, normalizers
from tokenizers.models import BPE

from bases import bunny
from data import BUNNY, VICUNA, Processor
from model import Config

# ---- tokenizer -----------------------------------------------------------------------------------------------------


def load_tokenizer(folder: Path) -> Tokenizer:
    """tokenizer.json, or the sentencepiece tokenizer.model that the original LLaVA ships."""
    if (folder / "tokenizer.json").is_file():
        return Tokenizer.from_file(str(folder / "tokenizer.json"))
    if (folder / "tokenizer.model").is_file():
        return read_sentencepiece(folder / "tokenizer.model")
    raise SystemExit(f"{folder}: no tokenizer.json and no tokenizer.model")


def load_processor(folder: Path, config: Config | bunny.Config) -> Processor:
    """Text and pictures of a base -> what it was tuned to read."""
    return Processor(load_tokenizer(folder), config, BUNNY if isinstance(config, bunny.Config) else VICUNA)


# The original LLaVA ships a sentencepiece BPE as a protobuf. Fields read: ModelProto.pieces = 1 {piece = 1, score = 2,
# type = 3}, ModelProto.normalizer_spec = 3 {add_dummy_prefix = 3}. Sentencepiece merges the neighbours whose joint
# piece has the highest score: the merges are all splits of every piece into two, ordered by the score of the whole.
NORMAL, UNKNOWN, CONTROL, BYTE = 1, 2, 3, 6


def varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        value |= (data[at] & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if data[at - 1] < 0x80:
            return value, at


def fields(data: bytes):
    """(field number, value) of one protobuf message; value is an int, or raw bytes."""
    at = 0
    while at < len(data):
        tag, at = varint(data, at)
        kind = tag & 7
        if kind == 0:
            value, at = varint(data, at)
        else:
            size, at = varint(data, at) if kind == 2 else ({1: 8, 5: 4}[kind], at)
            value, at = data[at : at + size], at + size
        yield tag >> 3, value


def read_sentencepiece(file: Path) -> Tokenizer:
    pieces, dummy_prefix = [], True
    try:
        for number, value in fields(file.read_bytes()):
            if number == 1:
                f = dict(fields(value))
                pieces.append((f[1].decode(), struct.unpack("<f", f[2])[0] if 2 in f else 0.0, f.get(3, NORMAL)))
            elif number == 3:
                dummy_prefix = bool(dict(fields(value)).get(3, 1))
    except (IndexError, KeyError, UnicodeDecodeError, struct.error) as e:
        raise SystemExit(f"{file}: not a sentencepiece model ({type(e).__name__}: {e})") from None
    kinds = {kind for _, _, kind in pieces}
    if BYTE not in kinds or UNKNOWN not in kinds:
        raise SystemExit(f"{file}: a sentencepiece model without byte fallback or <unk>; Llama's BPE has both")

    vocab = {piece: i for i, (piece, _, _) in enumerate(pieces)}
    splits = []
    for piece, score, kind in pieces:
        if kind == NORMAL:
            pairs = [(piece[:i], piece[i:]) for i in range(1, len(piece))]
            splits += [(-score, vocab[a], vocab[b], a, b) for a, b in pairs if a in vocab and b in vocab]
    merges = [(a, b) for *_, a, b in sorted(splits)]
    unknown = next(piece for piece, _, kind in pieces if kind == UNKNOWN)
    tokenizer = Tokenizer(BPE(vocab, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True))
    prepend, strip = ([normalizers.Prepend("▁")], [decoders.Strip(" ", 1, 0)]) if dummy_prefix else ([], [])
    tokenizer.normalizer = normalizers.Sequence([*prepend, normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    tokenizer.decoder = decoders.Sequence(steps)
    tokenizer.add_special_tokens([AddedToken(p, special=True, normalized=False)
                                  for p, _, kind in pieces if kind in (UNKNOWN, CONTROL)])  # fmt: skip
    return tokenizer

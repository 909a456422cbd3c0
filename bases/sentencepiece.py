"""A sentencepiece BPE (the original LLaVA's tokenizer.model, a protobuf) -> a tokenizer that gives the same ids.

Fields read: ModelProto.pieces = 1 {piece = 1, score = 2, type = 3} and .normalizer_spec = 3 {add_dummy_prefix = 3}.
Sentencepiece merges the two neighbours whose joint piece has the highest score. A BPE with merges does the same if its
merges are all splits of every piece into two pieces, ordered by the score of the whole.
"""

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from tokenizers import AddedToken, Tokenizer, decoders, normalizers
from tokenizers.models import BPE

NORMAL, UNKNOWN, CONTROL, BYTE = 1, 2, 3, 6  # ModelProto.SentencePiece.Type
FIXED_BYTES = {1: 8, 5: 4}  # wire type -> size


class Piece(NamedTuple):
    text: str
    score: float
    kind: int


def read_sentencepiece(file: Path) -> Tokenizer:
    """SystemExit if the file is no sentencepiece BPE with byte fallback."""
    try:
        pieces, dummy_prefix = read_model(file.read_bytes())
    except (LookupError, TypeError, AttributeError, UnicodeDecodeError, struct.error) as e:
        raise SystemExit(f"{file}: not a sentencepiece model ({type(e).__name__}: {e})") from None
    kinds = {piece.kind for piece in pieces}
    if BYTE not in kinds or UNKNOWN not in kinds:
        raise SystemExit(f"{file}: a sentencepiece model without byte fallback or <unk>; Llama's BPE has both")
    vocab = {piece.text: i for i, piece in enumerate(pieces)}
    unknown = next(piece.text for piece in pieces if piece.kind == UNKNOWN)
    bpe = BPE(vocab, merges(pieces, vocab), unk_token=unknown, fuse_unk=True, byte_fallback=True)
    tokenizer = Tokenizer(bpe)
    normal = [normalizers.Replace(" ", "▁")]
    decode = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if dummy_prefix:
        normal.insert(0, normalizers.Prepend("▁"))
        decode.append(decoders.Strip(" ", 1, 0))
    tokenizer.normalizer = normalizers.Sequence(normal)
    tokenizer.decoder = decoders.Sequence(decode)
    special = [piece.text for piece in pieces if piece.kind in (UNKNOWN, CONTROL)]
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in special])
    return tokenizer


def merges(pieces: list[Piece], vocab: dict[str, int]) -> list[tuple[str, str]]:
    """Every split of a piece into two, best score first, then by the ids of the two."""
    splits = []
    for piece in pieces:
        if piece.kind != NORMAL:
            continue
        for i in range(1, len(piece.text)):
            left, right = piece.text[:i], piece.text[i:]
            if left in vocab and right in vocab:
                splits.append((-piece.score, vocab[left], vocab[right], left, right))
    return [(left, right) for _, _, _, left, right in sorted(splits)]


# ---- protobuf ------------------------------------------------------------------------------------------------------


def read_model(data: bytes) -> tuple[list[Piece], bool]:
    """The pieces of a ModelProto, and whether a blank is put before every text."""
    pieces, dummy_prefix = [], True
    for number, value in fields(data):
        if number == 1:
            f = dict(fields(value))
            score = struct.unpack("<f", f[2])[0] if 2 in f else 0.0
            pieces.append(Piece(f[1].decode(), score, f.get(3, NORMAL)))
        elif number == 3:
            dummy_prefix = bool(dict(fields(value)).get(3, 1))
    return pieces, dummy_prefix


def fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """(field number, value) of one protobuf message; a value is an int, or raw bytes."""
    at = 0
    while at < len(data):
        tag, at = varint(data, at)
        wire_type = tag & 7
        if wire_type == 0:
            value, at = varint(data, at)
        else:
            if wire_type == 2:
                size, at = varint(data, at)
            else:
                size = FIXED_BYTES[wire_type]
            value = data[at : at + size]
            at += size
        yield tag >> 3, value


def varint(data: bytes, at: int) -> tuple[int, int]:
    """The number that starts at `at`, seven bits a byte, lowest first; and where it ends."""
    value = shift = 0
    while True:
        value |= (data[at] & 0x7F) << shift
        at += 1
        shift += 7
        if data[at - 1] < 0x80:
            return value, at

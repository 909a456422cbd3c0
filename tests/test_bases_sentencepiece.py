"""bases/sentencepiece.py: ids and texts of a small model, by hand; files that are none."""

import struct
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from bases.sentencepiece import read_sentencepiece

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2\nsize 4988000000\n"


def message(*fields) -> bytes:
    """A protobuf message of (number, wire type, value): 0 varint below 128, 2 bytes, 5 four raw bytes."""
    out = b""
    for number, kind, value in fields:
        out += bytes([number << 3 | kind])
        out += bytes([value]) if kind == 0 else bytes([len(value)]) + value if kind == 2 else value
    return out


def piece(text: str, score: float, kind: int = 1) -> tuple:
    return 1, 2, message((1, 2, text.encode()), (2, 5, struct.pack("<f", score)), (3, 0, kind))


def write_pieces(file: Path, extra=(), dummy_prefix: int = 1) -> Path:
    """<unk> <s> </s>, 256 bytes (ids 3-258), then 259 and on: pieces with scores."""
    rows = [piece("<unk>", 0, 2), piece("<s>", 0, 3), piece("</s>", 0, 3)]
    rows += [piece(f"<0x{b:02X}>", 0, 6) for b in range(256)]
    rows += [piece(p, s) for p, s in extra]
    file.write_bytes(message(*rows, (2, 2, message((3, 0, 2))), (3, 2, message((3, 0, dummy_prefix)))))
    return file


def test_sentencepiece_by_hand(tmp_path):
    """259 ▁, 260 a, 261 b, 262 c, 263 bc (score -1), 264 ab (-2), 265 ▁a (-3), 266 ▁abc (-4).

    "abc" -> ▁ a b c: bc scores best, then ab is gone and ▁a joins: ▁a bc. No pair makes ▁abc but (▁a, bc), so 266.
    "ab" -> ▁ ab: ab (-2) before ▁a (-3); ▁ + ab is no piece: 259 264. "é" -> ▁ and the bytes C3 A9: 3 + 195, 3 + 169.
    """
    pieces = [("▁", -9), ("a", -9), ("b", -9), ("c", -9), ("bc", -1), ("ab", -2), ("▁a", -3), ("▁abc", -4)]
    tokenizer = read_sentencepiece(write_pieces(tmp_path / "tokenizer.model", pieces))
    tokenizer.encode_special_tokens = True
    for sentence, ids in {
        "abc": [266],
        "ab": [259, 264],
        "é": [259, 198, 172],
        "a b": [265, 259, 261],
        "c  a": [259, 262, 259, 265],
    }.items():
        assert tokenizer.encode(sentence, add_special_tokens=False).ids == ids, sentence
        assert tokenizer.decode(ids) == sentence
    assert 2 not in tokenizer.encode("a</s>", add_special_tokens=False).ids  # text, not the end of the sequence
    assert [tokenizer.token_to_id(t) for t in ("<unk>", "<s>", "</s>")] == [0, 1, 2]


def test_without_add_dummy_prefix_no_blank_is_put_before_a_text(tmp_path):
    """259 ▁, 260 a, 261 ▁a (score -1): "a" stays a, and the blank of " a" is its own."""
    file = write_pieces(tmp_path / "tokenizer.model", [("▁", -9), ("a", -9), ("▁a", -1)], dummy_prefix=0)
    tokenizer = read_sentencepiece(file)
    for sentence, ids in {"a": [260], " a": [261], "a a": [260, 261]}.items():
        assert tokenizer.encode(sentence, add_special_tokens=False).ids == ids
        assert tokenizer.decode(ids) == sentence


def test_sentencepiece_that_is_none(tmp_path):
    for content in (b"", b"\x0a\xff\xff", POINTER, b"\x0b"):
        (tmp_path / "tokenizer.model").write_bytes(content)
        with pytest.raises(SystemExit, match=r"tokenizer\.model: "):
            read_sentencepiece(tmp_path / "tokenizer.model")
    assert isinstance(read_sentencepiece(write_pieces(tmp_path / "tokenizer.model")), Tokenizer)


@pytest.mark.parametrize("data", [b"\x08\x05", b"\xff" * 99, b"\x0a\x02\x18\x06", b"{}"])
def test_a_file_that_is_no_model(data, tmp_path):
    """A piece that is a number, a number without end, a piece without text, JSON."""
    (tmp_path / "tokenizer.model").write_bytes(data)
    with pytest.raises(SystemExit, match="tokenizer.model: not a sentencepiece model"):
        read_sentencepiece(tmp_path / "tokenizer.model")

"""Tokens -> the words people read: which tokens make up which word, by where each stands in the text.

A tokenizer says of every token which characters it covers (its offsets). A word ends where a blank begins, before
closing punctuation, and after each Chinese or Japanese character; where a token reaches over such an end, the two words
are one. So a word's value is the sum over its tokens, an emoji of four byte tokens is one word, and nothing is lost or
shown twice: the words' texts joined are the text.
"""

import re
from bisect import bisect_right
from typing import NamedTuple

from torch import Tensor

from data import Processor

CHUNK = re.compile(r"\s*(?:[\u3040-\u30ff\u3400-\u9fff]|[^\s\u3040-\u30ff\u3400-\u9fff]+)")
CLOSING = ".,:;!?…)]}\"'”’"


class Word(NamedTuple):
    """A word of a response, the blanks before it included; EOS is the last one, without text."""

    text: str
    first: int  # its tokens are first .. end - 1 of the response's
    end: int

    def sum(self, values: Tensor) -> float:
        """What the word's tokens amount to, of one value for each token of the response (R,)."""
        return float(values[self.first : self.end].sum())


def response_words(processor: Processor, response: str, ids: list[int]) -> list[Word]:
    """The words of a response that was encoded as `ids`, its EOS included; of a cut response those that are left."""
    blank = " " if processor.template.response_blank else ""
    text = blank + response.strip()  # as Processor.response_ids encodes it
    encoding = processor.tokenizer.encode(text, add_special_tokens=False)
    has_eos = len(ids) > len(encoding.ids)
    scored = len(ids) - has_eos
    assert ids[:scored] == encoding.ids[:scored], f"{response!r}: other ids than the example's"
    offsets = encoding.offsets[:scored]
    if scored < len(encoding.ids):
        text = text[: offsets[-1][1]]
    words = split_words(text, offsets)
    return words + [Word("", scored, scored + 1)] if has_eos else words


def split_words(text: str, offsets: list[tuple[int, int]]) -> list[Word]:
    """Words of a text whose token i covers the characters offsets[i]."""
    crossed = set()  # positions inside a token: no word ends there
    for start, end in offsets:
        crossed.update(range(start + 1, end))
    ends = [end for end in word_ends(text) if end not in crossed]
    if not ends or ends[-1] < len(text):
        ends.append(len(text))
    counts = [0] * len(ends)
    for start, _ in offsets:
        word = min(bisect_right(ends, start), len(ends) - 1)
        counts[word] += 1
    words = []
    start = token = 0
    for end, count in zip(ends, counts, strict=True):
        words.append(Word(text[start:end], token, token + count))
        start = end
        token += count
    return words


def word_ends(text: str) -> list[int]:
    """Positions after each word and each run of closing punctuation."""
    ends = []
    for chunk in CHUNK.finditer(text):
        stem = chunk[0].rstrip(CLOSING)
        if stem.strip() and len(stem) < len(chunk[0]):
            ends.append(chunk.start() + len(stem))
        ends.append(chunk.end())
    return ends

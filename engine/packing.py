"""Shared-prefix rows without padding: one forward pass for the three triples of many examples.

Computes exactly `losses.plain_logps`; read that first. Plain scoring runs three padded rows per example, and the prompt
of about 640 tokens three times. Here an example is two groups, one per picture, end to end with other examples in one
row; the prompt of m_w is computed once for both responses:

    [ m_w q ...... | y_w .... | y_l .... ][ m_l q ...... | y_w .... ][ next example ...
      0 .. P-1       P ..       P ..        0 .. P-1       P ..         positions

    who sees whom           m_w q   y_w   y_l   m_l q   y_w'
      m_w q                 causal
      y_w                   all     causal
      y_l                   all     -     causal
      m_l q                                     causal
      y_w' (after m_l)                          all     causal

The first token of *either* response is predicted by the last token of its prompt. 1,670 tokens per mDPO example of the
paper's size instead of 2,310, and no padding; measured gains stand in docs/results.md. Attention takes no dense mask:
on CUDA one call of torch's varlen_attn per layer, elsewhere one SDPA call per span.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from data import Example, normalised
from engine import head
from engine.device import has_flash, send
from losses import Logps
from model import causal
from pictures import ImageSpec

TRIPLES = ("chosen", "rejected", "image_rejected")  # (m_w, q, y_w), (m_w, q, y_l), (m_l, q, y_w): fields of Logps


class Span(NamedTuple):
    """Tokens [start, start + length) attend causally to themselves, after all of [prefix, prefix + prefix_length)."""

    start: int
    length: int
    prefix: int = 0
    prefix_length: int = 0

    @property
    def end(self) -> int:
        return self.start + self.length


# ---- a packed row --------------------------------------------------------------------------------------------------


class Group(NamedTuple):
    """A picture, and the responses that are scored after it."""

    image: Tensor | None  # (3, S, S)
    triples: list[str]  # which log-prob each response gives
    responses: list[Tensor]  # ids and EOS


def groups(example: Example, which=TRIPLES) -> list[Group]:
    """The groups of one example: m_w with both responses, m_l with the chosen one; only triples in `which`."""
    found = []
    after_m_w = {"chosen": example.chosen, "rejected": example.rejected}
    after_m_w = {name: y for name, y in after_m_w.items() if name in which}
    if after_m_w:
        found.append(Group(example.image, list(after_m_w), list(after_m_w.values())))
    if example.image_rejected is not None and "image_rejected" in which:
        found.append(Group(example.image_rejected, ["image_rejected"], [example.chosen]))
    return found


class Pictures:
    """The M pictures of a row, in reading order, and what the tower makes of them: once, as it is frozen."""

    def __init__(self, images: list[Tensor], spec: ImageSpec | None, features: Tensor | None = None):
        """images (3, S, S) each, levels 0-255 if there is a spec. features (M, N, C): where they are known already."""
        self.images = images
        self.spec = spec
        self.known = features

    def to(self, device: torch.device) -> "Pictures":
        """One by one, each from the pinned memory it was prepared in; a stack of them would not be pinned."""
        return Pictures([normalised(send(x, device), self.spec, device) for x in self.images], None, self.known)

    def features(self, model) -> Tensor | None:
        """(M, N, C) for policy and reference alike; None where there are no pictures."""
        if self.known is None and self.images:
            self.known = model.image_features(torch.stack(self.images))  # (M, 3, S, S) -> (M, N, C)
        return self.known

    def every_second(self, model) -> "Pictures":
        """Those of m_l alone, where each example has brought m_w and m_l."""
        return Pictures(self.images[1::2], self.spec, self.features(model)[1::2])


class Packed(NamedTuple):
    """A micro-batch as one row of T tokens with S response tokens and M pictures."""

    input_ids: Tensor  # (1, T)
    positions: Tensor  # (1, T), a response's start where its prompt ended
    pictures: Pictures
    predict_from: Tensor  # (S,) the position that predicts each response token
    targets: Tensor  # (S,) the response tokens
    owner: Tensor  # (S,) which log-prob a token belongs to: triple * B + example
    spans: list[Span]
    which: list[str]  # the triples in it
    examples: list[Example]  # B of them

    def to(self, device: torch.device) -> "Packed":
        return self._replace(
            input_ids=send(self.input_ids, device),
            positions=send(self.positions, device),
            pictures=self.pictures.to(device),
            predict_from=send(self.predict_from, device),
            targets=send(self.targets, device),
            owner=send(self.owner, device),
        )


def pack(examples: list[Example], which=TRIPLES) -> Packed:
    """Lays examples end to end.

    A group with the prompt p0 p1, y_w = a (and no more) and y_l = b c makes five tokens:

        input_ids      p0  p1  a   b   c
        positions      0   1   2   2   3      b follows p1 as a does
        spans          (0 ... 2)  (3 ... 4 after 0 ... 1)
        predict_from           1   1   3      p1 predicts a and b; b predicts c
        targets                a   b   c
        owner                  0   1   1      0 is `chosen`, 1 is `rejected`, of the only example
    """
    B = len(examples)
    ids, positions, images = [], [], []
    spans, predict_from, targets, owner = [], [], [], []
    T = 0  # tokens so far
    for b, example in enumerate(examples):
        prompt = example.prompt
        P = len(prompt)
        for group in groups(example, which):
            prompt_start = T
            ids.append(prompt)
            positions.append(torch.arange(P))
            if group.image is not None:
                images.append(group.image)
            T += P
            for i, (triple, y) in enumerate(zip(group.triples, group.responses, strict=True)):
                R = len(y)
                if i == 0:  # the first response continues its prompt's causal span
                    spans.append(Span(prompt_start, P + R))
                else:  # the second looks back over the prompt alone
                    spans.append(Span(T, R, prefix=prompt_start, prefix_length=P))
                ids.append(y)
                positions.append(torch.arange(P, P + R))
                predict_from.append(torch.tensor([prompt_start + P - 1]))
                predict_from.append(torch.arange(T, T + R - 1))
                targets.append(y)
                owner.append(torch.full((R,), TRIPLES.index(triple) * B + b))
                T += R
    return Packed(
        input_ids=torch.cat(ids)[None],  # (T,) -> (1, T)
        positions=torch.cat(positions)[None],  # (T,) -> (1, T)
        pictures=Pictures(images, examples[0].spec),
        predict_from=torch.cat(predict_from),  # (S,)
        targets=torch.cat(targets),  # (S,)
        owner=torch.cat(owner),  # (S,)
        spans=spans,
        which=[triple for group in groups(examples[0], which) for triple in group.triples],
        examples=examples,
    )


def split_by_tokens(examples: list[Example], budget: int) -> list[list[Example]]:
    """Few micro-batches of even length, each of at most `budget` packed tokens or of one example that is longer."""
    total = sum(example.tokens() for example in examples)
    n = math.ceil(total / budget)  # no fewer can hold them
    while True:
        rows = even_rows(examples, min(n, len(examples)))
        if all(len(row) == 1 or sum(example.tokens() for example in row) <= budget for row in rows):
            return rows
        n += 1  # ends at one example a row


def even_rows(examples: list[Example], n: int) -> list[list[Example]]:
    """n rows: the longest example that is left goes to the shortest row."""
    rows: list[list[Example]] = [[] for _ in range(n)]
    lengths = [0] * n
    for example in sorted(examples, key=Example.tokens, reverse=True):
        shortest = lengths.index(min(lengths))
        rows[shortest].append(example)
        lengths[shortest] += example.tokens()
    return rows


# ---- scoring -------------------------------------------------------------------------------------------------------


def packed_logps(model, packed: Packed) -> Logps:
    """The Logps of a packed micro-batch, (B,) float32 each; a triple that is not in it is None."""
    attend = attention(packed, model)
    x = model.embed(packed.input_ids, packed.pictures.features(model))  # (1, T, C)
    hidden = model.language_model(x, packed.positions, attend)  # (1, T, C)
    scored = hidden[0, packed.predict_from]  # (1, T, C) -> (S, C)
    token_logps = head.token_logps(scored, model.lm_head.weight, packed.targets)  # (S,)
    B = len(packed.examples)
    sums = token_logps.new_zeros(len(TRIPLES) * B, dtype=torch.float64)  # float64: a GPU's order of adding is not fixed
    sums = sums.index_add(0, packed.owner, token_logps.double()).float()  # (3B,)
    by_triple = dict(zip(TRIPLES, sums.view(len(TRIPLES), B), strict=True))  # (3B,) -> 3 x (B,)
    return Logps(**{name: logps if name in packed.which else None for name, logps in by_triple.items()})


def attention(packed: Packed, model) -> "SpanAttention | VarlenAttention":
    """Flash for all spans at once where the GPU and this torch have it, else one call per span."""
    device, dtype = packed.input_ids.device, model.lm_head.weight.dtype
    if dtype != torch.float32 and has_flash(device):
        return VarlenAttention(packed.spans, device)
    return SpanAttention(packed.spans, dtype, device)


class SpanAttention:
    """One SDPA call per span; any device and dtype."""

    def __init__(self, spans: list[Span], dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"):
        """Masks are made here, once for all layers: a compiled layer must find the same ones when it recomputes."""
        self.spans = spans
        self.masks = [span_mask(s, dtype, device) if s.prefix_length else None for s in spans]

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q (1, H, T, D), k and v (1, Hkv, T, D) -> (1, H, T, D)."""
        out = []
        for s, mask in zip(self.spans, self.masks, strict=True):
            own = slice(s.start, s.end)
            if mask is None:
                out.append(causal(q[:, :, own], k[:, :, own], v[:, :, own]))  # (1, H, R, D)
                continue
            seen = slice(s.prefix, s.end)  # a view: cheaper than copies of the prompt's keys and values
            out.append(
                F.scaled_dot_product_attention(
                    q[:, :, own],
                    k[:, :, seen],
                    v[:, :, seen],
                    attn_mask=mask,
                    enable_gqa=q.shape[1] != k.shape[1],
                )
            )  # (1, H, R, D)
        # spans lie end to end; joined as (1, T, H, D), the layout in which the heads of a token are neighbours
        return torch.cat([o.transpose(1, 2) for o in out], dim=1).transpose(1, 2)  # (1, H, T, D)


def span_mask(s: Span, dtype: torch.dtype, device: torch.device | str) -> Tensor:
    """(R, K) over the keys from the prefix's first to the span's last: 0 where seen, -inf elsewhere.

    A prompt of 2 tokens, y_w of 1, y_l of 3 queries (. is -inf):

             p0  p1  y_w  y_l0  y_l1  y_l2
        y_l0  0   0    .     0     .     .
        y_l1  0   0    .     0     0     .
        y_l2  0   0    .     0     0     0
    """
    before = s.start - s.prefix  # keys before the span's own: prompt and the other response
    mask = torch.full((s.length, before + s.length), -torch.inf, dtype=dtype, device=device)  # (R, K)
    mask = mask.triu(before + 1)  # query i sees keys up to before + i: bottom-right, SDPA's own is top-left
    mask[:, s.prefix_length : before] = -torch.inf  # the other response
    return mask


class VarlenAttention:
    """All spans in one flash call on CUDA, half precision.

    varlen takes the queries of all spans end to end and, separately, the keys each of them sees end to end. cu_q and
    cu_k say where each span begins in either: lengths 5, 3 and 4 give cu_q = 0, 5, 8, 12. The keys of a shared prompt
    are gathered once more for the second response, so cu_k grows by prefix_length + length.
    """

    def __init__(self, spans: list[Span], device: torch.device):
        q_lengths = [s.length for s in spans]
        k_lengths = [s.prefix_length + s.length for s in spans]
        self.keys = KeyOrder(spans, device)
        # two tensors even where they are equal: given one for both, torch may take cuDNN, which aligns it top-left
        self.cu_q = send(torch.tensor([0, *q_lengths]).cumsum(0, dtype=torch.int32), device)  # (n + 1,)
        self.cu_k = send(torch.tensor([0, *k_lengths]).cumsum(0, dtype=torch.int32), device)  # (n + 1,)
        self.max_q, self.max_k = max(q_lengths), max(k_lengths)

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q (1, H, T, D), k and v (1, Hkv, T, D) -> (1, H, T, D)."""
        from torch.nn.attention.varlen import varlen_attn

        positional, keywords = self.arguments(q, k, v)
        return varlen_attn(*positional, **keywords).transpose(0, 1)[None]  # (T, H, D) -> (1, H, T, D)

    def arguments(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[tuple, dict]:
        """varlen_attn's arguments, those that torch 2.11 and later releases share (2.11 has no enable_gqa)."""
        repeats = q.shape[1] // k.shape[1]
        if repeats > 1:
            k = k.repeat_interleave(repeats, dim=1)  # (1, Hkv, T, D) -> (1, H, T, D)
            v = v.repeat_interleave(repeats, dim=1)
        q, k, v = (x[0].transpose(0, 1) for x in (q, k, v))  # (1, H, T, D) -> (T, H, D)
        k = self.keys.gather(k)  # (T, H, D) -> (T_k, H, D)
        v = self.keys.gather(v)
        # window (-1, 0) is causal; with unequal lengths flash aligns it bottom-right, as the spans need it
        return (q, k, v, self.cu_q, self.cu_k, self.max_q, self.max_k), {"window_size": (-1, 0)}


class KeyOrder:
    """Which token each place of varlen's keys holds, and at which places each token stands.

    A prompt of 2 tokens, y_w of 1, y_l of 2: the spans (0 ... 2) and (3 ... 4 after 0 ... 1) read seven keys.

        place   0   1   2    3   4   5    6
        token   p0  p1  y_w  p0  p1  y_l0 y_l1      index = 0 1 2 0 1 3 4

        token   p0  p1  y_w  y_l0 y_l1
        own     0   1   2    5    6                 in its own span
        again   3   4   2    5    6                 as a prefix; where it is nobody's, its own place once more
    """

    def __init__(self, spans: list[Span], device: torch.device):
        index = []
        own = torch.empty(spans[-1].end, dtype=torch.long)  # (T,) spans lie end to end
        prefixes = []
        place = 0
        for s in spans:
            index.append(torch.arange(s.prefix, s.prefix + s.prefix_length))
            index.append(torch.arange(s.start, s.end))
            prefixes.append((s, place))
            place += s.prefix_length
            own[s.start : s.end] = torch.arange(place, place + s.length)
            place += s.length
        again = own.clone()  # (T,)
        for s, place in prefixes:
            prefix = slice(s.prefix, s.prefix + s.prefix_length)
            assert torch.equal(again[prefix], own[prefix]), f"{s}: its prefix is another span's too"
            again[prefix] = torch.arange(place, place + s.prefix_length)
        self.index = send(torch.cat(index), device)  # (T_k,)
        self.own, self.again = send(own, device), send(again, device)  # (T,) both

    def gather(self, x: Tensor) -> Tensor:
        """(T, H, D) -> (T_k, H, D)."""
        return GatherKeys.apply(x, self.index, self.own, self.again)


class GatherKeys(torch.autograd.Function):
    """x.index_select(0, index). Its own backward adds with atomics; a token has two places at most, so two reads do."""

    @staticmethod
    def forward(ctx, x: Tensor, index: Tensor, own: Tensor, again: Tensor) -> Tensor:
        ctx.save_for_backward(own, again)
        return x.index_select(0, index)  # (T, H, D) -> (T_k, H, D)

    @staticmethod
    def backward(ctx, upstream: Tensor):
        own, again = ctx.saved_tensors
        shared = (own != again)[:, None, None]  # (T, 1, 1)
        second = torch.where(shared, upstream.index_select(0, again), 0)  # (T, H, D)
        return upstream.index_select(0, own) + second, None, None, None  # (T_k, H, D) -> (T, H, D)

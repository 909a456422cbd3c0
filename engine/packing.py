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

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from data import Example, normalised
from engine import head
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


class Packed(NamedTuple):
    """A micro-batch as one row of T tokens with S response tokens and M pictures."""

    input_ids: Tensor  # (1, T)
    positions: Tensor  # (1, T), a response's start where its prompt ended
    images: Tensor | None  # (M, 3, S, S) in reading order
    predict_from: Tensor  # (S,) the position that predicts each response token
    targets: Tensor  # (S,) the response tokens
    owner: Tensor  # (S,) which log-prob a token belongs to: triple * B + example
    spans: list[Span]
    which: list[str]  # the triples in it
    examples: list[Example]  # B of them
    spec: ImageSpec | None  # of pictures that are still levels 0-255

    def to(self, device: torch.device) -> "Packed":
        return self._replace(
            input_ids=self.input_ids.to(device, non_blocking=True),
            positions=self.positions.to(device, non_blocking=True),
            images=normalised(self.images, self.spec, device),
            spec=None,
            predict_from=self.predict_from.to(device, non_blocking=True),
            targets=self.targets.to(device, non_blocking=True),
            owner=self.owner.to(device, non_blocking=True),
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
        images=torch.stack(images) if images else None,  # (M, 3, S, S)
        predict_from=torch.cat(predict_from),  # (S,)
        targets=torch.cat(targets),  # (S,)
        owner=torch.cat(owner),  # (S,)
        spans=spans,
        which=[triple for group in groups(examples[0], which) for triple in group.triples],
        examples=examples,
        spec=examples[0].spec,
    )


def tokens_of(example: Example, which=TRIPLES) -> int:
    """How many tokens an example takes in a packed row."""
    return sum(len(example.prompt) + sum(map(len, group.responses)) for group in groups(example, which))


def split_by_tokens(examples: list[Example], budget: int) -> list[list[Example]]:
    """Micro-batches of at most `budget` packed tokens, or of one example that is longer: first fit, longest first."""
    rows: list[list[Example]] = []
    room: list[int] = []
    for example in sorted(examples, key=tokens_of, reverse=True):
        size = tokens_of(example)
        fits = [i for i, left in enumerate(room) if size <= left]
        if fits:
            rows[fits[0]].append(example)
            room[fits[0]] -= size
        else:
            rows.append([example])
            room.append(budget - size)
    return rows


# ---- scoring -------------------------------------------------------------------------------------------------------


def packed_logps(model, packed: Packed) -> Logps:
    """The Logps of a packed micro-batch, (B,) float32 each; a triple that is not in it is None."""
    attend = attention(packed, model)
    hidden = model.hidden(packed.input_ids, packed.images, packed.positions, attend)  # (1, T, C)
    scored = hidden[0, packed.predict_from]  # (1, T, C) -> (S, C)
    token_logps = head.token_logps(scored, model.lm_head.weight, packed.targets)  # (S,)
    B = len(packed.examples)
    sums = token_logps.new_zeros(len(TRIPLES) * B, dtype=torch.float64)  # float64: a GPU's order of adding is not fixed
    sums = sums.index_add(0, packed.owner, token_logps.double()).float()  # (3B,)
    by_triple = dict(zip(TRIPLES, sums.view(len(TRIPLES), B), strict=True))  # (3B,) -> 3 x (B,)
    return Logps(**{name: logps if name in packed.which else None for name, logps in by_triple.items()})


def attention(packed: Packed, model) -> "SpanAttention | VarlenAttention":
    half = model.lm_head.weight.dtype != torch.float32 or torch.is_autocast_enabled("cuda")
    if packed.input_ids.is_cuda and half:
        return VarlenAttention(packed.spans, packed.input_ids.device)
    return SpanAttention(packed.spans)


class SpanAttention:
    """One SDPA call per span; any device and dtype."""

    def __init__(self, spans: list[Span]):
        self.spans, self.masks = spans, {}

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q (1, H, T, D), k and v (1, Hkv, T, D) -> (1, H, T, D)."""
        out = []
        for s in self.spans:
            own = slice(s.start, s.end)
            if s.prefix_length == 0:
                out.append(causal(q[:, :, own], k[:, :, own], v[:, :, own]))  # (1, H, R, D)
                continue
            seen = slice(s.prefix, s.end)  # a view: cheaper than copies of the prompt's keys and values
            out.append(
                F.scaled_dot_product_attention(
                    q[:, :, own],
                    k[:, :, seen],
                    v[:, :, seen],
                    attn_mask=self.mask(s, q),
                    enable_gqa=q.shape[1] != k.shape[1],
                )
            )  # (1, H, R, D)
        # spans lie end to end; joined as (1, T, H, D), the layout in which the heads of a token are neighbours
        return torch.cat([o.transpose(1, 2) for o in out], dim=1).transpose(1, 2)  # (1, H, T, D)

    def mask(self, s: Span, q: Tensor) -> Tensor:
        """(R, K) over the keys from the prefix's first to the span's last: 0 where seen, -inf elsewhere.

        A prompt of 2 tokens, y_w of 1, y_l of 3 queries (. is -inf). Kept, since all layers use the same one.

                 p0  p1  y_w  y_l0  y_l1  y_l2
            y_l0  0   0    .     0     .     .
            y_l1  0   0    .     0     0     .
            y_l2  0   0    .     0     0     0
        """
        if s not in self.masks:
            before = s.start - s.prefix  # keys before the span's own: prompt and the other response
            mask = torch.full((s.length, before + s.length), -torch.inf, dtype=q.dtype, device=q.device)  # (R, K)
            mask = mask.triu(before + 1)  # query i sees keys up to before + i: bottom-right, SDPA's own is top-left
            mask[:, s.prefix_length : before] = -torch.inf  # the other response
            self.masks[s] = mask
        return self.masks[s]


class VarlenAttention:
    """All spans in one flash call on CUDA, half precision.

    varlen takes the queries of all spans end to end and, separately, the keys each of them sees end to end. cu_q and
    cu_k say where each span begins in either: lengths 5, 3 and 4 give cu_q = 0, 5, 8, 12. The keys of a shared prompt
    are gathered once more for the second response, so cu_k grows by prefix_length + length.
    """

    def __init__(self, spans: list[Span], device: torch.device):
        q_lengths = [s.length for s in spans]
        k_lengths = [s.prefix_length + s.length for s in spans]
        seen = []
        for s in spans:
            seen.append(torch.arange(s.prefix, s.prefix + s.prefix_length))
            seen.append(torch.arange(s.start, s.end))
        self.index = torch.cat(seen).to(device)  # (T_k,)
        # two tensors even where they are equal: given one for both, torch may take cuDNN, which aligns it top-left
        self.cu_q = torch.tensor([0, *q_lengths]).cumsum(0).to(device, torch.int32)  # (n + 1,)
        self.cu_k = torch.tensor([0, *k_lengths]).cumsum(0).to(device, torch.int32)  # (n + 1,)
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
        k = k.index_select(0, self.index)  # (T, H, D) -> (T_k, H, D)
        v = v.index_select(0, self.index)
        # window (-1, 0) is causal; with unequal lengths flash aligns it bottom-right, as the spans need it
        return (q, k, v, self.cu_q, self.cu_k, self.max_q, self.max_k), {"window_size": (-1, 0)}

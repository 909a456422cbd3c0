"""Shared-prefix rows without padding, and the reference scored once in them.

Computes exactly `losses.plain_logps`, and the same inside `lora.lora_disabled`; read those first.

Plain scoring runs three padded rows per example and the ~640-token prompt three times. Here an example is two groups,
one per picture, end to end with other examples in one row; the prompt of m_w is computed once for both responses:

    [ m_w q ...... | y_w .... | y_l .... ][ m_l q ...... | y_w .... ][ next example ...
      0 .. P-1       P ..       P ..        0 .. P-1       P ..         positions

    who sees whom           m_w q   y_w   y_l   m_l q   y_w'
      m_w q                 causal
      y_w                   all     causal
      y_l                   all     -     causal
      m_l q                                     causal
      y_w' (after m_l)                          all     causal

The first token of *either* response is predicted by the last token of its prompt. 1,670 tokens per mDPO example of the
paper's size instead of 2,310, and no padding; measured gains stand in docs/results.md.
Attention takes no dense mask: on CUDA one call of torch's varlen_attn per layer, elsewhere one SDPA call per span.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from data import Example
from engine import head
from losses import Logps
from model import causal

TRIPLES = Logps._fields  # chosen (m_w, q, y_w), rejected (m_w, q, y_l), image_rejected (m_l, q, y_w)


class Span(NamedTuple):
    """Tokens [start, start + length) attend causally to themselves, after all of [prefix, prefix + prefix_length)."""

    start: int
    length: int
    prefix: int = 0
    prefix_length: int = 0


class SpanAttention:
    """One SDPA call per span; any device and dtype."""

    def __init__(self, spans: list[Span]):
        self.spans, self.masks = spans, {}

    def mask(self, s: Span, q: Tensor) -> Tensor:
        """(R, K) over the keys from the prefix's first to the span's last; one for all layers."""
        if s not in self.masks:
            own = s.start - s.prefix  # query i is key own + i: bottom-right, where SDPA's is_causal is top-left
            mask = torch.full((s.length, own + s.length), -torch.inf, dtype=q.dtype, device=q.device).triu(own + 1)
            mask[:, s.prefix_length : own] = -torch.inf  # the other response, between prompt and span
            self.masks[s] = mask
        return self.masks[s]

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q (1, H, T, D), k and v (1, Hkv, T, D) -> (1, H, T, D)."""
        out, gqa = [], q.shape[1] != k.shape[1]
        for s in self.spans:
            own = slice(s.start, s.start + s.length)
            if s.prefix_length:
                seen = slice(s.prefix, own.stop)  # a view: cheaper than copies of the prompt's keys and values
                args, mask = (q[:, :, own], k[:, :, seen], v[:, :, seen]), self.mask(s, q)
                out.append(F.scaled_dot_product_attention(*args, attn_mask=mask, enable_gqa=gqa))
            else:
                out.append(causal(q[:, :, own], k[:, :, own], v[:, :, own]))
        # spans lie end to end; joined as (1, T, H, D), the layout in which the heads of a token are neighbours
        return torch.cat([o.transpose(1, 2) for o in out], dim=1).transpose(1, 2)  # (1, H, T, D)


class VarlenAttention:
    """All spans in one flash call on CUDA, half precision; keys of a shared prompt are gathered again for y_l."""

    def __init__(self, spans: list[Span], device: torch.device):
        lengths = [(s.length, s.prefix_length + s.length) for s in spans]
        index = [torch.cat([torch.arange(s.prefix, s.prefix + s.prefix_length),
                            torch.arange(s.start, s.start + s.length)]) for s in spans]  # fmt: skip
        ends = torch.tensor([(0, 0), *lengths]).cumsum(0).to(device, torch.int32)  # (n + 1, 2)
        self.cu_q, self.cu_k = ends[:, 0].contiguous(), ends[:, 1].contiguous()
        self.max_q, self.max_k = (max(column) for column in zip(*lengths, strict=True))
        self.index = torch.cat(index).to(device)  # (T_k,)

    def arguments(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[tuple, dict]:
        """varlen_attn's arguments, those that torch 2.11 and later releases share (2.11 has no enable_gqa)."""
        g = q.shape[1] // k.shape[1]
        k, v = (x.repeat_interleave(g, dim=1) if g > 1 else x for x in (k, v))
        q, k, v = (x[0].transpose(0, 1) for x in (q, k, v))  # (1, H, T, D) -> (T, H, D)
        k, v = k.index_select(0, self.index), v.index_select(0, self.index)  # (T_k, H, D)
        # (-1, 0) is causal; with unequal lengths flash aligns it bottom-right, as the spans need it. cu_q and cu_k are
        # two tensors even where they are equal: given one for both, torch may take cuDNN, which aligns it top-left.
        return (q, k, v, self.cu_q, self.cu_k, self.max_q, self.max_k), {"window_size": (-1, 0)}

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        from torch.nn.attention.varlen import varlen_attn

        positional, keywords = self.arguments(q, k, v)
        return varlen_attn(*positional, **keywords).transpose(0, 1)[None]  # (T, H, D) -> (1, H, T, D)


class Packed(NamedTuple):
    """A micro-batch as one row of T tokens with S response tokens and M pictures."""

    input_ids: Tensor  # (1, T)
    positions: Tensor  # (1, T), a response's start where its prompt ended
    images: Tensor | None  # (M, 3, S, S) in reading order
    predict_from: Tensor  # (S,) the position that predicts each response token
    targets: Tensor  # (S,) the response tokens
    owner: Tensor  # (S,) which log-prob it belongs to: triple * B + example
    spans: list[Span]
    which: tuple[str, ...]  # the triples in it
    n: int  # B

    def to(self, device: torch.device) -> "Packed":
        moved = [t if t is None else t.to(device, non_blocking=True) for t in self[:6]]
        return Packed(*moved, *self[6:])


def groups(example: Example, which=TRIPLES) -> list[tuple[Tensor | None, list[tuple[str, Tensor]]]]:
    """[(picture, [(triple, response ids)])] of one example: m_w with both responses, m_l with the chosen one."""
    e = example
    all_groups = [(e.image, [("chosen", e.chosen), ("rejected", e.rejected)])]
    if e.image_rejected is not None:
        all_groups.append((e.image_rejected, [("image_rejected", e.chosen)]))
    wanted = [(picture, [r for r in responses if r[0] in which]) for picture, responses in all_groups]
    return [g for g in wanted if g[1]]


def pack(examples: list[Example], which=TRIPLES) -> Packed:
    ids, positions, pictures, spans, predict_from, targets, owner = [], [], [], [], [], [], []
    T = 0
    for b, example in enumerate(examples):
        for picture, responses in groups(example, which):
            start, P = T, len(example.prompt)
            ids.append(example.prompt)
            positions.append(torch.arange(P))
            pictures += [] if picture is None else [picture]
            T += P
            for i, (triple, y) in enumerate(responses):
                R = len(y)
                # the first response continues its prompt's causal span, the second looks back over the prompt
                spans.append(Span(start, P + R) if i == 0 else Span(T, R, start, P))
                predict_from += [torch.tensor([start + P - 1]), torch.arange(T, T + R - 1)]
                targets.append(y)
                owner.append(torch.full((R,), TRIPLES.index(triple) * len(examples) + b))
                ids.append(y)
                positions.append(torch.arange(P, P + R))
                T += R
    used = tuple(name for _, responses in groups(examples[0], which) for name, _ in responses)
    return Packed(
        torch.cat(ids)[None], torch.cat(positions)[None], torch.stack(pictures) if pictures else None,
        torch.cat(predict_from), torch.cat(targets), torch.cat(owner), spans, used, len(examples),
    )  # fmt: skip


def attention(packed: Packed, model) -> SpanAttention | VarlenAttention:
    if packed.input_ids.is_cuda and (model.lm_head.weight.dtype != torch.float32 or torch.is_autocast_enabled("cuda")):
        return VarlenAttention(packed.spans, packed.input_ids.device)
    return SpanAttention(packed.spans)


def packed_logps(model, packed: Packed) -> Logps:
    """The Logps of a packed micro-batch; a triple that is not in it is None."""
    attend = attention(packed, model)
    hidden = model.hidden(packed.input_ids, packed.images, packed.positions, attend)  # (1, T, C)
    scored = hidden[0, packed.predict_from]  # (S, C)
    token_logps = head.token_logps(scored, model.lm_head.weight, packed.targets)  # (S,)
    sums = token_logps.new_zeros(len(TRIPLES) * packed.n, dtype=torch.float64)  # float64: the order of a sum on a GPU
    sums = sums.index_add(0, packed.owner, token_logps.double()).float()  # (3B,)             is not fixed
    by_triple = sums.view(len(TRIPLES), packed.n)  # (3, B)
    return Logps(*(by_triple[i] if t in packed.which else None for i, t in enumerate(TRIPLES)))


def tokens_of(example: Example, which=TRIPLES) -> int:
    return sum(len(example.prompt) + sum(len(y) for _, y in responses) for _, responses in groups(example, which))


def split_by_tokens(examples: list[Example], budget: int) -> list[list[Example]]:
    """Micro-batches of at most `budget` packed tokens, or of one example that is longer: first fit, longest first."""
    rows: list[tuple[int, list[Example]]] = []
    for example in sorted(examples, key=tokens_of, reverse=True):
        size = tokens_of(example)
        for i, (used, row) in enumerate(rows):
            if used + size <= budget:
                rows[i] = (used + size, [*row, example])
                break
        else:
            rows.append((size, [example]))
    return [row for _, row in rows]

"""Answers from a model: batched greedy decoding with a KV cache, through the seams of model.py.

The cache is an `attend` per layer. Rows are right-padded: each row writes its next key and value over its own first free
slot, so padding is overwritten before anything could look at it, and positions are the row's own.
"""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from model import LLaVA, causal


class KVCache:
    """Keys and values of every layer, (B, Hkv, T_max, D) each."""

    def __init__(self, layers: int, slots: int):
        self.keys, self.values = [None] * layers, [None] * layers
        self.slots = slots
        self.positions = None  # (B, 1) where the current tokens are written; None: prefill, slots 0..T-1

    def attends(self) -> list:
        return [partial(self.attend, layer) for layer in range(len(self.keys))]

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if self.positions is None:
            T = k.shape[2]
            for store, new in ((self.keys, k), (self.values, v)):
                store[layer] = new.new_zeros(*new.shape[:2], self.slots, new.shape[3])  # (B, Hkv, T_max, D)
                store[layer][:, :, :T] = new
            return causal(q, k, v)
        rows = torch.arange(len(q), device=q.device)
        at = self.positions[:, 0]  # (B,)
        keys, values = self.keys[layer], self.values[layer]
        keys[rows, :, at], values[rows, :, at] = k[:, :, 0], v[:, :, 0]  # (B, Hkv, D) each
        visible = torch.arange(self.slots, device=q.device) <= self.positions  # (B, T_max)
        return F.scaled_dot_product_attention(
            q, keys, values, attn_mask=visible[:, None, None], enable_gqa=q.shape[1] != k.shape[1]
        )  # (B, H, 1, D)


@torch.no_grad()
def generate(model: LLaVA, prompts: list[Tensor], images: Tensor | None, max_new_tokens: int,
             temperature: float = 0.0, generator: torch.Generator | None = None) -> list[list[int]]:  # fmt: skip
    """Prompt ids (one 1-D tensor a row) and pictures (B, 3, S, S) -> new ids of each row, up to and with EOS.

    temperature 0 is greedy; above, tokens are drawn with `generator`.
    """
    c = model.config
    device = model.lm_head.weight.device
    lengths = torch.tensor([len(p) for p in prompts], device=device)  # (B,)
    input_ids = torch.nn.utils.rnn.pad_sequence(prompts, batch_first=True, padding_value=c.pad_id).to(device)  # (B, T)
    cache = KVCache(c.layers, int(lengths.max()) + max_new_tokens)
    hidden = model.hidden(input_ids, images, attend=cache.attends())  # (B, T, C)
    last = hidden[torch.arange(len(prompts), device=device), lengths - 1]  # (B, C)
    answers, done = [], torch.zeros(len(prompts), dtype=torch.bool, device=device)
    for i in range(max_new_tokens):
        logits = model.lm_head(last).float()  # (B, V)
        if temperature:
            tokens = torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator)[:, 0]  # (B,)
        else:
            tokens = logits.argmax(-1)  # (B,)
        answers.append(tokens)
        done |= tokens == c.eos_id
        if done.all() or i == max_new_tokens - 1:
            break
        cache.positions = (lengths + i)[:, None]  # (B, 1)
        last = model.hidden(tokens[:, None], None, cache.positions, cache.attends())[:, 0]  # (B, 1, C) -> (B, C)
    rows = torch.stack(answers, dim=1).tolist()  # (B, new)
    return [row[: row.index(c.eos_id) + 1] if c.eos_id in row else row for row in rows]

"""The cached reference against the live one."""

import pytest
import torch

from bases.checkpoint import load_model
from bases.tokenizer import load_processor
from data import PairData
from engine import packing, reference
from engine.reference import CachedReference
from formats.readers import read_pairs
from lora import add_lora, lora_disabled, lora_modules


@pytest.fixture
def world(tiny_base, pairs_file):
    """A tiny model with a non-zero adapter, and its data set with crops."""
    torch.manual_seed(0)
    model = load_model(tiny_base)
    data = PairData(read_pairs(pairs_file)[0], load_processor(tiny_base, model.config), "crop")
    add_lora(model, r=4, alpha=8)
    for m in lora_modules(model).values():
        torch.nn.init.normal_(m.lora_B, std=0.1)
    return model, data


def packed(*examples):
    """A micro-batch as the loop makes it, pictures normalised on the way to the device."""
    return packing.pack(list(examples)).to(torch.device("cpu"))


@torch.no_grad()
def adapter_off(model, batch):
    with lora_disabled(model):
        return packing.packed_logps(model, batch)


def test_cached_equals_live(world):
    model, data = world
    cached = CachedReference()
    batch = packed(*(data[(0, i)] for i in range(4)))
    for _ in range(2):  # scored, then looked up
        for a, b in zip(cached(model, batch), adapter_off(model, batch), strict=True):
            assert torch.equal(a, b)
    # epoch 1 has other crops: texts from the cache, m_l scored in a row of its own
    batch = packed(*(data[(1, i)] for i in range(4)))
    for a, b in zip(cached(model, batch), adapter_off(model, batch), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_each_text_and_each_draw_is_scored_once(world, monkeypatch):
    model, data = world
    calls, score = [], packing.packed_logps
    monkeypatch.setattr(reference, "packed_logps", lambda m, b: calls.append(b.which) or score(m, b))
    cached = CachedReference()
    for epoch in (0, 1, 1):
        cached(model, packed(data[(epoch, 0)]))
    assert calls == [["chosen", "rejected", "image_rejected"], ["image_rejected"]]  # all, epoch 1's crop, nothing
    data.fresh_every_epoch = False
    calls.clear()
    cached = CachedReference()
    for epoch in (0, 1, 2):
        cached(model, packed(data[(epoch, 0)]))
    assert calls == [["chosen", "rejected", "image_rejected"]]


def test_a_row_beside_unknown_ones_is_looked_up_right(world):
    """Row 2 is known, row 3 is not; each gets its own numbers, in the order of the batch."""
    model, data = world
    cached = CachedReference()
    cached(model, packed(data[(0, 2)]))
    batch = packed(data[(0, 3)], data[(0, 2)])
    for a, b in zip(cached(model, batch), adapter_off(model, batch), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_without_m_l_nothing_of_it_is_kept(world):
    model, data = world
    data.strategy = None
    cached = CachedReference()
    assert cached(model, packed(data[(0, 0)])).image_rejected is None
    assert len(cached.text) == 1 and not cached.image

"""A toy world that is made in a second: the same code, sizes at which nothing is learned."""

import pytest
import torch

import toy

FEW = dict(steps=2, batch=8)
TINY = toy.WORLD | dict(
    scenes=64,
    tower=toy.WORLD["tower"] | FEW,
    true_captions=toy.WORLD["true_captions"] | FEW,
    guessed_captions=toy.WORLD["guessed_captions"] | FEW,
    pairs=9,
    held_out_pairs=4,
    candidates=3,
    test_scenes=6,
    test_samples=2,
)


def shrink(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(toy, "WORLD", TINY)
    patch.setattr(toy, "SETTINGS", toy.SETTINGS | dict(epochs=1, batch=5))
    patch.setattr(toy, "DEVICE", torch.device("cpu"))

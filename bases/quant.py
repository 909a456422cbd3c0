"""Bases in 4 and 8 bits: the decoder's frozen linears are kept small and rebuilt in the model's dtype while they run.

    nf4    NormalFloat 4 (QLoRA, Dettmers et al. 2023, section 3): blocks of 64 weights in reading order, each divided
           by its largest magnitude and rounded to the nearest of 16 levels; two codes a byte, a float32 scale a block:
           4 + 32 / 64 = 4.5 bits a weight
    int8   a scale a row: round(127 w / max |w|); 8 bits a weight and 32 a row

Unlike the files of engine/ this changes numbers, of policy and reference alike, so it is a base of its own. LoRA,
embedding, head, projector and vision tower stay as they are.

Deviations from QLoRA
1. No double quantisation: the scales stay float32, 0.5 bits a weight instead of 0.127.
2. The weight is rebuilt in the backward pass too, not kept from the forward pass.
Codes and scales equal bitsandbytes' bit for bit (tests/test_bases_quant.py).
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

KINDS = ("nf4", "int8")
BLOCK = 64
AT_ONCE = 2**16  # blocks, so that the work takes little memory beside a large weight
# Quantiles of N(0, 1), eight for the negative side, zero, seven for the positive, divided by the largest (QLoRA, E).
NF4_LEVELS = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip


def quantise_nf4(weight: Tensor) -> tuple[Tensor, Tensor]:
    """(out, in) -> codes (n / 2,) uint8, the first of two weights in the high half, and scales (n / 64,) float32."""
    flat = weight.flatten()  # (out * in,)
    if len(flat) % BLOCK:
        flat = F.pad(flat, (0, -len(flat) % BLOCK))  # (n,)
    parts = [quantise_blocks(blocks) for blocks in flat.view(-1, BLOCK).split(AT_ONCE)]  # (n,) -> (n / 64, 64)
    return torch.cat([codes for codes, _ in parts]), torch.cat([scales for _, scales in parts])


def quantise_blocks(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """(b, 64) -> codes (32 b,) uint8 and scales (b,)."""
    levels = torch.tensor(NF4_LEVELS, device=blocks.device)
    midpoints = (levels[:-1] + levels[1:]) / 2
    blocks = blocks.float()
    scales = blocks.abs().amax(1)
    scaled = blocks * (1 / scales.clamp(min=1e-38))[:, None]  # in -1 .. 1; a block of zeros stays 0
    codes = torch.bucketize(scaled, midpoints, out_int32=True).to(torch.uint8).flatten()  # (64 b,) 0 .. 15
    return codes[0::2] << 4 | codes[1::2], scales


def quantise_int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """(out, in) -> codes (out, in) int8 and scales (out, 1) float32."""
    scales = weight.float().abs().amax(1, keepdim=True) / 127
    codes = torch.round(weight.float() / scales.clamp(min=1e-38))
    return codes.to(torch.int8), scales


def pairs_of_levels() -> Tensor:
    """(256, 2): the two levels that a byte of codes stands for. One look-up a byte, not two."""
    levels = torch.tensor(NF4_LEVELS)
    byte = torch.arange(256)
    return torch.stack([levels[byte >> 4], levels[byte & 15]], dim=1)


def dequantise(codes: Tensor, scales: Tensor, pairs: Tensor, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """Codes and scales of either kind -> shape (out, in) in the model's dtype."""
    if codes.dtype == torch.int8:
        return (codes.float() * scales).to(dtype)
    blocks = F.embedding(codes.int(), pairs).view(-1, BLOCK)  # (n / 2,) -> (n / 2, 2) -> (n / 64, 64)
    flat = (blocks * scales[:, None]).flatten()  # (n,), the last block padded
    return flat[: shape[0] * shape[1]].view(shape).to(dtype)  # (out, in)


class QuantLinear(nn.Module):
    """A frozen Linear whose weight is codes and scales. x (..., in) -> (..., out)."""

    def __init__(self, linear: nn.Linear, kind: str, dtype: torch.dtype):
        super().__init__()
        assert kind in KINDS, kind
        self.in_features = linear.in_features
        self.out_features = linear.out_features
        self.kind = kind
        self.dtype = dtype
        self.bias = linear.bias

    def quantise(self, weight: Tensor) -> None:
        """Takes the codes of `weight` (out, in), on its device."""
        codes, scales = quantise_nf4(weight) if self.kind == "nf4" else quantise_int8(weight)
        self.weight = nn.Parameter(codes, requires_grad=False)
        self.scales = nn.Parameter(scales, requires_grad=False)
        self.register_buffer("pairs", pairs_of_levels().to(weight.device), persistent=False)

    def dequantised(self) -> Tensor:
        """The weight (out, in) that it computes with."""
        return dequantise(self.weight, self.scales, self.pairs, (self.out_features, self.in_features), self.dtype)

    def forward(self, x: Tensor) -> Tensor:
        """F.linear(x, self.dequantised(), self.bias), which would keep the rebuilt weight for the backward pass."""
        shape = (self.out_features, self.in_features)
        return QuantMatmul.apply(x, self.weight, self.scales, self.pairs, self.bias, shape, self.dtype)


class QuantMatmul(torch.autograd.Function):
    """y = x W^T + b, dL/dx = dL/dy W; W is rebuilt in both passes and kept in neither."""

    @staticmethod
    def forward(ctx, x, codes, scales, pairs, bias, shape, dtype):
        ctx.save_for_backward(codes, scales, pairs)
        ctx.shape = shape
        ctx.dtype = dtype
        W = dequantise(codes, scales, pairs, shape, dtype)  # (out, in)
        return F.linear(x, W, bias)  # (..., in) -> (..., out)

    @staticmethod
    def backward(ctx, dy):
        codes, scales, pairs = ctx.saved_tensors
        W = dequantise(codes, scales, pairs, ctx.shape, ctx.dtype)  # (out, in)
        dx = dy.to(ctx.dtype) @ W  # (..., out) -> (..., in); autograd casts it to x's dtype
        return dx, None, None, None, None, None, None


def kind_of(model: nn.Module) -> str | None:
    """Of KINDS, where the model's linears are quantised."""
    return next((m.kind for m in model.modules() if isinstance(m, QuantLinear)), None)


def swap_linears(model: nn.Module, kind: str, dtype: torch.dtype) -> None:
    """Every Linear of the decoder's layers becomes a QuantLinear that waits for its weight."""
    for layer in model.language_model.layers:
        for parent in list(layer.modules()):
            for name, child in list(parent.named_children()):
                if isinstance(child, nn.Linear):
                    setattr(parent, name, QuantLinear(child, kind, dtype))

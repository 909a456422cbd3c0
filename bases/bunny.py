"""Bunny-v1.0-3B by hand, the mDPO paper's second base: SigLIP so400m -> two-layer projector -> Phi-2.

Assembled like LLaVA (model.py) with the same three seams; only the tower and the block differ.
  SigLIP: no class token, no pre-LN, tanh GELU, a bias on the patch convolution, 384 px in patches of 14 (6 left over)
  Phi-2:  one LayerNorm feeds attention and MLP side by side, biases everywhere but on the head, rotary on 32 of 80 dims

Deviations from the released mDPO code
1. Its trainer tokenizes a response without the blank that Bunny was tuned with ("ASSISTANT:The"). Here it is kept
   (data.BUNNY); `BUNNY_RELEASED` reproduces the release (`train.py --bunny-template released`).
2. The checkpoint's own vision tensors are used; the release ignores them and loads SigLIP from its own repository.
"""

from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model import Attend, LLaVA, VisionBlock, VisionConfig, join_heads, rotate, split_heads

SO400M = VisionConfig(
    width=1152,
    layers=27,
    heads=16,
    ffn=4304,
    image_size=384,
    patch=14,
    eps=1e-6,
)


@dataclass(frozen=True)
class Config:
    vision: VisionConfig = SO400M
    vocab: int = 50295
    width: int = 2560
    layers: int = 32
    heads: int = 32
    kv_heads: int = 32
    ffn: int = 10240
    eps: float = 1e-5
    rope_theta: float = 10000.0
    rotary_factor: float = 0.4
    image_id: int = -200  # the vocabulary has no row for <image>
    pad_id: int = 50256
    bos_id: int = 50256  # never written: no BOS in Bunny's prompts
    eos_id: int = 50256

    @property
    def head_dim(self) -> int:
        return self.width // self.heads

    @property
    def rope_dim(self) -> int:
        return int(self.rotary_factor * self.head_dim)  # 32 of 80


class SiglipTower(nn.Module):
    """SigLIP up to its last but one layer, no post_layernorm: (B, 3, S, S) -> (B, N, Cv)."""

    def __init__(self, c: VisionConfig):
        super().__init__()
        self.patch_embedding = nn.Conv2d(3, c.width, c.patch, stride=c.patch)  # drops the pixels left over
        self.position_embedding = nn.Embedding(c.patches, c.width)
        act = partial(F.gelu, approximate="tanh")
        self.layers = nn.ModuleList(VisionBlock(c, act) for _ in range(c.layers_run))

    def forward(self, images: Tensor) -> Tensor:
        x = self.patch_embedding(images).flatten(2).transpose(1, 2)  # (B, Cv, h, w) -> (B, N, Cv), row by row
        x = x + self.position_embedding.weight.to(x.dtype)
        for layer in self.layers:
            x = layer(x)
        return x


class PhiAttention(nn.Module):
    def __init__(self, c: Config):
        super().__init__()
        self.head_dim = c.head_dim
        self.rope_dim = c.rope_dim
        self.q_proj = nn.Linear(c.width, c.heads * c.head_dim)
        self.k_proj = nn.Linear(c.width, c.kv_heads * c.head_dim)
        self.v_proj = nn.Linear(c.width, c.kv_heads * c.head_dim)
        self.dense = nn.Linear(c.heads * c.head_dim, c.width)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], attend: Attend) -> Tensor:
        q = self.turn(split_heads(self.q_proj(x), self.head_dim), rope)  # (B, H, T, D)
        k = self.turn(split_heads(self.k_proj(x), self.head_dim), rope)  # (B, Hkv, T, D)
        v = split_heads(self.v_proj(x), self.head_dim)  # (B, Hkv, T, D)
        return self.dense(join_heads(attend(q, k, v)))  # (B, T, C)

    def turn(self, x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
        """Rotary embedding on the first rope_dim dimensions of a head, the others pass. x (B, H, T, D)."""
        cos, sin = rope
        turned = rotate(x[..., : self.rope_dim], cos, sin)
        return torch.cat([turned, x[..., self.rope_dim :]], dim=-1)  # (B, H, T, D)


class PhiMLP(nn.Module):
    def __init__(self, c: Config):
        super().__init__()
        self.fc1 = nn.Linear(c.width, c.ffn)
        self.fc2 = nn.Linear(c.ffn, c.width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class PhiBlock(nn.Module):
    def __init__(self, c: Config):
        super().__init__()
        self.input_layernorm = nn.LayerNorm(c.width, c.eps)
        self.self_attn = PhiAttention(c)
        self.mlp = PhiMLP(c)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], attend: Attend) -> Tensor:
        h = self.input_layernorm(x).to(x.dtype)  # autocast leaves it in float32, which each linear would cast again
        return x + self.self_attn(h, rope, attend) + self.mlp(h)


class Bunny(LLaVA):
    """(B, T) ids and (B, 3, 384, 384) pictures -> logits (B, T, V). The head has no bias, unlike plain Phi-2's."""

    def __init__(self, config: Config):
        super().__init__(config, SiglipTower, PhiBlock, nn.LayerNorm)

"""LLaVA-1.5 by hand: CLIP ViT-L/14-336 -> two-layer projector -> Llama decoder.

    images (B, 3, S, S) -> VisionTower (B, N, Cv) -> mm_projector (B, N, C) --scatter--+
    input_ids (B, T) with N placeholders per picture -> embed_tokens (B, T, C) --------+-> Decoder (B, T, C) -> lm_head

The data expands `<image>` to N placeholder ids, the model only writes features over them: it never changes a length.
Three seams let other files go faster without a second decoder:
  attend     what attention is: `attend(q, k, v) -> out`, one for all layers or a list with one per layer
  positions  (B, T) rotary positions, default 0..T-1
  hidden()   the final hidden states; the head is applied outside it
This file knows nothing of LoRA, losses, packing or caches, and draws no random numbers. There is no dropout.

Deviations from LLaVA-1.5: none in the arithmetic. The vision layers after the selected one are not built (layer 23 of
0..23 and post_layernorm never influence the output), and dropout, which DPO training switches off, does not exist.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


@dataclass(frozen=True)
class VisionConfig:
    width: int = 1024
    layers: int = 24  # of the checkpoint; `feature_layer` says how many of them run
    heads: int = 16
    ffn: int = 4096
    image_size: int = 336
    patch: int = 14
    eps: float = 1e-5
    feature_layer: int = -2  # hidden_states[-2]: after all layers but the last

    @property
    def patches(self) -> int:
        return (self.image_size // self.patch) ** 2

    @property
    def layers_run(self) -> int:
        """hidden_states[i] is what i layers leave, i = 0 .. layers; counted from the end, -1 is all of them."""
        if self.feature_layer >= 0:
            return self.feature_layer
        return self.layers + 1 + self.feature_layer


@dataclass(frozen=True)
class Config:
    vision: VisionConfig = VisionConfig()
    vocab: int = 32064  # 32,000 Llama pieces, <image>, <pad>, padded up to a multiple of 64
    width: int = 4096
    layers: int = 32
    heads: int = 32
    kv_heads: int = 32
    ffn: int = 11008
    eps: float = 1e-5
    rope_theta: float = 10000.0
    image_id: int = 32000
    pad_id: int = 32001
    bos_id: int = 1
    eos_id: int = 2

    @property
    def head_dim(self) -> int:
        return self.width // self.heads

    @property
    def rope_dim(self) -> int:
        return self.head_dim  # every dimension of a head turns


BASES = {
    "llava-1.5-7b": Config(),
    "llava-1.5-13b": Config(
        width=5120,
        layers=40,
        heads=40,
        kv_heads=40,
        ffn=13824,
    ),
    "toy": Config(  # the world of toy.py: 48 px pictures, 9 patches, a vocabulary of words
        vision=VisionConfig(
            width=64,
            layers=4,
            heads=4,
            ffn=256,
            image_size=48,
            patch=16,
        ),
        vocab=128,
        width=96,
        layers=2,
        heads=4,
        kv_heads=4,
        ffn=256,
        image_id=126,
        pad_id=127,
    ),
}

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


def split_heads(x: Tensor, head_dim: int) -> Tensor:
    """(B, T, H*D) -> (B, H, T, D); k and v may have fewer heads than q."""
    B, T, _ = x.shape
    return x.view(B, T, -1, head_dim).transpose(1, 2)  # (B, T, H*D) -> (B, T, H, D) -> (B, H, T, D)


def join_heads(x: Tensor) -> Tensor:
    """(B, H, T, D) -> (B, T, H*D)."""
    return x.transpose(1, 2).flatten(2)  # (B, H, T, D) -> (B, T, H, D) -> (B, T, H*D)


def causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Plain causal attention. q (B, H, T, D), k and v (B, Hkv, T, D) -> (B, H, T, D).

    Right padding needs no mask: no token sees what comes after it.
    """
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])


# ---- vision: CLIP ViT, pre-LN --------------------------------------------------------------------------------------


class VisionAttention(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.head_dim = width // heads
        self.q_proj = nn.Linear(width, width)
        self.k_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.out_proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q = split_heads(self.q_proj(x), self.head_dim)  # (B, H, N, D)
        k = split_heads(self.k_proj(x), self.head_dim)  # (B, H, N, D)
        v = split_heads(self.v_proj(x), self.head_dim)  # (B, H, N, D)
        out = F.scaled_dot_product_attention(q, k, v)  # (B, H, N, D); every patch sees every patch
        return self.out_proj(join_heads(out))  # (B, N, C)


def quick_gelu(x: Tensor) -> Tensor:
    """OpenAI CLIP's activation, x * sigma(1.702 x); not the GELU that open_clip's own models use."""
    return x * torch.sigmoid(1.702 * x)


class VisionMLP(nn.Module):
    def __init__(self, width: int, ffn: int, act: Callable[[Tensor], Tensor]):
        super().__init__()
        self.fc1 = nn.Linear(width, ffn)
        self.fc2 = nn.Linear(ffn, width)
        self.act = act

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


class VisionBlock(nn.Module):
    def __init__(self, c: VisionConfig, act: Callable[[Tensor], Tensor] = quick_gelu):
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(c.width, c.eps)
        self.self_attn = VisionAttention(c.width, c.heads)
        self.layer_norm2 = nn.LayerNorm(c.width, c.eps)
        self.mlp = VisionMLP(c.width, c.ffn, act)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class VisionTower(nn.Module):
    """CLIP ViT up to the selected layer, class token dropped: (B, 3, S, S) -> (B, N, Cv)."""

    def __init__(self, c: VisionConfig):
        super().__init__()
        self.class_embedding = nn.Parameter(torch.zeros(c.width))
        self.patch_embedding = nn.Conv2d(3, c.width, c.patch, stride=c.patch, bias=False)
        self.position_embedding = nn.Embedding(c.patches + 1, c.width)  # + 1: the class token
        self.pre_layrnorm = nn.LayerNorm(c.width, c.eps)  # the checkpoints' own spelling
        self.layers = nn.ModuleList(VisionBlock(c) for _ in range(c.layers_run))

    def forward(self, images: Tensor) -> Tensor:
        x = self.patch_embedding(images).flatten(2).transpose(1, 2)  # (B, Cv, h, w) -> (B, N, Cv), row by row
        cls = self.class_embedding.to(x.dtype).expand(len(x), 1, -1)  # (B, 1, Cv)
        x = torch.cat([cls, x], dim=1) + self.position_embedding.weight.to(x.dtype)  # (B, 1+N, Cv)
        x = self.pre_layrnorm(x)
        for layer in self.layers:
            x = layer(x)
        return x[:, 1:]  # (B, N, Cv): LLaVA's "patch" features, without the class token


# ---- language: Llama -----------------------------------------------------------------------------------------------


class RMSNorm(nn.Module):
    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        h = x.float()  # the mean of squares in float32, whatever the model's dtype
        h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * h.to(x.dtype)


def rope_table(positions: Tensor, dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """cos and sin of t * theta^(-2i/dim) for positions (B, T): two (B, 1, T, dim) float32 tables."""
    freqs = theta ** (-torch.arange(0, dim, 2, device=positions.device, dtype=torch.float32) / dim)  # (dim/2,)
    angles = positions[:, None, :, None].float() * freqs  # (B, 1, T, dim/2)
    angles = torch.cat([angles, angles], dim=-1)  # (B, 1, T, dim): half-split, i is paired with i + dim/2
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of x (B, H, T, D), half-split: (a, b) -> (a cos - b sin, b cos + a sin)."""
    a, b = x.chunk(2, dim=-1)
    return x * cos.to(x.dtype) + torch.cat([-b, a], dim=-1) * sin.to(x.dtype)


class Attention(nn.Module):
    def __init__(self, c: Config):
        super().__init__()
        self.head_dim = c.head_dim
        self.q_proj = nn.Linear(c.width, c.heads * c.head_dim, bias=False)
        self.k_proj = nn.Linear(c.width, c.kv_heads * c.head_dim, bias=False)
        self.v_proj = nn.Linear(c.width, c.kv_heads * c.head_dim, bias=False)
        self.o_proj = nn.Linear(c.heads * c.head_dim, c.width, bias=False)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], attend: Attend) -> Tensor:
        q = split_heads(self.q_proj(x), self.head_dim)  # (B, H, T, D)
        k = split_heads(self.k_proj(x), self.head_dim)  # (B, Hkv, T, D); kv head j serves query heads j*g..j*g+g-1
        v = split_heads(self.v_proj(x), self.head_dim)  # (B, Hkv, T, D)
        cos, sin = rope
        out = attend(rotate(q, cos, sin), rotate(k, cos, sin), v)  # (B, H, T, D)
        return self.o_proj(join_heads(out))  # (B, T, C)


class MLP(nn.Module):
    def __init__(self, c: Config):
        super().__init__()
        self.gate_proj = nn.Linear(c.width, c.ffn, bias=False)
        self.up_proj = nn.Linear(c.width, c.ffn, bias=False)
        self.down_proj = nn.Linear(c.ffn, c.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))  # SwiGLU


class Block(nn.Module):
    def __init__(self, c: Config):
        super().__init__()
        self.input_layernorm = RMSNorm(c.width, c.eps)
        self.self_attn = Attention(c)
        self.post_attention_layernorm = RMSNorm(c.width, c.eps)
        self.mlp = MLP(c)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], attend: Attend) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), rope, attend)
        return x + self.mlp(self.post_attention_layernorm(x))


class Decoder(nn.Module):
    """Token embedding, blocks, final norm. The first `checkpointed` layers are recomputed in the backward pass."""

    def __init__(self, c: Config, block: type[nn.Module] = Block, norm: type[nn.Module] = RMSNorm):
        super().__init__()
        self.embed_tokens = nn.Embedding(c.vocab, c.width)
        self.layers = nn.ModuleList(block(c) for _ in range(c.layers))
        self.norm = norm(c.width, c.eps)
        self.rope_dim = c.rope_dim
        self.rope_theta = c.rope_theta
        self.checkpointed = 0

    def forward(self, x: Tensor, positions: Tensor, attend: Attend | list[Attend]) -> Tensor:
        rope = rope_table(positions, self.rope_dim, self.rope_theta)
        attends = attend if isinstance(attend, list) else [attend] * len(self.layers)
        for i, (layer, attend_i) in enumerate(zip(self.layers, attends, strict=True)):
            if i < self.checkpointed and torch.is_grad_enabled():
                x = checkpoint(layer, x, rope, attend_i, use_reentrant=False)
            else:
                x = layer(x, rope, attend_i)
        return self.norm(x)


# ---- LLaVA ---------------------------------------------------------------------------------------------------------


class LLaVA(nn.Module):
    """Tower, projector, decoder, head. Bunny (bases/bunny.py) is the same with its own tower, block and norm."""

    source = "weights made here"  # or the folder or hub repository that they were loaded from

    def __init__(
        self,
        config: Config,
        tower: type[nn.Module] = VisionTower,
        block: type[nn.Module] = Block,
        norm: type[nn.Module] = RMSNorm,
    ):
        super().__init__()
        c = self.config = config
        self.vision_tower = tower(c.vision)
        self.mm_projector = nn.Sequential(nn.Linear(c.vision.width, c.width), nn.GELU(), nn.Linear(c.width, c.width))
        self.language_model = Decoder(c, block, norm)
        self.lm_head = nn.Linear(c.width, c.vocab, bias=False)

    def image_features(self, images: Tensor) -> Tensor:
        """(B, 3, S, S) prepared pictures -> (B, N, C) what the decoder reads. The tower is frozen, no gradient."""
        with torch.autocast(images.device.type, enabled=False):  # training reads what answering reads
            with torch.no_grad():
                features = self.vision_tower(images.to(self.mm_projector[0].weight.dtype))  # (B, N, Cv)
            return self.mm_projector(features)  # (B, N, C)

    def embed(self, input_ids: Tensor, features: Tensor | None) -> Tensor:
        """(B, T) ids, and (M, N, C) features written over the placeholders in reading order -> (B, T, C)."""
        is_image = input_ids == self.config.image_id  # (B, T)
        x = self.language_model.embed_tokens(input_ids.masked_fill(is_image, 0))  # (B, T, C); the id may be outside V
        slots = is_image.sum()
        given = 0 if features is None else features.shape[0] * features.shape[1]
        if slots.is_cpu:
            assert slots == given, f"{slots} image placeholders in input_ids, {given} image features"
        else:  # by the GPU itself: the host would have to wait for all that is still to be computed before this
            torch._assert_async(slots == given)
        if features is None:
            return x
        return x.masked_scatter(is_image[..., None], features.to(x.dtype))  # (B, T, 1) mask over (B, T, C)

    def hidden(
        self,
        input_ids: Tensor,
        images: Tensor | None,
        positions: Tensor | None = None,
        attend: Attend | list[Attend] = causal,
    ) -> Tensor:
        """Final hidden states (B, T, C), after the last norm, before the head; images None: no tower is run."""
        if positions is None:
            positions = torch.arange(input_ids.shape[1], device=input_ids.device)[None]  # (1, T)
        features = None if images is None else self.image_features(images)
        return self.language_model(self.embed(input_ids, features), positions, attend)

    def forward(self, input_ids: Tensor, images: Tensor | None) -> Tensor:
        """input_ids (B, T) with placeholders expanded, images (B, 3, S, S) or None -> logits (B, T, V)."""
        return self.lm_head(self.hidden(input_ids, images))

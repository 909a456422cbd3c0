"""Bunny-v1.0-3B by hand, the mDPO paper's second base: SigLIP so400m -> two-layer projector -> Phi-2.

Assembled like LLaVA (model.py) with the same three seams; only the tower and the block differ.
  SigLIP: no class token, no pre-LN, tanh GELU, a bias on the patch convolution, 384 px in patches of 14 (6 left over)
  Phi-2:  one LayerNorm feeds attention and MLP side by side, biases everywhere but on the head, rotary on 32 of 80 dims

Deviations from the released mDPO code
1. Its trainer tokenizes a response without the blank that Bunny was tuned with ("ASSISTANT:The"). Here it is kept
   (`TEMPLATE`); `BUNNY_RELEASED` reproduces the release (`train.py --bunny-template released`).
2. The checkpoint's own vision tensors are used; the release ignores them and loads SigLIP from its own repository.
"""

from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model import Attend, Decoder, LLaVA, VisionBlock, VisionConfig, rotate


@dataclass(frozen=True)
class Config:
    vision: VisionConfig = VisionConfig(1152, 27, 16, 4304, 384, 14, 1e-6)
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


def read_config(c: dict, vision_config, vision: dict | None) -> Config:
    """A bunny-phi config.json; it holds no vision sizes, those are so400m's unless a SigLIP config is given."""
    d = Config()
    v = vision or next((v for k, v in c.items() if "vision_config" in k), {})
    if c.get("hidden_act", "gelu_new") != "gelu_new" or c.get("qk_layernorm") or c.get("tie_word_embeddings"):
        raise SystemExit(
            "config.json: a bunny-phi variant that is not Bunny-v1.0-3B's (hidden_act, qk_layernorm, tying)"
        )
    heads = c.get("num_attention_heads", d.heads)
    return Config(
        vision_config(v, d.vision), c.get("vocab_size", d.vocab), c.get("hidden_size", d.width),
        c.get("num_hidden_layers", d.layers), heads, c.get("num_key_value_heads") or heads,
        c.get("intermediate_size", d.ffn), c.get("layer_norm_eps", d.eps), c.get("rope_theta", d.rope_theta),
        c.get("partial_rotary_factor", d.rotary_factor), d.image_id, *(c.get(f"{t}_token_id", d.eos_id)
                                                                       for t in ("pad", "bos", "eos")),
    )  # fmt: skip


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
        self.head_dim, self.rope_dim = c.head_dim, c.rope_dim
        self.q_proj = nn.Linear(c.width, c.heads * c.head_dim)
        self.k_proj = nn.Linear(c.width, c.kv_heads * c.head_dim)
        self.v_proj = nn.Linear(c.width, c.kv_heads * c.head_dim)
        self.dense = nn.Linear(c.heads * c.head_dim, c.width)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], attend: Attend) -> Tensor:
        B, T, _ = x.shape
        q, k, v = (
            p(x).view(B, T, -1, self.head_dim).transpose(1, 2)  # (B, T, H*D) -> (B, H, T, D)
            for p in (self.q_proj, self.k_proj, self.v_proj)
        )
        r = self.rope_dim  # the first r dims turn, the others pass
        q, k = (torch.cat([rotate(x[..., :r], *rope), x[..., r:]], dim=-1) for x in (q, k))  # (B, H, T, D)
        return self.dense(attend(q, k, v).transpose(1, 2).reshape(B, T, -1))  # (B, H, T, D) -> (B, T, C)


class PhiMLP(nn.Module):
    def __init__(self, c: Config):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(c.width, c.ffn), nn.Linear(c.ffn, c.width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class PhiBlock(nn.Module):
    def __init__(self, c: Config):
        super().__init__()
        self.input_layernorm = nn.LayerNorm(c.width, c.eps)
        self.self_attn = PhiAttention(c)
        self.mlp = PhiMLP(c)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], attend: Attend) -> Tensor:
        h = self.input_layernorm(x)
        return x + self.self_attn(h, rope, attend) + self.mlp(h)


class Bunny(LLaVA):
    lora_targets = ("q_proj", "k_proj", "v_proj", "dense", "fc1", "fc2")
    lora_spelling = "original"  # its code has no other

    def __init__(self, config: Config):
        nn.Module.__init__(self)
        c = self.config = config
        self.vision_tower = SiglipTower(c.vision)
        self.mm_projector = nn.Sequential(nn.Linear(c.vision.width, c.width), nn.GELU(), nn.Linear(c.width, c.width))
        self.language_model = Decoder(c, PhiBlock, nn.LayerNorm(c.width, c.eps))
        self.lm_head = nn.Linear(c.width, c.vocab, bias=False)  # unlike plain Phi-2's

"""LoRA (Hu et al. 2021) by hand: y = W x + s B A x, with s = alpha / r (or alpha / sqrt(r) for rsLoRA).

The reference model of DPO is not a second model: it is the same weights with the adapter off,
    with lora_disabled(model): ...
(mDPO 2.1: pi_ref is the model training starts from; B starts at zero, so policy and reference start equal.)

Deviations from the papers' released code
1. No LoRA dropout: both releases set 0.05 and their trainer then zeroes every dropout; here it does not exist.
2. A is drawn from a generator seeded in the call, not from the global state.

Adapters on the disk are PEFT's: bases/adapter.py.
"""

import math
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# The linears that are trained: these of every decoder layer (Llama; Bunny's are in bases/architectures.py).
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


class LoRALinear(nn.Module):
    """A frozen Linear with a low-rank update beside it. x (..., in) -> (..., out)."""

    def __init__(self, base: nn.Linear, r: int, scaling: float, generator: torch.Generator):
        super().__init__()
        self.base = base
        self.scaling = scaling
        self.enabled = True
        A = torch.empty(r, base.in_features)
        bound = 1 / math.sqrt(base.in_features)  # kaiming_uniform(a = sqrt 5), as nn.Linear and PEFT
        A.uniform_(-bound, bound, generator=generator)
        self.lora_A = nn.Parameter(A.to(base.weight.device))  # (r, in) float32
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, r, device=base.weight.device))  # (out, r) float32

    def forward(self, x: Tensor) -> Tensor:
        """y = W x + s B A x, or W x alone for the reference."""
        Wx = self.base(x)  # (..., in) -> (..., out)
        if not self.enabled:
            return Wx
        if not torch.is_autocast_enabled(x.device.type):  # under it A and B are cast instead: x is shared, not copied
            x = x.to(self.lora_A.dtype)
        sAx = self.scaling * F.linear(x, self.lora_A)  # (..., in) -> (..., r); scaled here, where it is small
        BsAx = F.linear(sAx, self.lora_B)  # (..., r) -> (..., out)
        return Wx.add_(BsAx)  # in place: nobody else reads Wx


def scaling_of(r: int, alpha: float, rslora: bool = False) -> float:
    """s: alpha / r, or alpha / sqrt(r) for rsLoRA."""
    return alpha / math.sqrt(r) if rslora else alpha / r


def add_lora(
    model: nn.Module,
    r: int = 64,
    alpha: float = 128,
    rslora: bool = False,
    seed: int = 0,
    targets: tuple[str, ...] = TARGETS,
) -> list[nn.Parameter]:
    """Wraps the target linears of every decoder layer, freezes all else, returns the adapter's parameters.

    r 64, alpha 128: mDPO 4.1. Not the head, the projector or the vision tower (whose q_proj has the same name).
    """
    assert not lora_modules(model), "add_lora: the model has a LoRA already"
    generator = torch.Generator().manual_seed(seed)
    model.requires_grad_(False)
    scaling = scaling_of(r, alpha, rslora)
    wrapped = set()
    for layer in model.language_model.layers:
        for parent in list(layer.modules()):
            for name, child in list(parent.named_children()):
                if name in targets:
                    setattr(parent, name, LoRALinear(child, r, scaling, generator))
                    wrapped.add(name)
    assert wrapped == set(targets), f"add_lora: the decoder's layers have no {sorted(set(targets) - wrapped)}"
    model.lora_config = {"r": r, "lora_alpha": alpha, "use_rslora": rslora}
    return [p for p in model.parameters() if p.requires_grad]


def lora_modules(model: nn.Module) -> dict[str, LoRALinear]:
    """name -> LoRALinear, names like language_model.layers.0.self_attn.q_proj."""
    return {name: m for name, m in model.named_modules() if isinstance(m, LoRALinear)}


@contextmanager
def lora_disabled(model: nn.Module):
    """Inside, the model is the reference model pi_ref: the same weights without the adapter."""
    modules = lora_modules(model).values()
    assert modules, "lora_disabled: the model has no LoRA"
    for m in modules:
        m.enabled = False
    try:
        yield
    finally:
        for m in modules:
            m.enabled = True


@torch.no_grad()
def merge_lora(model: nn.Module) -> None:
    """W += s B A in float32, then back to W's dtype, and the adapter is gone. For export; training never merges."""
    for name, m in lora_modules(model).items():
        weight = m.base.weight
        assert weight.is_floating_point(), f"merge_lora: {name} is quantised; merge into the full weights"
        update = m.scaling * (m.lora_B.float() @ m.lora_A.float())  # (out, r) (r, in) -> (out, in)
        weight.copy_((weight.float() + update).to(weight.dtype))
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, m.base)

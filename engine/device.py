"""The device and how it computes: chosen and set up once, the same for training, answering and measuring."""

import argparse
import contextlib
import os

# Rows differ in length, the classic case of a fragmented heap. The allocator reads this when CUDA is first used; what
# the user has set, by this name or by its older one, holds.
if "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")

import torch
from torch import nn

from engine.distributed import under_torchrun

CUDA = torch.device("cuda")


def choose_device() -> torch.device:
    """CUDA where there is one, else the CPU.

    cuDNN's attention is switched off: it builds a plan for every new pair of lengths, 23-37 ms each on an H100, and
    here almost every row and every generated token has a new length. Flash and memory-efficient attention are left.
    TF32, cuDNN's default for the convolution that cuts a picture into patches, is switched off too: float32 is float32.
    """
    if not torch.cuda.is_available():
        return torch.device("cpu")
    torch.backends.cuda.enable_cudnn_sdp(False)
    torch.backends.cudnn.allow_tf32 = False
    return CUDA


def send(x: torch.Tensor, device: torch.device) -> torch.Tensor:
    """x on the device, without waiting for it: CUDA copies what is pinned while the host goes on."""
    if device.type == "cuda" and not x.is_cuda:
        x = x.pin_memory()  # itself, if it is already
    return x.to(device, non_blocking=True)


def has_flash(device: torch.device = CUDA) -> bool:
    """Whether flash attention runs there: an Ampere GPU or newer, and a torch that was built with it."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return False
    return torch.backends.cuda.is_flash_attention_available() and torch.cuda.get_device_capability(device) >= (8, 0)


def autocast_for(weight: torch.Tensor) -> contextlib.AbstractContextManager:
    """Mixed precision on CUDA where the base's weights are bfloat16; a float32 base computes in float32."""
    if weight.is_cuda and weight.dtype == torch.bfloat16:
        return torch.autocast("cuda", torch.bfloat16)
    return contextlib.nullcontext()


# A run whose LoRA is still zero has policy = reference and a first loss of 3 ln 2 only if both round alike.
ROUNDING = {
    # Else Inductor keeps fused values in float32 where nothing is saved for the backward pass: off by up to 0.046.
    "emulate_precision_casts": True,
    # Else it times two block sizes for the sum in a norm, and whether to pad a product, once for the policy's kernel
    # and once for the reference's: each may take another, and the order of the sum with it.
    "deterministic": True,
}


def compile_blocks(layers: nn.ModuleList) -> None:
    """One compiled graph for all layers and lengths, in place."""
    for layer in layers:
        layer.compile(dynamic=True, options=ROUNDING)


def settle_speed(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Ends the command where speed flags of train.py exclude each other; sets what they leave open."""
    padded = not args.pack
    own_micro_batch = args.micro_batch != parser.get_default("micro_batch")
    wrong = {
        "--reference cached keeps the log-probs of packed rows: add --pack": args.reference == "cached" and padded,
        "--tokens-per-batch is of packed rows: add --pack, or give --micro-batch": args.tokens_per_batch and padded,
        "--micro-batch is of padded rows: add --no-pack, or give --tokens-per-batch": own_micro_batch and args.pack,
        "--compile needs a CUDA device": args.compile and not torch.cuda.is_available(),
        "--compile needs a base that is not sharded": args.compile and args.shard,
        "--shard and --quant exclude each other": args.shard and args.quant,
        "--shard needs several processes: torchrun --nproc-per-node N": args.shard and not under_torchrun(),
    }
    for reason, is_so in wrong.items():
        if is_so:
            parser.error(reason)
    args.reference = args.reference or ("cached" if args.pack else "live")
    if args.compile is None:
        args.compile = args.pack and has_flash() and not args.shard

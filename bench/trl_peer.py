"""The peer of bench/training.py: the same LoRA preference training with TRL, PEFT and transformers; one JSON line.

`dpo` is TRL's DPOTrainer as shipped. `mdpo` adds the conditional and the anchor term the way the paper's released
trainer does: one more forward of (cropped picture, q, y_w) for policy and reference. Same shapes, rows, LoRA and
optimiser. cuDNN's attention is off for both or for neither: here as in engine/device.py.
Not a test: it needs trl, datasets and accelerate, which nothing else here does.
"""

import argparse
import json
import math
import os
import random
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import torch.nn.functional as F
from datasets import Dataset, Image, Sequence
from peft import LoraConfig
from torch.utils.data import SequentialSampler
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    TrainerCallback,
)
from trl import DPOConfig, DPOTrainer
from trl.trainer.utils import selective_log_softmax

from bench.inputs import BETA, LORA_ALPHA, LORA_R, SHAPES, kept_rows
from data import Pair
from engine.device import choose_device
from engine.memory import peak_gib
from model import Config

TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'user' %}USER: {% for c in m.content %}"
    "{% if c.type == 'image' %}<image>\n{% else %}"
    "{{ c.text }}{% endif %}{% endfor %} ASSISTANT:{% else %} {% for c in m.content %}{{ c.text }}{% endfor %}"
    "</s>{% endif %}{% endfor %}"
)
LINEARS = r".*language_model.*(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"


def row_of(pair: Pair) -> dict:
    """A pair in TRL's columns."""
    return {
        "images": [str(pair.image)],
        "prompt": [{"role": "user", "content": pair.prompt}],
        "chosen": [{"role": "assistant", "content": pair.chosen.strip()}],
        "rejected": [{"role": "assistant", "content": pair.rejected.strip()}],
    }


def build(c: Config, tokenizer_file: Path, dtype: torch.dtype, device: torch.device):
    """transformers' LLaVA of the same shape with random weights, and its processor."""
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(tokenizer_file),
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        extra_special_tokens={"image_token": "<image>"},
    )
    text = LlamaConfig(
        hidden_size=c.width,
        intermediate_size=c.ffn,
        num_hidden_layers=c.layers,
        num_attention_heads=c.heads,
        num_key_value_heads=c.kv_heads,
        vocab_size=c.vocab,
        max_position_embeddings=4096,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=tokenizer.pad_token_id,
    )
    vision = CLIPVisionConfig(
        hidden_size=c.vision.width,
        intermediate_size=c.vision.ffn,
        num_hidden_layers=c.vision.layers,
        num_attention_heads=c.vision.heads,
        image_size=c.vision.image_size,
        patch_size=c.vision.patch,
        projection_dim=768,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_seq_length=c.vision.patches,
        vision_feature_layer=-2,
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        vision_feature_select_strategy="default",
    )
    torch.manual_seed(0)
    torch.set_default_dtype(dtype)
    with device:
        model = LlavaForConditionalGeneration(config)
    torch.set_default_dtype(torch.float32)
    size = c.vision.image_size
    processor = LlavaProcessor(
        CLIPImageProcessor(size={"shortest_edge": size}, crop_size=size),
        tokenizer,
        patch_size=c.vision.patch,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=TEMPLATE,
    )
    return model, processor


class InOrder(DPOTrainer):
    def _get_train_sampler(self, *_):
        return SequentialSampler(self.train_dataset)


class MDPO(InOrder):
    """L_DPO + L_CoPO + L_AncPO; TRL computes (m_w, q, y_w) and (m_w, q, y_l) in one padded batch, so do we here."""

    chunked_head = False

    def logps(self, model, inputs: dict, mask) -> torch.Tensor:
        """(B, T) ids -> (B,)."""
        if self.chunked_head:
            labels = inputs["input_ids"].masked_fill(mask == 0, -100)
            return model(**inputs, labels=labels, fused_lm_head=True, use_cache=False).log_probs.sum(1)
        logits = model(**inputs, use_cache=False).logits[:, :-1]
        return (selective_log_softmax(logits, inputs["input_ids"][:, 1:]) * mask[:, 1:]).sum(1)

    def triples(self, model, both: dict, mask, cropped: dict) -> tuple:
        """The log-probs of chosen and rejected, which stand in one batch, and of image_rejected."""
        chosen, rejected = self.logps(model, both, mask).chunk(2)
        image_rejected = self.logps(model, cropped, mask[: len(mask) // 2])
        return chosen, rejected, image_rejected

    def _compute_loss(self, model, inputs, return_outputs=False):
        both = dict(inputs)
        mask = both.pop("completion_mask")
        cropped = {name: value[: len(mask) // 2] for name, value in both.items()}
        cropped["pixel_values"] = crop(cropped["pixel_values"])
        policy = self.triples(model, both, mask, cropped)
        base = self.accelerator.unwrap_model(model)
        with torch.no_grad(), base.disable_adapter():
            reference = self.triples(base, both, mask, cropped)
        w, l, m_l = (BETA * (p - r) for p, r in zip(policy, reference, strict=True))
        return -(F.logsigmoid(w - l) + F.logsigmoid(w - m_l) + F.logsigmoid(w)).mean()


def crop(pictures: torch.Tensor) -> torch.Tensor:
    """1-20 % of the area, resized back, one place for all (B, 3, S, S)."""
    size = pictures.shape[-1]
    side = int(size * math.sqrt(random.uniform(0.01, 0.2)))
    top, left = random.randrange(size - side), random.randrange(size - side)
    part = pictures[:, :, top : top + side, left : left + side].float()
    return F.interpolate(part, pictures.shape[-2:], mode="bilinear").to(pictures.dtype)


class Clock(TrainerCallback):
    """Seconds of every step."""

    def __init__(self, cuda: bool):
        self.cuda, self.seconds = cuda, []

    def now(self) -> float:
        if self.cuda:
            torch.cuda.synchronize()
        return time.perf_counter()

    def on_step_begin(self, *_, **__):
        self.start = self.now()

    def on_step_end(self, *_, **__):
        self.seconds.append(self.now() - self.start)


def settings_of(args: argparse.Namespace, out: str, steps: int, cuda: bool) -> DPOConfig:
    return DPOConfig(
        output_dir=out,
        per_device_train_batch_size=args.micro,
        gradient_accumulation_steps=1,
        beta=BETA,
        max_steps=steps,
        learning_rate=1e-5,
        weight_decay=0.05,
        adam_beta2=0.98,
        logging_steps=1,
        gradient_checkpointing=args.checkpointing,
        bf16=cuda and args.dtype == "bfloat16",
        use_cpu=not cuda,
        max_length=None,
        save_strategy="no",
        remove_unused_columns=False,
        disable_tqdm=True,
        report_to=[],
    )


def parse_args(argv=None) -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--shape", choices=SHAPES, default="mini")
    p.add_argument("--objective", choices=("mdpo", "dpo"), default="mdpo")
    p.add_argument("--data", type=Path, required=True)
    p.add_argument("--tokenizer", type=Path, required=True)
    p.add_argument("--micro", type=int, default=1, help="pairs per forward and optimiser step")
    p.add_argument("--passes", type=int, default=3)
    p.add_argument("--dtype", default="float32")
    p.add_argument("--checkpointing", action="store_true")
    p.add_argument("--chunked-head", action="store_true", help="mdpo through TRL's head without full logits")
    p.add_argument("--longest", action="store_true", help="only the pair with the longest answers")
    return p.parse_args(argv)


def main(argv=None) -> None:
    args = parse_args(argv)
    device = choose_device()
    cuda = device.type == "cuda"
    rows = [row_of(pair) for pair in kept_rows(args.data, args.longest)[0]]
    # any len(rows) steps in a row see every row `micro` times, and every composition of a batch once
    warm = len(rows)
    timed = len(rows) * math.ceil(args.passes / args.micro)
    copies = math.ceil((warm + timed) * args.micro / len(rows))
    data = Dataset.from_list(rows * copies).cast_column("images", Sequence(Image()))
    model, processor = build(SHAPES[args.shape], args.tokenizer, getattr(torch, args.dtype), device)
    clock = Clock(cuda)
    with tempfile.TemporaryDirectory() as out:
        trainer = (MDPO if args.objective == "mdpo" else InOrder)(
            model,
            args=settings_of(args, out, warm + timed, cuda),
            train_dataset=data,
            processing_class=processor,
            peft_config=LoraConfig(r=LORA_R, lora_alpha=LORA_ALPHA, lora_dropout=0.0, target_modules=LINEARS),
            callbacks=[clock],
        )
        trainer.chunked_head = args.chunked_head
        sys.stdout, stdout = sys.stderr, sys.stdout  # the trainer prints its log
        trainer.train()
        sys.stdout = stdout
    log = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    result = {
        "peer": "trl",
        "micro": args.micro,
        "checkpointing": args.checkpointing,
        "chunked_head": args.chunked_head or args.objective == "dpo",
        "pairs_per_s": timed * args.micro / sum(clock.seconds[warm:]),
        "peak_gib": peak_gib(device),
        "losses_of_first_pass": log[:warm],
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()

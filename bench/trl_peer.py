"""The peer of bench.py: the same LoRA preference training with TRL + PEFT + transformers, one JSON line.

`dpo` is TRL's DPOTrainer as shipped. `mdpo` adds the conditional and the anchor term the way the paper's released
trainer does: one more forward of (cropped picture, q, y_w) for policy and reference. Same shapes, rows, LoRA and
optimiser as bench.py.
Not a test: it needs trl, datasets and accelerate, which nothing else here does.
"""

import argparse
import json
import math
import os
import random
import resource
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

SHAPES = {  # vision (width, ffn, layers, heads), decoder (width, ffn, layers, heads)
    "mini": ((256, 1024, 4, 4), (512, 1376, 8, 8)),
    "1b": ((1024, 4096, 24, 16), (2048, 5504, 22, 16)),
    "7b": ((1024, 4096, 24, 16), (4096, 11008, 32, 32)),
}
TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'user' %}USER: {% for c in m.content %}"
    "{% if c.type == 'image' %}<image>\n{% else %}"
    "{{ c.text }}{% endif %}{% endfor %} ASSISTANT:{% else %} {% for c in m.content %}{{ c.text }}{% endfor %}"
    "</s>{% endif %}{% endfor %}"
)


def rows_of(data: Path, longest: bool) -> list[dict]:
    """The rows bench.py keeps: both answers longer than three words, or of those the one with the longest answers."""
    file = data / "preferences.json" if data.is_dir() else data
    rows = []
    for row in json.loads(file.read_text()):
        (question, chosen), (_, rejected) = (
            [t["value"] for t in row[k]] for k in ("conversations", "rejected_conversations")
        )
        if min(len(chosen.split()), len(rejected.split())) > 3:

            def say(role, text):
                return [{"role": role, "content": text}]

            rows.append({"images": [str(file.parent / row["image"])], "chosen": say("assistant", chosen.strip()),
                         "prompt": say("user", question.replace("<image>", "").strip()),
                         "rejected": say("assistant", rejected.strip())})  # fmt: skip
    letters = [len(r["chosen"][0]["content"]) + len(r["rejected"][0]["content"]) for r in rows]
    return [rows[letters.index(max(letters))]] if longest else rows


def build(shape: str, tokenizer_file: Path, dtype: torch.dtype, device: str):
    (vw, vf, vl, vh), (w, f, l, h) = SHAPES[shape]
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(tokenizer_file), bos_token="<s>", eos_token="</s>",
                                        pad_token="<pad>", unk_token="<unk>",
                                        extra_special_tokens={"image_token": "<image>"})  # fmt: skip
    text = LlamaConfig(hidden_size=w, intermediate_size=f, num_hidden_layers=l, num_attention_heads=h, vocab_size=32064,
                       num_key_value_heads=h, max_position_embeddings=4096, bos_token_id=1, eos_token_id=2,
                       pad_token_id=tokenizer.pad_token_id)  # fmt: skip
    vision = CLIPVisionConfig(hidden_size=vw, intermediate_size=vf, num_hidden_layers=vl, num_attention_heads=vh,
                              image_size=336, patch_size=14, projection_dim=768)  # fmt: skip
    config = LlavaConfig(vision_config=vision, text_config=text, image_seq_length=576, vision_feature_layer=-2,
                         image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
                         vision_feature_select_strategy="default")  # fmt: skip
    torch.manual_seed(0)
    torch.set_default_dtype(dtype)
    with torch.device(device):
        model = LlavaForConditionalGeneration(config)
    torch.set_default_dtype(torch.float32)
    pictures = CLIPImageProcessor(size={"shortest_edge": 336}, crop_size=336)
    processor = LlavaProcessor(pictures, tokenizer, patch_size=14, vision_feature_select_strategy="default",
                               num_additional_image_tokens=1, chat_template=TEMPLATE)  # fmt: skip
    return model, processor


class InOrder(DPOTrainer):
    def _get_train_sampler(self, *_):
        return SequentialSampler(self.train_dataset)


class MDPO(InOrder):
    """L_DPO + L_CoPO + L_AncPO; TRL computes (m_w, q, y_w) and (m_w, q, y_l) in one padded batch, so do we here."""

    chunked_head = False

    def logps(self, model, inputs: dict, mask) -> torch.Tensor:
        if self.chunked_head:
            labels = inputs["input_ids"].masked_fill(mask == 0, -100)
            return model(**inputs, labels=labels, fused_lm_head=True, use_cache=False).log_probs.sum(1)
        logits = model(**inputs, use_cache=False).logits[:, :-1]
        return (selective_log_softmax(logits, inputs["input_ids"][:, 1:]) * mask[:, 1:]).sum(1)

    def _compute_loss(self, model, inputs, return_outputs=False):
        inputs = dict(inputs)
        mask = inputs.pop("completion_mask")
        n = len(mask) // 2
        chosen = {k: v[:n] for k, v in inputs.items()}
        picture = chosen["pixel_values"]
        side = int(picture.shape[-1] * math.sqrt(random.uniform(0.01, 0.2)))
        top, left = (random.randrange(picture.shape[-1] - side) for _ in range(2))
        crop = picture[:, :, top : top + side, left : left + side].float()
        chosen["pixel_values"] = F.interpolate(crop, picture.shape[-2:], mode="bilinear").to(picture.dtype)

        def triples(m):
            return (*self.logps(m, inputs, mask).chunk(2), self.logps(m, chosen, mask[:n]))

        policy = triples(model)
        base = self.accelerator.unwrap_model(model)
        with torch.no_grad(), base.disable_adapter():
            reference = triples(base)
        w, l, m_l = (0.1 * (p - r) for p, r in zip(policy, reference, strict=True))
        return -(F.logsigmoid(w - l) + F.logsigmoid(w - m_l) + F.logsigmoid(w)).mean()


class Clock(TrainerCallback):
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


def main(argv=None) -> None:
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
    args = p.parse_args(argv)
    cuda = torch.cuda.is_available()
    rows = rows_of(args.data, args.longest)
    warm = -(-len(rows) // args.micro)  # at least one pass
    timed = len(rows) * -(-args.passes // args.micro)  # any len(rows) steps in a row see every row `micro` times
    copies = -(-(warm + timed) * args.micro // len(rows))
    data = Dataset.from_list(rows * copies).cast_column("images", Sequence(Image()))
    model, processor = build(args.shape, args.tokenizer, getattr(torch, args.dtype), "cuda" if cuda else "cpu")
    linears = r".*language_model.*(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"
    lora = LoraConfig(r=64, lora_alpha=128, lora_dropout=0.0, target_modules=linears)
    clock = Clock(cuda)
    with tempfile.TemporaryDirectory() as out:
        settings = DPOConfig(
            output_dir=out, per_device_train_batch_size=args.micro, gradient_accumulation_steps=1, beta=0.1,
            max_steps=warm + timed, learning_rate=1e-5, weight_decay=0.05, adam_beta2=0.98, logging_steps=1,
            gradient_checkpointing=args.checkpointing, bf16=cuda and args.dtype == "bfloat16", use_cpu=not cuda,
            max_length=None, save_strategy="no", remove_unused_columns=False, disable_tqdm=True, report_to=[],
        )  # fmt: skip
        trainer = (MDPO if args.objective == "mdpo" else InOrder)(
            model, args=settings, train_dataset=data, processing_class=processor, peft_config=lora, callbacks=[clock]
        )
        trainer.chunked_head = args.chunked_head
        sys.stdout, stdout = sys.stderr, sys.stdout  # the trainer prints its log
        trainer.train()
        sys.stdout = stdout
    peak = torch.cuda.max_memory_allocated() if cuda else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    log = [h["loss"] for h in trainer.state.log_history if "loss" in h]
    print(json.dumps({"peer": "trl", "micro": args.micro, "checkpointing": args.checkpointing,
                      "chunked_head": args.chunked_head or args.objective == "dpo",
                      "pairs_per_s": timed * args.micro / sum(clock.seconds[warm:]), "peak_gib": peak / 2**30,
                      "losses_of_first_pass": log[:warm]}))  # fmt: skip


if __name__ == "__main__":
    main()

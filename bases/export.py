"""A base and an adapter -> one merged checkpoint that other tools open.

    python -m bases.export --base llava-1.5-7b --adapter runs/llava-1.5-7b-mdpo-0 --out merged
    python -m bases.export --base liuhaotian-folder --out converted     no adapter: the same model in the hub's layout

LLaVA is written in the hub's layout (transformers, vLLM and lmms-eval open it), Bunny in its own, shard by shard, every
tensor merged in float32 and cast. Then base + adapter and the files just written answer the same prompts, and if their
logits differ by more than a bound nothing is kept. docs/export.md shows how to use the result.

Deviations from the hub's llava-1.5-*-hf
1. Pictures are padded to a square, as LLaVA was trained; the hub's own config cuts the middle out.
2. The chat template has the Vicuna system prompt, as LLaVA was trained; the hub's has none.
3. From the original layout, which has no rows for <image> and <pad>, the added rows are the mean of the others.
"""

import argparse
import math
import os
import re
import shutil
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import save_file
from tokenizers import AddedToken, processors
from torch import Tensor, nn
from tqdm import tqdm

import losses
import pictures
from bases import bunny, checkpoint
from bases.adapter import load_adapter, read_adapter
from bases.tokenizer import load_processor, load_tokenizer
from data import SYSTEM, VICUNA, pad_rows
from external import files
from formats.readers import read_pairs
from lora import scaling_of
from model import Config

SHARD_BYTES = 5 * 10**9
DTYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}  # safetensors' words
# Largest logit difference allowed between base + adapter and the merged weights: what rounding the merged weights to
# the dtype explains, with room. A wrong scale or a forgotten layer is far above.
MAX_DIFFERENCE = {torch.float32: 0.01, torch.float16: 0.1, torch.bfloat16: 1.0}

VISION = [
    *((n, f"embeddings.{n}") for n in ("class_embedding", "patch_embedding.", "position_embedding.")),
    ("layers.", "encoder.layers."), ("", ""),
]  # fmt: skip
HUB = [("language_model.", "language_model.model."), ("lm_head.", "language_model.lm_head."),
       ("mm_projector.0.", "multi_modal_projector.linear_1."), ("mm_projector.2.", "multi_modal_projector.linear_2."),
       *((f"vision_tower.{ours}", f"vision_tower.vision_model.{theirs}") for ours, theirs in VISION)]  # fmt: skip
BUNNY = [("language_model.norm.", "model.final_layernorm."), ("language_model.", "model."), ("lm_head.", "lm_head."),
         ("mm_projector.", "model.mm_projector."),
         *((f"vision_tower.{o}", f"model.vision_tower.vision_tower.vision_model.{t}") for o, t in VISION)]  # fmt: skip

# Content is text, or parts of type image and text. No BOS here: tokenizers add it, and two would be one too many.
CHAT_TEMPLATE = (
    "{% macro body(content) %}{% if content is string %}{{ content }}{% else %}"
    "{% for part in content if part['type'] == 'image' %}{{ '<image>\\n' }}{% endfor %}"
    "{% for part in content if part['type'] == 'text' %}{{ part['text'] }}{% endfor %}{% endif %}{% endmacro %}"
    "{% if messages[0]['role'] == 'system' %}{{ body(messages[0]['content']) + ' ' }}"
    f'{{% else %}}{{{{ "{SYSTEM} " }}}}{{% endif %}}'
    "{% for message in messages %}{% if message['role'] == 'user' %}{{ 'USER: ' + body(message['content']) }}"
    "{% elif message['role'] == 'assistant' %}{{ ' ASSISTANT: ' + body(message['content']) + eos_token }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ ' ASSISTANT:' }}{% endif %}"
)

PROMPTS = [  # with a drawn picture each; --data takes the first pairs of a preference file instead
    ("Describe this image in detail.", "The image shows an area that becomes brighter from one side to the other."),
    ("What is the main object in the picture?", "There is no single object in the picture."),
    ("Is there a dog in the image? Answer yes or no.", "No"),
    ("Which colours do you see?", "I see shades of blue and red, from dark to bright."),
]


def parse_args(argv=None) -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--base", required=True, help=f"{', '.join(checkpoint.SOURCES)}, or a checkpoint folder")
    p.add_argument("--weights", type=Path, help="folder of the base's checkpoint, instead of the hub's cache")
    p.add_argument("--vision-weights", type=Path, help="CLIP or SigLIP folder, for layouts without the vision tower")
    p.add_argument("--adapter", type=Path, help="run folder or PEFT folder; none: only the layout changes")
    p.add_argument("--out", type=Path, required=True, help="folder to write; must not exist")
    p.add_argument("--dtype", choices=[str(d).removeprefix("torch.") for d in DTYPES], help="default: the checkpoint's")
    p.add_argument("--data", type=Path, help="preference file whose first 4 pairs are the check's prompts")
    p.add_argument("--image-root", type=Path, help="folder the image paths of --data start from")
    p.add_argument("--max-difference", type=float, help="bound on the logits (default: MAX_DIFFERENCE, by dtype)")
    return p.parse_args(argv)


# ---- tensors -------------------------------------------------------------------------------------------------------


def export_name(name: str, table: list[tuple[str, str]]) -> str:
    """Our name -> the layout's; the inverse of checkpoint.our_name."""
    ours, theirs = next(pair for pair in table if name.startswith(pair[0]))
    name = theirs + name.removeprefix(ours)
    return re.sub(r"(encoder\.layers\.\d+\.)fc", r"\1mlp.fc", name)


def write_shards(folder: Path, shapes: dict[str, tuple], dtype: torch.dtype, tensor: Callable[[str], Tensor],
                 limit: int = SHARD_BYTES) -> None:  # fmt: skip
    """model.safetensors, or an index and shards of at most `limit` bytes (or one tensor); tensor(name) makes each."""
    shards, room = [{}], limit
    for name, shape in shapes.items():
        size = math.prod(shape) * dtype.itemsize
        if size > room and shards[-1]:
            shards.append({})
            room = limit
        shards[-1][name] = shape
        room -= size
    table = {}
    for i, shard in enumerate(shards, 1):
        file = f"model-{i:05d}-of-{len(shards):05d}.safetensors" if len(shards) > 1 else "model.safetensors"
        tensors = {name: tensor(name) for name in tqdm(shard, file, disable=None)}
        made = {name: (t.shape, t.dtype) for name, t in tensors.items()}
        assert made == {name: (shape, dtype) for name, shape in shard.items()}, (made, shard)
        save_file(tensors, folder / file, {"format": "pt"})
        del tensors  # before the next ones are made
        table |= dict.fromkeys(shard, file)
    if len(shards) > 1:
        total = sum(math.prod(shape) for shape in shapes.values()) * dtype.itemsize
        files.write_json(
            folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": table}
        )


def write_weights(out: Path, stored: dict, adapter: Path | None, c: Config, dtype: torch.dtype) -> None:
    """Every tensor of the base, those with an adapter merged: W + s B A in float32, then cast. `c`: what is written."""
    table = BUNNY if isinstance(c, bunny.Config) else HUB
    kept = [n for n in stored if not checkpoint.IGNORED.search(n) or n.startswith("vision_tower.post_layernorm.")]
    if table is BUNNY:  # its layout ends with the last layer that runs
        kept = [n for n in kept if not checkpoint.unused_layer(n, c.vision.layers_run)]
    ours = {export_name(n, table): n for n in kept}
    grown = ("language_model.embed_tokens.weight", "lm_head.weight")
    shapes = {name: (c.vocab, c.width) if n in grown else stored[n].shape for name, n in ours.items()}
    adapter, *settings = read_adapter(adapter) if adapter else ({}, 1, 1)
    scaling = scaling_of(*settings)

    def tensor(name: str) -> Tensor:
        module = ours[name].removesuffix(".weight")
        t = checkpoint.read_tensor(stored[ours[name]], torch.float32)
        if f"{module}.lora_A" in adapter:
            t += scaling * (adapter[f"{module}.lora_B"].float() @ adapter[f"{module}.lora_A"].float())  # (out, in)
        if len(t) < shapes[name][0]:
            t = torch.cat([t, t.mean(0, keepdim=True).expand(shapes[name][0] - len(t), -1)])  # (V, C) -> (V', C)
        return t.to(dtype)

    write_shards(out, shapes, dtype, tensor)


# ---- the files beside them -----------------------------------------------------------------------------------------


def with_image_rows(config: Config) -> Config:
    """A config of the original layout -> with <image> and <pad> after its vocabulary, padded up to a multiple of 64."""
    if config.image_id >= 0:
        return config
    vocab = (config.vocab + 2 + 63) // 64 * 64
    return replace(config, vocab=vocab, image_id=config.vocab, pad_id=config.vocab + 1)


def write_llava_files(folder: Path, out: Path, c: Config, dtype: torch.dtype) -> None:
    """Config, tokenizer, processors and chat template, complete: nothing is left to a library's defaults."""
    v, size = c.vision, {"height": c.vision.image_size, "width": c.vision.image_size}
    text = dict(model_type="llama", vocab_size=c.vocab, hidden_size=c.width, intermediate_size=c.ffn,
                num_hidden_layers=c.layers, num_attention_heads=c.heads, num_key_value_heads=c.kv_heads,
                head_dim=c.head_dim, hidden_act="silu", rms_norm_eps=c.eps, rope_theta=c.rope_theta,
                max_position_embeddings=4096, attention_bias=False, mlp_bias=False, tie_word_embeddings=False,
                bos_token_id=c.bos_id, eos_token_id=c.eos_id)  # fmt: skip
    vision = dict(model_type="clip_vision_model", hidden_size=v.width, intermediate_size=v.ffn,
                  num_hidden_layers=v.layers, num_attention_heads=v.heads, image_size=v.image_size, patch_size=v.patch,
                  layer_norm_eps=v.eps, hidden_act="quick_gelu", projection_dim=768)  # fmt: skip
    files.write_json(out / "config.json", dict(
        architectures=["LlavaForConditionalGeneration"], model_type="llava", text_config=text, vision_config=vision,
        image_token_index=c.image_id, image_seq_length=v.patches, pad_token_id=c.pad_id, projector_hidden_act="gelu",
        multimodal_projector_bias=True, vision_feature_layer=v.feature_layer, vision_feature_select_strategy="default",
        tie_word_embeddings=False, torch_dtype=str(dtype).removeprefix("torch."),
    ))  # fmt: skip
    spec, ids = VICUNA.image, dict(bos_token_id=c.bos_id, eos_token_id=c.eos_id, pad_token_id=c.pad_id)
    files.write_json(out / "generation_config.json", ids)
    files.write_json(out / "preprocessor_config.json", dict(
        image_processor_type="LlavaImageProcessor", processor_class="LlavaProcessor", do_pad=True, do_center_crop=False,
        do_convert_rgb=True, do_resize=True, size={"shortest_edge": v.image_size}, resample=3, crop_size=size,
        do_rescale=True, rescale_factor=1 / 255, do_normalize=True, image_mean=spec.mean, image_std=spec.std,
    ))  # fmt: skip
    files.write_json(out / "processor_config.json", dict(
        processor_class="LlavaProcessor", image_token="<image>", patch_size=v.patch, num_additional_image_tokens=1,
        vision_feature_select_strategy="default",
    ))  # fmt: skip
    (out / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")
    files.write_json(out / "chat_template.json", {"chat_template": CHAT_TEMPLATE})  # where transformers < 4.50 looks
    write_tokenizer(folder, out, c)


def write_tokenizer(folder: Path, out: Path, c: Config) -> None:
    tokenizer = load_tokenizer(folder)
    new = [t for t in ("<image>", "<pad>") if tokenizer.token_to_id(t) is None]
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in new])
    image_id = tokenizer.token_to_id("<image>")
    if image_id != c.image_id:
        raise SystemExit(f"{folder}: <image> is {image_id} in the tokenizer and {c.image_id} in config.json")
    bos, eos, pad = (tokenizer.id_to_token(i) for i in (c.bos_id, c.eos_id, c.pad_id))
    tokenizer.post_processor = processors.TemplateProcessing(f"{bos} $A", f"{bos} $A {bos} $B", [(bos, c.bos_id)])
    tokenizer.save(str(out / "tokenizer.json"))
    # the fast class reads tokenizer.json as it is; LlamaTokenizer may rebuild it with another rule for blanks
    files.write_json(out / "tokenizer_config.json", dict(
        tokenizer_class="PreTrainedTokenizerFast", bos_token=bos, eos_token=eos, pad_token=pad, unk_token="<unk>",
        padding_side="left", model_max_length=4096, clean_up_tokenization_spaces=False,
        processor_class="LlavaProcessor",
    ))  # fmt: skip


def copy_bunny_files(folder: Path, out: Path, dtype: torch.dtype) -> None:
    """Everything of the base's folder that is not weights, with the dtype in its config."""
    for file in folder.iterdir():
        if file.is_file() and file.suffix not in (".safetensors", ".bin") and not file.name.endswith(".index.json"):
            shutil.copyfile(file, out / file.name)
    config = files.read_json(folder / "config.json", dict) | {"torch_dtype": str(dtype).removeprefix("torch.")}
    files.write_json(out / "config.json", config)


# ---- is it the same model? -----------------------------------------------------------------------------------------


def prompts(args: argparse.Namespace) -> list[tuple[Image.Image, str, str]]:
    """(picture, question, answer) of the check."""
    if args.data:
        pairs = [p for p in read_pairs(args.data, args.image_root)[0] if p.image][:4]
        try:
            return [(pictures.open_image(p.image), p.prompt, p.chosen) for p in pairs]
        except ValueError as e:
            raise SystemExit(f"{args.data}: the picture of one of its first four pairs: {e}") from None
    gradient = Image.linear_gradient("L")
    turned = [gradient.rotate(90 * i).resize((320, 160 + 80 * i)) for i in range(len(PROMPTS))]
    drawn = [Image.merge("RGB", (t, t.point(lambda x: 128), t.point(lambda x: 255 - x))) for t in turned]
    return [(picture, *prompt) for picture, prompt in zip(drawn, PROMPTS, strict=True)]


@contextmanager
def float32_arithmetic(model: nn.Module):
    """Inside, every layer computes in float32, its weights widened while it runs: exact, without a second copy."""
    dtype = model.lm_head.weight.dtype
    model.vision_tower.float()
    model.mm_projector.float()
    leaves = [m for m in [*model.language_model.modules(), model.lm_head] if m._parameters and not m._modules]

    def widen(module, *_):
        module.to(torch.float32)

    def narrow(module, *_):
        module.to(dtype)

    hooks = [m.register_forward_pre_hook(widen) for m in leaves] + [m.register_forward_hook(narrow) for m in leaves]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def answers(model, folder: Path, asked: list, vocab: int) -> tuple[Tensor, Tensor]:
    """Logits (positions that predict an answer token, V) and log-probs (B,) of the answers, over `vocab` rows."""
    processor, device = load_processor(folder, model.config), model.lm_head.weight.device
    ids = [[torch.tensor(processor.prompt_ids(q)) for _, q, _ in asked],
           [torch.tensor(processor.response_ids(a)) for _, _, a in asked]]  # fmt: skip
    tokens = pad_rows(*ids, model.config.pad_id)
    x = torch.stack([processor.prepare(picture) for picture, _, _ in asked]).to(device)  # (B, 3, S, S)
    input_ids, mask = (t.to(device) for t in tokens)
    with float32_arithmetic(model):
        logits = model(input_ids, x)[..., :vocab]  # (B, T, V)
    return logits[:, :-1][mask[:, 1:]].cpu(), losses.sequence_logps(logits, input_ids, mask).cpu()


def compare(name: str, a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor]) -> float:
    """Prints the largest differences of logits and log-probs, returns the former."""
    logits, logps = ((x - y).abs().max().item() for x, y in zip(a, b, strict=True))
    print(f"{name}: largest difference of a logit {logits:.3g}, of an answer's log-prob {logps:.3g} nats")
    return logits


def main(argv=None) -> None:
    args = parse_args(argv)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    folder, out = checkpoint.resolve(args.base, args.weights), args.out
    part = out.with_name(out.name + ".part")
    for there in (out, part):  # the latter is left by a killed export
        if there.exists():
            raise SystemExit(f"{there}: exists already; an export never overwrites")
    stored, _ = checkpoint.checkpoint_tensors(folder, args.vision_weights)
    own = checkpoint.read_tensor(stored["language_model.norm.weight"]).dtype
    dtype = getattr(torch, args.dtype) if args.dtype else own
    asked = prompts(args)
    model = checkpoint.load_model(folder, args.vision_weights, own, device)
    config = model.config
    expected = base = answers(model, folder, asked, config.vocab)
    if args.adapter:
        load_adapter(model, args.adapter)
        expected = answers(model, folder, asked, config.vocab)
        compare("adapter against base", expected, base)
    del model  # the merged one needs its room
    c = config if isinstance(config, bunny.Config) else with_image_rows(config)
    part.mkdir(parents=True)
    try:
        write_weights(part, stored, args.adapter, c, dtype)
        if isinstance(c, bunny.Config):
            copy_bunny_files(folder, part, dtype)
        else:
            write_llava_files(folder, part, c, dtype)
        found = answers(checkpoint.load_model(part, None, dtype, device), part, asked, config.vocab)
        bound = MAX_DIFFERENCE[dtype] if args.max_difference is None else args.max_difference
        difference = compare(f"written as {DTYPES[dtype]} against what it was made from", found, expected)
        if not difference <= bound:
            raise SystemExit(f"More than {bound}: nothing is kept. Try --dtype float32, or raise --max-difference.")
        os.rename(part, out)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    print(f"{out}: {', '.join(sorted(f.name for f in out.iterdir()))}")


if __name__ == "__main__":
    main()

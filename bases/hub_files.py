"""What stands beside the weights of an exported LLaVA, complete: nothing is left to a library's defaults.

Config, generation config, tokenizer, processors, chat template; transformers, vLLM and lmms-eval read them.
bases/export.py says how they differ from the hub's llava-1.5-*-hf.
"""

from pathlib import Path

import torch
from tokenizers import AddedToken, processors

from bases.tokenizer import load_tokenizer
from data import SYSTEM, VICUNA
from external import files
from model import Config, VisionConfig

MAX_POSITIONS = 4096

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


def write_llava_files(folder: Path, out: Path, c: Config, dtype: torch.dtype) -> None:
    """All of them, for weights of config `c` in `out`; the tokenizer comes from `folder`."""
    files.write_json(out / "config.json", model_config(c, dtype))
    ids = {"bos_token_id": c.bos_id, "eos_token_id": c.eos_id, "pad_token_id": c.pad_id}
    files.write_json(out / "generation_config.json", ids)
    files.write_json(out / "preprocessor_config.json", picture_config(c.vision))
    files.write_json(
        out / "processor_config.json",
        {
            "processor_class": "LlavaProcessor",
            "image_token": "<image>",
            "patch_size": c.vision.patch,
            "num_additional_image_tokens": 1,  # the class token, which `default` takes off again
            "vision_feature_select_strategy": "default",
        },
    )
    files.write_text(out / "chat_template.jinja", CHAT_TEMPLATE)
    files.write_json(out / "chat_template.json", {"chat_template": CHAT_TEMPLATE})  # where transformers < 4.50 looks
    write_tokenizer(folder, out, c)


def model_config(c: Config, dtype: torch.dtype) -> dict:
    return {
        "architectures": ["LlavaForConditionalGeneration"],
        "model_type": "llava",
        "text_config": text_config(c),
        "vision_config": vision_config(c.vision),
        "image_token_index": c.image_id,
        "image_seq_length": c.vision.patches,
        "pad_token_id": c.pad_id,
        "projector_hidden_act": "gelu",
        "multimodal_projector_bias": True,
        "vision_feature_layer": c.vision.feature_layer,
        "vision_feature_select_strategy": "default",
        "tie_word_embeddings": False,
        "torch_dtype": str(dtype).removeprefix("torch."),
    }


def text_config(c: Config) -> dict:
    return {
        "model_type": "llama",
        "vocab_size": c.vocab,
        "hidden_size": c.width,
        "intermediate_size": c.ffn,
        "num_hidden_layers": c.layers,
        "num_attention_heads": c.heads,
        "num_key_value_heads": c.kv_heads,
        "head_dim": c.head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": c.eps,
        "rope_theta": c.rope_theta,
        "max_position_embeddings": MAX_POSITIONS,
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": False,
        "bos_token_id": c.bos_id,
        "eos_token_id": c.eos_id,
    }


def vision_config(v: VisionConfig) -> dict:
    return {
        "model_type": "clip_vision_model",
        "hidden_size": v.width,
        "intermediate_size": v.ffn,
        "num_hidden_layers": v.layers,
        "num_attention_heads": v.heads,
        "image_size": v.image_size,
        "patch_size": v.patch,
        "layer_norm_eps": v.eps,
        "hidden_act": "quick_gelu",
        "projection_dim": 768,
    }


def picture_config(v: VisionConfig) -> dict:
    spec = VICUNA.image
    return {
        "image_processor_type": "LlavaImageProcessor",
        "processor_class": "LlavaProcessor",
        "do_pad": True,
        "do_center_crop": False,
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": v.image_size},
        "resample": 3,  # bicubic
        "crop_size": {"height": v.image_size, "width": v.image_size},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": spec.mean,
        "image_std": spec.std,
    }


def write_tokenizer(folder: Path, out: Path, c: Config) -> None:
    """The base's tokenizer with <image> and <pad> where the config has them; BOS is added by it."""
    tokenizer = load_tokenizer(folder)
    new = [token for token in ("<image>", "<pad>") if tokenizer.token_to_id(token) is None]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in new])
    image_id = tokenizer.token_to_id("<image>")
    if image_id != c.image_id:
        raise SystemExit(f"{folder}: <image> is {image_id} in the tokenizer and {c.image_id} in config.json")
    bos, eos, pad = (tokenizer.id_to_token(token) for token in (c.bos_id, c.eos_id, c.pad_id))
    tokenizer.post_processor = processors.TemplateProcessing(f"{bos} $A", f"{bos} $A {bos} $B", [(bos, c.bos_id)])
    tokenizer.save(str(out / "tokenizer.json"))
    files.write_json(
        out / "tokenizer_config.json",
        {
            # the fast class reads tokenizer.json as it is; LlamaTokenizer may rebuild it with another rule for blanks
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": bos,
            "eos_token": eos,
            "pad_token": pad,
            "unk_token": "<unk>",
            "padding_side": "left",
            "model_max_length": MAX_POSITIONS,
            "clean_up_tokenization_spaces": False,
            "processor_class": "LlavaProcessor",
        },
    )

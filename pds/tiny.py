"""Tiny random models in the published layouts: what `make pds-demo` and the tests run the stages on.

Each is of the real classes, and a folder of it is read like that of the real model; only the sizes differ, and what
they say means nothing.
"""

from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn

from external import files
from model import Config
from pds import armorm, imagereward, runner

TEXTS = (
    "A red boat on a calm sea, seen from above.",
    "Two dogs sleep near an old door.",
    "What is in the picture, and where does it stand?",
    "The picture shows a small house with a tall tree and a white fence.",
)
LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789"
LLAMA_3_SPLIT = (  # Llama 3's own rule for where words end
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def randomise(model: nn.Module, seed: int) -> nn.Module:
    """Weights so large that every part of the model matters to what comes out."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        scale = 1.5 / parameter[0].numel() ** 0.5 if parameter.dim() > 1 and "embed" not in name else 0.3
        around = 1.0 if parameter.dim() == 1 and "norm" in name.lower() and name.endswith("weight") else 0.0
        parameter.data = torch.randn(parameter.shape, generator=generator) * scale + around
    return model.eval()


# ---- judges --------------------------------------------------------------------------------------------------------


def write_imagereward(folder: Path, seed: int = 0) -> Path:
    """ImageReward.pt, med_config.json and vocab.txt; the picture tower is 64 wide, one head, 32 pixels."""
    folder.mkdir(parents=True)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", ",", ".", "?", *LETTERS, *(f"##{letter}" for letter in LETTERS)]
    files.write_text(folder / "vocab.txt", "".join(f"{word}\n" for word in words))
    config = {
        "hidden_size": 32,
        "num_attention_heads": 4,
        "num_hidden_layers": 2,
        "intermediate_size": 48,
        "vocab_size": len(words) + 2,  # [DEC] and [ENC]
        "max_position_embeddings": 64,
        "layer_norm_eps": 1e-12,
        "encoder_width": 768,  # as in the real file: not what is used
    }
    files.write_json(folder / "med_config.json", config)
    vision = imagereward.VisionTransformer(width=64, layers=2, heads=1, image_size=32, patch=16)
    model = randomise(imagereward.ImageReward(vision, imagereward.Bert(config, 64), 32), seed)
    generator = torch.Generator().manual_seed(seed + 1)
    projections = {"blip.vision_proj": (16, 64), "blip.text_proj": (16, 32)}
    state = dict(model.state_dict())
    for name, (rows, columns) in projections.items():
        state[f"{name}.weight"] = torch.randn(rows, columns, generator=generator) / columns**0.5
        state[f"{name}.bias"] = torch.randn(rows, generator=generator) / 4
    torch.save(state, folder / "ImageReward.pt")
    return folder


def llama_3_tokenizer() -> Tokenizer:
    """Byte-level BPE with Llama 3's rule and special tokens."""
    tokenizer = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(LLAMA_3_SPLIT), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=330, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([*TEXTS, "user", "assistant", "\n\n", "\n\n"] * 3, trainer)
    special = ("<|begin_of_text|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>", "[PAD]")
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    return tokenizer


def write_armorm(folder: Path, seed: int = 0) -> Path:
    """A Llama of two layers in bfloat16, ArmoRM's heads in float32, in the hub's layout."""
    folder.mkdir(parents=True)
    tokenizer = llama_3_tokenizer()
    tokenizer.save(str(folder / "tokenizer.json"))
    body = Config(
        vocab=tokenizer.get_vocab_size(), width=32, layers=2, heads=4, kv_heads=2, ffn=48, eps=1e-5, rope_theta=5e5
    )
    config = {
        "architectures": [armorm.ARCHITECTURE],
        "auto_map": {"AutoModelForSequenceClassification": "modeling_custom.LlamaForRewardModelWithGating"},
        "model_type": "llama",
        "vocab_size": body.vocab,
        "hidden_size": body.width,
        "num_hidden_layers": body.layers,
        "num_attention_heads": body.heads,
        "num_key_value_heads": body.kv_heads,
        "intermediate_size": body.ffn,
        "rms_norm_eps": body.eps,
        "rope_theta": body.rope_theta,
        "max_position_embeddings": 512,
        "num_objectives": len(armorm.OBJECTIVES),
        "gating_hidden_dim": 24,
        "gating_n_hidden": 3,
        "gating_temperature": 10.0,
    }
    files.write_json(folder / "config.json", config)
    model = randomise(armorm.ArmoRM(body, hidden=24, n_hidden=3, temperature=10.0), seed)
    state = {}
    for name, tensor in model.state_dict().items():
        state[name] = tensor.bfloat16() if name.startswith("model.") else tensor
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def write_clip(folder: Path, seed: int = 0) -> Path:
    """A CLIP in open_clip's own layout, with its real tokenizer."""
    open_clip = runner.optional("open_clip")
    folder.mkdir(parents=True)
    sizes = {
        "embed_dim": 16,
        "quick_gelu": True,
        "vision_cfg": {"image_size": 32, "patch_size": 16, "width": 32, "layers": 1, "head_width": 16},
        "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
    }
    files.write_json(folder / "open_clip_config.json", {"model_cfg": sizes, "preprocess_cfg": {}})
    model = randomise(open_clip.CLIP(**sizes), seed)
    state = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    save_file(state, folder / "open_clip_model.safetensors", metadata={"format": "pt"})
    return folder


# ---- generators ----------------------------------------------------------------------------------------------------


def write_sd3(folder: Path, seed: int = 0) -> Path:
    """A StableDiffusion3Pipeline that paints 32 x 32 pixels: both CLIPs, T5, the transformer, a VAE of one level."""
    diffusers, transformers = runner.optional("diffusers"), runner.optional("transformers")
    letters = [*LETTERS, *(f"{letter}</w>" for letter in LETTERS), "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {piece: i for i, piece in enumerate(letters)}
    start, end = len(letters) - 2, len(letters) - 1
    clip_tokenizer = transformers.CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=77)
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -9.0), ("\u2581", -2.0), *((letter, -3.0) for letter in LETTERS)]
    t5_tokenizer = transformers.T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=256)
    clip_sizes = transformers.CLIPTextConfig(
        vocab_size=len(letters),
        hidden_size=32,
        intermediate_size=37,
        num_hidden_layers=2,
        num_attention_heads=4,
        projection_dim=32,
        max_position_embeddings=77,
        bos_token_id=start,
        eos_token_id=end,
        pad_token_id=end,
    )
    t5_sizes = transformers.T5Config(
        vocab_size=len(pieces),
        d_model=64,
        d_kv=8,
        d_ff=37,
        num_layers=2,
        num_heads=4,
        feed_forward_proj="gated-gelu",
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        pipeline = diffusers.StableDiffusion3Pipeline(
            transformer=diffusers.SD3Transformer2DModel(
                sample_size=32,
                patch_size=2,
                in_channels=4,
                out_channels=4,
                num_layers=2,
                attention_head_dim=8,
                num_attention_heads=4,
                joint_attention_dim=64,  # T5's
                caption_projection_dim=32,  # heads x head size
                pooled_projection_dim=64,  # both CLIPs' projections
                pos_embed_max_size=32,
            ),
            vae=diffusers.AutoencoderKL(
                block_out_channels=(8,),
                layers_per_block=1,
                latent_channels=4,
                norm_num_groups=1,
                use_quant_conv=False,
                use_post_quant_conv=False,
                shift_factor=0.0609,
                scaling_factor=1.5035,
            ),
            scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
            text_encoder=transformers.CLIPTextModelWithProjection(clip_sizes),
            text_encoder_2=transformers.CLIPTextModelWithProjection(clip_sizes),
            text_encoder_3=transformers.T5EncoderModel(t5_sizes),
            tokenizer=clip_tokenizer,
            tokenizer_2=clip_tokenizer,
            tokenizer_3=t5_tokenizer,
        )
    pipeline.save_pretrained(folder, safe_serialization=True)
    return folder

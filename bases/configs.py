"""config.json -> Config: every value is checked for its kind and range as it is read.

The hub's LLaVA-1.5 is sparse: what its file leaves out is Llama-7B and CLIP ViT-L. Bunny's holds no vision sizes: those
of so400m are known here.
"""

from math import isfinite

from bases import bunny
from model import Config, VisionConfig

LARGEST = 2**20  # no width, vocabulary or picture comes near it


class Fields:
    """Names and values of a JSON file, or of an object in it. A null counts as left out."""

    def __init__(self, values: dict, where: str):
        self.values = values
        self.where = where

    def get(self, name: str, default=None):
        value = self.values.get(name)
        return default if value is None else value

    def part(self, name: str) -> "Fields":
        """The object at `name`, empty where it is left out."""
        value = self.get(name, {})
        if not isinstance(value, dict):
            self.refuse(name, "an object")
        return Fields(value, f"{self.where}, {name}")

    def whole(self, name: str, default: int, least: int = 1, most: int = LARGEST) -> int:
        value = self.get(name, default)
        if type(value) is not int or not least <= value <= most:  # a bool is an int to isinstance
            self.refuse(name, f"a whole number from {least} to {most}")
        return value

    def number(self, name: str, default: float, most: float) -> float:
        value = self.get(name, default)
        if type(value) not in (int, float) or not isfinite(value) or not 0 < value <= most:
            self.refuse(name, f"a number above 0, at most {most:g}")
        return float(value)

    def refuse(self, name: str, wanted: str) -> None:
        raise SystemExit(f"{self.where}: {name} is {self.values.get(name)!r}, expected {wanted}")


def read_vision(v: Fields, defaults: VisionConfig, feature_layer: int = -2) -> VisionConfig:
    """The vision part of a config.json, or the config.json of a CLIP or SigLIP folder."""
    v = v.part("vision_config") if "vision_config" in v.values else v  # a full CLIP has it one level down
    d = defaults
    config = VisionConfig(
        width=v.whole("hidden_size", d.width),
        layers=v.whole("num_hidden_layers", d.layers, most=512),
        heads=v.whole("num_attention_heads", d.heads),
        ffn=v.whole("intermediate_size", d.ffn),
        image_size=v.whole("image_size", d.image_size, most=4096),
        patch=v.whole("patch_size", d.patch),
        eps=v.number("layer_norm_eps", d.eps, most=0.1),
        feature_layer=feature_layer,
    )
    if config.width % config.heads:
        v.refuse("num_attention_heads", f"a divisor of hidden_size {config.width}")
    if config.patch > config.image_size:
        v.refuse("patch_size", f"at most image_size {config.image_size}")
    if not 1 <= config.layers_run <= config.layers:
        raise SystemExit(f"{v.where}: feature layer {feature_layer} of a tower with {config.layers} layers")
    return config


def check_decoder(c: Config | bunny.Config, t: Fields) -> None:
    """Sizes that do not go together; ids that have no row."""
    if c.width % c.heads or c.rope_dim % 2:
        t.refuse("num_attention_heads", f"a divisor of hidden_size {c.width} that leaves heads of even size")
    if c.heads % c.kv_heads:
        t.refuse("num_key_value_heads", f"a divisor of num_attention_heads {c.heads}")
    for name, token in (("pad_token_id", c.pad_id), ("bos_token_id", c.bos_id), ("eos_token_id", c.eos_id)):
        if token >= c.vocab:
            raise SystemExit(f"{t.where}: {name} is {token}, but vocab_size is {c.vocab}")


# ---- LLaVA-1.5 -----------------------------------------------------------------------------------------------------


def read_llava(c: Fields, vision: Fields | None) -> Config:
    """`vision`: the config.json of a vision folder, where there is one."""
    original = "text_config" not in c.values  # liuhaotian's: a flat Llama config with mm_* fields
    t = c if original else c.part("text_config")
    v = vision or c.part("vision_config")
    feature_layer = c.get("mm_vision_select_layer" if original else "vision_feature_layer", -2)
    refuse_variants(c, t, v, feature_layer)
    d = Config()
    heads = t.whole("num_attention_heads", d.heads)
    config = Config(
        vision=read_vision(v, d.vision, feature_layer),
        vocab=t.whole("vocab_size", 32000),
        width=t.whole("hidden_size", d.width),
        layers=t.whole("num_hidden_layers", d.layers, most=512),
        heads=heads,
        kv_heads=t.whole("num_key_value_heads", heads),
        ffn=t.whole("intermediate_size", d.ffn),
        eps=t.number("rms_norm_eps", 1e-6, most=0.1),  # Llama's default; LLaVA-1.5's files say 1e-5
        rope_theta=read_rope(t, "rope_theta", 10000.0, most=1e9),
        image_id=-200 if original else read_image_id(c),  # the original has no row for <image>
        pad_id=max(0, c.whole("pad_token_id", 0, least=-1)),  # any row will do: padding is masked
        bos_id=t.whole("bos_token_id", d.bos_id, least=0) or d.bos_id,  # 0, <unk>, is what early Llama files say
        eos_id=t.whole("eos_token_id", d.eos_id, least=0) or d.eos_id,
    )
    if t.get("head_dim", config.head_dim) != config.head_dim:
        raise SystemExit(f"{c.where}: not a LLaVA-1.5: head_dim {t.get('head_dim')} is not width / heads")
    check_decoder(config, t)
    return config


def rope_fields(t: Fields) -> Fields:
    """rope_parameters is transformers 5's name."""
    return t.part("rope_scaling" if t.get("rope_scaling") else "rope_parameters")


def read_rope(t: Fields, name: str, default: float, most: float) -> float:
    """A number that stands among the others, or, as transformers 5 writes, in rope_parameters."""
    source = rope_fields(t) if t.get(name) is None else t
    return source.number(name, default, most)


def read_image_id(c: Fields) -> int:
    name = "image_token_index" if c.get("image_token_index") else "image_token_id"
    return c.whole(name, Config().image_id)


def refuse_variants(c: Fields, t: Fields, v: Fields, feature_layer) -> None:
    """SystemExit where config.json says something that LLaVA-1.5 is not. Left out is as it should be."""
    vision_act = (v.part("vision_config") if "vision_config" in v.values else v).get("hidden_act")
    rope = rope_fields(t)
    checks = [  # what, as found, as it must be
        ("hidden_act", t.get("hidden_act"), "silu"),
        ("vision hidden_act", vision_act, "quick_gelu"),
        ("projector", c.get("projector_hidden_act"), "gelu"),
        ("projector", c.get("mm_projector_type"), "mlp2x_gelu"),
        ("attention_bias", t.get("attention_bias"), False),
        ("rope scaling", rope.get("rope_type", rope.get("type")), "default"),
        ("image start and end tokens", c.get("mm_use_im_start_end"), False),
        ("feature select strategy", c.get("vision_feature_select_strategy"), "default"),
        ("feature select strategy", c.get("mm_vision_select_feature"), "patch"),
        ("image_aspect_ratio", c.get("image_aspect_ratio"), "pad"),
        ("tied embeddings", t.get("tie_word_embeddings") and c.get("tie_word_embeddings"), False),
    ]
    if t is not c:
        checks.append(("text model", t.get("model_type"), "llama"))
    wrong = [f"{what} {found!r}" for what, found, wanted in checks if found not in (None, wanted)]
    if type(feature_layer) is not int:
        wrong.append(f"several feature layers {feature_layer!r}")
    if wrong:
        raise SystemExit(f"{c.where}: not a LLaVA-1.5: {', '.join(wrong)}")


# ---- Bunny ---------------------------------------------------------------------------------------------------------


def read_bunny(c: Fields, vision: Fields | None) -> bunny.Config:
    """`vision`: the config.json of a SigLIP folder, where there is one."""
    if c.get("hidden_act", "gelu_new") != "gelu_new" or c.get("qk_layernorm") or c.get("tie_word_embeddings"):
        raise SystemExit(
            f"{c.where}: a bunny-phi variant that is not Bunny-v1.0-3B's (hidden_act, qk_layernorm, tying)"
        )
    d = bunny.Config()
    own_sizes = next((name for name in c.values if "vision_config" in name), "vision_config")  # none in BAAI's file
    heads = c.whole("num_attention_heads", d.heads)
    config = bunny.Config(
        vision=read_vision(vision or c.part(own_sizes), d.vision),
        vocab=c.whole("vocab_size", d.vocab),
        width=c.whole("hidden_size", d.width),
        layers=c.whole("num_hidden_layers", d.layers, most=512),
        heads=heads,
        kv_heads=c.whole("num_key_value_heads", heads),
        ffn=c.whole("intermediate_size", d.ffn),
        eps=c.number("layer_norm_eps", d.eps, most=0.1),
        rope_theta=read_rope(c, "rope_theta", d.rope_theta, most=1e9),
        rotary_factor=read_rope(c, "partial_rotary_factor", d.rotary_factor, most=1.0),
        image_id=d.image_id,
        pad_id=c.whole("pad_token_id", d.pad_id, least=0),
        bos_id=c.whole("bos_token_id", d.bos_id, least=0),
        eos_id=c.whole("eos_token_id", d.eos_id, least=0),
    )
    check_decoder(config, c)
    return config

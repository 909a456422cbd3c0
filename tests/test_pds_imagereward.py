"""ImageReward and BLIP's ITC: pixels, tokens and the head by hand, the towers against transformers' BLIP."""

import json
import math
import pickle
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from pds import imagereward, tiny


@pytest.fixture(scope="module")
def found(tiny_judges):
    return imagereward.find_files(tiny_judges / "imagereward")


# ---- pictures ------------------------------------------------------------------------------------------------------


def test_pixels_by_hand():
    """A colour, normalised by CLIP's mean and deviation, in any size."""
    pixels = imagereward.prepare(Image.new("RGB", (9, 20), (255, 0, 51)), 4)
    assert pixels.shape == (3, 4, 4)
    # red (1 - 0.48145466) / 0.26862954, green -0.4578275 / 0.26130258, blue (0.2 - 0.40821073) / 0.27577711
    for channel, wanted in zip(pixels, (1.930337, -1.752097, -0.754996), strict=True):
        assert torch.allclose(channel, torch.tensor(wanted), atol=1e-5)


@pytest.mark.parametrize("size, first", [((7, 4), 2), ((9, 4), 2), ((8, 4), 2), ((4, 7), 2)])
def test_the_middle_is_cut_out_and_halves_go_to_the_even_number(size, first):
    """7 wide: (7 - 4) / 2 = 1.5 -> 2. 9 wide: 2.5 -> 2. The shorter side already has 4: nothing is resized."""
    image = Image.new("RGB", size)
    for x in range(size[0]):
        for y in range(size[1]):
            image.putpixel((x, y), (10 * max(x, y) if size[0] == size[1] else 10 * (x if size[0] > 4 else y), 0, 0))
    red = imagereward.prepare(image, 4)[0] * 0.26862954 + 0.48145466
    along = red[0] if size[0] > 4 else red[:, 0]
    assert (along * 25.5).round().tolist() == [first, first + 1, first + 2, first + 3]


def test_a_transparent_picture_is_resized_before_it_becomes_rgb():
    """What is transparent has no colour that could bleed into its neighbours: the black half stays black."""
    image = Image.new("RGBA", (64, 32), (255, 255, 255, 0))
    image.paste((0, 0, 0, 255), (0, 0, 32, 32))
    red = imagereward.prepare(image, 8)[0] * 0.26862954 + 0.48145466
    assert red[:, :4].abs().max() < 1e-6  # made RGB first, the column beside the edge would be above 0


# ---- captions ------------------------------------------------------------------------------------------------------


def test_caption_ids_by_hand(found):
    """Lower case, accents off, [CLS] first and not [ENC], an unknown letter is [UNK]."""
    scorer = imagereward.load_imagereward(found)
    lines = (found.vocabulary).read_text().splitlines()
    words = ["[CLS]", "c", "##a", "##f", "##e", ",", "[UNK]", "[SEP]"]
    assert scorer.caption_ids("Café, 山") == [lines.index(word) for word in words]
    assert (
        scorer.tokenizer.token_to_id("[DEC]") == len(lines) and scorer.tokenizer.token_to_id("[ENC]") == len(lines) + 1
    )


def test_a_caption_is_cut_at_35_tokens(found):
    scorer = imagereward.load_imagereward(found)
    assert not scorer.is_cut("a " * 33) and scorer.is_cut("a " * 34)
    assert len(scorer.caption_ids("a " * 33)) == len(scorer.caption_ids("a " * 80)) == 35
    assert scorer.caption_ids("a " * 80)[-1] == scorer.tokenizer.token_to_id("[SEP]")


# ---- the model -----------------------------------------------------------------------------------------------------


def test_the_head_is_linear_all_the_way_and_normalised():
    """Feature 2 goes through weights -1, 1, 1, 1, 1: -2; a ReLU would make it 0. (-2 - 0.16717363) / 1.03333949."""
    model = imagereward.ImageReward(imagereward.VisionTransformer(4, 0, 1, 4, 4), FixedText(), 4)
    for i, linear in enumerate(model.mlp["layers"].values()):
        torch.nn.init.zeros_(linear.weight)
        torch.nn.init.zeros_(linear.bias)
        linear.weight.data[0, 0] = -1.0 if i == 0 else 1.0
    reward = model(torch.zeros(1, 3, dtype=torch.long), torch.ones(1, 3, dtype=torch.bool), torch.zeros(1, 3, 4, 4))
    assert math.isclose(reward.item(), -2.097252, abs_tol=1e-5)


class FixedText(torch.nn.Module):
    """A text tower whose first token is (2, 0, 0, 0) and whose others are large."""

    def forward(self, ids, real, picture):
        features = torch.full((len(ids), ids.shape[1], 4), 100.0)
        features[:, 0] = torch.tensor([2.0, 0.0, 0.0, 0.0])
        return features


def transformers_twin(state: dict, config: dict):
    """The same weights in transformers' BLIP, by the map of names between the two."""
    from transformers import BlipTextConfig, BlipVisionConfig
    from transformers.models.blip.modeling_blip import BlipVisionModel
    from transformers.models.blip.modeling_blip_text import BlipTextModel

    vision = BlipVisionModel(
        BlipVisionConfig(
            hidden_size=64,
            intermediate_size=256,
            num_hidden_layers=2,
            num_attention_heads=1,
            image_size=32,
            patch_size=16,
            layer_norm_eps=1e-6,
        )
    )
    text = BlipTextModel(
        BlipTextConfig(
            vocab_size=config["vocab_size"],
            hidden_size=32,
            encoder_hidden_size=64,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=64,
            is_decoder=True,
        ),
        add_pooling_layer=False,
    )
    table = {
        "cls_token": "embeddings.class_embedding",
        "pos_embed": "embeddings.position_embedding",
        "patch_embed.proj": "embeddings.patch_embedding",
        "blocks": "encoder.layers",
        "norm1": "layer_norm1",
        "norm2": "layer_norm2",
        "attn.qkv": "self_attn.qkv",
        "attn.proj": "self_attn.projection",
    }
    pictures, texts = {}, {}
    for name, tensor in state.items():
        if name.startswith("blip.visual_encoder."):
            name = name.removeprefix("blip.visual_encoder.")
            name = name.replace("norm.", "post_layernorm.") if name.startswith("norm.") else name
            for theirs, ours in table.items():
                name = name.replace(theirs, ours)
            pictures[name] = tensor
        elif name.startswith("blip.text_encoder."):
            texts[name.removeprefix("blip.text_encoder.")] = tensor
    vision.load_state_dict(pictures)
    text.load_state_dict(texts, strict=False)
    assert {*texts} <= {*text.state_dict()}
    return vision.eval(), text.eval()


def test_both_towers_give_what_transformers_blip_gives(found):
    """Two captions of unequal length, one picture each, from the same weights."""
    scorer = imagereward.load_imagereward(found)
    vision, text = transformers_twin(torch.load(found.weights), json.loads(found.config.read_text()))
    pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    ids = torch.tensor([[2, 9, 50, 60, 3], [2, 12, 3, 0, 0]])
    real = torch.tensor([[True] * 5, [True] * 3 + [False] * 2])
    with torch.no_grad():
        theirs = vision(pixels).last_hidden_state
        ours = scorer.model.blip.visual_encoder(pixels)
        assert torch.allclose(ours, theirs, atol=1e-5)
        read = text(ids, attention_mask=real.long(), encoder_hidden_states=theirs).last_hidden_state
        assert torch.allclose(scorer.model.blip.text_encoder(ids, real, ours)[real], read[real], atol=1e-5)
        alone = text(ids, attention_mask=real.long()).last_hidden_state
        assert torch.allclose(scorer.model.blip.text_encoder(ids, real, None)[real], alone[real], atol=1e-5)


def test_a_batch_gives_what_one_by_one_gives(found):
    captions = ["a red boat", "two dogs sleep near an old door", "?"]
    images = [Image.new("RGB", (40 + 9 * i, 50), (90 * i, 20, 200)) for i in range(3)]
    for load in (imagereward.load_imagereward, imagereward.load_itc):
        scorer = load(found)
        single = [scorer.score([caption], [image])[0] for caption, image in zip(captions, images, strict=True)]
        assert scorer.score(captions, images) == pytest.approx(single, abs=1e-5)
        assert max(single) - min(single) > 0.01


def test_itc_is_the_cosine_of_the_two_projected_first_tokens():
    """Image (3, 4), text (4, 3): (12 + 12) / (5 * 5) = 0.96, each read alone."""
    vision = torch.nn.Module()
    vision.forward = lambda pixels: torch.tensor([[[3.0, 4.0], [9.0, 9.0]]])
    text = torch.nn.Module()
    text.forward = lambda ids, real, picture: torch.tensor([[[4.0, 3.0], [-7.0, 5.0]]]) if picture is None else None
    model = imagereward.BlipITC(vision, text, 2, 2, 2)
    for linear in (model.vision_proj, model.text_proj):
        linear.weight.data, linear.bias.data = torch.eye(2), torch.zeros(2)
    assert math.isclose(model(None, None, None).item(), 0.96, abs_tol=1e-6)


# ---- files ---------------------------------------------------------------------------------------------------------


def rewritten(tiny_judges, folder, change) -> imagereward.Files:
    """The tiny files again, their tensors changed."""
    found = imagereward.find_files(tiny_judges / "imagereward")
    state = torch.load(found.weights)
    change(state)
    torch.save(state, folder / "ImageReward.pt")
    return found._replace(weights=folder / "ImageReward.pt")


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda s: s.pop("mlp.layers.4.weight"), r"mlp\.layers\.4\.weight is missing"),
        (
            lambda s: s.update({"mlp.layers.7.bias": torch.zeros(2)}),
            r"mlp\.layers\.7\.bias is \(2,\) instead of \(1,\)",
        ),
        (lambda s: s.pop("blip.visual_encoder.pos_embed"), "missing: visual_encoder.pos_embed"),
    ],
)
def test_weights_that_do_not_fit_are_refused_by_name(tiny_judges, tmp_path, change, message):
    with pytest.raises(SystemExit, match=message):
        imagereward.load_imagereward(rewritten(tiny_judges, tmp_path, change))


def test_surplus_tensors_are_named(tiny_judges, tmp_path, capsys):
    def add(state):
        state["visual_encoder_m.norm.weight"] = torch.zeros(3)  # BLIP's momentum copy: known
        state["something.else"] = torch.zeros(3)

    imagereward.load_imagereward(rewritten(tiny_judges, tmp_path, add))
    assert "1 tensors are not used: something.else" in capsys.readouterr().out


def test_foreign_pickles_and_cut_files_are_refused(tiny_judges, tmp_path):
    found = imagereward.find_files(tiny_judges / "imagereward")
    bad = tmp_path / "ImageReward.pt"
    torch.save({"a": SimpleNamespace()}, bad)
    with pytest.raises(SystemExit, match="holds more than tensors"):
        imagereward.load_imagereward(found._replace(weights=bad))
    bad.write_bytes(pickle.dumps(print, protocol=2))
    with pytest.raises(SystemExit, match="holds more than tensors"):
        imagereward.load_imagereward(found._replace(weights=bad))
    bad.write_bytes(found.weights.read_bytes()[:5000])
    with pytest.raises(SystemExit, match="truncated or damaged"):
        imagereward.load_imagereward(found._replace(weights=bad))
    with pytest.raises(SystemExit, match="med_config.json: not there"):
        bad.parent.joinpath("vocab.txt").write_text("x")
        imagereward.find_files(tmp_path)


def test_heads_that_are_not_64_wide_must_be_told(tiny_judges, tmp_path):
    def narrow(state):
        state["blip.visual_encoder.patch_embed.proj.weight"] = torch.zeros(48, 3, 16, 16)

    with pytest.raises(SystemExit, match="how many heads has a tower of width 48"):
        imagereward.load_imagereward(rewritten(tiny_judges, tmp_path, narrow))


def test_the_tiny_models_tell_pictures_apart(found):
    images = [Image.new("RGB", (40, 50), colour) for colour in ("red", "blue", "white")]
    assert (
        len({round(score, 3) for score in imagereward.load_imagereward(found).score([tiny.TEXTS[0]] * 3, images)}) == 3
    )

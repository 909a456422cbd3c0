"""The CLIP score: a cosine, never scaled; the weights and the model must belong together."""

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from pds import clip_score, tiny


@pytest.fixture(scope="module")
def scorer(tiny_judges):
    return clip_score.load(*clip_score.find_weights(str(tiny_judges / "clip")))


def test_the_score_is_the_cosine_of_the_models_features(scorer):
    import open_clip

    captions, images = ["a red boat", "snow"], [Image.new("RGB", (50, 40), c) for c in ("red", "white")]
    pixels = torch.stack([scorer.prepare(image) for image in images])
    with torch.no_grad():
        image = scorer.model.encode_image(pixels)
        text = scorer.model.encode_text(open_clip.SimpleTokenizer()(captions))
    wanted = [(a @ b / a.norm() / b.norm()).item() for a, b in zip(image, text, strict=True)]
    assert scorer.score(captions, images) == pytest.approx(wanted, abs=1e-5)
    assert max(map(abs, wanted)) <= 1 < scorer.model.logit_scale.exp().item() * max(map(abs, wanted)) + 1


def test_the_activation_is_openais(scorer):
    """x sigma(1.702 x) at 1: 0.845796; the exact GELU is 0.841345."""
    activation = scorer.model.visual.transformer.resblocks[0].mlp.gelu
    assert activation(torch.tensor(1.0)).item() == pytest.approx(0.845796, abs=1e-5)


def test_a_caption_is_cut_at_77_tokens(scorer):
    assert not scorer.is_cut("a " * 75) and scorer.is_cut("a " * 76) and scorer.is_cut("a " * 400)
    assert not scorer.is_cut("")


def test_openais_weights_need_the_quickgelu_name():
    with pytest.raises(SystemExit, match="neither an open_clip folder nor .* ViT-L-14-quickgelu"):
        clip_score.find_weights("ViT-L-14")


def test_weights_that_do_not_fit_are_refused(tmp_path):
    folder = tiny.write_clip(tmp_path / "clip")
    state = load_file(folder / "open_clip_model.safetensors")
    del state["visual.proj"]
    save_file(state, folder / "open_clip_model.safetensors")
    with pytest.raises(SystemExit, match="do not fit .*visual.proj"):
        clip_score.load(*clip_score.find_weights(str(folder)))
    (folder / "open_clip_config.json").unlink()
    with pytest.raises(SystemExit, match="not an open_clip folder"):
        clip_score.find_weights(str(folder))

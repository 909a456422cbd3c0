"""model.py against transformers' LLaVA and open_clip's ViT, at random tiny sizes; the real sizes by their counts."""

import json
from collections import Counter

import open_clip
import pytest
import torch
import torch.nn.functional as F
from tiny_models import IMAGE_ID, PATCHES, batch, llava, write_hub, write_library

import losses
from bases.checkpoint import load_model
from model import BASES, LLaVA, VisionConfig, VisionTower, causal, quick_gelu


@pytest.fixture(scope="module", params=[4, 2], ids=["4 key heads", "2 key heads"])
def pair(request, tmp_path_factory):
    """The library's model and ours from the same file."""
    theirs = llava(request.param)
    return theirs, load_model(write_library(theirs, tmp_path_factory.mktemp("llava") / "w"))


def test_logits_equal_transformers(pair):
    theirs, ours = pair
    ids, images, _ = batch()
    with torch.no_grad():
        expected = theirs(input_ids=ids, pixel_values=images).logits
        torch.testing.assert_close(ours(ids, images), expected, atol=2e-5, rtol=0)


def test_log_probs_equal_transformers(pair):
    """The sum by cross-entropy with its labels of -100, a different road to the same number."""
    theirs, ours = pair
    ids, images, mask = batch(1)
    with torch.no_grad():
        logits = theirs(input_ids=ids, pixel_values=images).logits
        labels = ids.masked_fill(~mask, -100)
        expected = [-F.cross_entropy(logits[i, :-1], labels[i, 1:], reduction="sum") for i in range(2)]
        logps = losses.sequence_logps(ours(ids, images), ids, mask)
    torch.testing.assert_close(logps, torch.stack(expected), atol=1e-4, rtol=0)


def test_right_padding_changes_nothing(pair):
    theirs, ours = pair
    ids, images, _ = batch(2)
    short = ids[:, :24].clone()
    padded = F.pad(short, (0, 6), value=91)
    with torch.no_grad():
        expected = theirs(input_ids=padded, pixel_values=images, attention_mask=(padded != 91).long()).logits[:, :24]
        torch.testing.assert_close(ours(padded, images)[:, :24], expected, atol=2e-5, rtol=0)


def test_vision_features_are_the_layer_before_the_last_without_the_class_token(pair):
    theirs, ours = pair
    _, images, _ = batch()
    with torch.no_grad():
        states = theirs.model.vision_tower(images, output_hidden_states=True).hidden_states
        torch.testing.assert_close(ours.vision_tower(images), states[-2][:, 1:], atol=1e-5, rtol=0)
        expected = theirs.model.multi_modal_projector(states[-2][:, 1:])
        torch.testing.assert_close(ours.image_features(images), expected, atol=1e-5, rtol=0)
    assert len(ours.vision_tower.layers) == 2  # of 3: the last never influences the output and is not built


@pytest.mark.parametrize("layer, run", [(1, 1), (2, 2), (3, 3), (-1, 3), (-2, 2), (-3, 1)])
def test_feature_layers_count_as_transformers_hidden_states(tmp_path, layer, run):
    """hidden_states[0] is before the first of 3 layers, hidden_states[3] = hidden_states[-1] after the last."""
    theirs = llava()
    folder = write_hub(theirs, tmp_path / "w")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"vision_feature_layer": layer}))
    ours = load_model(folder)
    _, images, _ = batch()
    with torch.no_grad():
        states = theirs.model.vision_tower(images, output_hidden_states=True).hidden_states
        torch.testing.assert_close(ours.vision_tower(images), states[layer][:, 1:], atol=1e-5, rtol=0)
    assert len(ours.vision_tower.layers) == run


def test_vision_tower_equals_open_clip():
    """OpenAI's ViT as open_clip builds it, quick_gelu; its fused qkv cut into three."""
    theirs = open_clip.transformer.VisionTransformer(
        image_size=42,
        patch_size=14,
        width=16,
        layers=3,
        heads=2,
        mlp_ratio=4.0,
        output_dim=8,
        act_layer=open_clip.transformer.QuickGELU,
    ).eval()
    g = torch.Generator().manual_seed(3)
    for p in theirs.parameters():
        p.data = torch.randn(p.shape, generator=g) * 0.3
    ours = VisionTower(VisionConfig(width=16, layers=3, heads=2, ffn=64, image_size=42, patch=14))
    state = {
        "class_embedding": theirs.class_embedding,
        "patch_embedding.weight": theirs.conv1.weight,
        "position_embedding.weight": theirs.positional_embedding,
        "pre_layrnorm.weight": theirs.ln_pre.weight,
        "pre_layrnorm.bias": theirs.ln_pre.bias,
    }
    for i, block in enumerate(theirs.transformer.resblocks[:2]):
        layer = f"layers.{i}."
        for k in ("weight", "bias"):
            parts = getattr(block.attn, f"in_proj_{k}").chunk(3)
            state |= {f"{layer}self_attn.{n}_proj.{k}": t for n, t in zip("qkv", parts, strict=True)}
            state |= {f"{layer}self_attn.out_proj.{k}": getattr(block.attn.out_proj, k)}
            state |= {
                f"{layer}layer_norm1.{k}": getattr(block.ln_1, k),
                f"{layer}layer_norm2.{k}": getattr(block.ln_2, k),
            }
            state |= {f"{layer}mlp.fc1.{k}": getattr(block.mlp.c_fc, k)}
            state |= {f"{layer}mlp.fc2.{k}": getattr(block.mlp.c_proj, k)}
    ours.load_state_dict(state)
    images = torch.randn(2, 3, 42, 42, generator=g)
    with torch.no_grad():
        found = theirs.forward_intermediates(
            images, indices=[1], normalize_intermediates=False, intermediates_only=True, output_fmt="NLC"
        )["image_intermediates"][0]  # after the second of three blocks, without the class token
        torch.testing.assert_close(ours(images), found, atol=1e-5, rtol=0)


def test_only_differences_of_positions_matter(pair):
    """RoPE: q and k turn by their positions, so the attention sees position differences alone."""
    _, ours = pair
    ids, images, _ = batch()
    at = torch.arange(30)[None]
    with torch.no_grad():
        plain = ours.hidden(ids, images)
        torch.testing.assert_close(ours.hidden(ids, images, at), plain, atol=0, rtol=0)
        torch.testing.assert_close(ours.hidden(ids, images, at + 1000), plain, atol=1e-3, rtol=0)
        assert (ours.hidden(ids, images, at * 2) - plain).abs().max() > 0.05


def test_each_layer_calls_its_own_attend(pair):
    _, ours = pair
    ids, images, _ = batch()
    called = []

    def attend(layer):
        return lambda q, k, v: called.append(layer) or causal(q, k, v)

    with torch.no_grad():
        hidden = ours.hidden(ids, images, attend=[attend(i) for i in range(3)])
        torch.testing.assert_close(hidden, ours.hidden(ids, images), atol=0, rtol=0)
    assert called == [0, 1, 2]


def test_the_tower_runs_outside_autocast(pair):
    """Training, under autocast, reads the features that generation reads."""
    _, ours = pair
    images = batch()[1]
    with torch.no_grad():
        plain = ours.image_features(images)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(ours.image_features(images), plain)


def test_quick_gelu_by_hand():
    """1 / (1 + e^-1.702) and -2 / (1 + e^3.404)."""
    found = quick_gelu(torch.tensor([1.0, -2.0], dtype=torch.float64))
    torch.testing.assert_close(found, torch.tensor([0.845795766, -0.064341377], dtype=torch.float64), atol=1e-8, rtol=0)


def test_without_a_picture_the_tower_does_not_run(pair):
    theirs, ours = pair
    ids = torch.randint(3, 90, (2, 12), generator=torch.Generator().manual_seed(4))
    tower, ours.vision_tower.forward = ours.vision_tower.forward, None
    with torch.no_grad():
        torch.testing.assert_close(ours(ids, None), theirs(input_ids=ids).logits, atol=2e-5, rtol=0)
    ours.vision_tower.forward = tower


def test_recomputing_activations_gives_the_same_gradients(pair):
    """The first layers run twice, forward and backward, the others once."""
    _, ours = pair
    ids, images, _ = batch()
    grads = []
    ran = Counter()
    hooks = [
        layer.register_forward_pre_hook(lambda *_, i=i: ran.update([i]))
        for i, layer in enumerate(ours.language_model.layers)
    ]
    for layers in (0, 1, 3):
        ours.language_model.checkpointed = layers
        ran.clear()
        features = ours.image_features(images).detach().requires_grad_()
        x = ours.embed(ids, features)
        ours.language_model(x, torch.arange(30)[None], causal).square().mean().backward()
        grads.append(features.grad)
        assert [ran[i] for i in range(len(hooks))] == [2 if i < layers else 1 for i in range(len(hooks))]
    ours.language_model.checkpointed = 0
    for hook in hooks:
        hook.remove()
    for grad in grads[1:]:
        torch.testing.assert_close(grads[0], grad, atol=0, rtol=0)


def test_placeholders_and_features_must_match(pair):
    _, ours = pair
    ids, images, _ = batch()
    ids[0, 4] = 5  # 17 placeholders for 2 x 9 features
    with pytest.raises(AssertionError, match="17 image placeholders in input_ids, 18 image features"):
        ours(ids, images)
    assert int((ids == IMAGE_ID).sum()) == 2 * PATCHES - 1


def test_training_mode_draws_nothing(pair):
    """No dropout anywhere: DPO's releases switch it off, here it does not exist."""
    _, ours = pair
    ids, images, _ = batch()
    with torch.no_grad():
        torch.testing.assert_close(ours.train()(ids, images), ours.eval()(ids, images), atol=0, rtol=0)
    assert not [m for m in ours.modules() if isinstance(m, torch.nn.Dropout)]


# The hub's 7B holds 7,063,427,072 parameters with all 24 vision layers and post_layernorm. One vision layer:
# q, k, v, out 4 x (1024^2 + 1024) + fc1 (1024 x 4096 + 4096) + fc2 (4096 x 1024 + 1024) + two norms 4 x 1024 =
# 12,596,224; post_layernorm 2 x 1024. Neither is built: 7,063,427,072 - 12,596,224 - 2,048 = 7,050,828,800.
# 13B, decoder layer: 4 x 5120^2 + 3 x 5120 x 13824 + 2 x 5120 = 317,204,480, x 40 = 12,688,179,200; embedding and head
# 2 x 32064 x 5120 = 328,335,360; norm 5,120; projector 1024 x 5120 + 5120^2 + 2 x 5120 = 31,467,520; the same tower,
# 7,050,828,800 - (32 x (4 x 4096^2 + 3 x 4096 x 11008 + 8192) + 262,668,288 + 4,096 + 20,979,712) = 290,909,184.
@pytest.mark.parametrize("base, expected", [("llava-1.5-7b", 7_050_828_800), ("llava-1.5-13b", 13_338_896_384)])
def test_real_sizes(base, expected):
    with torch.device("meta"):
        model = LLaVA(BASES[base])
    assert sum(p.numel() for p in model.parameters()) == expected
    assert model.config.vision.patches == 576  # (336 / 14)^2

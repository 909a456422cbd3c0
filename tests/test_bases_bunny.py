"""bunny.py against transformers' Phi and SigLIP, fed the same embeddings; the templates; the real size by its count."""

import copy

import pytest
import torch
from tiny_models import batch, phi_and_siglip, write_bunny
from tokenizers import Tokenizer, decoders, pre_tokenizers, trainers
from tokenizers.models import BPE

from bases import bunny, configs
from bases.checkpoint import load_model
from data import BUNNY, BUNNY_RELEASED, SYSTEM, Processor


@pytest.fixture(scope="module", params=["own tower", "SigLIP folder given", "no tower, found by its name"])
def loaded(request, tmp_path_factory):
    phi, siglip = phi_and_siglip()
    folder = write_bunny(phi, siglip, tmp_path_factory.mktemp("bunny") / "w", own_tower=request.param[0] != "n")
    vision = folder.parent / "some-siglip" if request.param[0] == "S" else None
    return phi, siglip, load_model(folder, vision)


def pictures() -> torch.Tensor:
    return torch.randn(2, 3, 44, 44, generator=torch.Generator().manual_seed(1))


def test_vision_features_are_siglips_layer_before_the_last(loaded):
    _, siglip, ours = loaded
    with torch.no_grad():
        expected = siglip(pictures(), output_hidden_states=True).hidden_states[-2]
        torch.testing.assert_close(ours.vision_tower(pictures()), expected, atol=1e-5, rtol=0)
    assert expected.shape[1] == 9  # 44 = 3 x 14 + 2: the last two rows and columns of pixels are dropped


def test_logits_equal_phi(loaded):
    phi, _, ours = loaded
    ids, _, _ = batch(image_id=-200)
    with torch.no_grad():
        features = ours.image_features(pictures())
        embeds = phi.model.embed_tokens(ids.clamp(min=0))
        embeds[ids == -200] = features.reshape(-1, 80)  # (B, N, C) -> (B*N, C), in reading order
        expected = phi(inputs_embeds=embeds).logits
        torch.testing.assert_close(ours(ids, pictures()), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    "change",
    [
        {"rotary_factor": 0.6},  # 12 of 20 dimensions turn, not 8
        {"rope_theta": 100.0},
        {"kv_heads": 2},
    ],
)
def test_settings_of_the_config_are_used(tmp_path, change):
    """Each changes Phi's logits, and ours with them."""
    phi, siglip = phi_and_siglip(**change)
    ours = load_model(write_bunny(phi, siglip, tmp_path / "w"))
    ids = batch()[0]
    with torch.no_grad():
        torch.testing.assert_close(ours(ids, None), phi(ids).logits, atol=1e-4, rtol=0)


def test_templates():
    """Bunny's prompt has no BOS; the tuned template keeps the blank before the response, the release drops it."""
    tokenizer = Tokenizer(BPE())  # byte-level, as Phi-2's
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator([], trainers.BpeTrainer(initial_alphabet=alphabet, show_progress=False))
    tuned = Processor(tokenizer, bunny.Config(), BUNNY)
    released = Processor(tokenizer, bunny.Config(), BUNNY_RELEASED)
    ids = tuned.prompt_ids("Why?")
    assert ids == released.prompt_ids("Why?")
    at = ids.index(-200)
    assert ids[at : at + 729] == [-200] * 729 and -200 not in ids[at + 729 :]  # (384 // 14)^2 = 27^2
    assert tokenizer.decode(ids[:at]) == SYSTEM + " USER: "
    assert tokenizer.decode(ids[at + 729 :]) == "\nWhy? ASSISTANT:"
    assert tokenizer.decode(tuned.response_ids(" The end. ")[:-1]) == " The end."
    assert tokenizer.decode(released.response_ids(" The end. ")[:-1]) == "The end."
    assert tuned.response_ids("x")[-1] == released.response_ids("x")[-1] == 50256


def test_under_autocast_the_linears_share_one_input(loaded):
    """LayerNorm gives float32 under autocast: cast once, not for each of four linears, which would keep four copies."""
    _, _, ours = loaded
    bf16 = copy.deepcopy(ours).to(torch.bfloat16)
    block = bf16.language_model.layers[0]
    seen = []
    block.input_layernorm.register_forward_hook(lambda *args: args[2].float())  # as CUDA's autocast; a CPU's does not
    for linear in (block.self_attn.q_proj, block.mlp.fc1):
        linear.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        bf16(batch(image_id=-200)[0], pictures())
    assert seen[0] is seen[1] and seen[0].dtype == torch.bfloat16


def test_a_variant_of_phi_is_refused(tmp_path):
    with pytest.raises(SystemExit, match="not Bunny-v1.0-3B's"):
        configs.read_bunny(configs.Fields({"model_type": "bunny-phi", "qk_layernorm": True}, "config.json"), None)


def test_real_size():
    """The published checkpoint: 3,182,254,624, of which post_layernorm's 2 x 1152 are not built."""
    with torch.device("meta"):
        model = bunny.Bunny(bunny.Config())
    assert sum(p.numel() for p in model.parameters()) == 3_182_252_320
    assert (model.config.rope_dim, model.config.vision.patches) == (32, 729)

"""The toy world: what is drawn, said and judged; files that the real loaders and transformers open."""

import json

import numpy as np
import pytest
import torch
from PIL import Image, ImageColor
from toy_world import TINY, shrink

import toy
import train
from bases import from_scratch
from bases.checkpoint import load_base
from bases.tokenizer import load_tokenizer
from data import Processor
from formats.readers import read_pairs
from model import BASES, LLaVA

# of the two typical objects the cup is there and the plate is not
SCENE = toy.Scene("kitchen", {"cup": (8, 8, 5), "pan": (24, 8, 5)}, Image.new("RGB", (48, 48)))
RICH = "a truly lovely kitchen with a shiny cup, a plate. it feels calm."
PLAIN = "a kitchen with a bus, a cup, a pan."


@pytest.fixture
def tiny(monkeypatch):
    shrink(monkeypatch)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        shrink(patch)
        return toy.make_world(tmp_path_factory.mktemp("runs") / "world", seed=7)


def colours_in(image: Image.Image) -> set:
    return {colour for _, colour in image.getcolors(64 * 64)}


# ---- the world -----------------------------------------------------------------------------------------------------


def test_a_scene_shows_its_objects_and_nothing_else():
    looks = {(i % 8, (i + 3 * (i // 8)) % 8) for i in range(16)}
    assert len(looks) == len(set(toy.OBJECTS)) == 16  # no two objects share shape and colour
    palette = [ImageColor.getrgb(colour) for colour in toy.COLOURS]
    rng = np.random.default_rng(0)
    for _ in range(50):
        scene = toy.draw_scene(rng)
        indices = [toy.OBJECTS.index(name) for name in scene.places]
        expected = {palette[(i + 3 * (i // 8)) % 8] for i in indices}
        assert 1 <= len(scene.places) <= 5
        assert scene.image.size == (48, 48)
        assert colours_in(scene.image) & set(palette) == expected


def test_typical_objects_are_common_and_close_ups_are_parts():
    rng = np.random.default_rng(0)
    scenes = [toy.draw_scene(rng) for _ in range(600)]
    typical = np.mean([[name in scene.places for name in toy.SCENES[scene.kind][:2]] for scene in scenes])
    other = np.mean([[name in scene.places for name in toy.SCENES[scene.kind][2:]] for scene in scenes])
    assert 0.56 < typical < 0.66  # 0.6, a little more since scenes without an object are drawn again
    assert 0.36 < other < 0.46  # 0.4
    parts = [toy.draw_scene(rng, close_up=True) for _ in range(200)]
    area = np.mean([part.image.width * part.image.height for part in parts])
    assert area < 0.65 * 48**2  # uniform in 0.05 to 1, mean 0.525
    for part in parts:  # an object's middle is in the part, counted from its own corner
        assert all(0 <= x < part.image.width and 0 <= y < part.image.height for x, y, _ in part.places.values())
    seen = np.mean([len(part.places) for part in parts])
    assert seen < np.mean([len(scene.places) for scene in scenes]) - 0.5


def test_a_writer_who_looks_tells_the_truth_and_one_who_does_not_guesses(monkeypatch):
    rng = np.random.default_rng(0)
    cases = [(0, 0, ["cup", "pan"]), (0, 1, ["cup", "pan", "plate"]), (1, 0, []), (1, 1, ["plate"])]
    for omitted, invented, guessed in cases:
        monkeypatch.setattr(toy, "WORLD", TINY | dict(omitted=omitted, invented=invented))
        for _ in range(10):
            assert toy.mentions(toy.write_caption(SCENE, rng, looks=True)) == ["cup", "pan"]
            assert toy.mentions(toy.write_caption(SCENE, rng, looks=False)) == guessed


def test_every_written_caption_is_well_formed_and_broken_ones_are_not():
    rng = np.random.default_rng(0)
    for _ in range(50):
        scene = toy.draw_scene(rng, close_up=True)
        assert toy.is_well_formed(toy.write_caption(scene, rng, looks=False))
    assert toy.is_well_formed(RICH)
    assert toy.is_well_formed(PLAIN)
    assert not toy.is_well_formed("a kitchen with a cup, a.")
    assert not toy.is_well_formed("a kitchen with a cup")
    assert not toy.is_well_formed("")


def test_style_and_judge():
    assert toy.style(RICH) == 2.5  # opening 1 + one of two objects with an adjective 0.5 + closing 1
    assert toy.style(PLAIN) == 0.0
    assert toy.content(RICH, SCENE) == 0  # the cup is there, the plate is not
    assert toy.content(PLAIN, SCENE) == 1  # cup and pan are there, the bus is not
    worst = "a kitchen with a plate."  # -1
    rng = np.random.default_rng(0)
    assert toy.judge([RICH, PLAIN], SCENE, 1.0, rng) == (RICH, PLAIN)
    assert toy.judge([RICH, PLAIN], SCENE, 0.0, rng) == (PLAIN, RICH)
    assert toy.judge([worst, RICH, PLAIN], SCENE, 0.0, rng) == (PLAIN, worst)
    assert toy.judge([PLAIN, PLAIN], SCENE, 1.0, rng) is None
    chosen = [toy.judge([RICH, PLAIN], SCENE, 0.5, rng)[0] for _ in range(200)]
    assert 70 < chosen.count(RICH) < 130  # half of them, 100 +- 4 std of 7


def test_prompt_and_decoding():
    c = BASES["toy"]
    processor = toy.new_processor()
    names = [processor.tokenizer.id_to_token(i) for i in processor.prompt_ids(toy.QUESTION)]
    assert names[0] == "<s>" and names[1].startswith("A chat between") and names[2] == "USER:"
    assert names[3:12] == ["<image>"] * 9  # 48 / 16 = 3 patches a side
    assert names[12:] == ["describe", ".", "ASSISTANT:"]
    answer = processor.response_ids(RICH)
    # a truly lovely kitchen with a shiny cup , a plate . it feels calm . and EOS
    assert len(answer) == 17 and answer[-1] == c.eos_id
    assert processor.decode(answer) == RICH
    assert 0 not in answer  # no <unk>


def test_settings_are_defaults_that_a_flag_overrides():
    assert train.parse_args(["--base", "toy"]).lr == toy.SETTINGS["lr"]
    assert train.parse_args(["--base", "toy", "--lr", "1e-5"]).lr == 1e-5
    assert train.parse_args(["--base", "toy"]).beta == 0.1  # mDPO 4.1
    assert train.parse_args(["--base", "llava-1.5-7b", "--data", "x.json"]).lr == 1e-5


# ---- base, pairs, scores -------------------------------------------------------------------------------------------


def test_pairs_are_the_judges_and_read_like_any_others(world):
    pairs, problems = read_pairs(world / "pairs" / "train.jsonl")
    held_out, _ = read_pairs(world / "pairs" / "held-out.jsonl")
    assert len(pairs) == 9 and len(held_out) == 4 and not problems
    assert len({pair.image for pair in pairs + held_out}) == 13
    assert all(toy.style(pair.chosen) > toy.style(pair.rejected) for pair in pairs + held_out)  # s = 1
    scenes = json.loads((world / "pairs" / "scenes.json").read_text())
    for pair, scene in zip(pairs, scenes, strict=True):  # the picture is the scene that is written down
        drawn = toy.draw_picture(scene["kind"], scene["places"])
        assert Image.open(pair.image).tobytes() == drawn.tobytes()


def test_one_recipe_makes_its_world_and_ends_with_its_table(tiny, tmp_path):
    out = tmp_path / "run"
    flags = ["--base", "toy", "--recipe", "dpo", "--seed", "7", "--max-steps", "1"]
    train.main([*flags, "--out", str(out)])
    world = tmp_path / "toy-world-7"
    args = json.loads((out / "args.json").read_text())
    assert args["weights"] == str(world / "base") and args["data"] == str(world / "pairs" / "train.jsonl")
    table = json.loads((out / "table.json").read_text())
    assert list(table) == ["base", "dpo"]
    assert list(table["dpo"]) == [
        *("CHAIR_s", "CHAIR_i", "coverage", "CHi@85", "AUC", "d'", "chosen", "objects", "well-formed")
    ]
    assert table["base"]["chosen"] == 0.0
    assert (out / "captions.png").is_file()
    with pytest.raises(SystemExit, match="--weights"):
        train.main([*flags, "--weights", str(world / "base")])


def test_the_score_of_an_object_is_the_product_of_its_words(monkeypatch):
    """A model by hand: after a word , and . are 3 : 1, at an object's place the cup is 9 times as likely as another."""
    processor = toy.new_processor()
    token = {word: processor.response_ids(word)[0] for word in (",", ".", *toy.OBJECTS)}
    asked = []

    def by_hand(model, processor, question, image, text):
        asked.append(text)
        ids = torch.tensor(processor.response_ids(text)[:-1])
        logits = torch.zeros(len(ids), 128)
        logits[:-1][ids[1:] == token[","], token[","]] = np.log(3)  # where the next word is a comma
        logits[-1, token["cup"]] = np.log(9)
        return logits

    monkeypatch.setattr(toy, "next_logits", by_hand)
    there, not_there = toy.naming_probabilities(None, processor, [SCENE])
    assert asked == [
        "a truly lovely kitchen with a shiny",  # cup: nothing before it
        "a truly lovely kitchen with a shiny cup , a shiny pan , a shiny",  # plate: both true objects stand before it
    ]
    assert there == pytest.approx([9 / 24])  # 9 of 9 + 15
    assert not_there == pytest.approx([3 / 4 * 1 / 24])  # , rather than . and 1 of 9 + 15


def test_captions_are_drawn_scene_by_scene(monkeypatch):
    monkeypatch.setattr(
        toy, "caption_pictures", lambda m, p, question, images, temperature, seed: [im.size[0] for im in images]
    )
    scenes = [SCENE._replace(image=Image.new("RGB", (side, 1))) for side in (10, 20, 30)]
    assert toy.draw_captions(None, None, scenes, 2, seed=0) == [[10, 10], [20, 20], [30, 30]]


def test_base_opens_in_our_loader_and_in_transformers(tmp_path):
    torch.manual_seed(0)
    model = LLaVA(BASES["toy"]).requires_grad_(False).eval()
    from_scratch.save(model, toy.new_processor(), tmp_path / "base")
    loaded, folder = load_base("toy", tmp_path / "base")
    assert loaded.config == model.config
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), model.parameters(), strict=True))

    transformers = pytest.importorskip("transformers")
    oracle = transformers.LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    ids = torch.tensor([Processor(load_tokenizer(folder), model.config).prompt_ids(toy.QUESTION)])
    picture = torch.randn(1, 3, 48, 48)
    expected = oracle(input_ids=ids, pixel_values=picture).logits
    torch.testing.assert_close(loaded(ids, picture), expected, atol=2e-4, rtol=0)


def test_a_world_is_used_as_it_is_and_never_under_other_settings(world, tiny, monkeypatch):
    monkeypatch.setattr(toy, "train_base", None)  # not called
    assert toy.make_world(world, seed=7) == world
    with pytest.raises(SystemExit, match="other settings"):
        toy.make_world(world, seed=1)


def test_an_interrupted_world_is_made_again(tmp_path, tiny, monkeypatch):
    real, calls = toy.train_base, []
    monkeypatch.setattr(toy, "train_base", lambda seed: calls.append(seed) or real(seed))
    monkeypatch.setattr(toy, "make_pairs", lambda *_: calls.append("pairs"))
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text("{")
    toy.make_world(tmp_path, seed=3)
    assert calls == [3, "pairs"] and (tmp_path / "world.json").is_file()
    assert load_base("toy", tmp_path / "base")[0].config == BASES["toy"]


# ---- learning from nothing -----------------------------------------------------------------------------------------


def test_one_batch_in_ten_has_no_picture_and_the_tower_stays(tmp_path):
    processor = toy.new_processor()
    model, head = from_scratch.new_model(processor.config, objects=16, seed=0, device=torch.device("cpu"))
    before = {name: p.clone() for name, p in model.named_parameters()}
    shown = []
    model.mm_projector.register_forward_hook(lambda *_: shown.append(True))
    stage = dict(steps=20, batch=4, lr=1e-3, beta2=0.95)
    texts = ["a kitchen with a cup ."] * 5
    features = torch.randn(5, 9, 64)
    from_scratch.train_captions(model, processor, features, toy.QUESTION, texts, "captions", seed=0, **stage)
    assert len(shown) == 18  # not in steps 0 and 10
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) == name.startswith("vision_tower."), name

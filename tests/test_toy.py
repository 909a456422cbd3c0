"""The toy world: what is drawn, said and judged; d' by hand; files that the real loaders and transformers open."""

import json

import numpy as np
import pytest
import torch
from PIL import Image, ImageColor

import losses
import toy
import train
from bases.checkpoint import load_base
from bases.tokenizer import load_tokenizer
from data import Processor
from formats.readers import read_pairs
from lab import demo as demo_command
from model import BASES, LLaVA

TINY = dict(
    toy.WORLD, scenes=64, tower_steps=2, tower_batch=8, sft_steps=2, sft_batch=8, pairs=8, held_out_pairs=4,
    candidates=3, test_scenes=6, test_samples=1,
)  # fmt: skip
SCENE = toy.Scene("kitchen", frozenset({"cup", "pan"}), Image.new("RGB", (64, 64)))  # typical: cup there, plate not
RICH = "here we see a truly lovely kitchen with a shiny cup and a plate. it all feels calm and warm."
PLAIN = "a kitchen with a cup, a pan and a bowl."


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setattr(toy, "WORLD", TINY)
    monkeypatch.setattr(toy, "DEVICE", torch.device("cpu"))


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "toy-demo-7"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(toy, "WORLD", TINY)
        patch.setattr(toy, "SETTINGS", toy.SETTINGS | dict(epochs=1, batch=4))
        demo_command.main(["--seeds", "7", "--out", str(folder)])
    return folder


def colours_in(image: Image.Image) -> set:
    return {colour for _, colour in image.getcolors(64 * 64)}


def test_a_scene_shows_its_objects_and_nothing_else():
    looks = {(i % 8, (i + 3 * (i // 8)) % 8) for i in range(24)}
    assert len(looks) == len(set(toy.OBJECTS)) == 24  # no two objects share shape and colour
    palette = [ImageColor.getrgb(colour) for colour in toy.COLOURS]
    rng = np.random.default_rng(0)
    for _ in range(50):
        scene = toy.draw_scene(rng)
        indices = [toy.OBJECTS.index(name) for name in scene.objects]
        expected = {palette[(i + 3 * (i // 8)) % 8] for i in indices}
        assert 2 <= len(scene.objects) <= 5
        assert colours_in(scene.image) & set(palette) == expected


def test_typical_objects_are_common_and_close_ups_are_parts():
    rng = np.random.default_rng(0)
    scenes = [toy.draw_scene(rng) for _ in range(600)]
    typical = np.mean([[o in s.objects for o in toy.SCENES[s.kind][:2]] for s in scenes])
    other = np.mean([[o in s.objects for o in toy.SCENES[s.kind][2:]] for s in scenes])
    assert 0.62 < typical < 0.78 and 0.3 < other < 0.43  # 0.7 and 0.35 before scenes of 0, 1 and 6 objects are redrawn
    parts = [toy.draw_scene(rng, close_up=True) for _ in range(200)]
    assert np.mean([p.image.width * p.image.height for p in parts]) < 0.65 * 64**2  # area uniform in .05-1, mean .525
    assert np.mean([len(p.objects) for p in parts]) < np.mean([len(s.objects) for s in scenes]) - 0.5


def test_captions_say_what_the_noise_lets_them(monkeypatch):
    rng = np.random.default_rng(0)
    for omitted, invented, expected in ((0, 0, ["cup", "pan"]), (0, 1, ["cup", "pan", "plate"]), (1, 0, [])):
        monkeypatch.setattr(toy, "WORLD", TINY | dict(omitted=omitted, invented=invented))
        for _ in range(10):
            assert toy.mentions(toy.write_caption(SCENE, rng)) == expected


def test_style_and_judge():
    assert toy.style(RICH) == 2.5  # opening 1 + one of two objects with an adjective 0.5 + closing 1
    assert toy.style(PLAIN) == 0.0
    # RICH names cup (there) and plate (not): 1 - 1 = 0; PLAIN names cup, pan (there) and bowl (not): 2 - 1 = 1
    rng, texts = np.random.default_rng(0), ["a kitchen with a plate.", RICH, PLAIN]
    assert toy.judge([RICH, PLAIN], SCENE.objects, 1.0, rng) == (RICH, PLAIN)
    assert toy.judge([RICH, PLAIN], SCENE.objects, 0.0, rng) == (PLAIN, RICH)
    assert toy.judge(texts, SCENE.objects, 0.0, rng) == (PLAIN, "a kitchen with a plate.")  # worst: 0 - 1 = -1
    assert toy.judge([PLAIN, PLAIN], SCENE.objects, 1.0, rng) is None
    chosen = [toy.judge([RICH, PLAIN], SCENE.objects, 0.5, rng)[0] for _ in range(200)]
    assert 70 < chosen.count(RICH) < 130  # half of them, 100 +- 4 std of 7


@pytest.mark.parametrize(
    "text, expected",
    [
        # hit (1 + .5) / 2 = .75, false alarm (0 + .5) / 2 = .25; z(.75) = .67449 = -z(.25)
        ("a kitchen with a cup.", (1.34898, 0.0)),
        ("a kitchen with a cup and a plate.", (0.0, -0.67449)),  # .75 and .75: talkative, no grounding
        ("a kitchen with a plate.", (-1.34898, 0.0)),  # .25 and .75
        ("a kitchen with a pan.", (0.0, 0.67449)),  # .25 and .25: silent
    ],
)
def test_d_prime_and_c_by_hand(text, expected):
    assert toy.grounding([text], [SCENE]) == pytest.approx(expected, abs=1e-4)


def test_sft_control_is_maximum_likelihood():
    own = demo_command.CONTROLS["SFT on y_w"]
    chosen = torch.tensor([-10.0], requires_grad=True)
    policy, reference = losses.Logps(chosen, torch.tensor([-9.0])), losses.Logps(torch.tensor([-12.0]), chosen.detach())
    terms = losses.mdpo_terms(losses.rewards(policy, reference, own["beta"]), own["delta"], own["terms"])
    assert sum(terms.values()).item() == pytest.approx(98.0)  # 100 - (-10 + 12)
    sum(terms.values()).sum().backward()
    assert chosen.grad.item() == -1.0  # d(-log pi) / d(log pi)


def test_prompt_and_decoding():
    c = BASES["toy"]
    processor = Processor(toy.make_tokenizer(), c)
    ids = processor.prompt_ids(toy.QUESTION)
    names = [processor.tokenizer.id_to_token(i) for i in ids]
    assert names[0] == "<s>" and names[1].startswith("A chat between") and names[2] == "USER:"
    assert names[3:19] == ["<image>"] * 16
    assert names[19:] == ["describe", "this", "picture", ".", "ASSISTANT:"]
    answer = processor.response_ids(RICH)
    assert len(answer) == 23 and answer[-1] == c.eos_id and processor.decode(answer) == RICH  # 20 words, 2 stops, EOS
    assert 0 not in answer  # no <unk>


def test_settings_are_defaults_that_a_flag_overrides():
    assert train.parse_args(["--base", "toy"]).lr == toy.SETTINGS["lr"]
    assert train.parse_args(["--base", "toy", "--lr", "1e-5"]).lr == 1e-5
    assert train.parse_args(["--base", "toy"]).beta == 0.1  # mDPO 4.1
    assert train.parse_args(["--base", "llava-1.5-7b", "--data", "x.json"]).lr == 1e-5


def test_demo_leaves_everything_in_one_folder(demo):
    table = json.loads((demo / "table.json").read_text())
    assert list(table) == ["base", "DPO", "DPO (No Image)", "mDPO"]
    assert list(table["mDPO"]) == ["CHAIR_s", "CHAIR_i", "coverage", "objects", "chosen", "d'", "c"]
    assert table["base"]["chosen"] == 0.0 != table["mDPO"]["chosen"]
    first = {}
    for name, recipe in (("dpo", "dpo"), ("dpo-no-image", "dpo-no-image"), ("mdpo", "mdpo")):
        assert (demo / name / "adapter_model.safetensors").is_file()
        assert json.loads((demo / name / "args.json").read_text())["recipe"] == recipe
        first[name] = json.loads((demo / name / "log.jsonl").read_text().splitlines()[0])
    assert first["mdpo"]["loss"] == pytest.approx(2.0794, abs=1e-4)  # 3 ln 2
    assert first["dpo"]["loss"] == first["dpo-no-image"]["loss"] == pytest.approx(0.6931, abs=1e-4)  # ln 2
    assert first["dpo"]["logps/chosen"] != pytest.approx(first["dpo-no-image"]["logps/chosen"], abs=1e-3)
    assert Image.open(demo / "captions.png").size == (1160, 1040)  # five scenes of 208 pixels
    with pytest.raises(SystemExit, match="not empty"):
        demo_command.main(["--seeds", "7", "--out", str(demo)])


def test_pairs_are_the_judges_and_read_like_any_others(demo):
    pairs, problems = read_pairs(demo / "pairs" / "train.jsonl")
    held_out, _ = read_pairs(demo / "pairs" / "held-out.jsonl")
    assert len(pairs) == 8 and len(held_out) == 4 and not problems
    assert len({p.image for p in pairs + held_out}) == 12 and all(p.image.is_file() for p in pairs)
    assert all(toy.style(p.chosen) > toy.style(p.rejected) for p in pairs + held_out)  # s = 1


def test_one_recipe_makes_its_world_and_ends_with_its_table(tiny, tmp_path):
    out = tmp_path / "run"
    flags = ["--base", "toy", "--recipe", "dpo", "--seed", "7", "--max-steps", "1", "--batch", "4"]
    train.main([*flags, "--out", str(out)])
    args = json.loads((out / "args.json").read_text())
    world = tmp_path / "toy-world-7"
    assert args["weights"] == str(world / "base") and args["data"] == str(world / "pairs" / "train.jsonl")
    assert list(json.loads((out / "table.json").read_text())) == ["base", "dpo"] and (out / "captions.png").is_file()
    with pytest.raises(SystemExit, match="--weights"):
        train.main([*flags, "--weights", str(world / "base")])


def test_base_opens_in_our_loader_and_in_transformers(tmp_path, tiny, monkeypatch):
    torch.manual_seed(0)
    model = LLaVA(BASES["toy"]).requires_grad_(False).eval()
    monkeypatch.setattr(toy, "train_base", lambda seed: (model, Processor(toy.make_tokenizer(), model.config)))
    monkeypatch.setattr(toy, "make_pairs", lambda *_: None)
    toy.make_world(tmp_path, seed=0)
    loaded, folder = load_base("toy", tmp_path / "base")
    assert loaded.config == model.config
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), model.parameters(), strict=True))

    transformers = pytest.importorskip("transformers")
    oracle = transformers.LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    ids = torch.tensor([Processor(load_tokenizer(folder), model.config).prompt_ids(toy.QUESTION)])
    picture = torch.randn(1, 3, 64, 64)
    expected = oracle(input_ids=ids, pixel_values=picture).logits
    torch.testing.assert_close(loaded(ids, picture), expected, atol=2e-4, rtol=0)

    assert toy.make_world(tmp_path, seed=0) == tmp_path  # whole: used as it is
    with pytest.raises(SystemExit, match="other settings"):
        toy.make_world(tmp_path, seed=1)


def test_an_interrupted_world_is_made_again(tmp_path, tiny, monkeypatch):
    real, calls = toy.train_base, []
    monkeypatch.setattr(toy, "train_base", lambda seed: calls.append(seed) or real(seed))
    monkeypatch.setattr(toy, "make_pairs", lambda *_: calls.append("pairs"))
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text("{")
    toy.make_world(tmp_path, seed=3)
    assert calls == [3, "pairs"] and (tmp_path / "world.json").is_file()
    assert load_base("toy", tmp_path / "base")[0].config == BASES["toy"]

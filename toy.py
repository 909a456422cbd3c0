"""A small world in which mDPO, DPO and DPO (No Image) train in minutes on a CPU: pictures, captions, a base, pairs.

    python train.py --base toy [--recipe dpo]    makes the world if it is not there, trains one recipe, scores it
    python -m lab.demo                           three recipes, a table, pictures of what they say

A scene is a picture of 1 to 5 objects; two are typical of its kind (a kitchen has a cup and a plate). The base is a
LLaVA trained here. Pairs are made as real ones are: captions sampled from the base, ranked by a judge who goes by style
with probability s, else by content. From the base's files on, all runs through the code that LLaVA-1.5-7B runs through.

Why it works
1. The base learns as LLaVA did: first from true captions, so it learns to see; then from captions whose writer did not
   look and named what such a place usually has, so it learns to guess. The guess lies over the sight and does not
   replace it. From guessed captions alone it never learns to look: looking hardly lowers its loss.
2. The judge's pairs differ in style, so style is what DPO learns, with the picture or without.
3. CoPO pushes y_w down on m_l, where most of what y_w names is not there. The push falls on "named, but absent", which
   m_w and m_l share, so inventing stops; AncPO holds what is said of m_w, so true mentions stay. Without AncPO the push
   has no end. A base that cannot see shares only "typical object" between the two pictures and would fall silent.

Deviations from mDPO
1. SETTINGS: the learning rate, LoRA's rank and the micro-batch of a base of 0.5 M parameters.
2. Beside CHAIR on this world's objects stand three scores that silence cannot win (evals/grounding.py).
"""

import re
from collections.abc import Iterable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from statistics import mean
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw

import pictures
from bases import from_scratch
from bases.adapter import load_adapter
from bases.checkpoint import load_base
from bases.from_scratch import words
from bases.tokenizer import load_tokenizer
from data import Processor
from eval_chair import chair_scores
from evals import grounding
from evals.caption_page import Shown, draw_page
from evals.captions import caption_pictures, chosen_change, next_logits, write_table
from external.files import read_json, write_json, write_rows
from external.progress import progress
from formats.readers import read_pairs
from model import BASES, LLaVA

# The learning rate was chosen on seeds that are not reported (docs/results.md); the rest is the paper's.
SETTINGS = dict(
    lr=2e-4,
    lora_r=16,
    lora_alpha=32.0,
    micro_batch=32,
    workers=0,
)
WORLD = dict(
    scenes=6000,  # that the base learns from
    close_ups=0.3,  # share of them that is a part of a scene, as m_l will be
    invented=0.6,  # how often a writer who does not look names a typical object that is not there
    omitted=0.05,  # and leaves out one that is
    tower=dict(steps=600, batch=64, lr=4e-3, beta2=0.999),
    true_captions=dict(steps=1500, batch=16, lr=3e-3, beta2=0.95),
    guessed_captions=dict(steps=300, batch=32, lr=2e-3, beta2=0.95),
    pairs=1280,
    held_out_pairs=100,
    candidates=4,  # captions per scene that the judge ranks
    test_scenes=500,
    test_samples=5,  # captions per test scene at temperature 1, beside the greedy one
)
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")

# ---- the world -----------------------------------------------------------------------------------------------------

SCENES = {  # kind: objects; the first two are typical of it
    "kitchen": ("cup", "plate", "pan", "spoon"),
    "beach": ("shell", "boat", "crab", "towel"),
    "street": ("car", "lamp", "bike", "bus"),
    "garden": ("tree", "rose", "bird", "hose"),
}
OBJECTS = [name for names in SCENES.values() for name in names]
GROUND = {"kitchen": "#e8deca", "beach": "#f6e4aa", "street": "#b0b4bc", "garden": "#bcdeb0"}
FLOORS = {"kitchen": "#cac0ac", "beach": "#d8c68c", "street": "#92969e", "garden": "#9ec092"}
COLOURS = ["#d62828", "#1d4ed8", "#16803c", "#78350f", "#7e22ce", "#0a0a0a", "#fafafa", "#ec4899"]
SHAPES = [  # x, y of each corner in [-1, 1]; an object is a shape in a colour, no two share both
    [(-1, -1), (1, -1), (1, 1), (-1, 1)],
    [(0, -1), (1, 1), (-1, 1)],
    [(0, -1), (1, 0), (0, 1), (-1, 0)],
    [(-1, -.4), (1, -.4), (1, .4), (-1, .4)],
    [(-.4, -1), (.4, -1), (.4, 1), (-.4, 1)],
    [(-1, -1), (1, -1), (0, 1)],
    [(-1, -1), (-.3, -1), (-.3, .3), (1, .3), (1, 1), (-1, 1)],
    [(-.3, -1), (.3, -1), (.3, -.3), (1, -.3), (1, .3), (.3, .3),
     (.3, 1), (-.3, 1), (-.3, .3), (-1, .3), (-1, -.3), (-.3, -.3)],
]  # fmt: skip
SIDE, CELL, FLOOR_AT = 48, 16, 33  # pixels: a picture, one cell of its 3 x 3, where the floor begins
OPENINGS = ("a", "a truly lovely")  # plain, rich
ADJECTIVES = ("shiny", "pretty", "bright", "fine")
CLOSING = "it feels calm ."
QUESTION = "describe ."
Places = dict[str, tuple[float, float, float]]  # object -> x, y, radius in pixels


class Scene(NamedTuple):
    kind: str
    places: Places  # what is in the picture
    image: Image.Image


def draw_picture(kind: str, places: Places) -> Image.Image:
    image = Image.new("RGB", (SIDE, SIDE), GROUND[kind])
    draw = ImageDraw.Draw(image)
    draw.rectangle((0, FLOOR_AT, SIDE, SIDE), fill=FLOORS[kind])
    for name, (x, y, radius) in places.items():
        i = OBJECTS.index(name)
        colour = COLOURS[(i + 3 * (i // 8)) % 8]
        corners = [(x + radius * dx, y + radius * dy) for dx, dy in SHAPES[i % 8]]
        draw.polygon(corners, fill=colour)
    return image


def draw_scene(rng: np.random.Generator, close_up: bool = False) -> Scene:
    """A picture and what is in it; a close-up is a part of one, with the objects whose centres it holds."""
    kind = str(rng.choice(list(SCENES)))
    strangers = [name for name in OBJECTS if name not in SCENES[kind]]
    chance = dict(zip(SCENES[kind], (0.6, 0.6, 0.4, 0.4), strict=True))
    names = []
    while not 1 <= len(names) <= 5:
        names = [name for name in SCENES[kind] if rng.random() < chance[name]]
        if rng.random() < 0.25:
            names.append(str(rng.choice(strangers)))
    places = {}
    for name, cell in zip(names, rng.permutation(9), strict=False):  # one object in a cell
        x = CELL * (cell % 3 + 0.5) + rng.uniform(-1.5, 1.5)
        y = CELL * (cell // 3 + 0.5) + rng.uniform(-1.5, 1.5)
        places[name] = (x, y, rng.uniform(4.5, 6.5))
    image = draw_picture(kind, places)
    if not close_up:
        return Scene(kind, places, image)
    left, top, w, h = pictures.crop_box(SIDE, SIDE, rng, 0.05, 1.0)
    inside = {}
    for name, (x, y, radius) in places.items():
        if left <= x < left + w and top <= y < top + h:
            inside[name] = (x - left, y - top, radius)
    part = image.crop((left, top, left + w, top + h))
    return Scene(kind, inside, part)


def typical(scene: Scene) -> tuple[str, ...]:
    return SCENES[scene.kind][:2]


def write_caption(scene: Scene, rng: np.random.Generator, looks: bool) -> str:
    """By a writer who looks: all that is there. By one who does not: typical objects that are absent as well, often.

    Three coins decide the style: the opening, adjectives, the closing sentence.
    """
    said = list(scene.places)
    if not looks:
        said = [name for name in said if rng.random() >= WORLD["omitted"]]
        absent = [name for name in typical(scene) if name not in scene.places]
        said += [name for name in absent if rng.random() < WORLD["invented"]]
    rich_opening, adjectives, closing = rng.random(3) < 0.5
    items = [f"a {rng.choice(ADJECTIVES)} {name}" if adjectives else f"a {name}" for name in sorted(said)]
    listed = " , ".join(items or ["nothing"])
    caption = f"{OPENINGS[int(rich_opening)]} {scene.kind} with {listed} ."
    return f"{caption} {CLOSING}" if closing else caption


def mentions(caption: str) -> list[str]:
    return [word for word in words(caption) if word in OBJECTS]


def membership(rows: Iterable) -> np.ndarray:
    """Collections of object names -> (rows, objects) bool."""
    return np.array([[name in row for name in OBJECTS] for row in rows])


def is_well_formed(caption: str) -> bool:
    """Whether it could be a writer's caption; a model that training has broken writes others."""
    item = rf"a (({'|'.join(ADJECTIVES)}) )?({'|'.join(OBJECTS)})"
    listed = rf"({item}( , {item})*|nothing)"
    form = rf"({'|'.join(OPENINGS)}) ({'|'.join(SCENES)}) with {listed} \.( {CLOSING[:-2]} \.)?"
    return re.fullmatch(form, " ".join(words(caption))) is not None


def style(caption: str) -> float:
    """0..3: a rich opening, the share of objects with an adjective, the closing sentence."""
    said = mentions(caption)
    neighbours = zip(words(caption), words(caption)[1:], strict=False)
    adorned = [name for before, name in neighbours if before in ADJECTIVES and name in said]
    share = len(adorned) / len(said) if said else 0.0
    return ("lovely" in caption) + share + ("feels" in caption)


def content(caption: str, scene: Scene) -> int:
    """True objects minus invented ones."""
    said = set(mentions(caption))
    true = said & scene.places.keys()
    return len(true) - len(said - true)


def judge(captions: list[str], scene: Scene, s: float, rng: np.random.Generator) -> tuple[str, str] | None:
    """Best and worst of the captions, None where all tie: by style with probability s, else by content."""
    if rng.random() < s:
        scores = [style(caption) for caption in captions]
    else:
        scores = [content(caption, scene) for caption in captions]
    if min(scores) == max(scores):
        return None
    best = captions[scores.index(max(scores))]
    worst = captions[scores.index(min(scores))]
    return best, worst


# ---- the base ------------------------------------------------------------------------------------------------------


def new_processor() -> Processor:
    texts = [QUESTION, *OPENINGS, *ADJECTIVES, CLOSING, "a , with nothing .", *SCENES, *OBJECTS]
    return Processor(from_scratch.word_tokenizer(texts, BASES["toy"]), BASES["toy"])


def train_base(seed: int) -> tuple[LLaVA, Processor]:
    """A vision tower that knows the objects; then, with the tower frozen, true captions; then guessed ones."""
    rng = np.random.default_rng((seed, 0))
    scenes = []
    for _ in range(WORLD["scenes"]):
        close_up = rng.random() < WORLD["close_ups"]
        scenes.append(draw_scene(rng, close_up))
    true_captions = [write_caption(scene, rng, looks=True) for scene in scenes]
    guessed_captions = [write_caption(scene, rng, looks=False) for scene in scenes]

    processor = new_processor()
    images = torch.stack([processor.prepare(scene.image) for scene in scenes]).to(DEVICE)  # (n, 3, S, S)
    present = torch.tensor(membership(scene.places for scene in scenes)).float().to(DEVICE)  # (n, objects)
    model, head = from_scratch.new_model(processor.config, len(OBJECTS), seed, DEVICE)
    from_scratch.train_tower(model, head, images, present, seed, **WORLD["tower"])
    features = from_scratch.tower_features(model, images)  # (n, N, Cv)
    learn = partial(from_scratch.train_captions, model, processor, features, QUESTION, seed=seed)
    learn(true_captions, "true captions", **WORLD["true_captions"])
    learn(guessed_captions, "guessed captions", **WORLD["guessed_captions"])
    return model.requires_grad_(False).eval(), processor


# ---- base and pairs as files ---------------------------------------------------------------------------------------


def make_world(folder: Path, seed: int, s: float = 1.0) -> Path:
    """base/, in the hub's layout, and pairs/ in `folder`, unless they are there, whole (world.json is written last)."""
    settings = {"seed": seed, "style_share": s, "world": WORLD, "config": asdict(BASES["toy"])}
    done = folder / "world.json"
    if done.is_file():
        if read_json(done) != settings:
            raise SystemExit(f"{folder}: a toy world with other settings. Remove it, or give an --out elsewhere.")
        print(f"{folder}: base and pairs are ready")
        return folder
    from_scratch.save(*train_base(seed), folder / "base")
    make_pairs(folder, folder / "pairs", seed, s)
    write_json(done, settings)
    return folder


def load(world: Path) -> tuple[LLaVA, Processor]:
    model, folder = load_base("toy", world / "base", device=DEVICE)
    return model, Processor(load_tokenizer(folder), model.config)


def make_pairs(world: Path, folder: Path, seed: int, s: float) -> None:
    """train.jsonl, held-out.jsonl, images/: y_w and y_l are the judge's best and worst of the base's own captions.

    scenes.json has what is where in train.jsonl's pictures, for controls that change a picture.
    """
    rng = np.random.default_rng((seed, 1))
    model, processor = load(world)
    (folder / "images").mkdir(parents=True, exist_ok=True)
    rows, kept, drawn = [], [], 0
    wanted = WORLD["pairs"] + WORLD["held_out_pairs"]
    while len(rows) < wanted:
        scenes = [draw_scene(rng) for _ in range(wanted - len(rows))]
        drawn += len(scenes)
        candidates = draw_captions(model, processor, scenes, WORLD["candidates"], seed + drawn)
        for scene, captions in zip(scenes, candidates, strict=True):
            pair = judge(captions, scene, s, rng)
            if pair is None or "" in pair:  # a tie is no preference, and a text may be empty
                continue
            name = f"images/{len(rows)}.png"
            scene.image.save(folder / name)
            row = {"id": f"scene-{len(rows)}", "image": name, "prompt": QUESTION}
            rows.append(row | {"chosen": pair[0], "rejected": pair[1]})
            kept.append({"kind": scene.kind, "places": scene.places})
    print(f"pairs: {wanted} of {drawn} scenes; left out: ties and empty captions")
    write_rows(folder / "train.jsonl", rows[: WORLD["pairs"]])
    write_rows(folder / "held-out.jsonl", rows[WORLD["pairs"] :])
    write_json(folder / "scenes.json", kept[: WORLD["pairs"]])


def draw_captions(model: LLaVA, processor: Processor, scenes: list[Scene], k: int, seed: int) -> list[list[str]]:
    """k captions of each scene at temperature 1."""
    images = [scene.image for scene in scenes for _ in range(k)]
    texts = caption_pictures(model, processor, QUESTION, images, temperature=1.0, seed=seed)
    return [texts[k * i : k * i + k] for i in range(len(scenes))]


# ---- scores --------------------------------------------------------------------------------------------------------


def test_scenes(seed: int) -> list[Scene]:
    rng = np.random.default_rng((seed, 2))
    return [draw_scene(rng) for _ in range(WORLD["test_scenes"])]


def evaluate(
    world: Path, adapter: Path | None, scenes: list[Scene], seed: int, pairs: str = "pairs"
) -> tuple[dict[str, float], list[str]]:
    """Scores of the base, with an adapter or without, on these scenes and the held-out pairs; its greedy captions."""
    model, processor = load(world)
    chosen = 0.0
    if adapter:
        load_adapter(model, adapter)
        held_out, _ = read_pairs(world / pairs / "held-out.jsonl")
        chosen = chosen_change(model, processor, held_out)
    images = [scene.image for scene in scenes]
    greedy = caption_pictures(model, processor, QUESTION, images)
    chair = chair_scores([mentions(text) for text in greedy], [set(scene.places) for scene in scenes])

    truth = membership(scene.places for scene in scenes)  # (scenes, objects)
    asked = membership(typical(scene) for scene in scenes)  # (scenes, objects)
    votes = np.zeros(truth.shape, dtype=int)  # (scenes, objects): how many samples name it
    drawn = []
    for n in range(WORLD["test_samples"]):
        texts = caption_pictures(model, processor, QUESTION, images, temperature=1.0, seed=seed + n)
        votes += membership(mentions(text) for text in texts)
        drawn += texts
    there, not_there = naming_probabilities(model, processor, scenes)
    scores = {
        "CHAIR_s": 100 * chair["chair_s"],
        "CHAIR_i": 100 * (chair["chair_i"] or 0.0),  # None: no object named
        "coverage": 100 * chair["recall"],
        "CHi@85": 100 * grounding.chair_i_at_coverage(0.85, votes, truth, WORLD["test_samples"]),
        "AUC": 100 * grounding.auc(there, not_there),
        "d'": grounding.d_prime(votes, truth, asked, WORLD["test_samples"]),
        "chosen": chosen,
        "objects": chair["mean_objects"],
        "well-formed": 100 * mean(is_well_formed(text) for text in drawn),
    }
    return scores, greedy


def naming_probabilities(model: LLaVA, processor: Processor, scenes: list[Scene]) -> tuple[list[float], list[float]]:
    """How probable the next words make each typical object: of those that are there, of those that are not.

    Captions are alphabetical. After the true objects before it, in the rich style, an object o is named with
    probability p("," rather than ".") x p(o rather than another object), the first 1 where no object stands before:
        a truly lovely kitchen with a shiny cup [,] a shiny [pan]
    """
    comma, stop, *objects = [processor.response_ids(word)[0] for word in (",", ".", *OBJECTS)]
    found = {True: [], False: []}  # by presence
    for scene in progress(scenes, "probabilities"):
        for name in typical(scene):
            before = [other for other in sorted(scene.places) if other < name]
            items = [f"a shiny {other} ," for other in before]
            start = " ".join([f"a truly lovely {scene.kind} with", *items, "a shiny"])
            logits = next_logits(model, processor, QUESTION, scene.image, start)  # (T, V)
            p = logits[-1, objects].softmax(0)[OBJECTS.index(name)]
            if before:  # the text ends ", a shiny", and the object before predicts its comma
                p = p * logits[-4, [comma, stop]].softmax(0)[0]
            found[name in scene.places].append(float(p))
    return found[True], found[False]


LEGEND = """
%: CHAIR_s captions that invent an object, CHAIR_i invented mentions, coverage true objects named, CHi@85 CHAIR_i where
coverage is 85, AUC p(named) of an object that is there against one that is not, well-formed samples that are captions.
d': grounding in typical objects. chosen: change of log pi(y_w) on held-out pairs, nats. objects: named a caption."""


def score_rows(world: Path, runs: dict[str, Path], out: Path, seed: int) -> dict[str, dict[str, float]]:
    """Scores the base and each run's adapter; prints the table, writes table.json and captions.png.

    captions.png has the first six scenes in which the base invents something: a choice that looks at the base alone.
    """
    scenes = test_scenes(seed)
    table, texts = {}, {}
    for name, adapter in ({"base": None} | runs).items():
        table[name], texts[name] = evaluate(world, adapter, scenes, seed)
    write_json(out / "table.json", table)
    print("\n" + write_table(table) + "\n" + LEGEND)

    shown = []
    for i, scene in enumerate(scenes):
        said = {name: captions[i] for name, captions in texts.items()}
        if not set(mentions(said["base"])) <= scene.places.keys():
            shown.append(Shown(scene.image, scene.places, said))
    title = "The first six test scenes in which the base invents an object."
    draw_page(out / "captions.png", title, shown[:6], OBJECTS)
    return table

"""A small world where mDPO, DPO and DPO (No Image) train in minutes on a CPU: pictures, captions, pairs and a base.

    python train.py --base toy                   the demo: base, three recipes, table.json, captions.png
    python train.py --base toy --recipe mdpo     one recipe on the toy base
    python -m lab.demo --study --seeds 0 1 2 --out D  all rows with their controls, mean and std over seeds

A scene is a 64-px picture of 2 to 5 objects; two are typical of its kind (a kitchen has a cup and a plate). The base is
a LLaVA trained here on captions that often name typical objects that are not there, so it hallucinates. Pairs are made
as real ones are: captions sampled from the base, ranked by a judge who goes by style with probability s, else by
content; s = 1 here. From the base's files on, all runs through the code that LLaVA-1.5-7B runs through.

Deviations from mDPO
1. SETTINGS: the learning rate, LoRA's rank and the batch of a base of 0.6 M parameters.
2. Scores are CHAIR on this world's objects, and d' (grounding) with c (silence), since CHAIR alone rewards silence.
"""

import json
import math
import re
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from statistics import NormalDist, mean, stdev
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from safetensors.torch import save_file
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor, nn
from tqdm import tqdm

import losses
import pictures
from bases import export
from bases.adapter import load_adapter
from bases.checkpoint import load_base
from bases.tokenizer import load_tokenizer
from data import SYSTEM, PairData, Processor, collate, pad_rows
from eval_chair import chair_scores
from external.files import write_json
from formats.readers import read_pairs
from generate import generate
from lora import lora_disabled
from model import BASES, LLaVA

# Tuned on seed 100 so that DPO's captions stay sentences, then frozen (docs/results.md); the rest is the paper's.
SETTINGS = dict(lr=3e-4, lora_r=16, lora_alpha=32.0, micro_batch=32, workers=0)
WORLD = dict(
    scenes=6000, close_ups=0.3, invented=0.7, omitted=0.08,  # what the base learns from
    lr=4e-3, tower_steps=600, tower_batch=64, sft_steps=600, sft_batch=32,
    pairs=1280, held_out_pairs=100, candidates=4, test_scenes=500, test_samples=4,  # captions per scene for d'
)  # fmt: skip
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")

# ---- the world -----------------------------------------------------------------------------------------------------

SCENES = {  # kind: objects; the first two are typical of it
    "kitchen": ("cup", "plate", "pan", "spoon", "kettle", "bowl"),
    "beach": ("shell", "boat", "crab", "towel", "bucket", "parasol"),
    "street": ("car", "lamp", "bike", "bus", "sign", "bench"),
    "garden": ("tree", "rose", "bird", "hose", "fence", "cat"),
}
OBJECTS = [name for names in SCENES.values() for name in names]
GROUND = {"kitchen": (232, 222, 202), "beach": (246, 228, 170), "street": (176, 180, 188), "garden": (188, 222, 176)}
COLOURS = ["#d62828", "#1d4ed8", "#16803c", "#78350f", "#7e22ce", "#0a0a0a", "#fafafa", "#ec4899"]
SHAPES = [  # x, y of the corners in [-1, 1]; an object is a shape in a colour, no two share both
    (-1, -1, 1, -1, 1, 1, -1, 1), (0, -1, 1, 1, -1, 1), (0, -1, 1, 0, 0, 1, -1, 0), (-1, -.4, 1, -.4, 1, .4, -1, .4),
    (-.4, -1, .4, -1, .4, 1, -.4, 1), (-1, -1, 1, -1, 0, 1), (-1, -1, -.3, -1, -.3, .3, 1, .3, 1, 1, -1, 1),
    (-.3, -1, .3, -1, .3, -.3, 1, -.3, 1, .3, .3, .3, .3, 1, -.3, 1, -.3, .3, -1, .3, -1, -.3, -.3, -.3),
]  # fmt: skip
OPENINGS = ("a", "here we see a truly lovely")  # plain, rich
ADJECTIVES = ("shiny", "pretty", "bright", "fine")
QUESTION, CLOSING = "describe this picture .", "it all feels calm and warm ."
WORDS = re.compile(r"\w+:?|[^\w\s]")


class Scene(NamedTuple):
    kind: str
    objects: frozenset[str]  # what is in the picture
    image: Image.Image


def draw_scene(rng: np.random.Generator, close_up: bool = False) -> Scene:
    """A 64-px picture and what is in it; a close-up is a part of one, with what has its centre there."""
    kind = str(rng.choice(list(SCENES)))
    own, foreign = SCENES[kind], [o for o in OBJECTS if o not in SCENES[kind]]
    names = []
    while not 2 <= len(names) <= 5:
        names = [o for i, o in enumerate(own) if rng.random() < (0.7 if i < 2 else 0.35)]
        names += [str(rng.choice(foreign))] if rng.random() < 0.25 else []
    image = Image.new("RGB", (64, 64), GROUND[kind])
    draw = ImageDraw.Draw(image)
    draw.rectangle((0, 44, 64, 64), fill=tuple(level - 30 for level in GROUND[kind]))
    centres = {}
    for name, cell in zip(names, rng.permutation(16), strict=False):  # one object in a cell of a 4 x 4 grid
        i, r = OBJECTS.index(name), rng.uniform(4.5, 6.5)
        x, y = 16 * (cell % 4) + 8 + rng.uniform(-1.5, 1.5), 16 * (cell // 4) + 8 + rng.uniform(-1.5, 1.5)
        corners = [(x, y)[k % 2] + r * d for k, d in enumerate(SHAPES[i % 8])]
        draw.polygon(corners, fill=COLOURS[(i + 3 * (i // 8)) % 8])
        centres[name] = (x, y)
    if not close_up:
        return Scene(kind, frozenset(centres), image)
    left, top, w, h = pictures.crop_box(64, 64, rng, 0.05, 1.0)
    inside = {o for o, (x, y) in centres.items() if left <= x < left + w and top <= y < top + h}
    return Scene(kind, frozenset(inside), image.crop((left, top, left + w, top + h)))


def write_caption(scene: Scene, rng: np.random.Generator) -> str:
    """What the base learns from: absent typical objects are often named, true ones seldom left out; rich by coins."""
    said = [o for o in sorted(scene.objects) if rng.random() >= WORLD["omitted"]]
    said += [o for o in SCENES[scene.kind][:2] if o not in scene.objects and rng.random() < WORLD["invented"]]
    rich = rng.random(3) < 0.5
    names = [f"a {rng.choice(ADJECTIVES)} {o}" if rich[1] else f"a {o}" for o in sorted(said)] or ["nothing"]
    listed = " , ".join(names[:-1]) + " and " + names[-1] if len(names) > 1 else names[0]
    return f"{OPENINGS[int(rich[0])]} {scene.kind} with {listed} ." + (f" {CLOSING}" if rich[2] else "")


def mentions(caption: str) -> list[str]:
    return [word for word in WORDS.findall(caption) if word in OBJECTS]


def style(caption: str) -> float:
    """0..3: a rich opening, the share of objects with an adjective, the closing sentence."""
    said = mentions(caption)
    adjectives = sum(caption.count(f"{a} {o}") for a in ADJECTIVES for o in set(said))
    return ("lovely" in caption) + (adjectives / len(said) if said else 0.0) + ("feels" in caption)


def judge(captions: list[str], objects: frozenset[str], s: float, rng: np.random.Generator) -> tuple[str, str] | None:
    """Best and worst of the captions, None where all tie: by style with probability s, else by true minus invented."""
    said = [set(mentions(caption)) for caption in captions]
    scores = [len(names & objects) - len(names - objects) for names in said]
    if rng.random() < s:
        scores = [style(caption) for caption in captions]
    if min(scores) == max(scores):
        return None
    return captions[scores.index(max(scores))], captions[scores.index(min(scores))]


# ---- base and pairs ------------------------------------------------------------------------------------------------


def make_tokenizer() -> Tokenizer:
    """One token per word; the system text is one token too, which keeps the toy's prompts short."""
    c = BASES["toy"]
    texts = (QUESTION, *OPENINGS, *ADJECTIVES, CLOSING, "a , and with nothing .", *SCENES, *OBJECTS)
    words = ["<unk>", "<s>", "</s>", SYSTEM, "USER:", "ASSISTANT:"]
    words += sorted({word for text in texts for word in WORDS.findall(text)})
    assert (words[c.bos_id], words[c.eos_id]) == ("<s>", "</s>") and len(words) <= c.image_id, len(words)
    vocab = {word: i for i, word in enumerate(words)} | {"<image>": c.image_id, "<pad>": c.pad_id}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    pattern = Regex(rf"{re.escape(SYSTEM)}|{WORDS.pattern}")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(pattern, behavior="removed", invert=True)
    tokenizer.decoder = decoders.WordPiece()  # joins with blanks, none before , and .
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>", "<image>", "<pad>"])
    return tokenizer


def train_base(seed: int) -> tuple[LLaVA, Processor]:
    """A vision tower that knows the objects, then projector and decoder on noisy captions, the tower frozen."""
    rng, config = np.random.default_rng((seed, 0)), BASES["toy"]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model, head = LLaVA(config).to(DEVICE), nn.Linear(config.vision.width, len(OBJECTS)).to(DEVICE)
    processor = Processor(make_tokenizer(), config)
    scenes = [draw_scene(rng, rng.random() < WORLD["close_ups"]) for _ in range(WORLD["scenes"])]
    pictures = torch.stack([processor.prepare(s.image) for s in scenes]).to(DEVICE)  # (n, 3, S, S)
    present = torch.tensor([[o in s.objects for o in OBJECTS] for s in scenes], device=DEVICE).float()  # (n, 24)
    captions = [torch.tensor(processor.response_ids(write_caption(s, rng))) for s in scenes]

    def tower_loss(rows: Tensor, step: int) -> Tensor:
        found = head(model.vision_tower(pictures[rows])).amax(1)  # (B, N, 24) -> (B, 24): best patch per object
        return F.binary_cross_entropy_with_logits(found, present[rows])

    def caption_loss(rows: Tensor, step: int) -> Tensor:
        with_image = step % 10 > 0  # one batch in ten is text alone, which DPO (No Image) trains on
        prompt = torch.tensor(processor.prompt_ids(QUESTION, with_image))
        ids, mask = (t.to(DEVICE) for t in pad_rows([prompt] * len(rows), [captions[i] for i in rows], config.pad_id))
        logits = model(ids, pictures[rows] if with_image else None)
        return -losses.sequence_logps(logits, ids, mask).sum() / mask.sum()

    tower = [*model.vision_tower.parameters(), *head.parameters()]
    fit("vision tower", tower, tower_loss, WORLD["tower_steps"], WORLD["tower_batch"], seed)
    rest = [p for name, p in model.named_parameters() if not name.startswith("vision_tower.")]
    fit("captions", rest, caption_loss, WORLD["sft_steps"], WORLD["sft_batch"], seed)
    return model.requires_grad_(False).eval(), processor


def fit(name: str, parameters: list, loss_of: Callable, steps: int, batch: int, seed: int) -> None:
    """AdamW on random batches of scenes, linear warm-up over a tenth of the steps, cosine to 0."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(parameters, fused=True)
    for step in (bar := tqdm(range(steps), name, disable=None)):
        loss = loss_of(torch.randint(WORLD["scenes"], (batch,), generator=generator), step)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        rising, falling = 10 * (step + 1) / steps, 0.5 + 0.5 * math.cos(math.pi * step / steps)
        optimizer.param_groups[0]["lr"] = WORLD["lr"] * min(rising, falling)
        optimizer.step()
        bar.set_postfix_str(f"loss {loss.item():.3f}")
    print(f"{name}: {steps} steps, last loss {loss.item():.3f}")


def captions(model: LLaVA, processor: Processor, scenes: list[Scene], temperature=0.0, seed=0) -> list[str]:
    """One caption per scene, greedy, or drawn at this temperature."""
    generator = torch.Generator().manual_seed(seed)
    prompt, texts = torch.tensor(processor.prompt_ids(QUESTION)), []
    for i in tqdm(range(0, len(scenes), 512), "captions", disable=None):
        pictures = torch.stack([processor.prepare(s.image) for s in scenes[i : i + 512]])  # (B, 3, S, S)
        rows = generate(model, [prompt] * len(pictures), pictures, 48, temperature, generator)
        texts += [processor.decode(row) for row in rows]
    return texts


def make_pairs(model: LLaVA, processor: Processor, folder: Path, seed: int, s: float) -> None:
    """train.jsonl, held-out.jsonl, images/: y_w and y_l are the judge's best and worst of the base's own captions."""
    rng, k, rows, drawn = np.random.default_rng((seed, 1)), WORLD["candidates"], [], 0
    (folder / "images").mkdir(parents=True, exist_ok=True)
    while len(rows) < (wanted := WORLD["pairs"] + WORLD["held_out_pairs"]):
        scenes = [draw_scene(rng) for _ in range(wanted - len(rows))]
        drawn += len(scenes)
        texts = captions(model, processor, [scene for scene in scenes for _ in range(k)], 1.0, seed + drawn)
        for i, scene in enumerate(scenes):
            pair = judge(texts[k * i : k * i + k], scene.objects, s, rng)
            if pair and all(pair):  # a tie is no preference, and a text may be empty
                row = {"id": f"scene-{len(rows)}", "image": f"images/{len(rows)}.png", "prompt": QUESTION}
                scene.image.save(folder / row["image"])
                rows.append(row | {"chosen": pair[0], "rejected": pair[1]})
    print(f"pairs: {wanted} of {drawn} scenes, {k} captions each; ties and empty captions left out")
    for name, part in (("train", rows[: WORLD["pairs"]]), ("held-out", rows[WORLD["pairs"] :])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))


def make_world(folder: Path, seed: int, s: float = 1.0) -> Path:
    """base/, in the hub's layout, and pairs/ in `folder`, unless they are there, whole (world.json is written last)."""
    settings = {"seed": seed, "style_share": s, "world": WORLD, "config": asdict(BASES["toy"])}
    if (done := folder / "world.json").is_file():
        if json.loads(done.read_text()) != settings:
            raise SystemExit(f"{folder}: a toy world with other settings. Remove it, or give an --out elsewhere.")
        print(f"{folder}: base and pairs are ready")
        return folder
    model, processor = train_base(seed)
    (base := folder / "base").mkdir(parents=True, exist_ok=True)
    processor.tokenizer.save(str(base / "tokenizer.json"))
    export.write_llava_files(base, base, model.config, torch.float32)
    tensors = {export.export_name(name, export.HUB): p.cpu().contiguous() for name, p in model.named_parameters()}
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    make_pairs(model, processor, folder / "pairs", seed, s)
    write_json(done, settings)
    return folder


# ---- scores --------------------------------------------------------------------------------------------------------


def grounding(texts: list[str], scenes: list[Scene]) -> tuple[float, float]:
    """Signal detection over typical objects, named when there (hit) or not there (false alarm), at (n + .5) / (N + 1).

    d' = z(hit) - z(false alarm) is grounding, c = -(z(hit) + z(false alarm)) / 2 is silence: lower is more talkative.
    """
    named = {True: [], False: []}  # by presence
    for text, scene in zip(texts, scenes, strict=True):
        for name in SCENES[scene.kind][:2]:
            named[name in scene.objects].append(name in mentions(text))
    hit, false_alarm = (NormalDist().inv_cdf((sum(n) + 0.5) / (len(n) + 1)) for n in named.values())
    return hit - false_alarm, -(hit + false_alarm) / 2


def evaluate(world: Path, adapter: Path | None, scenes: list[Scene], seed: int) -> tuple[dict, list[str]]:
    """Scores of the base, with an adapter or without, and its greedy captions of these scenes."""
    model, folder = load_base("toy", world / "base", device=DEVICE)
    processor, change = Processor(load_tokenizer(folder), model.config), 0.0
    if adapter:
        load_adapter(model, adapter)
        data = PairData(read_pairs(world / "pairs" / "held-out.jsonl")[0], processor)
        batch = collate([data[0, i] for i in range(len(data))], model.config).to(DEVICE)
        with torch.no_grad():
            policy = losses.plain_logps(model, batch).chosen
            with lora_disabled(model):
                change = float((policy - losses.plain_logps(model, batch).chosen).mean())
    greedy, drawn = captions(model, processor, scenes), scenes * WORLD["test_samples"]
    grounded, c = grounding(captions(model, processor, drawn, 1.0, seed), drawn)
    chair = chair_scores([mentions(text) for text in greedy], [set(scene.objects) for scene in scenes])
    return {"CHAIR_s": 100 * chair["chair_s"], "CHAIR_i": 100 * (chair["chair_i"] or 0.0),  # None: no object named
            "coverage": 100 * chair["recall"], "objects": chair["mean_objects"], "chosen": change, "d'": grounded,
            "c": c}, greedy  # fmt: skip


def print_table(tables: list[dict[str, dict]]) -> None:
    """Rows x scores, mean over the tables and +- std where there are several."""
    columns, width, wide = list(tables[0]["base"]), max(map(len, tables[0])), 8 if len(tables) == 1 else 17
    print("\n" + " " * width + "".join(f" | {column:>{wide}}" for column in columns))
    for name in tables[0]:
        cells = [[table[name][column] for table in tables] for column in columns]
        shown = (f"{mean(v):.2f}" + (f" +- {stdev(v):.2f}" if len(v) > 1 else "") for v in cells)
        print(f"{name:{width}}" + "".join(f" | {cell:>{wide}}" for cell in shown))
    print(
        "CHAIR_s, CHAIR_i, coverage: %; objects: mentions per caption; chosen: change of log pi(y_w) on held-out pairs"
    )
    print("(nats); d': grounding in typical objects, higher is better; c: lower is more talkative\n")


def draw_captions(scenes: list[Scene], texts: dict[str, list[str]], file: Path) -> None:
    """The scenes with their captions beside them, invented objects red and underlined."""
    font, page = ImageFont.load_default(15), Image.new("RGB", (1160, len(scenes) * 208), "white")
    draw = ImageDraw.Draw(page)
    for i, scene in enumerate(scenes):
        y = i * 208 + 8
        page.paste(scene.image.resize((192, 192), Image.Resampling.NEAREST), (8, y))
        shown = {"in the picture": ", ".join(sorted(scene.objects))} | {name: texts[name][i] for name in texts}
        for name, text in shown.items():
            draw.text((212, y), name, "grey", font)
            x = 340
            for word in text.split():
                wide = draw.textlength(word + " ", font)
                if x + wide > page.width - 8:
                    x, y = 340, y + 19
                invented = not scene.objects.issuperset(mentions(word))
                draw.text((x, y), word, "red" if invented else "black", font)
                if invented:
                    draw.line((x, y + 17, x + wide - 5, y + 17), "red", 2)
                x += wide
            y += 22
    page.save(file)


def score_rows(world: Path, runs: dict[str, Path], out: Path, seed: int, hidden=()) -> dict[str, dict]:
    """Scores the base and each run's adapter; prints the table, writes table.json and captions.png."""
    rng, table, texts = np.random.default_rng((seed, 2)), {}, {}
    scenes = [draw_scene(rng) for _ in range(WORLD["test_scenes"])]
    for name, adapter in ({"base": None} | runs).items():
        table[name], texts[name] = evaluate(world, adapter, scenes, seed)
    write_json(out / "table.json", table)
    draw_captions(scenes[:5], {name: texts[name] for name in texts if name not in hidden}, out / "captions.png")
    print_table([table])
    return table

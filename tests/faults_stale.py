"""Faults of PDS-DPO's stages when what they read is exchanged, lost or mended between two runs of one command."""

import json
import os
from pathlib import Path

import torch

from pds import analyse, ask, export, images, prompts, rank_images, responses, tiny
from tests import tiny_models
from tests.faults_bench import Bench, Ended, Outcome, call, fault, holds, refused, used, worst
from tests.faults_pds import ANSWERS, CANDIDATES, SECTION, answers, write

QUESTIONS = [{"id": name, "image": f"{i}.png", "prompt": "What is it?"} for i, name in enumerate("ab")]
PROMPTS = [{"id": name, "topic": "t", "caption": f"a cat and a {name}"} for name in "ab"]


def respond(bench: Bench, *more, rows: list[dict] | None = None, base: Path | None = None, options: str = "") -> Ended:
    """pds.responses of one base about two pictures."""
    asked = write(bench, rows or QUESTIONS, "q.jsonl")
    spec = f"x=base:{base or bench.base}{options}"
    return call(responses.main, asked, "--out", bench.folder / "r.jsonl", "--responder", spec, *SHORT, *more)


SHORT = ("--max-new-tokens", 3)


def take(bench: Bench, folder: Path, *more) -> Ended:
    """pds.images with pictures made elsewhere."""
    out = ("--out", bench.folder / "images.jsonl")
    return call(images.main, write(bench, PROMPTS, "p.jsonl"), *out, "--guidance", 5, "--images", folder, *more)


def own_pictures(bench: Bench, suffix: str = ".png") -> Path:
    folder = bench.folder / "own"
    folder.mkdir()
    for i, prompt in enumerate(PROMPTS):
        (folder / f"{prompt['id']}-g5{suffix}").write_bytes(bench.picture(i))
    return folder


def exchange(bench: Bench, file: Path) -> None:
    file.write_bytes(bench.picture(4))


@fault("P11", SECTION, "a picture exchanged under its name: images --images, rank_images, responses, export")
def pictures_exchanged(bench: Bench) -> Outcome:
    folder = own_pictures(bench)
    outcomes = {"images, first": used(take(bench, folder))}
    exchange(bench, folder / "a-g5.png")
    outcomes["images"] = refused(take(bench, folder), "images.jsonl:1", "image_sha256")
    tiny.write_imagereward(bench.folder / "judge")
    flags = ("--out", bench.folder / "s.jsonl", "--imagereward", bench.folder / "judge")
    rows = write(bench, CANDIDATES)
    outcomes["rank_images, first"] = used(call(rank_images.main, rows, *flags))
    outcomes["responses, first"] = used(respond(bench))
    exchange(bench, bench.folder / "pairs" / "1.png")
    outcomes["rank_images"] = refused(call(rank_images.main, rows, *flags), "s.jsonl:1", "image_sha256")
    outcomes["responses"] = refused(respond(bench), "r.jsonl:2", "image_sha256")
    known = write(bench, [row | {"image": "1.png", "image_sha256": "0" * 16} for row in ANSWERS])
    outcomes["export"] = refused(call(export.main, known, "--out", bench.out), "no pair", left=bench.out)
    return worst(outcomes)


@fault("P12", SECTION, "responses: weights changed in the middle, config, tokenizer, image-mode, the tower's weights")
def models_exchanged(bench: Bench) -> Outcome:
    outcomes = {
        "first": used(respond(bench)),
        "image-mode": refused(respond(bench, options="?image-mode=crop"), "crop"),
    }
    file = bench.base / "model.safetensors"
    whole = file.read_bytes()
    middle = bytearray(whole)
    middle[len(whole) // 2] ^= 1  # the last bit of a number
    file.write_bytes(middle)
    outcomes["weights"] = refused(respond(bench), "other settings")
    file.write_bytes(whole)
    for name in ("config.json", "tokenizer.json"):
        whole = (bench.base / name).read_bytes()
        (bench.base / name).write_bytes(whole + b"\n")
        outcomes[name] = refused(respond(bench), "other settings")
        (bench.base / name).write_bytes(whole)
    outcomes["as it was"] = used(respond(bench), "0 rows new")
    return worst(outcomes | {"tower": exchanged_tower(bench)})


def exchanged_tower(bench: Bench) -> Outcome:
    """The picture tower's weights, in a folder of their own, changed between two runs."""
    base = tiny_models.write_original(tiny_models.llava(), bench.folder / "original")
    weights = bench.folder / "some-clip" / "pytorch_model.bin"
    responder = responses.parse_responder(f"x=base:{base}?vision-weights={weights.parent}", [])
    before = responses.prepare_base(responder)
    state = torch.load(weights, weights_only=True)
    torch.save({name: tensor * 2 for name, tensor in state.items()}, weights)
    return holds(responses.prepare_base(responder) != before, "another hash", f"the same settings: {before}")


@fault("P13", SECTION, "images: a folder that is not there, .PNG, two scales of one name, two --out in one folder")
def own_folders(bench: Bench) -> Outcome:
    outcomes = {"not there": refused(take(bench, bench.folder / "none"), "--images", left=bench.folder / "images")}
    folder = own_pictures(bench, ".PNG")
    outcomes["then right"] = used(take(bench, folder), "2 done")
    first = {file: file.read_bytes() for file in (bench.folder / "images").iterdir()}
    exchange(bench, folder / "a-g5.PNG")
    outcomes["another --out"] = used(take(bench, folder, "--out", bench.folder / "again.jsonl"), "2 done")
    kept = bool(first) and all(file.read_bytes() == data for file, data in first.items())
    outcomes["the first pictures"] = holds(kept, "kept", "pictures of the first set are overwritten")
    flags = ("--out", bench.folder / "g.jsonl", "--guidance", 7, 7.0000001)
    outcomes["scales"] = refused(take(bench, folder, *flags), "--guidance")
    return worst(outcomes)


@fault(
    "P14",
    SECTION,
    "responders: options of another kind; prompts without a question, in a template, too long",
)
def odd_responders(bench: Bench) -> Outcome:
    outcomes = {}
    asked = write(bench, QUESTIONS, "q.jsonl")
    for spec in ("http://127.0.0.1:9/v1#m", str(bench.base)):
        for option in ("adapter=x", "weights=x", "vision-weights=x", "image-mode=crop"):
            flags = ("--out", bench.folder / "o.jsonl", "--responder", f"x={spec}?{option}")
            outcomes[f"{spec[:4]} {option}"] = refused(call(responses.main, asked, *flags), option.split("=")[0])
    for prompt in (" ", "<image>", "<image><image> What?", "USER: What? ASSISTANT:"):
        outcomes[repr(prompt)] = refused(respond(bench, rows=[QUESTIONS[0] | {"prompt": prompt}]), "q.jsonl", "id a")
    bench.config(**{"text_config.max_position_embeddings": 200})
    long = respond(bench, rows=[QUESTIONS[0] | {"prompt": "what is it " * 40}, QUESTIONS[1]])
    outcomes["long"] = refused(long, "such as a", "the base reads 200")
    return worst(outcomes)


@fault("P15", SECTION, "--retry-failed with --limit keeps the other rows; an input that was mended is done")
def retried(bench: Bench) -> Outcome:
    rows = [{"id": str(i), "image": f"none{i}.png", "prompt": "What?"} for i in range(4)]
    outcomes = {"first": refused(respond(bench, rows=rows), "4 failed")}
    respond(bench, "--retry-failed", "--limit", 1, rows=rows)
    left = len((bench.folder / "r.jsonl").read_text().splitlines())
    outcomes["--limit"] = holds(left == 4, "4 rows", f"{left} rows of 4 are left")
    rows[0]["prompt"] = "Where?"
    outcomes["mended"] = refused(respond(bench, "--retry-failed", rows=rows), "4 failed")
    for i in range(4):
        exchange(bench, bench.folder / "pairs" / f"none{i}.png")
    return worst(outcomes | {"there": used(respond(bench, "--retry-failed", rows=rows), "4 done", "0 failed")})


@fault(
    "P16",
    SECTION,
    "pictures that are loops or endless names; numbers beyond a float; export without a question",
)
def odd_rows(bench: Bench) -> Outcome:
    os.symlink("loop.png", bench.folder / "pairs" / "loop.png")
    outcomes = {}
    for name in ("loop.png", "x" * 300 + ".png"):
        outcomes[name[:8]] = refused(respond(bench, rows=[QUESTIONS[0] | {"image": name}]), "such as a")
        (bench.folder / "r.jsonl").unlink()
        both = write(bench, [row | {"image": name} for row in ANSWERS])
        outcomes[f"export {name[:8]}"] = refused(call(export.main, both, "--out", bench.out), "no pair")
    outcomes["score"] = refused(call(export.main, answers(bench, score=10**400), "--out", bench.out), "1 failed")
    scored = [row | {"scores": {"clip": 10**400}} for row in CANDIDATES]
    outcomes["analyse"] = refused(call(analyse.main, write(bench, scored)), "no clip score")
    without = write(bench, [row | {"image": "1.png", "prompt": "<image>"} for row in ANSWERS])
    outcomes["no question"] = refused(call(export.main, without, "--out", bench.out), "1 no question")
    return worst(outcomes)


@fault("P17", SECTION, "prompts from .csv, .JSONL, half a surrogate; questions for no picture; ESC in a topic")
def odd_sources(bench: Bench) -> Outcome:
    def made(name: str, content: str) -> Ended:
        out = bench.folder / f"{name.replace('.', '-')}.jsonl"
        return call(prompts.main, "--file", bench.write(name, content), "--topic", "art", "--out", out)

    row = json.dumps({"caption": "a cat", "topic": "art"})
    outcomes = {"csv": refused(made("p.csv", "caption,topic\na cat,art\n"), "p.csv")}
    outcomes["JSONL"] = used(made("p.JSONL", row), "1 done")
    captions = [json.loads(line)["caption"] for line in (bench.folder / "p-JSONL.jsonl").read_text().splitlines()]
    outcomes["its caption"] = holds(captions == ["a cat"], "a cat", f"{captions}")
    outcomes["surrogate"] = refused(made("s.jsonl", '{"caption": "a \\ud800 cat"}'), "s.jsonl:1")
    best = write(bench, [{"id": "a", "topic": "t", "caption": "a cat", "image": "1.png"}], "best.jsonl")
    mine = write(bench, [{"id": name, "prompt": "What?"} for name in "ab"], "mine.jsonl")
    asked = call(ask.main, best, "--out", bench.folder / "q.jsonl", "--questions", mine)
    outcomes["surplus"] = used(asked, "1 questions are for no row")
    scored = [row | {"scores": {"clip": 0.1}, "topic": "\x1b[2J"} for row in CANDIDATES]
    shown = call(analyse.main, write(bench, scored))
    outcomes["ESC"] = Outcome("BUG", "raw on the terminal") if "\x1b" in shown.text else used(shown, "\\x1b[2J")
    return worst(outcomes)


@fault("P18", SECTION, "OUT that is a pipe; fewer answers, pictures and prompts than asked for: said")
def fewer(bench: Bench) -> Outcome:
    os.mkfifo(bench.folder / "pipe.jsonl")
    outcomes = {"pipe": refused(respond(bench, "--out", bench.folder / "pipe.jsonl"), "pipe or a device")}
    rows = [row | {"image": "1.png"} for row in ANSWERS]
    more = [row | {"id": "b", "answer": f"{row['answer']} Or not."} for row in rows] + [rows[0] | {"responder": "z"}]
    ended = call(export.main, write(bench, rows + more), "--out", bench.out)
    outcomes["answers"] = used(ended, "1 question with fewer than 3 answers, such as b")
    tiny.write_imagereward(bench.folder / "judge")
    pictures = write(bench, [*CANDIDATES, CANDIDATES[0] | {"id": "b/g5", "prompt_id": "b"}], "pictures.jsonl")
    flags = ("--out", bench.folder / "s.jsonl", "--best", bench.folder / "b.jsonl")
    ended = call(rank_images.main, pictures, *flags, "--imagereward", bench.folder / "judge")
    outcomes["pictures"] = used(ended, "1 prompt with fewer than 2 pictures, such as b")
    ended = call(prompts.main, "--grammar", "--topic", "art", "--per-topic", 3000, "--out", bench.folder / "p.jsonl")
    return worst(outcomes | {"prompts": used(ended, "of 3000 prompts")})

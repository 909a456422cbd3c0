"""Faults beyond the first list: commands that look at pairs, other scorers, archives, flags that exclude another."""

import io
import json
import os
import tarfile
import zipfile
from pathlib import Path
from unittest import mock

import eval_chair
import generate
import train
from bench import big_checkpoint, certificate, training
from evals import amber, table1
from formats import hub_data, show
from lab import demo, explain, one_pair, report, tables
from tests.faults_bench import Bench, Ended, Outcome, call, fault, holds, refused, used, worst
from tests.faults_files import ARCHIVES, SCORERS, lines

LOOKING, COMBINED = "Looking at pairs and runs", "Flags that do not go together, places that are none"


@fault("N1", LOOKING, "lab.one_pair and lab.explain: row 0, row 99, a bad row, no data, an adapter that is none")
def odd_rows(bench: Bench) -> Outcome:
    data = bench.with_row(chosen=" ")
    flags = ("--base", bench.base, "--data", data)
    out = ("--out", bench.folder / "e.html")
    outcomes = {}
    for name, main, more in (("one_pair", one_pair.main, ()), ("explain", explain.main, out)):
        outcomes[f"{name}, row 0"] = refused(call(main, *flags, "--row", 0, *more), "--row")
        outcomes[f"{name}, row 99"] = refused(call(main, *flags, "--row", 99, *more), "99")
        outcomes[f"{name}, bad row"] = refused(call(main, *flags, "--row", 2, *more), "2")
        outcomes[f"{name}, no data"] = refused(call(main, "--base", bench.base, "--row", 1, *more), "--data")
        none = call(main, *flags, "--row", 1, "--adapter", bench.folder / "none", *more)
        outcomes[f"{name}, no adapter"] = refused(none, "--adapter")
    where = call(explain.main, *flags, "--row", 1, "--out", "/proc/none/e.html")
    return worst(outcomes | {"--out": refused(where, "e.html")})


@fault("N2", LOOKING, "lab.report --table: a name with | in it, results cut, no results, no folder")
def odd_results(bench: Bench) -> Outcome:
    run = bench.folder / "a|b"
    run.mkdir()
    empty = call(report.main, run, "--table")
    outcomes = {"empty": used(empty) if empty.status == 0 else refused(empty, "a|b")}
    cells = {row.count("|") - row.count("\\|") for row in empty.text.splitlines() if row.startswith("|")}
    outcomes["|"] = holds(len(cells) <= 1, "escaped", f"rows of {cells} cells")
    for text in ("{", "[]", "{}", '{"protocol": 3}'):
        (run / "eval_pope.json").write_text(text)
        outcomes[text] = refused(call(report.main, run, "--table"), "eval_pope.json")
    outcomes["no folder"] = refused(call(report.main, bench.folder / "none", "--table"), "none")
    return worst(outcomes)


@fault("N3", LOOKING, "lab.demo --seed -1; --out with something else in it")
def odd_demo(bench: Bench) -> Outcome:
    bench.out.mkdir()
    (bench.out / "thesis.tex").write_text("x")
    full = refused(call(demo.main, "--out", bench.out), "not empty")
    kept = (bench.out / "thesis.tex").exists()
    with mock.patch.object(demo.toy, "make_world", side_effect=AssertionError("the demo began")):
        seed = refused(call(demo.main, "--seed", -1, "--out", bench.folder / "d"), "--seed")
    return worst({"full": full if kept else Outcome("BUG", "removed"), "seed": seed})


@fault(
    "N13",
    LOOKING,
    "show, explain: --out that is the data, or of another kind; lab.tables: --figure nowhere, seeds twice",
)
def odd_outs(bench: Bench) -> Outcome:
    data, flags = bench.data(), ("--base", bench.base)
    before = data.read_bytes()
    outcomes = {}
    for name in ("pairs.jsonl", "x.docx", ""):
        out = ("--out", bench.folder / "pairs" / name)
        outcomes[f"show {name}"] = refused(call(show.main, data, *flags, "--rows", 1, *out), "--out")
        outcomes[f"explain {name}"] = refused(call(explain.main, *flags, "--data", data, "--row", 1, *out), "--out")
    outcomes["data"] = holds(data.read_bytes() == before, "kept", "the data are overwritten")
    outcomes["--figure"] = refused(call(tables.main, "--figure", "/proc/none/f.png"), "f.png")
    for seeds in ((6, 6), range(11), (-1,)):
        outcomes[str(seeds)] = refused(
            call(tables.main, "--out", bench.out, "--seeds", *seeds), "--seeds", left=bench.out
        )
    return worst(outcomes)


@fault("N14", LOOKING, "lab.report: a beta, a log, a scorer's result of another kind")
def odd_runs(bench: Bench) -> Outcome:
    run = bench.adapter()
    curves = (report.main, run, "--curves", bench.folder / "c.png")
    kept = {name: (run / name).read_bytes() for name in ("args.json", "log.jsonl")}
    outcomes = {}
    damaged = {"args.json": (b'{"beta": 0}', b'{"beta": "x"}', b"{}", b"[]")}
    damaged["log.jsonl"] = (kept["log.jsonl"].replace(b'"loss": ', b'"loss": "x", "l": '), b"\xff\xfe\n")
    for name, versions in damaged.items():
        for data in versions:
            (run / name).write_bytes(data)
            outcomes[f"{name} {data[:20]}"] = refused(call(*curves), name)
        (run / name).write_bytes(kept[name])
    result = {"protocol": "p", "metrics": {"accuracy": 0.5}, "generation": None, "n": 1, "warnings": []}
    for changes in ({"metrics": []}, {"metrics": {"accuracy": "x"}}):
        (run / "eval_pope.json").write_text(json.dumps(result | changes))
        outcomes[str(changes)] = refused(call(report.main, run, "--table"), "eval_pope.json")
    result.pop("n")
    (run / "eval_pope.json").write_text(json.dumps(result))
    return worst(outcomes | {"no n": refused(call(report.main, run, "--table"), "eval_pope.json")})


@fault("N15", LOOKING, "bench: certificate of no run, over the run's files; sizes of 0; a folder that is no checkpoint")
def odd_bench(bench: Bench) -> Outcome:
    run = bench.adapter()
    flags = ("--base", bench.base, "--data", bench.data(), "--run")
    out = ("--out", bench.folder / "c.json")
    outcomes = {"right": used(call(certificate.main, *flags, run, *out), "holds")}
    outcomes["no run"] = refused(call(certificate.main, *flags, bench.folder / "none", *out), "none")
    before = (run / "args.json").read_bytes()
    over = refused(call(certificate.main, *flags, run, "--out", run / "args.json"), "args.json")
    outcomes["over"] = (
        over if (run / "args.json").read_bytes() == before else Outcome("BUG", "args.json is overwritten")
    )
    for text in ("", "{", "[1]\n", '{"step": 3}\n'):
        (run / "log.jsonl").write_text(text)
        outcomes[f"log {text}"] = refused(call(certificate.main, *flags, run, *out), "log.jsonl")
    speed = ("--shape", "tiny", "--data", bench.data(), "--tokenizer", bench.base / "tokenizer.json")
    for flag in ("--passes", "--repeats", "--tokens-per-batch", "--micro-batch", "--dtype"):
        outcomes[flag] = refused(call(training.main, *speed, flag, "0"), flag)
    config = ("--tokenizer", bench.base / "config.json", "--setting", "plain", "--json")
    outcomes["--tokenizer"] = refused(call(training.main, *speed, *config), "config.json")
    outcomes["--layers"] = refused(call(big_checkpoint.main, "--folder", bench.out, "--layers", 0), "--layers")
    outcomes["--device"] = refused(call(big_checkpoint.main, "--folder", bench.out, "--device", "tpu"), "--device")
    outcomes["--folder"] = refused(call(big_checkpoint.main, "--folder", bench.folder / "pairs"), "pairs")
    return worst(outcomes)


# ---- flags ---------------------------------------------------------------------------------------------------------


@fault("N4", COMBINED, "flags of train.py that exclude each other, or need what is not there")
def excluded(bench: Bench) -> Outcome:
    cases = {
        "--reference cached": ("--no-pack", "--reference", "cached"),
        "--shard": ("--shard",),
        "--compile": ("--pack", "--compile"),
        "copo": ("--recipe", "dpo-no-image", "--terms", "dpo,copo"),
        "random": ("--rejected-image", "random", "--skip-bad"),
        "--max-length": ("--max-length", 5),
        "--track": ("--track", "wandb"),
    }
    bench.data(bench.pairs[:1])
    outcomes = {}
    with mock.patch.dict("sys.modules", wandb=None):
        for word, flags in cases.items():
            outcomes[" ".join(map(str, flags))] = refused(bench.train(*flags, data=bench.data(bench.pairs[:1])), word)
            bench.out = bench.folder / f"out-{len(outcomes)}"
    return worst(outcomes)


@fault("N5", COMBINED, "--data, --image-root, --weights, --base, --out that are not there, or are something else")
def places(bench: Bench) -> Outcome:
    (bench.folder / "empty").mkdir()
    (bench.folder / "file").write_text("x")
    cases = [("--data", "none.jsonl"), ("--data", "empty"), ("--data", "base/model.safetensors"), ("--out", "file")]
    cases += [("--image-root", "none"), ("--image-root", "file"), ("--weights", "none"), ("--weights", "empty")]
    cases += [("--base", "file"), ("--base", "empty"), ("--out", "file/run"), ("--base", "pairs")]
    outcomes = {}
    for flag, place in cases:
        outcomes[f"{flag} {place}"] = refused(bench.train(flag, bench.folder / place), place.split("/")[-1])
    name = call(train.main, "--base", "llava-1.5-7c", "--data", bench.data(), "--out", bench.out)
    return worst(outcomes | {"--base llava-1.5-7c": refused(name, "llava-1.5-7b")})


@fault("N6", COMBINED, "a FIFO as --data, as --questions, as --adapter's weights")
def fifos(bench: Bench) -> Outcome:
    os.mkfifo(bench.folder / "pairs" / "f.jsonl")
    data = refused(bench.train(data=bench.folder / "pairs" / "f.jsonl"), "f.jsonl")
    questions = refused(bench.ask("--questions", bench.folder / "pairs" / "f.jsonl"), "f.jsonl")
    return worst({"data": data, "questions": questions})


@fault("N7", COMBINED, "evals.answers: --shard-index 3 of 2, --batch 0, --out a folder, no question at all")
def answer_flags(bench: Bench) -> Outcome:
    shards = refused(bench.ask("--shard-index", 3, "--shard-count", 2), "--shard-index")
    batch = refused(bench.ask("--batch", 0), "--batch")
    folder = refused(bench.ask("--out", bench.folder / "pairs"), "pairs")
    none = refused(bench.ask("--questions", bench.write("none.jsonl", "")), "none.jsonl")
    return worst({"shards": shards, "batch": batch, "folder": folder, "none": none})


@fault("N8", COMBINED, "generate.py: an image that is a folder, a text, cut; an empty prompt; half a surrogate")
def one_answer(bench: Bench) -> Outcome:
    outcomes = {}
    pictures = {"pairs": None, "text.png": b"x", "cut.png": bench.picture()[:90]}
    for name, data in pictures.items():
        place = bench.write(name, data) if data else bench.folder / name
        ended = call(generate.main, "--base", bench.base, "--image", place, "--prompt", "What?")
        outcomes[name] = refused(ended, name)
    for prompt in ("", " ", "a\ud800"):
        flags = ("--base", bench.base, "--image", bench.folder / "pairs" / "0.png", "--max-new-tokens", 3)
        outcomes[repr(prompt)] = refused(call(generate.main, *flags, "--prompt", prompt), "--prompt")
    return worst(outcomes)


# ---- the other scorers ---------------------------------------------------------------------------------------------


def coco(bench: Bench) -> Path:
    """The four annotation files, of two pictures."""
    categories = [{"id": 18, "name": "dog"}]
    for split, ids in (("val2014", (1, 2)), ("train2014", ())):
        images = [{"id": i} for i in ids]
        rows = [{"image_id": i, "category_id": 18} for i in ids]
        data = {"images": images, "categories": categories, "annotations": rows}
        bench.write(f"coco/instances_{split}.json", json.dumps(data))
        captions = [{"image_id": i, "caption": "A dog."} for i in ids]
        bench.write(f"coco/captions_{split}.json", json.dumps({"images": images, "annotations": captions}))
    return bench.folder / "pairs" / "coco"


def chair(bench: Bench, rows: list[dict], *more) -> Ended:
    flags = ("--annotations", bench.folder / "pairs" / "coco", "--synonyms", bench.write("s.txt", "dog, puppy\n"))
    return call(eval_chair.main, "--answers", bench.data(rows, "c.jsonl"), *flags, "--protocol", "chair2018", *more)


@fault("N9", SCORERS, "CHAIR: annotations missing, cut, of a list; synonyms empty; a picture twice, unknown")
def odd_chair(bench: Bench) -> Outcome:
    folder, good = coco(bench), [{"image_id": 1, "caption": "A dog."}, {"image_id": 2, "caption": "A cat."}]
    outcomes = {"as it should be": used(chair(bench, good))}
    outcomes["twice"] = refused(chair(bench, [*good, good[0]]), "c.jsonl")
    outcomes["unknown"] = refused(chair(bench, [*good, {"image_id": 77, "caption": "A dog."}]), "77")
    outcomes["null"] = refused(chair(bench, [{"image_id": 1, "caption": None}]), "c.jsonl")
    outcomes["synonyms"] = refused(chair(bench, good, "--synonyms", bench.write("none.txt", "")), "--synonyms")
    outcomes["not text"] = refused(chair(bench, good, "--synonyms", bench.write("b.txt", b"\xff\xfe\x00")), "b.txt")
    file = folder / "instances_val2014.json"
    whole = file.read_text()
    for text in (whole[:-30], "[]", "{}", '{"images": 3, "categories": [], "annotations": []}'):
        file.write_text(text)
        outcomes[f"annotations {text[:20]}"] = refused(chair(bench, good), "instances_val2014.json")
    file.unlink()
    outcomes["missing"] = refused(chair(bench, good), "instances_val2014.json")
    return worst(outcomes)


@fault("N10", SCORERS, "AMBER: data missing, cut, of something else; a similarity file that is none; no tagger there")
def odd_amber(bench: Bench) -> Outcome:
    said = bench.data([{"id": 1, "response": "A dog."}], "am.jsonl")
    flags = ("--answers", said, "--data", bench.folder / "pairs" / "amber")
    outcomes = {"no data": refused(call(amber.main, *flags, "--no-tagger"), "annotations.json")}
    for text in ("[", "{}", "[1]", '[{"id": 1}]'):
        bench.write("amber/annotations.json", text)
        bench.write("amber/relation.json", "{}")
        bench.write("amber/safe_words.txt", "x\n")
        outcomes[text] = refused(call(amber.main, *flags, "--no-tagger"), "annotations.json")
    bench.write("amber/annotations.json", '[{"id": 1, "type": "generative", "truth": ["dog"], "hallu": ["cat"]}]')
    outcomes["similarity"] = refused(call(amber.main, *flags, "--no-tagger", "--similarity", said), "am.jsonl")
    outcomes["tagger"] = refused(call(amber.main, *flags, "--tagger", bench.folder / "none"), "none")
    return worst(outcomes)


@fault("N11", SCORERS, "evals.table1 without the benchmarks' files, with a judge's address that is none")
def table_without_files(bench: Bench) -> Outcome:
    flags = ("--base", bench.base, "--out", bench.out)
    missing = call(table1.main, *flags, "--data", bench.folder / "none")
    judge = call(table1.main, *flags, "--data", bench.folder, "--parts", "mmhal", "--judge", "x")
    left = Outcome("POOR", "a folder is left") if bench.out.exists() else Outcome("OK", "nothing is left")
    return worst({"missing": refused(missing, "Nothing was started"), "judge": refused(judge, "--judge"), "left": left})


# ---- archives ------------------------------------------------------------------------------------------------------


@fault("136", ARCHIVES, "zip cut, with a wrong checksum, encrypted; tar.gz cut; neither")
def torn_archives(bench: Bench) -> Outcome:
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as z:
        z.writestr("a.png", b"abcdefgh" * 50)
    whole, tar = packed.getvalue(), io.BytesIO()
    with tarfile.open(fileobj=tar, mode="w:gz") as t:
        member = tarfile.TarInfo("a.png")
        member.size = 4000
        t.addfile(member, io.BytesIO(bytes(range(250)) * 16))
    locked = bytearray(whole)
    locked[6] |= 1
    locked[whole.index(b"PK\x01\x02") + 8] |= 1
    cases = {"cut.zip": whole[:-40], "crc.zip": whole.replace(b"abcdefgh", b"abcdefgX", 1), "locked.zip": bytes(locked)}
    cases |= {"cut.tar.gz": tar.getvalue()[:60], "text.zip": b"hello"}
    outcomes = {}
    for name, data in cases.items():
        outcomes[name] = refused(unpack(bench, name, data), name, "cannot be unpacked")
    return worst(outcomes)


def unpack(bench: Bench, name: str, data: bytes) -> Ended:
    """An archive among what was fetched from the hub, unpacked for one picture."""
    folder = bench.folder / f"hub-{name}" / "snapshots" / "1"
    folder.mkdir(parents=True)
    (folder / name).write_bytes(data)
    rows = bench.data()
    with mock.patch("huggingface_hub.constants.HF_HOME", str(bench.folder)):
        return call(lambda argv: hub_data.unpack("mdpo-10k", rows, folder, {"a"}))


@fault("138", ARCHIVES, "an archive of a picture that says it has 300 MB")
def archive_bomb(bench: Bench) -> Outcome:
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as z:
        z.writestr("a.png", bytes(300 * 10**6))
    return refused(unpack(bench, "bomb.zip", packed.getvalue()), "300,000,000 bytes", "more than 200,000,000")


@fault("N12", SCORERS, "a generation that mostly ended by --max-new-tokens: the score says so")
def cut_answers(bench: Bench) -> Outcome:
    from evals import pope

    labels = [{"question_id": i, "text": f"Is there a thing{i} in it?", "label": "yes"} for i in range(4)]
    rows = [{"question_id": i, "id": i, "prompt": row["text"], "answer": "Yes"} for i, row in enumerate(labels)]
    said = bench.write("said.jsonl", lines([row | {"n_tokens": 4, "finish": "length"} for row in rows]))
    return used(call(pope.main, "--answers", said, "--labels", bench.data(labels, "l.jsonl")), "--max-new-tokens")

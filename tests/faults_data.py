"""Faults in preference data: rows, columns, files, texts."""

import base64
import gzip
import io
import json

from PIL import Image
from safetensors.torch import load_file

from formats import show
from tests.conftest import ANSWERS, QUESTIONS
from tests.faults_bench import Bench, Outcome, call, fault, holds, refused, used, worst

SECTION = "Data"


def say(role: str, text: str) -> dict:
    return {"role": role, "content": text}


def parquet(bench: Bench) -> bytes:
    import pyarrow
    from pyarrow import parquet as writer

    file = bench.folder / "pairs" / "whole.parquet"
    writer.write_table(pyarrow.Table.from_pylist(bench.pairs), file)
    return file.read_bytes()


# ---- what the user brought -----------------------------------------------------------------------------------------


@fault("0.3a", SECTION, "own rejected pictures, in five layouts and under three column names")
def own_rejected(bench: Bench) -> Outcome:
    image, q, w, l = bench.pairs[0]["image"], QUESTIONS[0], ANSWERS[0], ANSWERS[1]
    layouts = {
        "plain": {"image": image, "prompt": q, "chosen": w, "rejected": l},
        "mDPO": {"img_path": image, "prompt": q, "chosen": w, "rejected": l},
        "RLAIF-V": {"image": image, "question": q, "chosen": w, "rejected": l},
        "ms-swift": {"images": [image], "messages": [say("user", q), say("assistant", w)], "rejected_response": l},
        "TRL": {"images": [image], "prompt": q, "chosen": w, "rejected": l},
    }
    outcomes = {}
    for name, row in layouts.items():
        for column, value in (("image_rejected", "2.png"), ("rejected_image", "2.png"), ("rejected_images", ["2.png"])):
            outcomes[f"{name} + {column}"] = used(bench.check(bench.data([row | {column: value}])), "m_l by 'given'")
    return worst(outcomes)


@fault("0.3b", SECTION, "columns that no layout knows")
def unknown_columns(bench: Bench) -> Outcome:
    return used(bench.check(bench.with_row(shade="blue")), "not used", "shade")


@fault("0.3c", SECTION, "--rejected-image given, where no row brings one")
def given_without(bench: Bench) -> Outcome:
    return refused(bench.train("--rejected-image", "given"), "no image_rejected", ":1", left=bench.out)


@fault("0.4a", SECTION, "a rejected picture that is not there: check and train agree")
def given_missing(bench: Bench) -> Outcome:
    data = bench.data([row | {"image_rejected": "nope.png"} for row in bench.pairs])
    check, train = bench.check(data), bench.train(data=data)
    return worst({"check": refused(check, "nope.png"), "train": refused(train, "nope.png", left=bench.out)})


@fault("0.4b", SECTION, "a file without one usable row: check and train agree")
def none_usable(bench: Bench) -> Outcome:
    data = bench.data([row | {"chosen": " "} for row in bench.pairs])
    check, train = bench.check(data), bench.train("--skip-bad", data=data)
    return worst({"check": refused(check, "no usable rows"), "train": refused(train, "no usable rows")})


@fault("0.4c", SECTION, "show of rows with their own rejected pictures")
def show_given(bench: Bench) -> Outcome:
    data = bench.data([row | {"image_rejected": "2.png"} for row in bench.pairs])
    ended = call(show.main, data, "--base", bench.base, "--rows", 1, "--out", bench.folder / "show.png")
    return used(ended, "m_l by 'given'")


@fault("A10a", SECTION, "TRL: the prompt inside chosen and rejected, a system message")
def trl_implicit(bench: Bench) -> Outcome:
    start = [say("system", "Be brief."), say("user", QUESTIONS[0])]
    row = {"images": ["0.png"]}
    row |= {"chosen": [*start, say("assistant", ANSWERS[0])], "rejected": [*start, say("assistant", ANSWERS[1])]}
    return used(bench.check(bench.data([row])), "1 row with a system text")


@fault("A10b", SECTION, "columns of no known layout")
def no_layout(bench: Bench) -> Outcome:
    return refused(bench.check(bench.data([{"foto": "0.png", "frage": "a", "gut": "b", "schlecht": "c"}])), "foto")


@fault("A13", SECTION, "another model's template inside the prompt: [INST], ChatML, USER:")
def foreign_template(bench: Bench) -> Outcome:
    texts = ("[INST] What? [/INST]", "<|im_start|>user What?<|im_end|>", "USER: <image>\nWhat?")
    outcomes = {}
    for text in texts:
        bench.pairs[1]["prompt"] = text
        outcomes[text] = used(bench.check(), "another template inside the prompt")
    return worst(outcomes)


# ---- files ---------------------------------------------------------------------------------------------------------


@fault("0.9", SECTION, "broken JSON in line 3, blank lines before it")
def broken_line(bench: Bench) -> Outcome:
    lines = [json.dumps(row) for row in bench.pairs]
    lines[1:1] = ["", ""]
    lines[4] = lines[4][:-20]
    return refused(bench.check(bench.write("d.jsonl", "\n".join(lines))), "d.jsonl:5")


@fault("A9a", SECTION, "csv, tsv, yaml, ndjson in capitals, a packed file, JSON lines called .json")
def other_files(bench: Bench) -> Outcome:
    lines = "".join(json.dumps(row) + "\n" for row in bench.pairs)
    cases = {
        "p.csv": "image,prompt,chosen,rejected\n0.png,a,b,c\n",
        "p.tsv": "image\tprompt\n0.png\ta\n",
        "p.yaml": "- image: 0.png\n  prompt: a\n",
        "p.jsonl.gz": gzip.compress(lines.encode()),
    }
    read = ".json, .jsonl and .parquet are read"
    outcomes = {name: refused(bench.check(bench.write(name, text)), read) for name, text in cases.items()}
    for name in ("lines.json", "P.JSONL", "p.ndjson"):
        ended = bench.check(bench.write(name, lines))
        outcomes[name] = used(ended) if ended.status == 0 else refused(ended, ".jsonl")
    return worst(outcomes)


@fault("A9b", SECTION, '{"data": [...]}')
def wrapped(bench: Bench) -> Outcome:
    return refused(bench.check(bench.write("d.json", json.dumps({"data": bench.pairs}))), "list of rows")


@fault("A14", SECTION, "a typo in a local path with one slash")
def typo(bench: Bench) -> Outcome:
    return refused(bench.check("data/pairs.csv"), "data/pairs.csv")


@fault("67", SECTION, "an empty file, [], only newlines")
def empty(bench: Bench) -> Outcome:
    cases = {"a.jsonl": "", "b.json": "", "c.json": "[]", "d.jsonl": "\n\n\n"}
    return worst({name: refused(bench.check(bench.write(name, text)), name) for name, text in cases.items()})


@fault("68", SECTION, "a torn last line")
def torn(bench: Bench) -> Outcome:
    text = bench.data().read_text()
    return refused(bench.check(bench.write("d.jsonl", text[:-30])), "d.jsonl:5")


@fault("69", SECTION, "200,000 nested lists")
def nested(bench: Bench) -> Outcome:
    return refused(bench.check(bench.write("d.jsonl", "[" * 200_000 + "]" * 200_000 + "\n")), "d.jsonl:1")


@fault("70", SECTION, "one row of 5 MB")
def huge_row(bench: Bench) -> Outcome:
    return refused(bench.check(bench.with_row(chosen="a road " * 700_000)), "too long", ":2")


@fault("76", SECTION, "parquet: cut, a text, without rows")
def parquet_files(bench: Bench) -> Outcome:
    whole = parquet(bench)
    cases = {"cut.parquet": whole[: len(whole) // 2], "text.parquet": b"not parquet at all", "none.parquet": b""}
    return worst({name: refused(bench.check(bench.write(name, data)), name) for name, data in cases.items()})


@fault("A2", SECTION, "UTF-16, Latin-1")
def encodings(bench: Bench) -> Outcome:
    text = bench.data([row | {"prompt": "Où est-ce ?"} for row in bench.pairs]).read_text().encode().decode()
    text = text.replace("\\u00f9", "ù")
    cases = {code: bench.write(f"{code}.jsonl", text.encode(code)) for code in ("utf-16", "latin-1")}
    return worst({code: refused(bench.check(file), "utf-8") for code, file in cases.items()})


# ---- values --------------------------------------------------------------------------------------------------------


@fault("59", SECTION, "NaN, null, a number, a list as an answer")
def wrong_types(bench: Bench) -> Outcome:
    values = (float("nan"), None, 5, ["a", "b"])
    outcomes = {}
    for value in values:
        outcomes[str(value)] = refused(
            bench.check(bench.with_row(rejected=value)), "cannot be used: 1", "rejected", ":2:"
        )
        if "TypeError" in outcomes[str(value)].says:
            outcomes[str(value)] = Outcome("POOR", outcomes[str(value)].says)
    return worst(outcomes)


@fault("60", SECTION, "an id twice")
def id_twice(bench: Bench) -> Outcome:
    return used(bench.check(bench.with_row(id="p0")), "more than once: 1 id")


@fault("66", SECTION, "a key twice in a row")
def key_twice(bench: Bench) -> Outcome:
    lines = bench.data().read_text().splitlines()
    lines[1] = lines[1].replace('{"id"', '{"chosen": "Another.", "id"', 1)
    return used(bench.check(bench.write("d.jsonl", "\n".join(lines))), "stands twice", "chosen")


@fault("72", SECTION, "half a surrogate; a NUL in a text")
def surrogate(bench: Bench) -> Outcome:
    half = refused(bench.check(bench.with_row(chosen="a\ud800b")), ":2")
    ended = bench.check(bench.with_row(chosen="a\x00b"))
    return worst(
        {"half": half, "NUL": used(ended) if ended.status == 0 else refused(ended, "cannot be used: 1", ":2:")}
    )


@fault("73", SECTION, "</s>, <pad>, <image> in answers and questions")
def special_tokens(bench: Bench) -> Outcome:
    outcomes = {}
    for column in ("chosen", "rejected", "prompt"):
        for text in ("</s>", "<pad>", "<s>"):
            bench.pairs[1] |= {"chosen": "a", "rejected": "b", "prompt": "c"}
            ended = bench.check(bench.with_row(**{column: f"One {text} two"}))
            outcomes[f"{text} in {column}"] = refused(ended, "special-token text", text)
    bench.pairs[1] |= {"chosen": "a", "rejected": "b", "prompt": "c"}
    outcomes["<image> in chosen"] = refused(bench.check(bench.with_row(chosen="an <image> here")), "<image>")
    return worst(outcomes)


@fault("74", SECTION, "ESC sequences in ids, paths and texts: check, show, train")
def escapes(bench: Bench) -> Outcome:
    evil = "\x1b[2J\x1b]0;x\x07"
    data = bench.data([bench.pairs[0] | {"id": evil, "prompt": evil}, bench.pairs[1] | {"image": f"{evil}.png"}])
    shown = call(show.main, data, "--base", bench.base, "--out", bench.folder / "show.png")
    texts = {"check": bench.check(data).text, "show": shown.text, "train": bench.train(data=data).text}
    raw = [name for name, text in texts.items() if "\x1b" in text or "\x07" in text]
    return holds(not raw, "no control character reaches the terminal", f"raw in {raw}")


@fault("75", SECTION, "base64 of a BMP; base64 with line breaks; a data: URL")
def base64_pictures(bench: Bench) -> Outcome:
    out = io.BytesIO()
    Image.new("RGB", (90, 90), "red").save(out, "BMP")
    texts = {"BMP": base64.b64encode(out.getvalue()).decode(), "lines": base64.encodebytes(bench.picture()).decode()}
    texts["data:"] = f"data:image/png;base64,{base64.b64encode(bench.picture()).decode()}"
    outcomes = {}
    for name, text in texts.items():
        ended = bench.check(bench.with_row(image=text))
        outcomes[name] = used(ended) if ended.status == 0 else refused(ended, "cannot be used: 1", ":2:")
        if len(ended.text) > 4000:
            outcomes[name] = Outcome("BUG", f"{len(ended.text)} letters printed")
    return worst(outcomes)


@fault("78", SECTION, "an integer of 5,000 digits")
def long_integer(bench: Bench) -> Outcome:
    text = bench.data().read_text().replace('"p1"', "9" * 5000, 1)
    return refused(bench.check(bench.write("d.jsonl", text)), "d.jsonl:2")


# ---- numbers -------------------------------------------------------------------------------------------------------


@fault("61", SECTION, "a row twice, m_l drawn for each, with the cached reference: step 0 is 3 ln 2")
def duplicates_cached(bench: Bench) -> Outcome:
    ended = bench.train("--pack", "--tokens-per-batch", 300, "--batch", 4, data=bench.data(bench.pairs[:2] * 2))
    first = used(ended)
    if first.verdict != "OK":
        return first
    loss = bench.log()[0]["loss"]
    return holds(abs(loss - 2.0794) < 2e-4, f"loss {loss:.4f}", f"loss {loss:.4f}, not 2.0794")


@fault("62", SECTION, "rows in another order, resumed with the cached reference")
def reordered(bench: Bench) -> Outcome:
    packed = ("--pack", "--tokens-per-batch", 300)
    first = used(bench.train(*packed))
    if first.verdict != "OK":
        return first
    return refused(bench.train(*packed, "--resume", data=bench.data(bench.pairs[::-1])), "data")


@fault("79", SECTION, "chosen equal to rejected; m_w as its own rejected picture")
def no_contrast(bench: Bench) -> Outcome:
    rows = [row | {"rejected": row["chosen"], "image_rejected": row["image"]} for row in bench.pairs]
    return used(bench.check(bench.data(rows)), "identical chosen and rejected", "m_w itself as rejected image")


@fault("80", SECTION, "one pair, one epoch: one step")
def one_step(bench: Bench) -> Outcome:
    ended = used(bench.train("--epochs", 1, data=bench.data(bench.pairs[:1])))
    if ended.verdict != "OK":
        return ended
    adapter = load_file(bench.out / "adapter_model.safetensors")
    learnt = any(tensor.any() for name, tensor in adapter.items() if "lora_B" in name)
    return holds(learnt, "B is not zero after it", "the adapter is untrained: B is zero")

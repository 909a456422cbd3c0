"""Faults around a command: places that are none, a console, variables of the environment, odd addresses and numbers."""

import os
import subprocess
import sys
from unittest import mock

import generate
import train
from bases import export
from evals import questions
from external import endpoint
from lab import one_pair, pds_demo, report
from tests.faults_bench import ROOT, Bench, Ended, Outcome, call, change_json, fault, holds, refused, used, worst
from tests.faults_more import COMBINED, chair, coco


@fault(
    "N17", COMBINED, "a console in ASCII; NANOMDPO_WEIGHTS of no folder; RANK without torchrun; --out a link to nothing"
)
def surroundings(bench: Bench) -> Outcome:
    run = bench.adapter()
    ascii_only = {"PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
    command = [sys.executable, "-m", "lab.report", str(run), "--table"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=os.environ | ascii_only)
    outcomes = {"ASCII": used(Ended(done.returncode, done.stdout, done.stderr), "\\u2191")}
    flags = ("--image", bench.folder / "pairs" / "0.png", "--prompt", "What?")
    with mock.patch.dict(os.environ, NANOMDPO_WEIGHTS="/none"):
        outcomes["weights"] = refused(call(generate.main, "--base", "llava-1.5-7b", *flags), "NANOMDPO_WEIGHTS")
    for more in (
        {"RANK": "0"},
        {"RANK": "x", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "a", "MASTER_PORT": "1"},
    ):
        with mock.patch.dict(os.environ, more):
            outcomes[f"{len(more)} variables"] = refused(bench.train("--out", bench.folder / "r"), "torchrun")
    (bench.folder / "link").symlink_to("none")
    with mock.patch.object(train, "load_base_and_data", side_effect=AssertionError("loaded")):
        outcomes["link"] = refused(bench.train("--out", bench.folder / "link"), "link to nothing")
        with mock.patch.dict("sys.modules", wandb=None):
            outcomes["--track"] = refused(
                bench.train("--out", bench.folder / "r", "--track", "wandb"), "pip install wandb"
            )
    return worst(outcomes)


@fault(
    "N18",
    COMBINED,
    "questions without a question, --out a folder; export --out ''; --json ''; http://, http://[, port x",
)
def odd_places(bench: Bench) -> Outcome:
    folder = bench.folder / "pairs"
    out = ("--out", bench.folder / "q.jsonl")
    outcomes = {}
    for prompt in (" ", "<image>"):
        outcomes[repr(prompt)] = refused(call(questions.main, "folder", folder, "--prompt", prompt, *out), "--prompt")
    outcomes["folder"] = refused(
        call(questions.main, "folder", folder, "--prompt", "What?", "--out", folder), "overwritten"
    )
    rows = bench.data([{"question_id": 1, "image": "a.jpg", "text": "Is it?", "label": "yes"}], "pope.jsonl")
    outcomes["over"] = refused(call(questions.main, "pope", rows, "--out", rows), "is read by")
    outcomes["export"] = refused(call(export.main, "--base", bench.base, "--out", ""), "exists already")
    for place in (folder, folder / "1.png"):
        outcomes[f"pds_demo {place.name}"] = refused(call(pds_demo.main, "--out", place), "--out")
    outcomes["left as it was"] = holds(not (folder / "models").exists(), "yes", "models are written into it")
    run = bench.folder / "a\nb"
    run.mkdir()
    rows = [line for line in call(report.main, run, "--table").text.splitlines() if line.startswith("| ")]
    outcomes["a run of two lines"] = holds({row.count("|") for row in rows} == {12}, "escaped", rows[1])
    adapter = bench.adapter()
    kept = (adapter / "args.json").read_text()
    for name, value in {"beta": 0, "delta": "x", "terms": ["x"], "rejected_image": 3, "max_length": "x"}.items():
        (adapter / "args.json").write_text(kept)
        change_json(adapter / "args.json", {name: value})
        flag = "--" + name.replace("_", "-")
        outcomes[f"args.json, {name}"] = refused(call(one_pair.main, "--adapter", adapter, "--row", 1), flag)
    coco(bench)
    outcomes["--json"] = refused(chair(bench, [{"image_id": 1, "caption": "A dog."}], "--json", ""), "directory")
    for address in ("http://", "http://[", "http://host:x/v1", "https:///v1"):
        outcomes[address] = refused(call(lambda argv: endpoint.check_endpoint(argv[0]), address), address)
    return worst(outcomes)


@fault("N16", COMBINED, "--temperature and --top-p of 1e-300; shards beside a[1].jsonl; an adapter's edited lora_alpha")
def odd_answers(bench: Bench) -> Outcome:
    flags = (
        "--base",
        bench.base,
        "--image",
        bench.folder / "pairs" / "0.png",
        "--prompt",
        "What?",
        "--max-new-tokens",
        3,
    )
    greedy = call(generate.main, *flags).text
    outcomes = {}
    for more in (("--temperature", 1e-300), ("--temperature", 1, "--top-p", 1e-300)):
        text = call(generate.main, *flags, *more).text
        outcomes[str(more)] = holds(text == greedy, "as greedy", f"{text!r}, greedy {greedy!r}")
    out = ("--out", bench.folder / "a[1].jsonl")
    for i in range(2):
        outcomes[f"shard {i}"] = used(bench.ask(*out, "--shard-index", i, "--shard-count", 2))
    outcomes["joined"] = used(bench.ask(*out), "3 answers, 0 of them new")
    outcomes["--out is --questions"] = refused(bench.ask("--out", bench.folder / "pairs" / "q.jsonl"), "is read by")
    run = ("--adapter", bench.adapter())
    outcomes["adapter"] = used(bench.ask(*run))
    change_json(bench.out / "adapter_config.json", {"lora_alpha": 99})
    return worst(outcomes | {"lora_alpha": refused(bench.ask(*run), "other adapter")})

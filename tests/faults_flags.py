"""What a newcomer meets: the training line, --help, flags that are wrong, odd or from elsewhere, `--out` in the way."""

import json
import os
import re
import resource
import shutil
from unittest import mock

import generate
import train
from tests.faults_bench import SMALL, Bench, Outcome, call, fault, holds, last_line, refused, shell, used, worst

NEWCOMER, SECTION = "A newcomer's", "Flags and run folders"


@fault("0.1", NEWCOMER, "negative margins, and one of 12.8, in the training line")
def minus_sign(bench: Bench) -> Outcome:
    from engine import run_folder

    row = used(bench.train())
    if row.verdict != "OK":
        return row
    logged = bench.log()[0] | {"rewards/margins": -0.2485, "rewards/image_margins": -12.8174}
    line = run_folder.line(logged, 9)
    return holds("| -0.2485 -12.8174 |" in line, line, line)


@fault("A3", NEWCOMER, "train.py --help")
def shown_defaults(bench: Bench) -> Outcome:
    text = call(train.main, "--help").text
    lacking = [flag for flag in ("--beta", "--lr", "--epochs", "--lora-r", "--warmup") if not default_of(flag, text)]
    return holds("None" not in text and not lacking, "the recipe's values are shown", f"no default: {lacking}")


def default_of(flag: str, text: str) -> str:
    found = re.search(rf"^  {flag} .*?\(default: ([\d.e-]+)\)", text, re.MULTILINE | re.DOTALL)
    return found.group(1) if found else ""


@fault("A6", NEWCOMER, "--base toy in commands that do not make the toy")
def toy_elsewhere(bench: Bench) -> Outcome:
    image = bench.folder / "pairs" / "0.png"
    one = call(generate.main, "--base", "toy", "--image", image, "--prompt", "What?")
    checked = bench.check(bench.data(), "--base", "toy")
    return worst({"generate": refused(one, "toy"), "check": refused(checked, "toy")})


@fault("A28", NEWCOMER, "flags of TRL and LLaMA-Factory")
def foreign_flags(bench: Bench) -> Outcome:
    cases = {"--learning-rate": "--lr", "--lora_r": "--lora-r", "--per_device_train_batch_size": "--batch"}
    return worst({theirs: refused(bench.train(theirs, 1), f"here {ours}") for theirs, ours in cases.items()})


@fault("A18", NEWCOMER, "files others of the group must read: an adapter's mode")
def modes(bench: Bench) -> Outcome:
    mode = (bench.adapter() / "adapter_model.safetensors").stat().st_mode & 0o777
    before = os.umask(0)
    os.umask(before)
    return holds(mode == 0o666 & ~before, f"mode {mode:o}, by umask", f"mode {mode:o}, umask {before:o}")


@fault("A15", NEWCOMER, "what the run folder says it was trained on")
def run_says(bench: Bench) -> Outcome:
    bench.train("--skip-bad", data=bench.with_row(chosen=" "))
    text = (bench.out / "args.json").read_text()
    lacking = [
        word for word in ("base_sha256", "data_sha256", "torch", "device", "commit", "pairs") if word not in text
    ]
    return Outcome("POOR", f"not in args.json: {lacking}") if lacking else Outcome("OK", "hashes, counts, versions")


@fault("A29", NEWCOMER, "a console in cp1252, emoji in the data", slow=True)
def console(bench: Bench) -> Outcome:
    data = bench.with_row(prompt="Où \U0001f600 ?")
    show = f"-m formats.show {data} --base {bench.base} --out {bench.folder}/s.png"
    return used(shell(f"PYTHONIOENCODING=cp1252 python {show}"))


# ---- numbers -------------------------------------------------------------------------------------------------------

NONSENSE = {
    "0.11a": ("--clip", "-1"),
    "0.11b": ("--clip", "0"),
    "0.11c": ("--max-steps", "-3"),
    "0.11d": ("--max-steps", "0"),
    "0.11e": ("--beta", "0"),
    "0.11f": ("--beta", "-1"),
    "0.11g": ("--lora-alpha", "0"),
    "0.11h": ("--lora-alpha", "-5"),
    "0.11i": ("--warmup", "-1"),
    "0.11j": ("--warmup", "2"),
}


def nonsense(flag: str, value: str):
    def inject(bench: Bench) -> Outcome:
        return refused(bench.train(flag, value), flag, left=bench.out)

    return inject


for number, (flag, value) in NONSENSE.items():
    fault(number, SECTION, f"train.py {flag} {value}")(nonsense(flag, value))


WRONG = (
    "--lr -1,--lr 0,--lr nan,--lr inf,--lr x,--epochs 0,--epochs -1,--epochs 1.5,--batch 0,--batch -2,--seed -1,"
    "--seed x,--workers -1,--lora-r 0,--lora-r -4,--lora-r 2.5,--beta nan,--beta inf,--delta nan,--delta inf,"
    "--clip nan,--clip inf,--weight-decay -1,--weight-decay nan,--adam-beta2 1,--adam-beta2 -1,--adam-beta2 nan,"
    "--max-length 0,--max-length -1,--micro-batch 0,--terms x,--terms ,--anchors x,--recipe x,--rejected-image x,"
    "--rejected-image crop:2-3,--rejected-image crop:0.5-0.2,--dtype int8,--quant 3,--checkpointing x,--save-every 0,"
    "--tokens-per-batch 0,--track x,--reference x,--max-steps 1.5,--lora-alpha nan,--warmup nan,--nosuch 1"
)


@fault("103", SECTION, f"train.py: {WRONG.count(',') + 1} wrong or odd flags")
def wrong_flags(bench: Bench) -> Outcome:
    outcomes = {}
    for case in WRONG.split(","):
        flag, value = case.split(" ")
        outcomes[case] = refused(bench.train(flag, value), flag.strip("-"), left=bench.out)
    return worst(outcomes)


@fault("103b", SECTION, "train.py --batch 1000000 with five pairs")
def huge_batch(bench: Bench) -> Outcome:
    return used(bench.train("--batch", 1_000_000))


@fault("106", SECTION, "--lr 1e9, --lr 1e38")
def too_fast(bench: Bench) -> Outcome:
    return worst({lr: refused(bench.train("--lr", lr), "--lr", "at most 1", left=bench.out) for lr in ("1e9", "1e38")})


@fault("0.15", SECTION, "weights that are not finite after the last step")
def not_finite_at_the_end(bench: Bench) -> Outcome:
    from engine.run_folder import Run

    finish = Run.finish

    def after_a_step_too_large(self):
        next(p for p in self.model.parameters() if p.requires_grad).data.fill_(float("nan"))
        return finish(self)

    with mock.patch.object(Run, "finish", after_a_step_too_large):
        return refused(bench.train("--max-steps", 1), "finite", "lower --lr")


GENERATE = (
    "--beams 0,--beams 100000,--max-new-tokens 0,--max-new-tokens 1000000000,--temperature -1,--temperature nan,"
    "--temperature inf,--top-p 0,--top-p 2,--top-p -0.5,--seed -1,--dtype x,--image-mode x,--adapter nowhere,"
    "--base nowhere/at-all-xyz-/,--image nowhere.png"
)


@fault("108", SECTION, f"generate.py: {GENERATE.count(',') + 1} wrong flags")
def generate_flags(bench: Bench) -> Outcome:
    flags = ["--base", bench.base, "--image", bench.folder / "pairs" / "0.png", "--prompt", "What?"]
    outcomes = {}
    for case in GENERATE.split(","):
        name, wrong = case.split(" ")
        outcomes[case] = refused(call(generate.main, *flags, "--max-new-tokens", 3, name, wrong), wrong[:7])
    return worst(outcomes)


@fault("109", SECTION, "--prompt with two <image>, and with another template")
def prompts(bench: Bench) -> Outcome:
    flags = ["--base", bench.base, "--image", bench.folder / "pairs" / "0.png", "--max-new-tokens", 3]
    two = call(generate.main, *flags, "--prompt", "<image> <image> What?")
    ended = call(generate.main, *flags, "--prompt", "USER: What? ASSISTANT:")
    return worst({"two": refused(two, "--prompt"), "template": refused(ended, "--prompt")})


# ---- run folders ---------------------------------------------------------------------------------------------------


@fault("12", SECTION, "--out that cannot be written: train, export, evals.answers, show, report")
def read_only(bench: Bench) -> Outcome:
    from formats import show
    from lab import report

    where = "/proc/nowhere/out"
    run = bench.adapter()
    checked = call(show.main, bench.data(), "--base", bench.base, "--out", f"{where}.png")
    ends = {
        "train": bench.train("--out", where),
        "export": bench.export("--out", where),
        "answers": bench.ask("--out", f"{where}.jsonl"),
        "show": checked,
        "report": call(report.main, run, "--curves", f"{where}.png"),
    }
    return worst({name: refused(ended, where) for name, ended in ends.items()})


@fault("A4", SECTION, "--out with something else in it, found before the base is loaded")
def not_empty(bench: Bench) -> Outcome:
    bench.out.mkdir()
    (bench.out / "thesis.tex").write_text("x")
    (bench.base / "model.safetensors").write_bytes(b"")  # what would be said if the base were loaded first
    outcome = refused(bench.train(), "out: not empty")
    kept = [file.name for file in bench.out.iterdir() if file.name != ".lock"] == ["thesis.tex"]
    return outcome if kept else Outcome("BUG", "the folder was changed")


@fault("40", SECTION, "the same command a second time, after a run that ended, and after one that failed")
def again(bench: Bench) -> Outcome:
    failed = bench.train(data=bench.with_row(chosen=" "))
    first = bench.train(data=bench.with_row(chosen="Good."))
    second = bench.train(data=bench.data())
    return worst(
        {
            "failed": refused(failed, "empty chosen", left=None),
            "then right": used(first),
            "again": refused(second, "--resume"),
        }
    )


@fault("18", SECTION, "a second run in a folder that another holds")
def two_runs(bench: Bench) -> Outcome:
    from engine import run_folder

    bench.out.mkdir()
    held = run_folder.lock(bench.out)
    try:
        return refused(bench.train(), "out")
    finally:
        held.release()


@fault("33", SECTION, "the run folder removed while the run goes on")
def folder_removed(bench: Bench) -> Outcome:
    from engine.run_folder import Run

    log = Run.log

    def then_remove(self, step, *rest):
        log(self, step, *rest)
        shutil.rmtree(bench.out, ignore_errors=True)

    with mock.patch.object(Run, "log", then_remove):
        return refused(bench.train("--max-steps", 3), "out")


@fault("8", SECTION, "no room on the disk: train, export, evals.answers")
def disk_full(bench: Bench) -> Outcome:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    bench.data()
    resource.setrlimit(resource.RLIMIT_FSIZE, (400, hard))  # bytes a file; a write beyond it fails like a full disk
    try:
        run = bench.train(data=bench.folder / "pairs" / "pairs.jsonl")
        merged = bench.export()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    gone = Outcome("OK", "nothing is kept")
    if (bench.folder / "merged").exists():
        gone = Outcome("BUG", "a half-written export")
    return worst({"train": refused(run, "cannot be written"), "export": refused(merged, "written"), "left": gone})


@fault("38", SECTION, "an export's .part of one that was killed; --out that exists")
def export_again(bench: Bench) -> Outcome:
    part = bench.folder / "merged.part"
    part.mkdir()
    killed = refused(bench.export(), "killed")
    part.rmdir()
    (bench.folder / "merged").mkdir()
    return worst({".part": killed, "exists": refused(bench.export(), "exists")})


@fault("6", SECTION, "train.py | head -1", slow=True)
def closed_pipe(bench: Bench) -> Outcome:
    flags = f"--base {bench.base} --data {bench.data()} --out {bench.out} {' '.join(SMALL)}"
    ended = shell(f"python train.py {flags} | head -1; exit ${{PIPESTATUS[0]}}")
    return refused(ended, "Nobody reads the output")


@fault("3", SECTION, "SIGTERM in mid-run, then --resume", slow=True)
def terminated(bench: Bench) -> Outcome:
    steps = "--workers 0 --lora-r 4 --lora-alpha 8 --batch 2 --epochs 2000 --save-every 1000"
    flags = f"--base {bench.base} --data {bench.data()} --out {bench.out} {steps}"
    ended = shell(f"timeout -s TERM 30 python train.py {flags}; exit $?")
    return holds(
        "--resume" in ended.text and not ended.crash, "the command that resumes is printed", last_line(ended.text)
    )


@fault("36", SECTION, "ulimit -n 40 with workers", slow=True)
def few_files(bench: Bench) -> Outcome:
    flags = f"--base {bench.base} --data {bench.data()} --out {bench.out} {' '.join(SMALL)} --workers 4"
    ended = shell(f"ulimit -n 40; python train.py {flags}")
    return used(ended) if ended.status == 0 else refused(ended, "ulimit -n")


@fault("140", SECTION, "log.jsonl without keys, with NaN; a folder that is no run")
def report_logs(bench: Bench) -> Outcome:
    from lab import report

    run = bench.adapter()
    curves = bench.folder / "c.png"
    row = bench.log()[0]
    outcomes = {"no run": refused(call(report.main, bench.base, "--curves", curves), "no log.jsonl")}
    for name, changed in {"no keys": {"step": 0}, "no step": {"loss": 1.0}, "a list": [1]}.items():
        (run / "log.jsonl").write_text(json.dumps(changed) + "\n")
        outcomes[name] = refused(call(report.main, run, "--curves", curves), "log.jsonl")
    (run / "log.jsonl").write_text(json.dumps(row | {"loss": float("nan")}) + "\n")
    outcomes["NaN"] = used(call(report.main, run, "--curves", curves))
    return worst(outcomes)


@fault("141", SECTION, "--curves in a missing folder, with a suffix that is not written")
def curves(bench: Bench) -> Outcome:
    from lab import report

    run = bench.adapter()
    odd = call(report.main, run, "--curves", bench.folder / "c.docx")
    ended = call(report.main, run, "--curves", bench.folder / "none" / "c.svg")
    missing = used(ended) if ended.status == 0 else refused(ended, "c.svg")
    return worst({"suffix": refused(odd, ".docx"), "folder": missing})

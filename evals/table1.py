"""mDPO's Table 1 for one model, by one command: MMHal-Bench, Object HalBench and AMBER, on request POPE too.

    python -m evals.table1 --base llava-1.5-7b --adapter RUN --data FOLDER \
        --extractor URL --extractor-model M --judge URL --judge-model M

FOLDER holds what the benchmarks publish; what is missing is said, with where it comes from, before anything starts.
Each part is questions, answers, score; its files go to the run folder (or --out), and `lab.report` puts them beside the
paper's. The same command resumes a run that was stopped: no answer is made twice and no reply is asked for twice.

Deviations from the paper: those of eval_chair.py, evals.amber and evals.mmhal, which mark their results; POPE is not in
its table. Decoding is the benchmarks': 3 beams for Object HalBench, else greedy.
"""

import argparse
import time
from pathlib import Path
from typing import NamedTuple

import eval_chair
from engine.distributed import under_torchrun
from evals import amber, answers, mmhal, pope, questions
from external import endpoint, files
from external.terminal import set_up_terminal
from generate import add_model_flags


class Needed(NamedTuple):
    """A file or folder below --data."""

    path: str
    source: str


class Job(NamedTuple):
    """One file of questions of a part."""

    benchmark: str  # of evals.questions
    file: str
    pictures: str | None  # folder; None: they are in the file
    n: int
    flags: tuple[str, ...] = ()  # of evals.answers

    @property
    def name(self) -> str:
        return Path(self.file).stem if self.benchmark == "pope" else self.benchmark


OBJHAL = "objhal/obj_halbench_300_with_image.jsonl"
AMBER_QUERIES = "AMBER/data/query/query_generative.json"
MMHAL = "mmhal/response_template.json"
POPE = tuple(f"pope/coco_pope_{split}.json" for split in ("random", "popular", "adversarial"))
JOBS = {
    "objhal": [Job("objhal", OBJHAL, None, 300, ("--beams", "3"))],
    "amber": [Job("amber-generative", AMBER_QUERIES, "AMBER/image", 1004)],
    "mmhal": [Job("mmhal", MMHAL, "mmhal/images", 96)],
    "pope": [Job("pope", file, "coco/val2014", 3000, ("--max-new-tokens", "16")) for file in POPE],
}
TABLE1 = ("objhal", "amber", "mmhal")
COCO = "annotations_trainval2014.zip of cocodataset.org"
TAGGER = "averaged_perceptron_tagger_eng.zip of github.com/nltk/nltk_data (packages/taggers)"
RLHFV = "eval/data of github.com/RLHF-V/RLHF-V"
MMHAL_HUB = "huggingface.co/datasets/Shengcao1006/MMHal-Bench"
AMBER = "github.com/junyangwang0410/AMBER"
NEEDED = {
    "objhal": [
        Needed(OBJHAL, RLHFV),
        Needed("objhal/synonyms_refine.txt", RLHFV),
        Needed("coco/annotations/instances_val2014.json", COCO),
        Needed("coco/annotations/captions_val2014.json", COCO),
    ],
    "amber": [
        Needed(AMBER_QUERIES, AMBER),
        Needed("AMBER/data/annotations.json", AMBER),
        Needed("AMBER/data/relation.json", AMBER),
        Needed("AMBER/data/safe_words.txt", AMBER),
        Needed("AMBER/image", f"the link in the README of {AMBER}"),
        *[Needed(f"tagger/averaged_perceptron_tagger_eng.{part}.json", TAGGER) for part in amber.TAGGER_PARTS],
    ],
    "mmhal": [
        Needed(MMHAL, MMHAL_HUB),
        Needed("mmhal/eval_gpt_mmhal.py", MMHAL_HUB),  # holds the judge's prompt; it is read, not run
        Needed("mmhal/images", f"test_data.zip of {MMHAL_HUB}"),
    ],
    "pope": [
        *[Needed(file, "output/coco of github.com/RUCAIBox/POPE") for file in POPE],
        Needed("coco/val2014", "val2014.zip of cocodataset.org"),
    ],
}
PAIRS = "amber_pairs.json"  # below --data, made by evals.similarity


# ---- before it starts ----------------------------------------------------------------------------------------------


def check_ready(args: argparse.Namespace) -> None:
    """SystemExit with everything that is missing for the parts that are asked for, and where it comes from."""
    missing = []
    for part in args.parts:
        for needed in NEEDED[part]:
            if not (args.data / needed.path).exists():
                missing.append(f"  {part}: {args.data / needed.path}\n      from {needed.source}")
    if "amber" in args.parts and not amber.has_nltk():
        missing.append("  amber: the package nltk\n      pip install nltk")
    if "mmhal" in args.parts and not args.judge and not reviews_file(args).exists():
        missing.append("  mmhal: --judge URL --judge-model M\n      a language model that rates the 96 answers")
    if missing:
        listed = "\n".join(missing)
        raise SystemExit(f"Missing:\n{listed}\nNothing was started. --parts leaves a part out.")
    for url in (args.extractor, args.judge):
        if url:
            endpoint.check_endpoint(url)
    check_readable(args)
    files.check_writable(times_file(args))


def check_readable(args: argparse.Namespace) -> None:
    """SystemExit where the scorers could not read a file, which would be found out after hours of answering."""
    data = args.data
    if "objhal" in args.parts:
        eval_chair.load_vocabulary(str(data / "objhal/synonyms_refine.txt"), "objhal")
    if "amber" in args.parts:
        amber.load_data(str(data / "AMBER/data"))
        amber.load_tagger(str(data / "tagger"))
        if (data / PAIRS).exists():
            amber.load_similarity(str(data / PAIRS))
    if "mmhal" in args.parts:
        mmhal.read_prompt(str(data / "mmhal/eval_gpt_mmhal.py"))


def say_plan(args: argparse.Namespace) -> None:
    """What each part will do and, where this run folder has answers already, how long the rest takes at their speed."""
    times = read_times(args)
    for part in args.parts:
        for job in JOBS[part]:
            left = job.n - count_lines(answers_file(args, job))
            per_answer = times.get(job.name)
            takes = f"about {per_answer * left / 60:.0f} minutes" if per_answer else "the log will say how long"
            print(f"{job.name}: {left} of {job.n} answers to go, {takes}; into {answers_file(args, job)}")
    if "objhal" in args.parts:
        said = f"300 calls of {args.extractor}" if args.extractor else "no --extractor: a word list, not comparable"
        print(f"objhal, objects listed by: {said}")
    if "amber" in args.parts and not (args.data / PAIRS).exists():
        print(f"amber: no {args.data / PAIRS} (python -m evals.similarity makes it): equal words only, not comparable")
    if "mmhal" in args.parts:
        print(f"mmhal, rated by: 96 calls of {args.judge}" if args.judge else "mmhal: replies saved before")


def count_lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.is_file() else 0


# ---- questions and answers -----------------------------------------------------------------------------------------


def answers_file(args: argparse.Namespace, job: Job) -> Path:
    return args.out / f"{job.name}.jsonl"


def reviews_file(args: argparse.Namespace) -> Path:
    return args.out / "mmhal.reviews.json"


def times_file(args: argparse.Namespace) -> Path:
    return args.out / "table1.json"


def read_times(args: argparse.Namespace) -> dict[str, float]:
    """Seconds per answer of each job, as measured when it ran."""
    times = files.read_json(times_file(args), dict) if times_file(args).is_file() else {}
    if not all(isinstance(seconds, float | int) for seconds in times.values()):
        raise SystemExit(f"{times_file(args)}: not as this command wrote it; delete it, it only holds times.")
    return times


def answer(job: Job, args: argparse.Namespace, source: answers.Source | None) -> answers.Source:
    """Makes a job's questions and answers what is left of them; returns the model, for the next job."""
    asked = args.out / "questions" / f"{job.name}.jsonl"
    questions.main([job.benchmark, str(args.data / job.file), "--out", str(asked)])
    argv = ["--questions", str(asked), "--out", str(answers_file(args, job)), *model_flags(args), *job.flags]
    if job.pictures:
        argv += ["--image-root", str(args.data / job.pictures)]
    print("python -m evals.answers " + " ".join(argv), flush=True)
    job_args = answers.parse_args(argv)
    source = source or answers.Source(job_args)
    start = time.monotonic()
    new = answers.answer_file(job_args, source)
    if new:
        seconds = (time.monotonic() - start) / new
        files.write_json(times_file(args), read_times(args) | {job.name: round(seconds, 3)})
    return source


def model_flags(args: argparse.Namespace) -> list[str]:
    flags = ["--base", args.base, "--image-mode", args.image_mode]
    for name in ("weights", "vision_weights", "adapter", "dtype"):
        value = vars(args)[name]
        if value:
            flags += [f"--{name.replace('_', '-')}", str(value)]
    return flags


# ---- scores --------------------------------------------------------------------------------------------------------


def score(part: str, args: argparse.Namespace) -> None:
    """Runs the part's scorer; its result goes where lab.report looks for it."""
    said = [str(answers_file(args, job)) for job in JOBS[part]]
    scorer, argv = SCORERS[part](args)
    print(f"--- {part} ---", flush=True)
    scorer.main(["--answers", *said, *argv])


def objhal_scorer(args: argparse.Namespace):
    data = args.data
    argv = ["--protocol", "objhal", "--synonyms", str(data / "objhal/synonyms_refine.txt")]
    argv += ["--annotations", str(data / "coco/annotations"), "--json", str(args.out / "eval_chair.json")]
    if args.extractor:
        argv += ["--extractor", args.extractor, "--extractor-model", args.extractor_model]
    return eval_chair, argv


def amber_scorer(args: argparse.Namespace):
    pairs = args.data / PAIRS
    argv = ["--data", str(args.data / "AMBER/data"), "--tagger", str(args.data / "tagger")]
    argv += ["--similarity", str(pairs) if pairs.exists() else "exact", "--json", str(args.out / "eval_amber.json")]
    return amber, argv


def mmhal_scorer(args: argparse.Namespace):
    argv = ["--template", str(args.data / MMHAL), "--prompt", str(args.data / "mmhal/eval_gpt_mmhal.py")]
    argv += ["--reviews", str(reviews_file(args)), "--json", str(args.out / "eval_mmhal.json")]
    if args.judge:
        argv += ["--judge", args.judge, "--judge-model", args.judge_model]
    return mmhal, argv


def pope_scorer(args: argparse.Namespace):
    labels = [str(args.data / file) for file in POPE]
    return pope, ["--labels", *labels, "--json", str(args.out / "eval_pope.json")]


SCORERS = {"objhal": objhal_scorer, "amber": amber_scorer, "mmhal": mmhal_scorer, "pope": pope_scorer}


# ---- command line --------------------------------------------------------------------------------------------------


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    set_up_terminal()
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add_model_flags(p)
    p.add_argument("--data", type=Path, required=True, help="folder of the benchmarks' files; what is missing is said")
    p.add_argument("--out", type=Path, help="folder of the results (default: --adapter's)")
    p.add_argument("--parts", nargs="+", choices=list(JOBS), default=list(TABLE1), help="default: those of Table 1")
    p.add_argument("--extractor", help="endpoint of the language model that lists Object HalBench's objects")
    p.add_argument("--extractor-model", help="its name there")
    p.add_argument("--judge", help="endpoint of the language model that rates MMHal-Bench's answers")
    p.add_argument("--judge-model", help="its name there")
    args = p.parse_args(argv)
    if under_torchrun():
        p.error("one process asks and scores: start it without torchrun (evals.answers alone can be shared by GPUs)")
    args.out = args.out or args.adapter
    if not args.out:
        p.error("--out is needed without --adapter")
    if bool(args.extractor) != bool(args.extractor_model) or bool(args.judge) != bool(args.judge_model):
        p.error("--extractor goes with --extractor-model, --judge with --judge-model")
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    check_ready(args)
    say_plan(args)
    source = None
    for part in args.parts:
        for job in JOBS[part]:
            source = answer(job, args, source)
        score(part, args)
    print(f"All parts are done. Beside the paper's: python -m lab.report {args.out} --table")


if __name__ == "__main__":
    main()

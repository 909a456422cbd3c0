"""The question about each chosen picture: q (PDS-DPO 3.3, "an instruction prompt").

    python -m pds.ask best.jsonl --out questions.jsonl --templates
    python -m pds.ask best.jsonl --out questions.jsonl --endpoint http://host/v1 --model M
    python -m pds.ask best.jsonl --out questions.jsonl --questions mine.jsonl

IN has a row per prompt with its best picture, {id, topic, caption, image}; OUT adds `prompt`, and is what
pds.responses and evals.answers read. mine.jsonl has rows {id, prompt}.

Deviations from the paper and its release
1. The paper's questions are GPT-4's, made from the caption: most repeat it, so that a model can answer without looking.
   Our request asks for questions that do not; the templates know nothing of the caption.
2. Joined by id; the release pairs the lines of two files.
"""

import argparse
import hashlib
from collections.abc import Callable
from pathlib import Path

from external import files
from external.endpoint import reply_text
from external.terminal import printable
from pds import endpoints, runner
from pds.runner import Row

NEEDED = {"topic": str, "caption": str, "image": str}
LONGEST = 60  # words of a question
TEMPLATES = (
    "What is the main subject of this picture, and what is around it?",
    "Describe this picture in detail.",
    "How many people or animals can you see, and what is each of them doing?",
    "Which colours stand out here, and what do they belong to?",
    "What stands in the foreground, and what lies behind it?",
    "Where might this picture have been taken? Say which details tell you.",
    "What time of day or what kind of light is shown, and how can one tell?",
    "Is there any text in the picture? If so, what does it say, and if not, what could be mistaken for it?",
    "What is left and what is right of the centre?",
    "Name three objects in the picture and say how they are related.",
    "What seems to have happened just before this moment?",
    "Which materials and textures can be seen?",
    "What would one expect in such a scene that is missing here?",
    "Explain what makes this picture look real or unreal.",
    "What mood does the picture have, and which details create it?",
    "What is the largest thing in the picture, and what is the smallest that you can make out?",
)
REQUEST = """A picture was made from this description:
{caption}

Write one question about the picture, of at most 30 words, that can only be answered by looking at it. Ask about what is
there, how many, where, which colour, or what follows from it. Do not repeat the description. Answer with the question
alone."""


def template_of(seed: int, key: str) -> str:
    digest = hashlib.sha256(f"{seed} {key}".encode()).digest()
    return TEMPLATES[int.from_bytes(digest[:8]) % len(TEMPLATES)]


def with_question(row: Row, reply: dict) -> Row:
    """The row with the question of a reply. ValueError for a reply that is none."""
    text = " ".join(reply_text(reply).replace("<image>", " ").split()).strip('"\u201c\u201d ')
    if not text or len(text.split()) > LONGEST:
        raise ValueError(f"not one question of at most {LONGEST} words: {text[:80]!r}")
    return row | {"prompt": text}


def read_questions(file: Path) -> dict[str, str]:
    """id -> question. SystemExit if an id has two."""
    found = {}
    for row in runner.read_inputs(file, {"prompt": str}):
        if "error" not in row and found.setdefault(str(row["id"]), row["prompt"]) != row["prompt"]:
            raise SystemExit(f"{file}: two questions for {row['id']}; leave one of them")
    return found


def from_file(row: Row, questions: dict[str, str], file: Path) -> Row:
    question = questions.get(str(row["id"]), "").replace("<image>", " ").strip()
    return row | {"prompt": question} if question else runner.failed(row, f"no question for it in {file}")


def source_of(args: argparse.Namespace, ids: set[str]) -> tuple[dict, Callable[[], runner.Work]]:
    """Where the questions about these ids come from: for the settings, and as work."""
    if args.templates:
        described = {"model": "templates", "templates": files.sha256("\n".join(TEMPLATES).encode())[:16]}
        return described, lambda: runner.each_row(lambda row: row | {"prompt": template_of(args.seed, str(row["id"]))})
    if args.questions:
        questions = read_questions(args.questions)
        if surplus := sorted(questions.keys() - ids):
            print(printable(f"{args.questions}: {len(surplus)} questions are for no row of IN, such as {surplus[0]}"))
        described = {"model": f"questions of {args.questions.name}", "sha256": files.file_sha256(args.questions)}
        return described, lambda: runner.each_row(lambda row: from_file(row, questions, args.questions))
    where = endpoints.from_flags(args, args.endpoint, args.model)

    def body(row: Row) -> dict:
        text = REQUEST.format(caption=row["caption"])
        return {"messages": [endpoints.message(text)], "temperature": 0.7, "seed": args.seed}

    return {"request": REQUEST} | endpoints.describe(where), endpoints.Asker(where, body, with_question).work


def parse_args(argv=None) -> argparse.Namespace:
    p = runner.stage_parser(__doc__, "best.jsonl: {id, topic, caption, image}")
    p.add_argument("--templates", action="store_true", help="our own questions, which need nothing")
    p.add_argument("--questions", type=Path, metavar="FILE", help="questions of your own: {id, prompt}")
    p.add_argument("--seed", type=int, default=0, help="of the templates, and sent to the endpoint (default 0)")
    endpoints.add_flags(p)
    args = p.parse_args(argv)
    runner.check_flags(p, args)
    if [args.templates, bool(args.questions), bool(args.endpoint)].count(True) != 1:
        p.error("one source: --templates, --questions FILE, or --endpoint URL --model M")
    if bool(args.endpoint) != bool(args.model):
        p.error("--endpoint URL and --model M go together")
    return args


def main(argv=None) -> None:
    args = parse_args(argv)
    inputs = []
    for row in runner.read_inputs(args.input, NEEDED):
        kept = ("id", "topic", "caption", "image", "image_sha256", "error")
        inputs.append({name: row[name] for name in kept if name in row})
    made_by, load = source_of(args, {str(row["id"]) for row in inputs})
    settings = {"stage": "ask", "in": runner.beside(args.input, args.out), "seed": args.seed} | made_by
    result = runner.run(args, inputs, settings, {"prompt", "error"}, load)
    runner.report(args, result)


if __name__ == "__main__":
    main()

"""The answers: y_i = M_i(q, I*), by several models (PDS-DPO 3.3, equation 8).

    python -m pds.responses questions.jsonl --out answers.jsonl --responder mistral=llava-hf/llava-v1.6-mistral-7b-hf \\
        --responder llava=base:llava-1.5-7b --responder q=http://host/v1#model

IN has a row per question, {id, image, prompt, ...}; OUT one per question and responder, with {responder, answer,
finish: eos | length, n_tokens} or {responder, error}. A responder is NAME=SPEC:

    base:NAME or base:FOLDER   a base of ours through generate.py; toy is the one of the demo
    http://host/v1#MODEL       an OpenAI-compatible endpoint: at scale, the engine behind it does the work
    HUB/NAME or a folder       an image-text-to-text model of transformers, with its own chat template

and may end in generate.py's flags: `base:toy?temperature=0.7&seed=1&adapter=RUN`. Another seed is another responder.

Deviations from the paper and its release
1. Questions go through each model's chat template; the release gives the bare line, and some models say nothing to it.
2. A failed call is an error row, never an empty answer; answers keep their line ends; only new tokens are an answer.
3. Any number of responders; one model is in memory at a time.
"""

import argparse
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple
from urllib.parse import parse_qsl

import torch
from PIL import Image
from torch import Tensor

import generate
import pictures
from bases import adapter, checkpoint, tokenizer
from data import BadRow, bare_question
from external import files
from external.endpoint import reply_text
from external.flags import whole
from pds import candidates, endpoints, library, origin, runner
from pds.runner import Row

NEEDED = {"image": str, "prompt": str}
DECODING = ("temperature", "top-p", "seed", "max-new-tokens")
OPTIONS = {
    "base": (*DECODING, "dtype", "adapter", "weights", "vision-weights", "image-mode"),
    "endpoint": DECODING,
    "transformers": (*DECODING, "dtype"),
}
ROW_BYTES = 3 << 30  # of a 13B model: keys and values of 4,000 tokens


class Responder(NamedTuple):
    name: str
    spec: str  # as given
    kind: str  # base, endpoint, transformers
    model: str
    args: argparse.Namespace  # generate.py's flags


def parse_responder(text: str, defaults: list[str]) -> Responder:
    """NAME=SPEC -> what it means. SystemExit with the forms for anything else."""
    name, separator, spec = text.partition("=")
    if not separator or not name or not spec:
        raise SystemExit(
            f"--responder {text}: give NAME=SPEC, such as llava=base:llava-1.5-7b or q=http://host/v1#model"
        )
    where, _, query = spec.partition("?")
    options = parse_qsl(query, keep_blank_values=True)
    own = dict(options)
    if len(own) < len(options):
        raise SystemExit(f"--responder {text}: an option is there twice")
    kind, model = "transformers", where
    if where.startswith("base:"):
        kind, model = "base", where.removeprefix("base:")
    elif where.startswith(("http://", "https://")):
        kind, model = "endpoint", where.partition("#")[2]
        if not model:
            raise SystemExit(f"--responder {text}: which model of the endpoint? Give {where.rstrip('#')}#MODEL")
    if unknown := [option for option in own if option not in OPTIONS[kind]]:
        known = ", ".join(OPTIONS[kind])
        raise SystemExit(f"--responder {text}: no option {unknown[0]} for this kind, {kind}; known: {known}")
    p = argparse.ArgumentParser(prog=f"--responder {text}")
    generate.add_model_flags(p)
    generate.add_decoding_flags(p)
    flags = [f"--{option}={value}" for option, value in own.items()]
    return Responder(name, spec, kind, model, generate.parse_flags(p, ["--base", model, *defaults, *flags]))


# ---- our own bases -------------------------------------------------------------------------------------------------


class Base:
    """A base and its adapter, through generate.py."""

    def __init__(self, responder: Responder):
        self.args = responder.args
        self.processor, self.model = generate.load_processor(self.args), generate.load_model(self.args)
        self.context = tokenizer.context_of(checkpoint.resolve(self.args.base, self.args.weights))

    def prompt(self, row: Row) -> Tensor:
        """(T,) ids. BadRow if it is too long for the base."""
        return tokenizer.prompt_of(self.processor, candidates.bare(row["prompt"]), self.context)

    def problem(self, row: Row) -> str | None:
        """Why a question cannot be asked."""
        try:
            self.prompt(row)
        except BadRow as error:
            return ": ".join(error.args)

    def answer(self, rows: list[Row], images: list[Image.Image]) -> list[Row]:
        args, processor = self.args, self.processor
        answers = generate.generate(
            self.model,
            [self.prompt(row) for row in rows],
            torch.stack([processor.prepare(image) for image in images]),  # (B, 3, S, S)
            args.max_new_tokens,
            args.temperature,
            [generate.own_generator(args.seed, str(row["id"])) for row in rows],
            args.top_p,
            args.beams,
        )
        return [
            {
                "answer": processor.decode(ids),
                "finish": "eos" if ids[-1] == self.model.config.eos_id else "length",
                "n_tokens": len(ids),
            }
            for ids in answers
        ]


def prepare_base(responder: Responder) -> dict:
    """What the settings say of a base; it is fetched if it is not on this machine."""
    args = responder.args
    folder = checkpoint.resolve(args.base, args.weights)
    about = origin.named_model(responder.model, folder, checkpoint.base_sha256(folder, args.vision_weights))
    if args.adapter:
        about["adapter_sha256"] = adapter.adapter_sha256(args.adapter)[:16]
    return about | {"image_mode": args.image_mode}


# ---- models of transformers ----------------------------------------------------------------------------------------


class Library:
    """An image-text-to-text model of transformers, with the chat template that came with it."""

    def __init__(self, responder: Responder, folder: Path):
        transformers = runner.optional("transformers")
        self.args = responder.args
        self.model = library.load("vision-language model", folder, getattr(torch, self.args.dtype), self.args.device)
        self.processor = library.read_beside(transformers.AutoProcessor, folder)
        if not self.processor.chat_template:
            raise SystemExit(f"{folder}: no chat template; without it the model is asked in a form it never learned")
        self.processor.tokenizer.padding_side = "left"  # a new token must follow the last one of its prompt
        if self.processor.tokenizer.pad_token is None:
            self.processor.tokenizer.pad_token = self.processor.tokenizer.eos_token
        ends = self.model.generation_config.eos_token_id
        self.ends = set(ends if isinstance(ends, list) else [ends])

    def problem(self, row: Row) -> str | None:
        """Why a question cannot be asked."""
        tokens = len(self.processor.tokenizer(row["prompt"])["input_ids"])
        context = self.model.config.get_text_config().max_position_embeddings
        return f"prompt too long: {tokens} tokens, the model reads {context}" if tokens >= context else None

    @torch.no_grad()
    def answer(self, rows: list[Row], images: list[Image.Image]) -> list[Row]:
        args = self.args
        chats = []
        for row, image in zip(rows, images, strict=True):
            text = {"type": "text", "text": candidates.bare(row["prompt"])}
            chats.append([{"role": "user", "content": [{"type": "image", "image": image}, text]}])
        inputs = self.processor.apply_chat_template(
            chats, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt", padding=True
        ).to(self.model.device, dtype=self.model.dtype)
        decoding = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
        if args.temperature:
            decoding = {"do_sample": True, "temperature": args.temperature, "top_p": args.top_p, "top_k": 0}
            torch.manual_seed(generate.own_generator(args.seed, str(rows[0]["id"])).initial_seed())
        pad = self.processor.tokenizer.pad_token_id
        out = self.model.generate(
            **inputs, **decoding, num_beams=args.beams, max_new_tokens=args.max_new_tokens, pad_token_id=pad
        )
        new = out[:, inputs["input_ids"].shape[1] :]  # (B, new): without the prompt
        return [self.row_of(ids.tolist()) for ids in new]

    def row_of(self, ids: list[int]) -> Row:
        """New ids of an answer, padded behind its end -> its text, how it ended, its length with the end token."""
        end = next((i for i, token in enumerate(ids) if token in self.ends), None)
        own = ids if end is None else ids[: end + 1]
        text = self.processor.tokenizer.decode(own, skip_special_tokens=True).strip()
        return {"answer": text, "finish": "length" if end is None else "eos", "n_tokens": len(own)}


# ---- endpoints -----------------------------------------------------------------------------------------------------


def endpoint_work(responder: Responder, args: argparse.Namespace, image_root: Path) -> endpoints.Asker:
    """Rows through the endpoint, pictures as data: URLs."""
    own = responder.args
    where = endpoints.from_flags(args, responder.spec.partition("#")[0], responder.model)

    def body(row: Row) -> dict:
        picture = endpoints.data_uri(files.inside(image_root, row["image"]))
        text = candidates.bare(row["prompt"])
        return {
            "messages": [endpoints.message(text, picture)],
            "temperature": own.temperature,
            "top_p": own.top_p,
            "seed": own.seed,
            "max_tokens": own.max_new_tokens,
        }

    return endpoints.Asker(where, body, with_answer)


def with_answer(row: Row, reply: dict) -> Row:
    """The row with the text of a reply. ValueError if it has none."""
    cut = reply["choices"][0].get("finish_reason") == "length"
    usage = reply.get("usage")
    tokens = usage.get("completion_tokens") if isinstance(usage, dict) else None
    return row | {"answer": reply_text(reply).strip(), "finish": "length" if cut else "eos", "n_tokens": tokens}


# ---- the stage -----------------------------------------------------------------------------------------------------


class Answering:
    """Batches of rows, sorted by responder, one model in memory at a time."""

    def __init__(self, responders: list[Responder], args: argparse.Namespace, image_root: Path):
        self.responders = {responder.name: responder for responder in responders}
        self.args, self.image_root = args, image_root
        self.name, self.model, self.askers = None, None, {}

    def load(self, name: str) -> None:
        responder = self.responders[name]
        self.name, self.model = name, None  # the last one makes room first
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        if responder.kind == "base":
            self.model = Base(responder)
        else:
            self.model = Library(responder, library.find(responder.model, "--responder"))

    def open(self, row: Row) -> Image.Image | str:
        try:
            return pictures.open_image(files.inside(self.image_root, row["image"]))
        except ValueError as error:
            return f"{row['image']}: {error}"

    def locally(self, name: str, rows: list[Row]) -> list[Row]:
        if self.name != name:
            self.load(name)
        with ThreadPoolExecutor() as pool:  # Pillow decodes outside the interpreter lock
            opened = list(pool.map(self.open, rows))
        images = [self.model.problem(row) or image for row, image in zip(rows, opened, strict=True)]
        good = [(row, image) for row, image in zip(rows, images, strict=True) if not isinstance(image, str)]
        answers = self.model.answer([row for row, _ in good], [image for _, image in good]) if good else []
        left = iter(answers)
        return [
            runner.failed(row, image) if isinstance(image, str) else row | next(left)
            for row, image in zip(rows, images, strict=True)
        ]

    def __call__(self, rows: list[Row]) -> list[Row]:
        results = {}
        for name in dict.fromkeys(row["responder"] for row in rows):
            own = [row for row in rows if row["responder"] == name]
            if self.responders[name].kind == "endpoint":
                if name not in self.askers:
                    self.askers[name] = endpoint_work(self.responders[name], self.args, self.image_root)
                answered = self.askers[name](own)
            else:
                answered = self.locally(name, own)
            results |= {runner.row_key(row): row for row in answered}
        return [results[runner.row_key(row)] for row in rows]


def check_prompts(file: Path, questions: list[Row]) -> None:
    """SystemExit where a prompt holds no question, or one in the template of some model."""
    problems = []
    for row in questions:
        try:
            if "error" not in row and not bare_question(row["prompt"]):
                problems.append(f"id {row['id']}: no question in its prompt")
        except BadRow as error:
            problems.append(f"id {row['id']}: {': '.join(error.args)}")
    if problems:
        shown = "\n".join(problems[:5])
        raise SystemExit(f"{file}: {shown}\n{len(problems)} of {len(questions)} questions cannot be asked; correct it.")


def expand(questions: list[Row], names: list[str]) -> list[Row]:
    """A row per question and responder. SystemExit if the questions are answers already."""
    if any("responder" in row for row in questions):
        raise SystemExit("the rows of IN have a `responder`: they are answers already; give the questions of pds.ask")
    return [row | {"responder": name} for row in questions for name in names]


def describe(responder: Responder, args: argparse.Namespace) -> dict:
    """What the settings say of a responder; models that are not on this machine yet are fetched."""
    own = responder.args
    if responder.kind == "base":
        about = prepare_base(responder)
    elif responder.kind == "transformers":
        folder = library.find(responder.model, "--responder")
        about = origin.describe_model(responder.model, folder, library.deciding(folder))
    else:
        about = endpoints.describe(endpoints.from_flags(args, responder.spec.partition("#")[0], responder.model))
    decoding = {name: getattr(own, name) for name in ("temperature", "top_p", "seed", "max_new_tokens", "beams")}
    return about | {"kind": responder.kind, "dtype": own.dtype} | decoding


def parse_args(argv=None) -> argparse.Namespace:
    p = runner.stage_parser(__doc__, "questions.jsonl: {id, image, prompt}")
    p.add_argument("--responder", action="append", required=True, metavar="NAME=SPEC", help="repeatable; see the top")
    p.add_argument("--image-root", type=Path, help="folder the image paths start from (default: IN's)")
    p.add_argument("--max-new-tokens", type=whole(1), default=1000, help="of an answer (default 1000)")
    p.add_argument("--temperature", type=float, default=0.0, help="default 0: greedy")
    p.add_argument("--seed", type=int, default=0, help="of sampling (default 0)")
    endpoints.endpoint.add_flags(p)
    args = p.parse_args(argv)
    runner.check_flags(p, args)
    return args


def main(argv=None) -> None:
    args = parse_args(argv)
    defaults = [f"--max-new-tokens={args.max_new_tokens}", f"--temperature={args.temperature}", f"--seed={args.seed}"]
    responders = [parse_responder(text, defaults) for text in args.responder]
    names = [responder.name for responder in responders]
    if len(set(names)) < len(names):
        raise SystemExit(f"--responder: a name is there twice: {', '.join(sorted(names))}")
    image_root = Path(args.image_root or args.input.parent).resolve()
    questions = runner.read_inputs(args.input, NEEDED)
    check_prompts(args.input, questions)
    rows = expand(origin.with_pictures(questions, lambda row: files.inside(image_root, row["image"])), names)
    settings = {
        "stage": "responses",
        "in": runner.beside(args.input, args.out),
        "seed": args.seed,
        "responders": {responder.name: describe(responder, args) for responder in responders},
        "torch": torch.__version__,
    }

    def load() -> runner.Work:
        return runner.Work(Answering(responders, args, image_root), ROW_BYTES)

    added = {"answer", "finish", "n_tokens", "error"}
    result = runner.run(args, rows, settings, added, load, order=lambda row: names.index(row["responder"]))
    runner.report(args, result)


if __name__ == "__main__":
    main()

"""PDS-DPO from prompts to a trained step, on tiny random models: every stage, its file, the sheet and the figures.

    python -m lab.pds_demo [--out DIR]        make pds-demo

What the models say means nothing; the classes, the files and the commands are the real ones. Each command is printed as
it would be typed. What is in the folder already is kept: every stage resumes.
"""

import argparse
import contextlib
import hashlib
import json
import random
import shlex
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import torch

import toy
import train
from bases import from_scratch
from external import files
from pds import analyse, ask, export, images, prompts, rank_images, rank_responses, responses, tiny

WORDS = "a the red blue small tall old boat tree house dog road light wall near under behind with stands shows".split()


def sentence(text: str) -> str:
    """A made-up answer, the same for the same request."""
    rng = random.Random(hashlib.sha256(text.encode()).digest())
    return " ".join(rng.choice(WORDS) for _ in range(rng.randrange(6, 20))).capitalize() + "."


class Handler(BaseHTTPRequestHandler):
    """An OpenAI-compatible endpoint that answers everything."""

    def do_POST(self) -> None:
        request = self.rfile.read(int(self.headers["Content-Length"])).decode()
        choice = {"index": 0, "message": {"role": "assistant", "content": sentence(request)}, "finish_reason": "stop"}
        reply = json.dumps({"id": "x", "model": "made-up", "choices": [choice]}).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(reply)))
        self.end_headers()
        self.wfile.write(reply)

    def log_message(self, *args) -> None:
        pass


def write_base(folder: Path, seed: int = 0) -> Path:
    """A LLaVA in the toy world's shape and words, untrained; its end token is likely, so that answers end."""
    processor = toy.new_processor()
    config = processor.config
    model, _ = from_scratch.new_model(config, 1, seed, torch.device("cpu"))
    model.lm_head.weight.data[config.eos_id] *= 4
    from_scratch.save(model, processor, folder)
    return folder


@contextlib.contextmanager
def endpoint() -> Iterator[str]:
    """The address of an endpoint on this machine."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1"
    finally:
        server.shutdown()
        server.server_close()


def write_models(folder: Path) -> None:
    """The tiny models, those that are not there."""
    makers = {
        "sd3": tiny.write_sd3,
        "imagereward": tiny.write_imagereward,
        "clip": tiny.write_clip,
        "base": write_base,
        "armorm": tiny.write_armorm,
    }
    for name, make in makers.items():
        if not (folder / name).exists():
            make(folder / name)


def run(command, *words) -> None:
    """Prints a command as it would be typed, and runs it."""
    argv = [str(word) for word in words]
    name = "train.py" if command is train else f"-m {command.__name__}"
    print(f"\n$ python {name} {shlex.join(argv)}", flush=True)
    command.main(argv)


def run_stages(out: Path, models: Path, url: str, per_topic: int = 3, more: tuple = ()) -> None:
    """Prompts, pictures, judges, questions, answers, pairs. `more` goes to every stage that takes rows in shards."""
    run(
        prompts,
        "--grammar",
        "--topic",
        "art",
        "--topic",
        "school",
        "--per-topic",
        per_topic,
        "--out",
        out / "prompts.jsonl",
        *more,
    )
    run(images, out / "prompts.jsonl", "--out", out / "images.jsonl", "--model", models / "sd3", "--steps", 3, *more)
    judges = ["--imagereward", models / "imagereward", "--clip", models / "clip", "--blip", models / "imagereward"]
    scorers = ["--scorer", "imagereward", "--scorer", "clip", "--scorer", "blip"]
    run(
        rank_images,
        out / "images.jsonl",
        "--out",
        out / "scores.jsonl",
        "--best",
        out / "best.jsonl",
        *scorers,
        *judges,
        *more,
    )
    run(ask, out / "best.jsonl", "--out", out / "questions.jsonl", "--templates", *more)
    own = f"base:{models / 'base'}?temperature=1&max-new-tokens=200"
    run(
        responses,
        out / "questions.jsonl",
        "--out",
        out / "answers.jsonl",
        "--responder",
        f"a={own}&seed=0",
        "--responder",
        f"b={own}&seed=1",
        "--responder",
        f"q={url}#made-up",
        *more,
    )
    run(rank_responses, out / "answers.jsonl", "--out", out / "ranked.jsonl", "--armorm", models / "armorm", *more)


def main(argv=None) -> None:
    torch.set_num_threads(1)  # models this small gain nothing from a second
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--out", type=Path, default=Path("runs") / "pds-demo", help="folder (default runs/pds-demo)")
    args = p.parse_args(argv)
    out, models = args.out, args.out / "models"
    if out.exists() and not models.is_dir() and (out.is_file() or any(out.iterdir())):
        raise SystemExit(f"{out}: something else is there, not a demo of before. Give another --out, or remove it.")
    files.check_writable(out / "prompts.jsonl")
    write_models(models)
    with endpoint() as url:
        run_stages(out, models, url)
    run(export, out / "ranked.jsonl", "--out", out / "pairs", "--sizes", 2, 4)
    run(
        analyse,
        out / "scores.jsonl",
        out / "ranked.jsonl",
        "--json",
        out / "analysis.json",
        "--figures",
        out / "figures",
        "--sheet",
        out / "sheet.png",
    )
    if not (out / "run").exists():
        run(
            train,
            "--recipe",
            "pds-dpo",
            "--base",
            models / "base",
            "--data",
            out / "pairs" / "pairs.jsonl",
            "--out",
            out / "run",
            "--max-steps",
            1,
            "--batch",
            2,
        )
    print(f"\n{out}: look at sheet.png, figures/, pairs/README.md")


if __name__ == "__main__":
    main()

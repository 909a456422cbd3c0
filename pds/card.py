"""The data card of an exported set: where every number and every model in it came from.

Not from a paper. The stages' settings files name the file that each stage read, so the chain from the pairs back to
the prompts is followed, and rows are counted in the files themselves.
"""

import argparse
from collections import Counter
from pathlib import Path
from typing import NamedTuple

from external import files
from external.terminal import printable
from pds import runner
from pds.candidates import Export

# model: licence, and what it says about using outputs. Read on the hub; not legal advice.
LLAMA_2 = "Llama 2 Community: outputs may not be used to improve other large language models"
LLAMA_3 = "Llama 3 Community: outputs may not be used to improve other large language models"
LICENCES = {
    "stabilityai/stable-diffusion-3-medium-diffusers": "Stability AI Community: free below US$1 M revenue a year; "
    "outputs may not be used to create or improve any foundational generative model but theirs",
    "THUDM/ImageReward": "Apache-2.0",
    "RLHFlow/ArmoRM-Llama3-8B-v0.1": f"{LLAMA_3}; its body FsfairX-LLaMA3-RM-v0.1 is CC-BY-NC-4.0, not for commercial "
    "use",
    "ViT-L-14-quickgelu": "MIT (OpenAI's CLIP)",
    "llava-hf/llava-v1.6-mistral-7b-hf": "Apache-2.0",
    "llava-hf/llava-v1.6-vicuna-7b-hf": LLAMA_2,
    "llava-hf/llava-v1.6-vicuna-13b-hf": LLAMA_2,
    "llava-hf/llama3-llava-next-8b-hf": LLAMA_3,
    "llava-1.5-7b": LLAMA_2,
    "llava-1.5-13b": LLAMA_2,
    "bunny-v1.0-3b": "Apache-2.0 (Phi-2: MIT)",
    "grammar": "written by the local grammar of this project, MIT",
    "templates": "written by the templates of this project, MIT",
}
UNKNOWN = "not known here; look at the model's page"


class Stage(NamedTuple):
    name: str
    file: Path
    settings: dict


def chain(file: Path) -> list[Stage]:
    """The stages that made `file`, last one first, back to a file that was given, not made."""
    stages, seen = [], set()
    while file not in seen and file.is_file():
        seen.add(file)
        beside = runner.settings_file(file)
        settings = files.read_json(beside, dict) if beside.is_file() else {}
        stages.append(Stage(settings.get("stage", "given"), file, settings))
        if not isinstance(settings.get("in"), str):
            break
        file = (file.parent / settings["in"]).resolve()
    return stages


def models(settings: dict) -> list[dict]:
    """Every {model, revision, ...} in a stage's settings, wherever it stands."""
    if "model" in settings:
        return [settings]
    return [found for value in settings.values() if isinstance(value, dict) for found in models(value)]


def listed(counts: Counter) -> str:
    return ", ".join(f"{count} {reason}" for reason, count in sorted(counts.items())) or "none"


def table(header: list[str], rows: list[list]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    cells = [[printable(str(cell)).replace("|", "\\|") for cell in line] for line in lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in cells)


def stage_rows(stages: list[Stage]) -> list[list]:
    rows = []
    for stage in reversed(stages):
        made = files.read_rows(stage.file)
        failures = sum("error" in row for row in made)
        seed = stage.settings.get("seed")
        rows.append([stage.name, stage.file.name, len(made), failures, "-" if seed is None else seed])
    return rows


def model_rows(stages: list[Stage]) -> list[list]:
    rows = []
    for stage in reversed(stages):
        for model in models(stage.settings):
            name = str(model["model"])
            weights = model.get("weights_sha256")  # none: the grammar, the templates, a model behind an endpoint
            revision = model.get("revision") or (f"weights {weights}" if weights else "-")
            shown = Path(name).name if Path(name).is_absolute() else name  # no folder of this machine in a public file
            row = [stage.name, shown, revision, LICENCES.get(name, UNKNOWN)]
            if row not in rows:
                rows.append(row)
    return rows


def text(args: argparse.Namespace, export: Export, topics: dict[str, str]) -> str:
    """README.md of the folder, with the header that the hub reads."""
    stages = chain(args.input.resolve())
    counts = Counter(topics[pair["id"]] for pair in export.pairs)
    won = Counter(pair["responder_chosen"] for pair in export.pairs)
    lost = Counter(pair["responder_rejected"] for pair in export.pairs)
    sizes = "".join(f", pairs-{size}.jsonl" for size in args.sizes)
    parts = [
        "---\ntask_categories: [visual-question-answering]\ntags: [preference, dpo, synthetic]\n"
        "configs:\n- config_name: default\n  data_files: pairs.jsonl\n---",
        f"# {len(export.pairs)} preference pairs, made as in PDS-DPO",
        "Pictures from a text-to-image model, answers from several vision-language models, both chosen by reward "
        "models. No person has looked at a pair. The judge of the answers reads text only, it has seen no picture.",
        f"Files: pairs.jsonl{sizes} (nested, topics balanced, seed {args.seed}), pds-dpo.json (the pairs again, in the "
        "layout of the released set), and the pictures.",
        "## Stages\n\n" + table(["stage", "file", "rows", "of these failed", "seed"], stage_rows(stages)),
        "## Models and licences\n\n" + table(["stage", "model", "revision", "licence"], model_rows(stages)),
        "Some of these licences say what may be done with a model's outputs; read them before you publish this set.",
        f"## What was dropped\n\nAnswers that were no candidates: {listed(export.dropped_answers)}. "
        f"Questions without a pair: {listed(export.dropped_pairs)}. Least words {args.min_words}, least margin "
        f"{args.min_margin}.",
        "## What is in it\n\n" + table(["topic", "pairs"], [[name or "-", n] for name, n in sorted(counts.items())]),
        table(["responder", "chosen", "rejected"], [[name, won[name], lost[name]] for name in sorted({*won, *lost})]),
    ]
    return "\n\n".join(parts) + "\n"

"""The candidates: I_i = G(x, s_i), one picture per prompt and guidance scale (PDS-DPO 3.2, equation 5).

    python -m pds.images prompts.jsonl --out images.jsonl
    python -m pds.images prompts.jsonl --out images.jsonl --images DIR

IN has a row per prompt, {id, topic, caption}; OUT one per picture, {id: "art-1/g7", prompt_id, topic, caption,
guidance, seed, image}, the pictures beside it, in a folder that is called as OUT without `.jsonl`. --images takes
pictures made elsewhere, DIR/art-1-g7.png.

A prompt's text is encoded once and painted at every scale; a batch holds prompts at one scale. Noise is drawn on the
CPU, picture by picture, from (run seed, id, scale): it depends neither on the batch nor on the card.

Deviations from the paper and its release
1. Seeds come from ids; the release numbers them by the line of the prompt.
2. Scale and noise differ together, as in the release; --same-noise gives all scales of a prompt one noise, so that
   Figure 4 shows the scale alone.
3. A picture of one colour, or with numbers that are none, is a failure; there it is a candidate.
"""

import argparse
import hashlib
import inspect
import re
import shutil
from collections import OrderedDict
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import pictures
from external import files, hub
from external.flags import number, whole
from pds import origin, runner
from pds.runner import Row

DEFAULT = "stabilityai/stable-diffusion-3-medium-diffusers"
PATTERNS = (  # not the second copies of the weights, *.fp16.safetensors
    "model_index.json",
    "*/*.json",
    "*/*.txt",
    "*/*.model",
    "*/*model.safetensors",
    "*/model-0*.safetensors",
    "*/diffusion_pytorch_model-0*.safetensors",
)
GROUP = 32  # prompts that are painted at one scale before the next scale is begun
LEAST_SPREAD = 0.01  # standard deviation of a picture's values in 0..1; below, it is one colour
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")


def seed_of(run_seed: int, prompt_id: str, guidance: float | None) -> int:
    """The noise of a picture; of all pictures of a prompt for guidance None. 32 bits."""
    digest = hashlib.sha256(f"{run_seed} {prompt_id} {guidance}".encode()).digest()
    return int.from_bytes(digest[:4])


def candidates_of(prompts: list[Row], args: argparse.Namespace) -> list[Row]:
    """Every picture that is wanted, prompt by prompt; a prompt that failed before is passed on once."""
    rows = []
    for prompt in prompts:
        if "error" in prompt:
            rows.append(prompt)
            continue
        key = str(prompt["id"])
        if not re.fullmatch(r"\w[\w.-]*", key):
            raise SystemExit(f"prompt {key}: an id names files, and may have letters, digits, '.', '_' and '-'")
        for guidance in args.guidance:
            row = {"id": f"{key}/g{guidance:g}", "prompt_id": key}
            row |= {"topic": prompt["topic"], "caption": prompt["caption"], "guidance": guidance}
            seed = seed_of(args.seed, key, None if args.same_noise else guidance)
            rows.append(row | {"seed": None if args.images else seed})
    return rows


def stem(row: Row) -> str:
    """What a picture's file is called, without its ending."""
    return f"{row['prompt_id']}-g{row['guidance']:g}"


def picture_problem(values: np.ndarray) -> str | None:
    """Why a painted picture (H, W, 3) in 0..1 is no candidate."""
    if not np.isfinite(values).all():
        return "the picture has values that are not numbers; try --dtype bfloat16 or float32"
    if values.std() < LEAST_SPREAD:
        return "the picture is of one colour; try --dtype bfloat16 or float32, or a smaller batch"
    return None


# ---- painting ------------------------------------------------------------------------------------------------------


class Painter:
    """Batches of rows -> pictures, by a pipeline of diffusers."""

    def __init__(self, pipeline, args: argparse.Namespace, out: Path):
        self.pipeline, self.steps, self.out = pipeline, args.steps, out
        self.known = inspect.signature(pipeline.__call__).parameters
        self.scale_argument = args.scale_argument
        if self.scale_argument not in self.known:
            scales = [name for name in self.known if "scale" in name]
            raise SystemExit(f"this pipeline has no {self.scale_argument}; --scale-argument: {', '.join(scales)}")
        self.size = {name: args.size for name in ("height", "width") if args.size}
        self.encoded = OrderedDict()  # caption -> embeddings, of the last prompts
        self.cut = set()  # captions that a CLIP encoder does not read to their end

    def text_of(self, captions: list[str], scale: float) -> dict:
        """What the pipeline is told of the captions: their embeddings where it can take them, else the words.

        SD3's encoders, T5-XXL among them, read a caption once for all scales.
        """
        if type(self.pipeline).__name__ != "StableDiffusion3Pipeline" or scale <= 1:
            negative = {"negative_prompt": [""] * len(captions)} if "negative_prompt" in self.known else {}
            return {"prompt": captions} | negative
        clip = self.pipeline.tokenizer
        for caption in captions:
            if len(clip(caption)["input_ids"]) > clip.model_max_length:
                self.cut.add(caption)
            if caption not in self.encoded:
                self.encoded[caption] = self.pipeline.encode_prompt(
                    prompt=caption,
                    prompt_2=None,
                    prompt_3=None,
                    negative_prompt="",
                    do_classifier_free_guidance=True,
                )
        names = ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds")
        own = zip(*(self.encoded[caption] for caption in captions), strict=True)
        text = {name: torch.cat(parts) for name, parts in zip(names, own, strict=True)}  # (B, ...) each
        while len(self.encoded) > 2 * GROUP:
            self.encoded.popitem(last=False)
        return text

    @torch.no_grad()
    def paint(self, captions: list[str], scale: float, seeds: list[int], steps: int) -> np.ndarray:
        """(B, H, W, 3) in 0..1, all at one scale: pipelines take a number, not one per picture."""
        self.pipeline.set_progress_bar_config(disable=True)
        return self.pipeline(
            **self.text_of(captions, scale),
            **self.size,
            **{self.scale_argument: float(scale)},
            num_inference_steps=steps,
            generator=[torch.Generator().manual_seed(seed) for seed in seeds],
            output_type="np",
        ).images

    def check_scales(self, row: Row, scales: list[float]) -> None:
        """SystemExit if the scale changes nothing: then four candidates differ by chance alone."""
        try:
            first, last = (self.paint([row["caption"]], scale, [0], 2)[0] for scale in (min(scales), max(scales)))
        except ValueError as error:  # a --size that it does not paint
            raise SystemExit(f"the pipeline does not paint with these flags: {error}") from None
        if len(scales) > 1 and np.array_equal(first, last, equal_nan=True):
            raise SystemExit(
                f"{self.scale_argument} {min(scales):g} and {max(scales):g} give the same picture: a distilled model "
                "ignores it. Give one --guidance, another --scale-argument, or another model."
            )

    def __call__(self, rows: list[Row]) -> list[Row]:
        results = {}
        for scale in dict.fromkeys(row["guidance"] for row in rows):
            own = [row for row in rows if row["guidance"] == scale]
            painted = self.paint([row["caption"] for row in own], scale, [row["seed"] for row in own], self.steps)
            for row, values in zip(own, painted, strict=True):
                results[row["id"]] = self.save(row, values)
        return [results[row["id"]] for row in rows]

    def say_cut(self) -> None:
        if self.cut:
            print(f"{len(self.cut)} captions are longer than CLIP reads, and only T5 had all of them")

    def save(self, row: Row, values: np.ndarray) -> Row:
        if problem := picture_problem(values):
            return runner.failed(row, problem)
        name = f"{self.out.stem}/{stem(row)}.png"
        with files.whole(self.out.parent / name) as part:
            Image.fromarray((values * 255).round().astype(np.uint8)).save(part, "PNG")
        return row | {"image": name}


def find_pipeline(name: str) -> Path:
    """A folder with a model_index.json, or what the hub has under this name."""
    if (Path(name) / "model_index.json").is_file():
        return Path(name)
    if Path(name).exists() or name.count("/") != 1:
        raise SystemExit(f"--model {name}: neither a folder with a model_index.json nor a name on the hub")
    own = (
        f"its folder with --model DIR; a gated model first wants its licence accepted at https://huggingface.co/{name}"
    )
    return hub.download(name, PATTERNS, "model", name, f"{own}, and `hf auth login`")


def check_no_code(folder: Path) -> None:
    """SystemExit if the pipeline, or a part of it, is code that lies beside the weights."""
    for part, where in files.read_json(folder / "model_index.json", dict).items():
        library = where[0] if isinstance(where, list) else None
        custom = part == "_class_name" and isinstance(where, list)
        if custom or library not in (None, "diffusers", "transformers"):
            raise SystemExit(f"{folder}: {part} wants code of its own ({where}), which is not run here")


def load_pipeline(folder: Path, dtype: str, offload: bool):
    check_no_code(folder)
    diffusers, transformers = runner.optional("diffusers"), runner.optional("transformers")
    for library in (diffusers, transformers):
        library.logging.set_verbosity_error()  # a line for each caption that CLIP cuts; they are counted here
    try:
        pipeline = diffusers.DiffusionPipeline.from_pretrained(
            folder, dtype=getattr(torch, dtype), use_safetensors=True
        )
    except (OSError, ValueError, RuntimeError, AttributeError) as error:
        reason = " ".join(str(error).split())[:400]
        raise SystemExit(f"{folder}: not a pipeline that can be used ({reason})") from None
    if offload:
        pipeline.enable_model_cpu_offload()  # T5 leaves the card before the painter comes
    elif torch.cuda.is_available():
        pipeline.to("cuda")
    return pipeline


# ---- pictures made elsewhere ---------------------------------------------------------------------------------------


def own_picture(row: Row, folder: Path) -> Path | None:
    """The picture of a row that was made elsewhere."""
    for suffix in SUFFIXES:
        for spelled in (suffix, suffix.upper()):
            file = folder / f"{stem(row)}{spelled}"
            if file.is_file():
                return file
    return None


def take(rows: list[Row], folder: Path, out: Path) -> list[Row]:
    """Rows with the pictures of a folder, copied beside OUT."""
    results = []
    for row in rows:
        found = own_picture(row, folder)
        if not found:
            results.append(runner.failed(row, f"no {stem(row)}.png (or .jpg, .webp) in {folder}"))
            continue
        try:
            problem = picture_problem(np.asarray(pictures.open_image(found)) / 255)
        except ValueError as error:
            problem = f"{found.name}: {error}"
        if problem:
            results.append(runner.failed(row, problem))
            continue
        name = f"{out.stem}/{found.name}"
        if (out.parent / name).resolve() != found.resolve():
            with files.whole(out.parent / name) as part:
                shutil.copyfile(found, part)
        results.append(row | {"image": name})
    return results


# ---- command line --------------------------------------------------------------------------------------------------


def parse_args(argv=None) -> argparse.Namespace:
    p = runner.stage_parser(__doc__, "prompts.jsonl: {id, topic, caption}")
    p.add_argument("--model", default=DEFAULT, help=f"hub name or folder of a diffusers pipeline (default {DEFAULT})")
    p.add_argument("--images", type=Path, metavar="DIR", help="take pictures made elsewhere: <id>-g<scale>.png")
    p.add_argument("--guidance", type=number(0.0), nargs="+", default=[5.0, 7.0, 9.0, 11.0], help="default 5 7 9 11")
    p.add_argument("--scale-argument", default="guidance_scale", help="of the pipeline; true_cfg_scale for Qwen-Image")
    p.add_argument("--steps", type=whole(1, 1000), default=28, help="default 28")
    p.add_argument("--size", type=whole(1, 8192), help="side in pixels (default: the model's, 1024 for SD3)")
    p.add_argument("--seed", type=int, default=0, help="of the noise (default 0)")
    p.add_argument("--same-noise", action="store_true", help="one noise per prompt for all its scales")
    p.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="default float16 on CUDA, else float32")
    p.add_argument("--offload", action="store_true", help="parts wait in main memory: half the GPU memory, slower")
    args = p.parse_args(argv)
    runner.check_flags(p, args)
    args.guidance = sorted(set(args.guidance))
    names = [f"{guidance:g}" for guidance in args.guidance]
    if len(set(names)) < len(names):
        p.error(f"--guidance: two scales are both {max(names, key=names.count)} in six digits, which name the pictures")
    if args.images and not args.images.is_dir():
        p.error(f"--images {args.images}: no such folder")
    args.dtype = args.dtype or ("float16" if torch.cuda.is_available() else "float32")
    return args


def describe(args: argparse.Namespace, folder: Path | None) -> dict:
    """All that decides what the pictures are, beside the prompts."""
    common = {"stage": "images", "in": runner.beside(args.input, args.out), "guidance": args.guidance}
    if folder is None:
        return common | {"model": f"pictures of {args.images.name}"}
    deciding = {file for pattern in PATTERNS for file in folder.glob(pattern)}
    return (
        common
        | origin.describe_model(args.model, folder, list(deciding))
        | {
            "steps": args.steps,
            "size": args.size,
            "scale_argument": args.scale_argument,
            "seed": args.seed,
            "same_noise": args.same_noise,
            "dtype": args.dtype,
            "torch": torch.__version__,
            "diffusers": runner.optional("diffusers").__version__,
        }
    )


def main(argv=None) -> None:
    args = parse_args(argv)
    rows = candidates_of(runner.read_inputs(args.input, {"topic": str, "caption": str}), args)
    if args.images:
        rows = origin.with_pictures(rows, lambda row: own_picture(row, args.images))
    folder = None if args.images else find_pipeline(args.model)
    painters = []
    place = {row["id"]: number // len(args.guidance) for number, row in enumerate(rows)}  # of its prompt

    def load() -> runner.Work:
        if folder is None:
            return runner.Work(lambda batch: take(batch, args.images, args.out), row_bytes=1, rows=64)
        painter = Painter(load_pipeline(folder, args.dtype, args.offload), args, args.out)
        painters.append(painter)
        painter.check_scales(next(row for row in rows if "error" not in row), args.guidance)
        side = args.size or 1024
        return runner.Work(painter, row_bytes=side * side * 2000)  # of the attention of SD3, twice for guidance

    def order(row: Row) -> tuple:
        """Groups of prompts, in each of them scale by scale: a batch has one scale, a caption is encoded once."""
        return place[row["id"]] // GROUP, row["guidance"], place[row["id"]]

    result = runner.run(args, rows, describe(args, folder), {"image", "error"}, load, order)
    for painter in painters:
        painter.say_cut()
    runner.report(args, result)


if __name__ == "__main__":
    main()

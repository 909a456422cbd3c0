"""Time and peak memory of loading a 7B-shaped checkpoint, on random numbers in the hub's layout.

    python -m bench.big_checkpoint --folder DIR               writes 14.1 GB there (float16, three shards), if it is not
    python -m bench.big_checkpoint --folder DIR --layers 4    a decoder of four layers: 2.8 GB

Then a fresh process each loads it as stored, cast to bfloat16, and in nf4. The bound is 1.10 x the bytes of the weights
as they are kept, of a process with everything imported; for nf4 1 GB more, in which one tensor at a time is quantised.
"""

import argparse
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import torch

from bases.export import write_shards
from bases.layouts import their_name
from external import files
from external.flags import whole
from model import BASES, Config, LLaVA

ROOT = Path(__file__).parents[1]
BOUND = 1.10
ROOM = 10**9  # float32 copies of the largest linear, 4096 x 11008
MEASURE = """
import json, sys, time
from pathlib import Path
import torch
from bases.checkpoint import load_model
folder, dtype, quant, device = sys.argv[1:]
start = time.perf_counter()
model = load_model(Path(folder), dtype=getattr(torch, dtype), device=device, quant=quant or None)
seconds = time.perf_counter() - start
size = sum(p.nbytes for p in model.parameters())
# not ru_maxrss, which begins with that of the process this one was started from
[peak] = [int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmHWM")]
print(json.dumps({"seconds": seconds, "size": size, "peak": peak}))
"""


def write(folder: Path, c: Config) -> None:
    """Random numbers under the names and in the shapes of llava-hf/llava-1.5-7b-hf."""
    with torch.device("meta"):
        shapes = {their_name(name, "hub"): tuple(p.shape) for name, p in LLaVA(c).named_parameters()}
    vision, run = "vision_tower.vision_model.", c.vision.layers_run
    for name in [name for name in shapes if name.startswith(f"{vision}encoder.layers.{run - 1}.")]:
        shapes[name.replace(f".{run - 1}.", f".{run}.")] = shapes[name]  # in the file, never used
    for leaf in ("weight", "bias"):
        shapes[f"{vision}post_layernorm.{leaf}"] = (c.vision.width,)
    folder.mkdir(parents=True)
    g = torch.Generator().manual_seed(0)
    block = (torch.randn(2**26, generator=g) / 50).half()  # one block of random numbers, laid end to end

    def tensor(name: str) -> torch.Tensor:
        made = torch.empty(shapes[name], dtype=torch.float16)
        for part in made.view(-1).split(len(block)):
            part.copy_(block[: len(part)])
        return made

    write_shards(folder, shapes, torch.float16, tensor)
    config = {
        "model_type": "llava",
        "text_config": {"vocab_size": c.vocab, "rms_norm_eps": c.eps, "num_hidden_layers": c.layers},
        "vision_config": {},
        "image_token_index": c.image_id,
        "pad_token_id": c.pad_id,
    }
    files.write_json(folder / "config.json", config)


def main(argv=None) -> None:
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--folder", type=Path, required=True, help="where the checkpoint is, or is to be written")
    p.add_argument(
        "--layers",
        type=whole(1, 512),
        default=32,
        help="of the decoder that is written (default 32, 7B's; with few, the libraries alone break the bound)",
    )
    p.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    args = p.parse_args(argv)
    if args.folder.exists() and not (args.folder / "config.json").is_file():  # written last
        raise SystemExit(f"{args.folder}: no whole checkpoint (no config.json); remove it, or give another --folder")
    if not args.folder.exists():
        write(args.folder, replace(BASES["llava-1.5-7b"], layers=args.layers))
    failed = False
    for dtype, quant in (("float16", ""), ("bfloat16", ""), ("bfloat16", "nf4")):
        command = [sys.executable, "-c", MEASURE, str(args.folder.resolve()), dtype, quant, args.device]
        done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
        if done.returncode:
            raise SystemExit(f"loading as {quant or dtype} on {args.device} failed, see above")
        m = json.loads(done.stdout)
        bound = BOUND * m["size"] + (ROOM if quant else 0)
        failed |= m["peak"] > bound
        print(
            f"float16 -> {quant or dtype} on {args.device}: {m['seconds']:.1f} s, weights {m['size'] / 1e9:.2f} GB, "
            f"peak RSS {m['peak'] / 1e9:.2f} GB (bound {bound / 1e9:.2f} GB)"
        )
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()

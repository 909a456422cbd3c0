"""Time and peak memory of loading a 7B-shaped checkpoint, on random numbers in the hub's layout.

    python -m bench.big_checkpoint --folder DIR        writes 14.1 GB there (float16, three shards), unless it is there

Then a fresh process each loads it as stored and cast to bfloat16; the bound is 1.10 x the bytes of the weights in the
requested dtype, of a process with everything imported. Not collected by pytest; not part of `make test`.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import torch

from bases.export import write_shards
from bases.layouts import their_name
from model import BASES, LLaVA

ROOT = Path(__file__).parents[1]
BASE = "llava-1.5-7b"
BOUND = 1.10
MEASURE = """
import json, resource, sys, time
from pathlib import Path
import torch
from bases.checkpoint import load_model
start = time.perf_counter()
model = load_model(Path(sys.argv[1]), dtype=getattr(torch, sys.argv[2]), device=sys.argv[3])
seconds = time.perf_counter() - start
size = sum(p.numel() * p.element_size() for p in model.parameters())
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
print(json.dumps(dict(seconds=seconds, size=size, peak=peak)))
"""


def write(folder: Path) -> None:
    c = BASES[BASE]
    with torch.device("meta"):
        shapes = {their_name(n, "hub"): tuple(p.shape) for n, p in LLaVA(c).named_parameters()}
    vision, run = "vision_tower.vision_model.", c.vision.layers_run
    last = [n for n in shapes if n.startswith(f"{vision}encoder.layers.{run - 1}.")]
    shapes |= {n.replace(f".{run - 1}.", f".{run}."): shapes[n] for n in last}  # in the file, never used
    shapes |= {f"{vision}post_layernorm.{k}": (c.vision.width,) for k in ("weight", "bias")}
    folder.mkdir(parents=True)
    g = torch.Generator().manual_seed(0)
    block = (torch.randn(2**26, generator=g) / 50).half()  # one block of random numbers, laid end to end

    def tensor(name: str) -> torch.Tensor:
        n = torch.Size(shapes[name]).numel()
        return block.repeat(n // len(block) + 1)[:n].view(shapes[name])

    write_shards(folder, shapes, torch.float16, tensor)
    config = {"model_type": "llava", "text_config": {"vocab_size": c.vocab, "rms_norm_eps": c.eps}, "vision_config": {},
              "image_token_index": c.image_id, "pad_token_id": c.pad_id}  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))


def main(argv=None) -> None:
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--folder", type=Path, required=True, help="where the checkpoint is, or is to be written")
    p.add_argument("--device", default="cpu")
    args = p.parse_args(argv)
    if not args.folder.exists():
        write(args.folder)
    failed = False
    for dtype in ("float16", "bfloat16"):
        command = [sys.executable, "-c", MEASURE, str(args.folder.resolve()), dtype, args.device]
        m = json.loads(subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True).stdout)
        ratio = m["peak"] / m["size"]
        failed |= ratio > BOUND
        print(f"float16 -> {dtype} on {args.device}: {m['seconds']:.1f} s, weights {m['size'] / 1e9:.2f} GB, "
              f"peak RSS {m['peak'] / 1e9:.2f} GB, {ratio:.3f} x (bound {BOUND} x)")  # fmt: skip
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()

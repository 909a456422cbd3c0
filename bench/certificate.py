"""What a run can show for itself, from its folder and its base alone: one JSON file; an error where a claim fails.

    python -m bench.certificate --run runs/llava-1.5-7b-mdpo-0 --base llava-1.5-7b --data mdpo-10k --out claims.json

1. The first loss was ln 2 a term: at B = 0 policy and reference are one.
2. They are still one here: with a fresh adapter, a pair's log-probs with the adapter on and off, bit by bit.
3. The adapter reloads equal: read into the base and written again, every tensor is the same to the bit.
4. Which code scored: the sha256 of every scorer, commit and package versions.
"""

import argparse
import math
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file

from bases.adapter import adapter_files, load_adapter, save_adapter
from bases.checkpoint import load_base
from bases.tokenizer import load_processor
from data import PairData
from engine.device import choose_device
from engine.run_folder import environment
from external.files import check_writable, read_json, read_rows, sha256, write_json
from formats.problems import Demands, examine, usable
from formats.readers import read_pairs
from lora import add_lora, merge_lora
from model import LLaVA
from train import live_reference, plain_path

ROOT = Path(__file__).parents[1]
ADAPTER = "adapter_model.safetensors"


def first_loss(run: Path) -> dict:
    """The loss of step 0 and what it should be."""
    first = [row for row in read_rows(run / "log.jsonl") if row.get("step") == 0 and "loss" in row]
    if not first:
        raise SystemExit(f"{run / 'log.jsonl'}: no row of step 0")
    row = first[0]
    terms = [name for name in row if name.startswith("losses/")]
    expected = len(terms) * math.log(2)
    return {"loss": row["loss"], "expected": expected, "holds": abs(row["loss"] - expected) < 1e-3}


def equal_at_zero(model: LLaVA, data: PairData) -> dict:
    """Policy and reference log-probs of the first pair, the adapter's B being zero. Leaves the model without it."""
    add_lora(model)
    path = plain_path(model)
    batch = path.make_batch([data[(0, 0)]]).to(model.lm_head.weight.device)
    with torch.no_grad(), path.autocast:
        policy = path.score(model, batch)
        reference = live_reference(model, batch, path.score)
    merge_lora(model)  # adds exactly zero
    pairs = [(p.item(), r.item()) for p, r in zip(policy, reference, strict=True) if p is not None]
    return {"policy_and_reference": pairs, "holds": all(p == r for p, r in pairs)}


def reloads_equal(model: LLaVA, run: Path) -> dict:
    """The adapter, read and written again."""
    load_adapter(model, run)
    with tempfile.TemporaryDirectory() as again:
        save_adapter(model, Path(again), base=model.source)
        written = load_file(Path(again) / ADAPTER)
    kept = load_file(run / ADAPTER)
    same = kept.keys() == written.keys() and all(torch.equal(kept[name], written[name]) for name in kept)
    return {"tensors": len(kept), "sha256": sha256((run / ADAPTER).read_bytes()), "holds": same}


def scorers() -> dict[str, str]:
    """sha256 of every file that scores."""
    files = [ROOT / "eval_chair.py", *sorted((ROOT / "evals").glob("*.py"))]
    return {str(file.relative_to(ROOT)): sha256(file.read_bytes()) for file in files}


def main(argv=None) -> None:
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--run", type=Path, required=True, help="run folder")
    p.add_argument("--base", required=True, help="the base of the run: its name, or its folder")
    p.add_argument("--data", required=True, help="the preference data of the run")
    p.add_argument("--out", type=Path, required=True, help="where the certificate goes")
    args = p.parse_args(argv)
    settings = read_json(args.run / "args.json", dict)
    start = first_loss(args.run)
    adapter_files(args.run)  # ends here where there is none
    check_writable(args.out, [*args.run.iterdir(), args.data])
    pairs, problems = read_pairs(args.data)
    if not pairs:
        raise SystemExit(f"{args.data}: no usable rows ({len(problems)} others)")
    device = choose_device()
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    model, folder = load_base(args.base, dtype=dtype, device=device)
    processor = load_processor(folder, model.config)
    good = usable(examine(args.data, pairs[:16], [], processor, Demands()), skip_bad=True)
    data = PairData(good[:2], processor, "crop")
    certificate = {
        "first_loss": start,
        "equal_at_zero": equal_at_zero(model, data),
        "adapter_reloads": reloads_equal(model, args.run),
        "settings": settings,
        "scorers": scorers(),
        "made": environment(device),
    }
    write_json(args.out, certificate)
    claims = ("first_loss", "equal_at_zero", "adapter_reloads")
    for claim in claims:
        print(f"{claim}: {'holds' if certificate[claim]['holds'] else 'DOES NOT HOLD'}")
    if broken := [claim for claim in claims if not certificate[claim]["holds"]]:
        raise SystemExit(f"{args.out}: {', '.join(broken)} does not hold")


if __name__ == "__main__":
    main()

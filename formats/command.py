"""What the commands that look at data share: their first flags, and what of a base they need."""

import argparse
from pathlib import Path

import pictures
from bases import checkpoint
from bases.tokenizer import load_processor
from data import Processor
from formats import hub_data


def data_parser(description: str, base_required: bool) -> argparse.ArgumentParser:
    """DATA, --base, --image-root and --rejected-image, as train.py has them."""
    p = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.add_argument("data", help=f"preference file, folder, or hub data set ({', '.join(hub_data.NAMED)}, owner/name)")
    bases = ", ".join(checkpoint.SOURCES)
    p.add_argument("--base", required=base_required, help=f"{bases}, or a checkpoint folder; no weights are loaded")
    p.add_argument("--image-root", type=Path, help="folder the image paths start from (default: the data file's)")
    p.add_argument("--rejected-image", default="crop", choices=pictures.STRATEGIES, help="how m_l is made from m_w")
    return p


def load_small_processor(base: str) -> Processor:
    """Of a base on the hub only config and tokenizer are fetched."""
    folder = checkpoint.resolve(base, patterns=checkpoint.SMALL_FILES)
    return load_processor(folder, checkpoint.read_config(folder))

"""What the commands that look at data share: flags, the base's small files, rows as train.py sees them."""

import argparse
from pathlib import Path
from typing import NamedTuple

import pictures
from bases import checkpoint
from bases.tokenizer import load_processor
from data import MAX_LENGTH, Processor
from external.flags import given, whole
from external.terminal import print_any_letter
from formats import hub_data
from formats.problems import Demands, Examined, examine
from formats.readers import read_pairs


class Looks(NamedTuple):
    """What a recipe of train.py looks at."""

    with_image: bool
    m_l: bool


RECIPES = {  # tested equal to train.RECIPES
    "mdpo": Looks(with_image=True, m_l=True),
    "dpo": Looks(with_image=True, m_l=False),
    "dpo-no-image": Looks(with_image=False, m_l=False),
    "pds-dpo": Looks(with_image=True, m_l=False),
}


def data_parser(description: str, base_required: bool) -> argparse.ArgumentParser:
    """DATA and the flags that decide which of its rows can be used, as train.py has them."""
    print_any_letter()
    p = argparse.ArgumentParser(description=description)
    p.add_argument(
        "data",
        type=given,
        help=f"preference file, folder, or hub data set ({', '.join(hub_data.NAMED)}, owner/name)",
    )
    bases = ", ".join(checkpoint.SOURCES)
    p.add_argument(
        "--base",
        type=given,
        required=base_required,
        help=f"{bases}, or a checkpoint folder; no weights are loaded",
    )
    p.add_argument("--image-root", type=Path, help="folder the image paths start from (default: the data file's)")
    p.add_argument("--recipe", choices=RECIPES, default="mdpo", help="what is looked at (default: %(default)s)")
    p.add_argument("--rejected-image", type=pictures.strategy, metavar="STRATEGY", help=pictures.STRATEGY_HELP)
    p.add_argument(
        "--max-length",
        type=whole(1),
        default=MAX_LENGTH,
        help="prompt + response, image tokens counted (default: %(default)s)",
    )
    p.add_argument("--cut-long", action="store_true", help="a response that is too long is cut: it is no problem")
    return p


def read_and_examine(args: argparse.Namespace) -> tuple[Examined, Processor | None]:
    """The rows of args.data and their problems, by the flags of data_parser."""
    processor = load_small_processor(args.base) if args.base else None
    looks = RECIPES[args.recipe]
    demands = Demands(
        rejected_image=args.rejected_image,
        needs_m_l=looks.m_l,
        with_image=looks.with_image,
        max_length=args.max_length,
        cut_long=args.cut_long,
    )
    pairs, problems = read_pairs(args.data, args.image_root)
    return examine(args.data, pairs, problems, processor, demands), processor


def load_small_processor(base: str) -> Processor:
    """Of a base on the hub only config and tokenizer are fetched."""
    folder = checkpoint.resolve(base, patterns=checkpoint.SMALL_FILES)
    return load_processor(folder, checkpoint.read_config(folder))

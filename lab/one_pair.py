"""One real pair in numbers: three log-probs of policy and reference, the rewards, each loss term with its numbers in.

    python -m lab.one_pair --base B --data D --row N                  before training: the adapter is still zero
    python -m lab.one_pair --base B --data D --row N --adapter RUN    after it

    open_pairs     base, adapter and data as train.py sets them up, with the run's own settings (RUN/args.json)
    pair_numbers   one pair -> its log-probs token by token, the rewards, the terms; lab/explain.py draws the same

The numbers are those of a step of `train.py --batch 1` that meets this pair with this adapter and this epoch's m_l: a
step logs what it sees before it changes the weights, so the first step of epoch 1 is seen with RUN/epoch-1, --epoch 1.
m_l is scored even where the run's objective does not look at it (DPO): as a crop, and in no term.
"""

import argparse
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import losses
import train
from bases.adapter import load_adapter
from bases.checkpoint import source_of
from data import Example, PairData, Tokens, collate
from engine.device import autocast_for, choose_device
from external import files
from external.flags import whole
from external.terminal import count, print_any_letter, printable
from lora import add_lora, lora_disabled
from losses import Logps, Rewards
from model import LLaVA

W, L, M_L = "m_w, q, y_w", "m_w, q, y_l", "m_l, q, y_w"  # chosen, rejected, image_rejected


class TokenLogps(NamedTuple):
    """Log-probs of one model in nats, one for each response token and EOS, each (R,) float32."""

    chosen: Tensor
    rejected: Tensor
    image_rejected: Tensor | None  # None for a run without pictures


class Triple(NamedTuple):
    """A picture, the question, an answer: what policy and reference say token by token, and the reward."""

    symbols: str
    policy: Tensor  # (R,) log pi_theta(y_t | m, q, y_<t)
    reference: Tensor  # (R,) log pi_ref
    reward: float


class Term(NamedTuple):
    """One term of the loss: its formula, and the same with numbers."""

    name: str
    meaning: str
    formula: str
    filled: str
    value: float


class Numbers(NamedTuple):
    """All there is to say about one pair."""

    example: Example
    chosen: Triple
    rejected: Triple
    image_rejected: Triple | None  # None for a run without pictures
    terms: list[Term]

    @property
    def triples(self) -> list[Triple]:
        return [triple for triple in (self.chosen, self.rejected, self.image_rejected) if triple]

    @property
    def loss(self) -> float:
        return sum(term.value for term in self.terms)


# ---- a pair's numbers ----------------------------------------------------------------------------------------------


@torch.no_grad()
def pair_numbers(model: LLaVA, example: Example, settings: argparse.Namespace) -> Numbers:
    """Policy and reference on the three triples of one example; the objective is that of `settings`."""
    batch = collate([example], model.config).to(model.lm_head.weight.device)
    with autocast_for(model.lm_head.weight):
        policy = score_tokens(model, batch)
        with lora_disabled(model):
            reference = score_tokens(model, batch)
    r = losses.rewards(sums(policy), sums(reference), settings.beta)
    chosen = Triple(W, policy.chosen, reference.chosen, float(r.chosen))
    rejected = Triple(L, policy.rejected, reference.rejected, float(r.rejected))
    image_rejected = None
    if r.image_rejected is not None:
        image_rejected = Triple(M_L, policy.image_rejected, reference.image_rejected, float(r.image_rejected))
    return Numbers(example, chosen, rejected, image_rejected, loss_terms(r, settings))


def score_tokens(model: LLaVA, batch) -> TokenLogps:
    """`losses.plain_logps` for a batch of one pair, before its sum."""
    chosen = token_logps(model, batch.chosen, batch.images)
    rejected = token_logps(model, batch.rejected, batch.images)
    if batch.image_rejected is None:
        return TokenLogps(chosen, rejected, None)
    return TokenLogps(chosen, rejected, token_logps(model, batch.chosen, batch.image_rejected))


def token_logps(model: LLaVA, tokens: Tokens, images: Tensor | None) -> Tensor:
    """log pi(y_t | m, q, y_<t) of one row's response tokens: (R,) float32, on the CPU."""
    scored = tokens.response_mask[0, 1:]  # (1, T) -> (T-1,)
    logits = model(tokens.input_ids, images)[0, :-1][scored]  # (1, T, V) -> (R, V)
    targets = tokens.input_ids[0, 1:][scored]  # (1, T) -> (R,)
    logps = F.log_softmax(logits.float(), dim=-1)  # (R, V)
    return logps.gather(-1, targets[:, None])[:, 0].cpu()  # (R, 1) -> (R,)


def sums(tokens: TokenLogps) -> Logps:
    """log pi(y | m, q): the sum over the response, a batch of one, each (1,)."""
    image_rejected = tokens.image_rejected
    if image_rejected is not None:
        image_rejected = image_rejected.sum()[None]  # (Tw,) -> (1,)
    return Logps(tokens.chosen.sum()[None], tokens.rejected.sum()[None], image_rejected)


def loss_terms(r: Rewards, settings: argparse.Namespace) -> list[Term]:
    """The terms that are switched on, an anchor each for itself; their sum is the loss (losses.mdpo_terms)."""
    w, l, m_l = f"r({W})", f"r({L})", f"r({M_L})"
    delta = settings.delta
    anchors = settings.anchors if "ancpo" in settings.terms else ()
    found = []
    if "dpo" in settings.terms:
        loss = losses.dpo_loss(r.chosen, r.rejected)
        found.append(term("L_DPO", "which answer", w, l, r.chosen, r.rejected, loss))
    if "copo" in settings.terms:
        loss = losses.copo_loss(r.chosen, r.image_rejected)
        found.append(term("L_CoPO", "which picture", w, m_l, r.chosen, r.image_rejected, loss))
    if "w" in anchors:
        loss = losses.ancpo_loss(r.chosen, delta)
        found.append(term("L_AncPO", "keep y_w likely", w, "delta", r.chosen, delta, loss))
    if "l" in anchors:
        loss = losses.ancpo_below_loss(r.rejected, delta)
        found.append(term("L_AncPO(y_l)", "keep y_l unlikely", "delta", l, delta, r.rejected, loss))
    if "m_l" in anchors:
        loss = losses.ancpo_below_loss(r.image_rejected, delta)
        found.append(term("L_AncPO(m_l)", "keep y_w unlikely without m_w", "delta", m_l, delta, r.image_rejected, loss))
    return found


def term(name: str, meaning: str, above: str, below: str, x, y, loss: Tensor) -> Term:
    """-log sigma(above - below), and the same with the numbers x and y."""
    filled = f"-log sigma({number(x)} - {number(y)})"
    return Term(name, meaning, f"-log sigma({above} - {below})", filled, float(loss))


def number(x) -> str:
    """Four decimals; a negative number in brackets, since it stands in a formula."""
    shown = f"{float(x):.4f}"
    if shown == "-0.0000":
        return "0.0000"
    return f"({shown})" if shown.startswith("-") else shown


# ---- the base, the adapter and the data ----------------------------------------------------------------------------


class Opened(NamedTuple):
    model: LLaVA
    data: PairData
    settings: argparse.Namespace
    keys: list[tuple[int, int]]  # (epoch, index) of the rows asked for


def open_pairs(args: argparse.Namespace) -> Opened:
    """What train.py would set up, with an adapter. SystemExit if a row is not there or cannot be used."""
    settings = run_settings(args)
    model, data = train.load_base_and_data(settings, choose_device())
    if data.strategy is None and data.with_image:
        data.strategy = "crop"
    if args.adapter:
        model.source = source_of(settings.base)  # as the run's adapter names its base
        load_adapter(model, args.adapter)
    else:
        add_lora(model, r=1, alpha=1.0)  # zero, as at the start of every run: the policy is the reference
    index_of = {pair.row: index for index, pair in enumerate(data.pairs)}
    absent = [row for row in args.row if row not in index_of]
    if absent:
        raise SystemExit(
            f"{settings.data}: no usable row {', '.join(map(str, absent))}; it has {count(len(data), 'usable row')}, "
            f"from {min(index_of)} to {max(index_of)} (`python -m formats.check` says what is wrong with the others)"
        )
    return Opened(model, data, settings, [(args.epoch, index_of[row]) for row in dict.fromkeys(args.row)])


def run_settings(args: argparse.Namespace) -> argparse.Namespace:
    """train.py's settings: those the adapter's run recorded, else the paper's; the flags given here win."""
    recorded = read_args(args.adapter) if args.adapter else {}
    base = args.base or recorded.get("base")
    data = args.data or recorded.get("data")
    for flag, value in (("--base", base), ("--data", data)):
        if not value:
            raise SystemExit(f"{flag} is needed: there is no args.json of a run of train.py that names it")
    settings = vars(train.parse_args([f"--base={base}", f"--data={data}", *as_flags(recorded)]))
    settings |= {name: recorded[name] for name in settings.keys() & recorded.keys()}
    if base != recorded.get("base"):
        settings |= {"weights": None, "vision_weights": None}
    if data != recorded.get("data"):
        settings["image_root"] = None
    settings |= {"base": str(base), "data": str(data), "skip_bad": True, "recorded": bool(recorded)}
    for name in ("weights", "vision_weights", "image_root"):
        path = vars(args)[name] or settings[name]
        settings[name] = Path(str(path)) if path else None
    return argparse.Namespace(**settings)


RECORDED = "recipe terms anchors beta delta rejected_image max_length seed dtype quant".split()


def as_flags(recorded: dict) -> list[str]:
    """What decides a pair's numbers as train.py's flags, which refuse what an args.json was not written with."""
    flags = []
    for name in RECORDED:
        value = recorded.get(name)
        if value is not None:
            text = ",".join(map(str, value)) if isinstance(value, list) else value
            flags.append(f"--{name.replace('_', '-')}={text}")
    return flags


def read_args(adapter: Path) -> dict:
    """args.json of the run that the adapter belongs to: RUN or RUN/epoch-N; empty for an adapter from elsewhere."""
    if not adapter.is_dir():
        raise SystemExit(f"--adapter {adapter}: no such folder; give a run of train.py, its epoch-N, or a PEFT folder")
    for folder in (adapter, adapter.parent):
        if (folder / "args.json").is_file():
            return files.read_json(folder / "args.json", dict)
    print(f"{adapter}: no args.json of a run; beta, terms and how m_l is made are taken as in mDPO's recipe")
    return {}


def pair_parser(description: str) -> argparse.ArgumentParser:
    """The flags that say which pair is meant, and before or after which training."""
    print_any_letter()
    p = argparse.ArgumentParser(description=description)
    p.add_argument("--base", help="as in train.py; with --adapter RUN the run's own")
    p.add_argument("--data", help="as in train.py; with --adapter RUN the run's own")
    p.add_argument(
        "--row", type=whole(1), nargs="+", required=True, metavar="N", help="rows as all messages count: from 1"
    )
    p.add_argument("--adapter", type=Path, help="RUN, RUN/epoch-N, or any PEFT folder; without: before training")
    p.add_argument("--epoch", type=whole(0), default=0, help="the epoch whose m_l is drawn, from 0 (default: 0)")
    p.add_argument("--image-root", type=Path, help="folder the image paths start from")
    p.add_argument("--weights", type=Path, help="folder of the base's checkpoint")
    p.add_argument("--vision-weights", type=Path, help="CLIP or SigLIP folder, for layouts without the vision tower")
    return p


# ---- the text ------------------------------------------------------------------------------------------------------


def text(numbers: Numbers, settings: argparse.Namespace) -> str:
    """The pair and its numbers, for the terminal."""
    pair, beta = numbers.example.pair, f"{settings.beta:g}"
    lines = [
        f"row {pair.row}, id {printable(pair.id)}",
        f"  q    {printable(pair.prompt)}",
        f"  y_w  {printable(pair.chosen)}",
        f"  y_l  {printable(pair.rejected)}",
        "",
        f"log-probs in nats, summed over {count(len(numbers.chosen.policy), 'token')} of y_w and "
        f"{len(numbers.rejected.policy)} of y_l, EOS included",
        "  (picture, question, answer)   log pi_theta   log pi_ref",
    ]
    for triple in numbers.triples:
        lines.append(f"  ({triple.symbols}) {triple.policy.sum():28.4f} {triple.reference.sum():12.4f}")
    lines += ["", f"rewards, r = beta (log pi_theta - log pi_ref), beta {beta}"]
    for triple in numbers.triples:
        difference = f"{number(triple.policy.sum())} - {number(triple.reference.sum())}"
        lines.append(f"  r({triple.symbols}) = {beta} ({difference}) = {triple.reward:.4f}")
    lines += ["", f"loss, delta {settings.delta:g}"]
    for t in numbers.terms:
        lines.append(f"  {t.name}: {t.meaning}")
        lines.append(f"    = {t.formula}")
        lines.append(f"    = {t.filled} = {t.value:.4f}")
    addends = " + ".join(f"{t.value:.4f}" for t in numbers.terms)
    lines.append(f"  L = {addends} = {numbers.loss:.4f}")
    return "\n".join(lines)


def main(argv=None) -> None:
    args = pair_parser(__doc__.split("\n")[0]).parse_args(argv)
    opened = open_pairs(args)
    for key in opened.keys:
        numbers = pair_numbers(opened.model, opened.data[key], opened.settings)
        print("\n" + text(numbers, opened.settings))


if __name__ == "__main__":
    main()

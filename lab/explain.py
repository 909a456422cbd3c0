"""One preference pair as a page to look at and to share: what training changed, word by word and number by number.

    python -m lab.explain --base B --adapter RUN --data DATA --row 3 --out explain.html
    python -m lab.explain --base B --adapter RUN --data DATA --row 3 7 12 --out explain.html     with a list

The page is one file without scripts; pictures are inside, nothing is fetched, and the browser is told to refuse it.
Its numbers are lab/one_pair.py's. For each word of an answer, tokens summed (lab/explain_words.py):
    what it adds to the reward    beta (log pi_theta(y_t | m_w, q, y_<t) - log pi_ref(y_t | m_w, q, y_<t))
    what it owes the picture      log pi(y_t | m_w, q, y_<t) - log pi(y_t | m_l, q, y_<t), before and after training
"""

import argparse
import math
from pathlib import Path

import numpy as np
from torch import Tensor

import pictures
from data import Example, PairData
from external import files
from external.flags import file_ending
from external.terminal import count
from lab.explain_html import (
    END,
    bar,
    coloured,
    figure,
    kept_frame,
    largest_of,
    legend,
    maths,
    plain,
    prose,
    shown,
    signed,
)
from lab.explain_words import Word, response_words
from lab.one_pair import Numbers, Triple, open_pairs, pair_numbers, pair_parser

POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"  # no scripts, nothing from elsewhere
RECIPES = {"mdpo": "mDPO", "dpo": "DPO", "dpo-no-image": "DPO (No Image)", "pds-dpo": "PDS-DPO"}
M_L = {  # strategies that are no crop of m_w: what m_l is
    "random": "the picture of another pair",
    "moco": "m_w cropped, recoloured and blurred at random",
    "crop-released": "a crop of the prepared m_w, as in the released code",
    "region-noise": "m_w with noise over a fifth of it",
    "same": "m_w itself",
    "given": "the rejected picture that the data brings",
}


def page(articles: list[str], pairs: list[Numbers], settings: argparse.Namespace, args: argparse.Namespace) -> str:
    """The whole page: an article for each pair, with a list before them where there are several."""
    css = Path(__file__).with_name("explain.css").read_text(encoding="utf-8")
    title = "One preference pair" if len(pairs) == 1 else f"{len(pairs)} preference pairs"
    title += f", before and after {training(settings)}" if args.adapter else ", before training"
    header = [f"<h1>{title}</h1>", lead(settings, args), facts(settings, args)]
    if len(pairs) > 1:
        header.append(contents(pairs))
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{POLICY}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
{css}</style>
</head>
<body>
<main>
<header>
{lines(header)}
</header>
{lines(articles)}
{FOOTER}
</main>
</body>
</html>
"""


def lines(parts: list[str]) -> str:
    return "\n".join(parts)


def training(settings: argparse.Namespace) -> str:
    """The recipe by its name in the papers; an adapter from elsewhere has none."""
    return RECIPES[settings.recipe] if settings.recorded else "training"


def lead(settings: argparse.Namespace, args: argparse.Namespace) -> str:
    """What the reader is looking at, in two sentences."""
    text = "A model was shown a picture, a question, a better answer y_w and a worse one y_l. "
    if args.adapter:
        text += f"This page shows what {training(settings)} changed: word by word, then in the numbers of the loss."
    else:
        text += "This is how it sees them before training, when policy and reference are the same."
    return f'<p class="lead">{prose(text)}</p>'


def facts(settings: argparse.Namespace, args: argparse.Namespace) -> str:
    """What decides the numbers."""
    named = {
        "base": settings.base,
        "adapter": args.adapter or "none",
        "data": settings.data,
        prose("m_l of epoch"): args.epoch,
        "β": f"{settings.beta:g}",
        "δ": f"{settings.delta:g}",
    }
    items = [f"<li>{name} <b><bdi>{shown(str(value))}</bdi></b></li>" for name, value in named.items()]
    return f'<ul class="facts">{lines(items)}</ul>'


def contents(pairs: list[Numbers]) -> str:
    """The list of pairs."""
    items = []
    for numbers in pairs:
        pair = numbers.example.pair
        question = f'<span class="q" dir="auto">{shown(pair.prompt)}</span>'
        link = f"<b>row {pair.row}</b>{question}<span>loss {plain(numbers.loss)}</span>"
        items.append(f'<li><a href="#row-{pair.row}">{link}</a></li>')
    return f"<nav><ol>{lines(items)}</ol></nav>"


# ---- one pair ------------------------------------------------------------------------------------------------------


def article(numbers: Numbers, data: PairData, beta: float) -> str:
    """All sections about one pair."""
    example, processor = numbers.example, data.processor
    chosen = response_words(processor, example.pair.chosen, example.chosen.tolist())
    rejected = response_words(processor, example.pair.rejected, example.rejected.tolist())
    sections = [the_pair(numbers, data), word_rewards(numbers, chosen, rejected, beta)]
    if numbers.image_rejected:
        sections.append(owed_to_picture(numbers, chosen, beta))
    sections += [log_probs(numbers, beta), loss(numbers), all_words(numbers, chosen, rejected, beta)]
    return f'<article id="row-{example.pair.row}">\n{lines(sections)}\n</article>'


def the_pair(numbers: Numbers, data: PairData) -> str:
    """Both pictures, the question, and what training did in three sentences."""
    pair = numbers.example.pair
    return f"""<div class="pair">
<div class="pictures">{both_pictures(numbers.example, data)}</div>
<div>
<p class="label">Row {pair.row} · <bdi>{shown(pair.id)}</bdi> · the question</p>
<p class="question" dir="auto">{shown(pair.prompt)}</p>
<ul class="verdict">{lines(verdict(numbers))}</ul>
</div>
</div>"""


def both_pictures(example: Example, data: PairData) -> str:
    """m_w with the crop's frame on it, and m_l, as the model sees them."""
    if example.image is None:
        return '<p class="soft">This recipe leaves the picture out of its prompts.</p>'
    image = pictures.open_image(example.pair.image)
    box = kept_box(example, data, image.size)
    if box:
        frame = kept_frame(box, image.size, example.spec)
        left, top, width, height = box
        made = f"the framed part, {100 * width * height / (image.width * image.height):.1f} % of it"
    else:
        frame = ""
        made = M_L[data.strategy]
    m_w = f"<b>m_w, the right picture</b><br>{image.width} × {image.height} pixels"
    m_l = f"<b>m_l, the wrong picture</b><br>{made}"
    return figure(example.image, "m_w", m_w, frame) + figure(example.image_rejected, "m_l", m_l)


def kept_box(example: Example, data: PairData, size: tuple[int, int]) -> tuple[int, int, int, int] | None:
    """(left, top, width, height) of the crop that m_l shows, drawn once more as data.py drew it; None if it is none."""
    kept = pictures.crop_range(data.strategy)
    if kept is None:
        return None
    width, height = size
    low, high = kept
    rng = np.random.default_rng((data.seed, example.pair.row, example.draw))
    return pictures.crop_box(width, height, rng, low, high)


def verdict(numbers: Numbers) -> list[str]:
    """What L_DPO, L_CoPO and L_AncPO ask for, and whether training brought it."""
    w, l, m_l = numbers.chosen, numbers.rejected, numbers.image_rejected
    found = [finding(w.reward - l.reward, "has gained on the worse one", "has lost to the worse one", "in reward")]
    if m_l:
        up = "has gained more with the right picture than with the wrong one"
        down = "has gained less with the right picture than with the wrong one"
        found.append(finding(w.reward - m_l.reward, up, down, "in reward"))
    nats = float((w.policy - w.reference).sum())
    times = f"e<sup>{nats:.1f}</sup>" if abs(nats) > 7 else f"{math.exp(nats):.2f}"
    up, down = f"is {times} times as likely as before", f"is only {times} times as likely as before"
    found.append(finding(nats, up, down, "nats"))
    return found


def finding(change: float, up: str, down: str, unit: str) -> str:
    """One line of the verdict, marked as a rise, a fall, or neither."""
    if abs(change) < 5e-5:
        return f'<li class="even">not yet: the better answer {up} <span class="soft">(0.0000 {unit})</span></li>'
    kind, what = ("yes", up) if change > 0 else ("no", down)
    return f'<li class="{kind}">The better answer {what} <span class="soft">({signed(change)} {unit})</span></li>'


# ---- words ---------------------------------------------------------------------------------------------------------


def reward_columns(triple: Triple, beta: float) -> dict[str, Tensor]:
    """What each token adds to the reward, and the log-probs it comes from, each (R,)."""
    return {
        "reward": beta * (triple.policy - triple.reference),
        "log π_θ": triple.policy,
        "log π_ref": triple.reference,
    }


def word_rewards(numbers: Numbers, chosen: list[Word], rejected: list[Word], beta: float) -> str:
    """Both answers, each word in the colour of its part of the reward."""
    w, l = reward_columns(numbers.chosen, beta), reward_columns(numbers.rejected, beta)
    largest = max(largest_of(chosen, w["reward"]), largest_of(rejected, l["reward"]))
    per_token = "beta (log pi_theta(y_t) - log pi_ref(y_t))"

    def card(title: str, words: list[Word], columns: dict[str, Tensor], triple: Triple) -> str:
        equation = f"{maths(f'sum_t {per_token} = r({triple.symbols})')} = <b>{signed(triple.reward)}</b>"
        text = coloured(words, columns, largest)
        return f'<div class="card"><h3>{prose(title)}</h3>{text}<p class="sum">{equation}</p></div>'

    return f"""<section>
<h2>What each word adds to the reward</h2>
<p class="why">Blue words became likelier by training, orange ones less likely: {maths(per_token)}, summed over the
word's tokens. Hover over a word for its numbers.</p>
{card("y_w, the better answer", chosen, w, numbers.chosen)}
{card("y_l, the worse answer", rejected, l, numbers.rejected)}
{legend(largest, "reward", "less likely than before", "likelier than before")}
</section>"""


def owed_columns(m_w: Tensor, m_l: Tensor) -> dict[str, Tensor]:
    """What each token of y_w owes the right picture, and the log-probs with either, each (R,)."""
    return {"owed": m_w - m_l, "log π(y_t | m_w)": m_w, "log π(y_t | m_l)": m_l}


def owed_to_picture(numbers: Numbers, chosen: list[Word], beta: float) -> str:
    """y_w twice, before and after training, each word in the colour of what it owes m_w."""
    w, m_l = numbers.chosen, numbers.image_rejected
    before = owed_columns(w.reference, m_l.reference)
    after = owed_columns(w.policy, m_l.policy)
    largest = max(largest_of(chosen, before["owed"]), largest_of(chosen, after["owed"]))
    change = float(after["owed"].sum() - before["owed"].sum())
    margin = f"{maths('r(m_w, q, y_w) - r(m_l, q, y_w)')} = {beta:g} × ({signed(change)}) = {signed(beta * change)}"
    asked = "what L_CoPO wants to grow"
    if "L_CoPO" not in [term.name for term in numbers.terms]:
        asked = "the margin of L_CoPO (nothing in this run's loss asks for it)"

    def card(title: str, pi: str, columns: dict[str, Tensor]) -> str:
        equation = maths(f"log {pi}(y_w | m_w) - log {pi}(y_w | m_l)")
        equation += f" = <b>{signed(float(columns['owed'].sum()))}</b>"
        text = coloured(chosen, columns, largest)
        return f'<div class="card"><h3>{title}, {maths(pi)}</h3>{text}<p class="sum">{equation}</p></div>'

    return f"""<section>
<h2>What the better answer owes the picture</h2>
<p class="why">How much likelier each word of {maths("y_w")} is with the right picture than with the wrong one:
{maths("log pi(y_t | m_w) - log pi(y_t | m_l)")}. Blue words need the picture, pale ones would be said without it.</p>
<div class="two">
{card("Before training", "pi_ref", before)}
{card("After training", "pi_theta", after)}
</div>
{legend(largest, "nats", "likelier with the wrong picture", "likelier with the right one")}
<p class="note">The change between the two sums, times {maths("beta")}, is {prose(asked)}: {margin}.</p>
</section>"""


# ---- numbers -------------------------------------------------------------------------------------------------------

MEANINGS = ("right picture, better answer", "right picture, worse answer", "wrong picture, better answer")


def log_probs(numbers: Numbers, beta: float) -> str:
    """The triples: log-probs of both models, their difference, the reward."""
    largest = max(abs(triple.reward) for triple in numbers.triples)
    rows = []
    for triple, meaning in zip(numbers.triples, MEANINGS, strict=False):
        before, after = float(triple.reference.sum()), float(triple.policy.sum())
        cells = [plain(before), plain(after), signed(after - before), f"<b>{signed(triple.reward)}</b>"]
        name = f'{maths(f"({triple.symbols})")}<br><span class="small soft">{meaning}</span>'
        drawn = f'<td class="drawn">{bar(triple.reward, largest)}</td>'
        rows.append(f"<tr><td>{name}</td>{number_cells(cells)}{drawn}</tr>")
    return f"""<section>
<h2>Log-probs and rewards</h2>
<p class="why">How likely either model finds the whole answer, the sum over its tokens. The reward is the change times
{maths("beta")}.</p>
<div class="card scroll"><table>
<tr><th>picture, question, answer</th>
<th class="n">before<br>{maths("log pi_ref")}</th>
<th class="n">after<br>{maths("log pi_theta")}</th>
<th class="n">change</th>
<th class="n">reward<br>{maths("r = beta")} × change</th><th></th></tr>
{lines(rows)}
</table></div>
</section>"""


def number_cells(cells: list[str]) -> str:
    return "".join(f'<td class="n">{cell}</td>' for cell in cells)


def loss(numbers: Numbers) -> str:
    """Each term with its formula, the numbers in it, and the sum."""
    cards = []
    for term in numbers.terms:
        title = f"<h3>{prose(term.name)} · {prose(term.meaning)}</h3>"
        value = f'<p class="value">= {plain(term.value)}</p>'
        cards.append(f'<div class="card">{title}<p>{maths(term.formula)}<br>= {maths(term.filled)}</p>{value}</div>')
    addends = " + ".join(plain(term.value) for term in numbers.terms)
    n = len(numbers.terms)
    start = f"{n} ln 2 = {n * math.log(2):.4f}" if n > 1 else "ln 2 = 0.6931"
    return f"""<section>
<h2>The loss</h2>
<p class="why">Each term is {maths("-log sigma")} of a difference that training wants to grow. At the start all rewards
are 0 and each term is ln 2 = 0.6931, where {maths("delta")} is 0.</p>
<div class="terms">{lines(cards)}</div>
<p class="card total"><span>{maths("L")} = {addends} =</span> <b>{plain(numbers.loss)}</b>
<span class="soft">before training {start}</span></p>
</section>"""


def all_words(numbers: Numbers, chosen: list[Word], rejected: list[Word], beta: float) -> str:
    """Every word's numbers as tables, folded: for those who cannot hover."""
    w, m_l = numbers.chosen, numbers.image_rejected
    columns = reward_columns(w, beta)
    if m_l:
        columns["owed before"] = w.reference - m_l.reference
        columns["owed after"] = w.policy - m_l.policy
    tables = word_table("y_w", chosen, columns) + word_table("y_l", rejected, reward_columns(numbers.rejected, beta))
    return f"<details><summary>All numbers, word by word</summary>{tables}</details>"


def word_table(name: str, words: list[Word], columns: dict[str, Tensor]) -> str:
    """A word a row, the columns' sums at the end."""
    head = "".join(f'<th class="n">{title}</th>' for title in columns)
    rows = []
    for word in words:
        cells = [signed(word.sum(values)) for values in columns.values()]
        rows.append(f'<tr><td dir="auto">{shown(word.text.strip()) or END}</td>{number_cells(cells)}</tr>')
    sums = [f"<b>{signed(float(values.sum()))}</b>" for values in columns.values()]
    rows.append(f"<tr><td><b>sum</b></td>{number_cells(sums)}</tr>")
    return f'<div class="scroll"><table><tr><th>{maths(name)}</th>{head}</tr>{lines(rows)}</table></div>'


FOOTER = f"""<footer class="small soft">
<p>Log-probs are in nats: a difference of 1 is a factor of e ≈ 2.72 in probability. {maths("pi_theta")}, the policy, is
the model with its adapter; {maths("pi_ref")}, the reference, is the model without it. A word's value is the sum over
its tokens; {END} is the end-of-sequence token, which is scored like any other.</p>
<p>mDPO: Wang et al. 2024, sections 2.1, 3.1 and 3.2. Made by lab/explain.py of nanomdpo. A step of train.py with
<span class="maths">--batch 1</span> that meets this pair with these weights logs the same numbers.</p>
</footer>"""


def main(argv=None) -> None:
    p = pair_parser(__doc__.split("\n")[0])
    html = file_ending(".html", ".htm")
    p.add_argument("--out", type=html, default=Path("explain.html"), help="the page (default: %(default)s)")
    args = p.parse_args(argv)
    files.check_writable(args.out)
    opened = open_pairs(args)
    settings = opened.settings
    pairs = [pair_numbers(opened.model, opened.data[key], settings) for key in opened.keys]
    articles = [article(numbers, opened.data, settings.beta) for numbers in pairs]
    files.write_text(args.out, page(articles, pairs, settings, args))
    print(f"{args.out}: {count(len(pairs), 'pair')}, {args.out.stat().st_size / 1024:.0f} KB; open it in a browser")


if __name__ == "__main__":
    main()

"""Which answers may become chosen or rejected, and the pair that a question gives (PDS-DPO 3.3, equation 10).

An empty answer as y_l is a pair that DPO wins for free, and an answer that repeats the question teaches to repeat it.
So an answer is first made what would be exported, then kept or refused for a reason that is counted, then judged.

Deviations from the paper and its release
1. The release judges question and answer together and removes the question afterwards; a failed or empty answer is
   judged like any other, and often becomes y_l. Here neither is a candidate.
2. All scores equal, or best and worst in the same words: no pair. The release takes one answer for both sides.
"""

from collections import Counter, defaultdict
from typing import NamedTuple

from pds.runner import Row, is_number

REFUSALS = (  # how a refusal begins, in lower case
    "i'm sorry",
    "i am sorry",
    "sorry,",
    "i apologize",
    "my apologies",
    "unfortunately, i",
    "i can't",
    "i cannot",
    "i can not",
    "i'm unable",
    "i am unable",
    "i'm not able",
    "i am not able",
    "as an ai",
    "as a language model",
    "as a text-based",
)


class Rules(NamedTuple):
    """What export asks of answers and pairs."""

    min_words: int = 3
    min_margin: float = 0.0


# ---- an answer, as it would be exported ----------------------------------------------------------------------------


def bare(text: str) -> str:
    """A question or answer without the placeholder of the picture."""
    return text.replace("<image>", " ").strip()


def without_echo(question: str, answer: str) -> str:
    """The answer without the question at its beginning, whatever the case and the blanks."""
    answer, at = bare(answer), 0
    for word in bare(question).split():
        rest = answer[at:].lstrip()
        if not rest.casefold().startswith(word.casefold()):
            return answer
        at = len(answer) - len(rest) + len(word)
    return answer[at:].strip()


# ---- an answer, as a candidate -------------------------------------------------------------------------------------


def refused_for(row: Row, rules: Rules) -> str | None:
    """Why an answer is no candidate: failed, empty, short, cut or refusal. None: it is one."""
    if "error" in row or not isinstance(row.get("answer"), str):
        return "failed"
    answer = without_echo(row["prompt"], row["answer"])
    if not answer:
        return "empty"
    if len(answer.split()) < rules.min_words:
        return "short"
    if row.get("finish") == "length":
        return "cut"
    if answer.replace("\u2019", "'").lower().startswith(REFUSALS):
        return "refusal"
    if not is_number(row.get("score")):
        return "failed"  # the judge said nothing of it
    return None


# ---- the pair of a question ----------------------------------------------------------------------------------------


class Choice(NamedTuple):
    """y_w and y_l of a question, or why there is no pair; and why which answers were no candidates."""

    chosen: Row | None
    rejected: Row | None
    dropped: str | None  # too few, tie, identical, margin
    refused: dict[str, str]  # responder -> reason


def same_words(a: str, b: str) -> bool:
    return a.casefold().split() == b.casefold().split()


def choose(answers: list[Row], rules: Rules) -> Choice:
    """The best and the worst answer of one question: y_w = argmax r_i, y_l = argmin r_i. Names break ties."""
    answers = sorted(answers, key=lambda row: str(row["responder"]))
    reasons = {row["responder"]: refused_for(row, rules) for row in answers}
    refused = {name: reason for name, reason in reasons.items() if reason}
    left = [row for row in answers if row["responder"] not in refused]
    if len(left) < 2:
        return Choice(None, None, "too few", refused)
    best = max(left, key=lambda row: row["score"])  # the first of equals
    worst = min(left, key=lambda row: row["score"])
    if best["score"] == worst["score"]:
        return Choice(None, None, "tie", refused)
    if same_words(without_echo(best["prompt"], best["answer"]), without_echo(worst["prompt"], worst["answer"])):
        return Choice(None, None, "identical", refused)
    if best["score"] - worst["score"] < rules.min_margin:
        return Choice(None, None, "margin", refused)
    return Choice(best, worst, None, refused)


def by_question(rows: list[Row]) -> dict[str, list[Row]]:
    """Question id -> its answers. SystemExit where answers to different questions, or pictures, have one id."""
    found = defaultdict(list)
    for row in rows:
        found[str(row["id"])].append(row)
    for key, answers in found.items():
        asked = {(row.get("prompt"), row.get("image")) for row in answers if "error" not in row}
        if len(asked) > 1:
            raise SystemExit(
                f"id {key}: its answers have {len(asked)} different prompts or images; no pair is made of them"
            )
    return found


class Export(NamedTuple):
    """What a file of ranked answers gives."""

    pairs: list[Row]
    dropped_pairs: Counter  # reason -> how many questions
    dropped_answers: Counter

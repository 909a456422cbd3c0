"""MMHal-Bench (LLaVA-RLHF, Sun et al. 2023): 96 questions whose answers a language model rates from 0 to 6.

The judge sees the objects in the picture, the question, a human's answer and ours, not the picture. Ratings below 3
mean that something is invented. Ratings by different judges or prompts do not compare; the published ones come from
GPT-4 versions that are switched off.

Deviations:
1. Any OpenAI-compatible judge; a reply is taken whatever model name it carries.
2. The judge's prompt is not part of this repository (it is GPL-3.0): give your own copy, a text file or the
   eval_gpt_mmhal.py that holds it. Its sha256 is in the result, with a warning when it is not the official text.

Run: python -m evals.mmhal --answers answers.jsonl --template response_template.json --prompt prompt.txt
     --judge http://localhost:8000/v1 --judge-model M --reviews reviews.json [--json result.json]
     python -m evals.mmhal --reviews reviews.json      scores saved reviews again; what only --answers, --template and
     --prompt can tell (lengths, generation settings, that the reviews belong to them) is null then
"""

import argparse
import ast
from pathlib import Path

from evals import stats
from evals.stats import Part, ratio
from external import endpoint, files
from external.endpoint import Endpoint

SCORER = "evals.mmhal 1"
N = 96
TYPES = ("attribute", "adversarial", "comparison", "counting", "relation", "environment", "holistic", "other")
PUBLISHED_JUDGE = "gpt-4"  # 0314 and others, all switched off; which one is not told in mDPO's table
OFFICIAL_TEMPLATE = "28ed24e19ffef292597c35f1dad37760b2e0a088b3b40ca3b50f105fc1b951bb"
OFFICIAL_PROMPT = "2c73d8c50f1740d000fae62cfeed103c2f7a5bcfa904b27e6e09900e7ce600cc"


def rating(reply: str) -> int | None:
    """The one digit 0-6 that follows "rating: " (exactly one blank); None when there is none, or two different ones."""
    found = [digit for digit in range(7) if f"rating: {digit}" in reply.lower()]
    return found[0] if len(found) == 1 else None


def mmhal_metrics(s: dict) -> dict:
    """Sums -> metrics; numbers or arrays."""
    return {
        "score": ratio(s["score"], s["rows"]),
        "hallucination_rate": ratio(s["hallucinated"], s["rows"]),
        "informativeness": ratio(s["informative"], 3 * s["rows"]),  # RLHF-V's addition
    }


def mmhal_part(scores: list[int]) -> Part:
    counts = []
    for given in scores:
        informative = given - 3 if given >= 3 else given  # 0-3, with or without something invented
        counts.append({"rows": 1, "score": given, "hallucinated": int(given < 3), "informative": informative})
    return Part(list(range(len(scores))), counts, mmhal_metrics)


def mmhal_scores(scores: list[int]) -> dict:
    """Metrics of the ratings in the benchmark's order, where record i is of type i mod 8."""
    per_type = {name: scores[i::8] for i, name in enumerate(TYPES)}
    means = {name: sum(found) / len(found) if found else None for name, found in per_type.items()}
    return stats.values(mmhal_part(scores)) | {"per_type": means}


def read_prompt(path: str) -> tuple[str, str]:
    """The judge's prompt with its four {} and its sha256."""
    text = files.read_text(path)
    if path.endswith(".py"):  # read, never run
        try:
            constants = [node.value for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Constant)]
        except (SyntaxError, ValueError, RecursionError) as error:
            raise SystemExit(f"{path}: not a Python file ({error}).") from None
        text = next((c for c in constants if isinstance(c, str) and c.count("{}") == 4), "")
    elif files.sha256(text.removesuffix("\n").encode()) == OFFICIAL_PROMPT:
        text = text.removesuffix("\n")  # a line end that an editor added
    if text.count("{}") != 4:
        raise SystemExit(f"{path}: the prompt needs four {{}}: picture contents, question, human answer, answer.")
    return text, files.sha256(text.encode())


def match(rows: list[dict], template: list[dict]) -> None:
    """Answers must be in the template's order, one per record."""
    if len(rows) != N or len(template) != N:
        where = f"{rows[0]['_where']} on: {len(rows)} answers, {len(template)} template records"
        raise SystemExit(f"{where}; MMHal-Bench has {N}, and all must be answered.")
    for i, (row, record) in enumerate(zip(rows, template, strict=True)):
        asked = stats.question_of(row)
        contents = record.get("image_content")
        texts = [record.get("question"), record.get("gt_answer"), *(contents if isinstance(contents, list) else [None])]
        if not all(isinstance(text, str) for text in texts):
            raise SystemExit(
                f"{record['_where']}: wanted the texts `question` and `gt_answer` and a list of texts, "
                "`image_content`; use the benchmark's own response_template.json."
            )
        if record["question"].strip() not in asked:
            raise SystemExit(
                f"{row['_where']}: answers {asked!r}, but question {i} of the template is {record['question']!r}; the "
                "answers must be in the template's order."
            )


def not_empty(reply: str) -> None:
    if not reply.strip():
        raise ValueError("an empty reply")


def judge(rows: list[dict], template: list[dict], prompt: str, path: str, asked: Endpoint) -> list[dict]:
    """Replies to the 96 requests, new or saved at `path`."""
    pieces = prompt.split("{}")
    requests = {}
    for i, (row, record) in enumerate(zip(rows, template, strict=True)):
        slots = [", ".join(record["image_content"]), record["question"], record["gt_answer"], row["answer"]]
        content = pieces[0]
        for slot, text in zip(slots, pieces[1:], strict=True):
            content += slot + text
        requests[str(i)] = {"model": asked.model, "messages": [{"role": "user", "content": content}], "temperature": 0}
    return endpoint.ask_all(requests, path, not_empty, asked)


def is_cut(review: dict) -> bool:
    """Whether the judge was not let finish: what it would have rated is not known."""
    return review["choices"][0].get("finish_reason") == "length"


def read_ratings(reviews: list[dict], path: str) -> list[int | None]:
    """The rating in each of the 96 reviews, which must be in order."""
    keys = [review.get("key", str(i)) for i, review in enumerate(reviews)]
    if len(reviews) != N or keys != [str(i) for i in range(N)]:
        raise SystemExit(f"{path}: {len(reviews)} reviews in the order {keys[:3]}...; all {N} are needed in order.")
    ratings = []
    for i, review in enumerate(reviews):
        try:
            ratings.append(rating(endpoint.reply_text(review)))
        except ValueError as error:
            raise SystemExit(f"{path}: review {i}: {error}; remove it and ask again.") from error
    return ratings


def score(path: str, args: argparse.Namespace) -> tuple[dict, list[Part]]:
    rows, digest = [], None
    if args.answers:
        rows, template = stats.read_answers(args.answers), files.read_rows(args.template)
        match(rows, template)
        for row in rows:
            row["answer"] = row["answer"].replace("Assistant:", "").strip()
        prompt, digest = read_prompt(args.prompt)
        asked = endpoint.from_flags(args, args.url, args.model)
        reviews = judge(rows, template, prompt, path, asked)
    else:
        reviews = files.read_rows(path)
    ratings = read_ratings(reviews, path)
    part = mmhal_part([found or 0 for found in ratings])
    models = sorted({str(review.get("request_model") or review.get("model")) for review in reviews})
    protocol = f"MMHal-Bench, judge {', '.join(models)}"
    result = stats.header(SCORER, protocol, [args.answers] if rows else [], rows, N if rows else None)
    if not rows:
        result |= {"n": N, "n_expected": N, "n_empty": None, "generation": None}
    if not all(model.startswith(PUBLISHED_JUDGE) for model in models):
        stats.not_comparable(result, f"judge {', '.join(models)}: published scores are {PUBLISHED_JUDGE}'s")
    if digest not in (None, OFFICIAL_PROMPT):
        stats.not_comparable(result, f"{args.prompt} is not the official prompt")
    if rows and files.sha256(Path(args.template).read_bytes()) != OFFICIAL_TEMPLATE:
        stats.not_comparable(result, f"{args.template} is not the official template")
    if cut := sum(is_cut(review) for review in reviews):
        stats.not_comparable(result, f"{cut} replies were cut off by the judge's limit of tokens; raise it, ask anew")
    if None in ratings:
        result["warnings"].append(f"{ratings.count(None)} replies without exactly one rating, counted as 0")
    result |= {
        "judge": {"models": models, "prompt_sha256": digest, "prompt_official": digest and digest == OFFICIAL_PROMPT},
        "reviews": {"path": path, "n_without_rating": ratings.count(None)},
        **stats.summary(part),
        "per_type": mmhal_scores([found or 0 for found in ratings])["per_type"],
        "rows": [{"id": i, "rating": found} for i, found in enumerate(ratings)],
    }
    return result, [part]


def main(argv: list[str] | None = None) -> None:
    what = "the judge's replies: written when asking, read when scoring again"
    parser = stats.scorer_flags(__doc__, "--reviews", what, "files of reviews")
    parser.add_argument("--answers", help="answers.jsonl, 96 rows in the template's order, or a filled template")
    parser.add_argument("--template", help="response_template.json of MMHal-Bench")
    parser.add_argument("--prompt", help="your copy of the judge's prompt")
    parser.add_argument("--judge", dest="url", help="OpenAI-compatible endpoint, such as http://localhost:8000/v1")
    parser.add_argument("--judge-model", dest="model", help="name of the model there")
    endpoint.add_flags(parser)
    args = parser.parse_args(argv)
    together = [args.answers, args.template, args.prompt]
    if any(together) and not (all(together) and args.reviews):
        parser.error("--answers, --template, --prompt and --reviews go together")
    if args.url and not (args.model and args.answers):
        parser.error("--judge needs --judge-model, --answers, --template and --prompt")
    stats.check_json(args.json, [args.reviews, *together, *(args.compare or [])])
    scored = [score(path, args) for path in args.compare or [args.reviews]]
    for result, _ in scored:
        print(" | ".join(f"{name} {value:.2f}" for name, value in result["per_type"].items()))
    stats.report(scored, args.json)


if __name__ == "__main__":
    main()

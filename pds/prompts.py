"""The prompts: what the pictures will show, topic by topic (PDS-DPO 3.2, "text-to-image prompts spanning 10 topics").

    python -m pds.prompts --grammar --per-topic 100 --out prompts.jsonl
    python -m pds.prompts --file art.txt --topic art --out prompts.jsonl
    python -m pds.prompts --endpoint http://host/v1 --model M --per-topic 900 --out prompts.jsonl

OUT has rows {id: "art-17", topic, caption}. A prompt that shares 80 % of its words with an earlier one is dropped and
counted. A number belongs to a place in its source: it is never used again, whatever was dropped.

Deviations from the paper, whose wording for GPT-4 and whose prompts are not released
1. Our own request, ten topics of the paper's list; any endpoint, no endpoint (a grammar), or the user's own prompts.
2. Near-duplicates are dropped; the paper does not say.
"""

import argparse
import copy
import random
import re
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path

from external import files
from external.endpoint import reply_text
from external.flags import whole
from external.terminal import printable
from pds import endpoints, runner
from pds.runner import Row

TOPICS = (
    "art",
    "culinary",
    "daily activities",
    "holidays",
    "industrial",
    "nature",
    "school",
    "transportation",
    "urban",
    "weather",
)
GRAMMAR = Path(__file__).parent.parent / "assets" / "pds_grammar.json"
NEAR = 0.8  # Jaccard of the words, from which on two prompts are near-duplicates
PER_REQUEST = 20  # prompts that an endpoint is asked for at once
LONGEST = 60  # words; CLIP and ImageReward read no more
REQUEST = """Write {n} prompts for a text-to-image model. The topic is "{topic}".
Each describes one realistic picture in 15 to 30 words: who or what is in it, how many, where they are, what they do,
colours, light and point of view. Vary all of these, and use no names of persons or artists.
One prompt on each line, no numbers, no headings. This is request {k}: do not write what earlier ones may have had."""

# ---- the grammar ---------------------------------------------------------------------------------------------------


def from_grammar(topics: list[str], per_topic: int, seed: int) -> Iterator[tuple[str, int, str]]:
    """(topic, number, caption), drawn; equal captions are left to be dropped with the near ones."""
    parts = files.read_json(GRAMMAR, dict)
    for topic in topics:
        if topic not in parts["subjects"]:
            raise SystemExit(f"--topic {topic}: the grammar knows {', '.join(parts['subjects'])}")
        rng = random.Random(f"{seed} {topic}")
        for number in range(1, per_topic + 1):
            slots = (parts["views"], parts["subjects"][topic], parts["places"], parts["lights"])
            words = [rng.choice(slot) for slot in slots]
            yield topic, number, "{} {} {}, {}.".format(*words)


# ---- the user's own ------------------------------------------------------------------------------------------------


def from_file(file: Path, topic: str | None) -> Iterator[tuple[str, int, str]]:
    """A caption a line, or JSON rows of {caption, topic}; --topic stands for those without one."""
    numbers = Counter()
    for where, own, caption in captions_of(file, topic):
        if not isinstance(own, str) or not own.strip():
            raise SystemExit(f"{where}: no `topic`; give it in the row, or --topic for all")
        if not isinstance(caption, str) or not caption.strip():
            raise SystemExit(f"{where}: no `caption`")
        if problem := runner.row_problem({"id": own, "caption": caption}, {}):
            raise SystemExit(f"{where}: {problem}")
        numbers[slug(own)] += 1
        yield own, numbers[slug(own)], " ".join(caption.split())


def captions_of(file: Path, topic: str | None) -> list[tuple[str, str | None, str]]:
    """(where, topic, caption) of every row of a file."""
    kind = file.suffix.lower()
    if kind in (".csv", ".tsv", ".parquet", ".gz", ".zip"):
        raise SystemExit(f"{file}: --file takes a text file, a prompt a line, or .json and .jsonl rows of its prompts")
    if kind in (".json", ".jsonl"):
        return [(row["_where"], row.get("topic", topic), row.get("caption")) for row in files.read_rows(file)]
    lines = enumerate(files.read_text(file).split("\n"), 1)
    found = [(f"{file}:{number}", topic, line) for number, line in lines if line.strip()]
    if not found:
        raise SystemExit(f"{file}: no prompts in it")
    return found


# ---- an endpoint ---------------------------------------------------------------------------------------------------


def captions_in(text: str) -> list[str]:
    """The prompts of a reply, one a line, without numbers, bullets and quotation marks."""
    found = []
    for line in text.split("\n"):
        line = re.sub(r"^\s*(?:[-*\u2022]|\d+[.):])\s*", "", line).strip().strip('"\u201c\u201d').strip()
        if 4 <= len(line.split()) <= LONGEST:
            found.append(line)
    return found


def with_captions(row: Row, reply: dict) -> Row:
    found = captions_in(reply_text(reply))
    if not found:
        raise ValueError("a reply without a prompt in it")
    return row | {"captions": found[:PER_REQUEST]}


def from_endpoint(args: argparse.Namespace, topics: list[str]) -> Iterator[tuple[str, int, str]]:
    """(topic, number, caption). Replies are rows of their own beside OUT, so that none is asked for twice."""
    where = endpoints.from_flags(args, args.endpoint, args.model)
    count = -(-args.per_topic // PER_REQUEST)
    requests = [{"id": f"{slug(topic)}/{k}", "topic": topic, "k": k} for topic in topics for k in range(count)]

    def body(row: Row) -> dict:
        text = REQUEST.format(n=PER_REQUEST, topic=row["topic"], k=row["k"] + 1)
        return {"messages": [endpoints.message(text)], "temperature": 1.0, "seed": args.seed + row["k"]}

    own = copy.copy(args)
    own.out, own.limit = args.out.with_suffix(".replies.jsonl"), None
    settings = {"stage": "prompts", "request": REQUEST, "seed": args.seed} | endpoints.describe(where)
    asker = endpoints.Asker(where, body, with_captions)
    result = runner.run(own, requests, settings, {"captions", "error"}, asker.work)
    if result.failed:
        runner.report(own, result)  # ends here: numbers belong to places in replies, and some are not there yet
    for row in result.rows:
        for place, caption in enumerate(row["captions"]):
            number = row["k"] * PER_REQUEST + place + 1
            if number <= args.per_topic:
                yield row["topic"], number, caption


# ---- near-duplicates -----------------------------------------------------------------------------------------------


class Seen:
    """Word sets of the prompts so far, and which of them hold a word."""

    def __init__(self):
        self.sets: list[frozenset[str]] = []
        self.with_word = defaultdict(list)

    def is_near(self, caption: str) -> bool:
        """Whether an earlier caption shares at least NEAR of all words of both; if none does, this one is kept.

        Two sets so near share at least one of the few rarest words of either, so only those are looked up.
        """
        words = frozenset(re.findall(r"\w+", caption.lower()))
        rarest = sorted(words, key=lambda word: (len(self.with_word[word]), word))
        lookups = len(words) - int(-(-NEAR * len(words) // 1)) + 1
        near = {i for word in rarest[:lookups] for i in self.with_word[word]}
        if any(len(words & self.sets[i]) >= NEAR * len(words | self.sets[i]) for i in near):
            return True
        for word in words:
            self.with_word[word].append(len(self.sets))
        self.sets.append(words)
        return False


def slug(topic: str) -> str:
    """A topic as the beginning of an id, which also names files."""
    return re.sub(r"\W+", "-", topic.strip().lower()).strip("-") or "topic"


def accept(source: Iterator[tuple[str, int, str]]) -> tuple[list[Row], Counter]:
    """The rows of a source, and how many near-duplicates each topic lost."""
    seen, rows, dropped = Seen(), [], Counter()
    for topic, number, caption in source:
        if seen.is_near(caption):
            dropped[f"near-duplicate in {topic}"] += 1
        else:
            rows.append({"id": f"{slug(topic)}-{number}", "topic": topic, "caption": caption})
    return rows, dropped


def say_short(rows: list[Row], topics: list[str], per_topic: int) -> None:
    """Says which topics have fewer prompts than were asked for: a source wrote fewer, or near-duplicates."""
    counts = Counter(row["topic"] for row in rows)
    for topic in topics:
        if counts[topic] < per_topic:
            print(printable(f"{topic}: {counts[topic]} of {per_topic} prompts; another --seed and --out give more"))


# ---- command line --------------------------------------------------------------------------------------------------


def parse_args(argv=None) -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--file", type=Path, help="prompts of your own: a text file, or JSON rows {caption, topic}")
    p.add_argument("--grammar", action="store_true", help="a local grammar, which needs nothing")
    p.add_argument("--topic", action="append", help="repeatable (default: the ten of the paper); of --file's rows: one")
    p.add_argument("--per-topic", type=whole(1, 20_000), default=100, help="prompts of each topic (default 100)")
    p.add_argument("--seed", type=int, default=0, help="of the grammar, and sent to the endpoint (default 0)")
    endpoints.add_flags(p)
    runner.add_flags(p)
    args = p.parse_args(argv)
    runner.check_flags(p, args)
    if [bool(args.file), args.grammar, bool(args.endpoint)].count(True) != 1:
        p.error("one source: --file FILE, --grammar, or --endpoint URL --model M")
    if bool(args.endpoint) != bool(args.model):
        p.error("--endpoint URL and --model M go together")
    if args.file and args.topic and len(args.topic) > 1:
        p.error("--file takes one --topic, for the rows without one")
    return args


def main(argv=None) -> None:
    args = parse_args(argv)
    topics = args.topic or list(TOPICS)
    settings = {"stage": "prompts", "topics": topics, "per_topic": args.per_topic, "seed": args.seed}
    if args.file:
        source = from_file(args.file, topics[0] if args.topic else None)
        settings = {"stage": "prompts", "model": f"prompts of {args.file.name}"}
    elif args.grammar:
        source = from_grammar(topics, args.per_topic, args.seed)
        settings["model"] = "grammar"
    else:
        source = from_endpoint(args, topics)
        settings["model"] = args.model
    rows, dropped = accept(source)
    if not args.file:
        say_short(rows, topics, args.per_topic)
    result = runner.run(args, rows, settings, set(), lambda: runner.each_row(lambda row: row))
    runner.report(args, result, dropped)


if __name__ == "__main__":
    main()

"""A language model that lists the objects of an answer, as Object HalBench has it before its words are looked up.

Deviations: the prompt is ours, any OpenAI-compatible endpoint may answer, and code fences around a reply are dropped.
"""

import json
from pathlib import Path

from evals import stats
from external import endpoint, files
from external.endpoint import Endpoint

EXTRACT = """You list the objects that a picture description says are in the picture.

[Question]
<image> {question}
[End of question]

[Description]
{answer}
[End of description]

Treat the description as true. Rules:
1. List only objects that the description says are visible in the picture, nothing you infer.
2. Give each object as a plain noun, without number, colour, size, material or any other attribute.
3. Do not list parts, feelings, actions or qualities as objects.
4. Answer with one JSON list of strings and nothing else, such as ["dog", "tennis racket"].
5. If there is no object, answer []."""
SHORT = 3  # answers of so few words are not sent, and name nothing


def extract(rows: list[dict], ids: list[int], path: str, asked: Endpoint) -> list[list[str]]:
    """Names the language model finds in each answer; its replies are kept at `path`."""
    requests = {}
    for row, key in zip(rows, ids, strict=True):
        if len(row["answer"].split()) > SHORT:
            content = EXTRACT.format(question=stats.question_of(row), answer=row["answer"])
            requests[str(key)] = {
                "model": asked.model,
                "messages": [{"role": "system", "content": content}],
                "temperature": 0.2,
                "top_p": 1,
                "max_tokens": 512,
            }
    saved = files.read_json(path) if Path(path).is_file() else []
    if isinstance(saved, dict):  # {image_id: text of the reply}, from another tool
        texts = saved
        if missing := sorted(requests.keys() - texts.keys()):
            raise SystemExit(f"{path}: no reply for {len(missing)} answers, such as of image {missing[:3]}.")
    else:
        replies = endpoint.ask_all(requests, path, reply_objects, asked)
        texts = {key: endpoint.reply_text(reply) for key, reply in zip(requests, replies, strict=True)}
    names = []
    for key in map(str, ids):
        try:
            names.append(reply_objects(texts[key]) if key in requests else [])
        except (ValueError, RecursionError) as error:
            raise SystemExit(
                f"{path}: the reply for image {key} has no list of objects ({error}); remove it and ask again."
            ) from None
    return names


def reply_objects(reply: str) -> list[str]:
    """The list in an extractor's reply: all of it, or its last line. ValueError when there is none."""
    if not isinstance(reply, str):
        raise ValueError(f"not a text: {str(reply)[:80]}")
    lines = [line for line in reply.strip().split("\n") if not line.startswith("```")]
    try:
        found = json.loads("\n".join(lines))
    except ValueError:
        if '["' not in reply:
            raise
        found = json.loads(lines[-1])
    if not isinstance(found, list) or not all(isinstance(name, str) for name in found):
        raise ValueError(f"not a JSON list of texts: {reply[:80]!r}")
    return found

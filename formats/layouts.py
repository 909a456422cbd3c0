"""The layouts of preference data: one function per format, recognised by its columns.

Each takes a row as stored and gives Fields; it raises BadRow for a row that cannot be used, NoPair for one that makes
no pair by its format's own rule (a tie of ratings). Every layout may also bring `system` and a picture for m_l under
one of REJECTED_IMAGE; readers.py takes those, and names the columns that nothing takes.
"""

import json
import re
from collections.abc import Callable
from typing import NamedTuple

from data import BadRow, bare_question
from external.terminal import printable

NOT_FITTING = "row does not fit the file's format"
NOT_ONE_TURN = "not one question and one answer"
REJECTED_IMAGE = ("image_rejected", "rejected_image", "rejected_images")  # ours, its other spelling, ms-swift's
EVERYWHERE = {"id", "idx", "system", *REJECTED_IMAGE}  # columns that any layout may have


class NoPair(Exception):
    """Why a row makes no pair although nothing is wrong with it."""


class Fields(NamedTuple):
    """What a row holds, as stored."""

    image: object  # m_w: whatever readers.stored_image takes
    prompt: str
    chosen: str
    rejected: str
    system: str | None = None  # instead of the template's own system text


# ---- chats ---------------------------------------------------------------------------------------------------------

NOT_READ = ("tool_calls", "function_call", "reasoning_content", "thinking", "audio")  # parts of some chats' messages
ROLES = {"system": "system", "user": "question", "human": "question", "assistant": "answer", "gpt": "answer"}


class Chat(NamedTuple):
    """At most one message of each role, and the pictures inside them."""

    system: str | None = None
    question: str | None = None
    answer: str | None = None
    images: tuple = ()


def read_chat(name: str, value, alone: str) -> Chat:
    """A text, a message or a list of messages. A text, or a message without a role, is the `alone` part.

    BadRow by `name`, what the value is of the pair.
    """
    if isinstance(value, str):
        return Chat(**{alone: value})
    messages = [value] if isinstance(value, dict) else value
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise BadRow(NOT_FITTING, f"{name}: {type(value).__name__} where text or messages were wanted")
    found = {}
    images = []
    for message in messages:
        role = message.get("role") or message.get("from")
        if role is not None and role not in ROLES:
            raise BadRow("message of an unknown role", repr(role))
        part = alone if role is None else ROLES[role]
        if part in found:
            raise BadRow(NOT_ONE_TURN, f"{len(messages)} messages in one column")
        found[part], inside = message_content(message)
        images += inside
    return Chat(**found, images=tuple(images))


def message_content(message: dict) -> tuple[str, list]:
    """(text, pictures) of a message whose content is text or a list of parts; a picture's place alone is none."""
    content = message.get("content")
    if content is None:
        content = message.get("value")  # LLaVA's word
    more = [key for key in NOT_READ if message.get(key)]
    if content is None or more:
        raise BadRow("message is not text and pictures alone", f"it has {', '.join(more) or 'no content'}")
    if isinstance(content, str):
        return content, []
    texts = []
    images = []
    for part in content:
        kind = part["type"]
        if kind == "text":
            texts.append(part["text"])
        elif kind in ("image", "image_url"):
            images.append(part_image(part))
        else:
            raise BadRow("message part is neither text nor a picture", repr(kind))
    if len(images) > 1:
        raise BadRow("several images", f"{len(images)} in one message; one picture per pair is supported")
    return "\n".join(texts), [image for image in images if image]


def part_image(part: dict):
    """The picture of {"type": "image"}, in any of its spellings, or OpenAI's {"type": "image_url"}; None: a place."""
    image = part.get("image_url") or part.get("image") or part.get("url") or part.get("path")
    if isinstance(image, dict) and "url" in image:
        return image["url"]
    return image


def one_of(texts: list[str | None], reason: str) -> str | None:
    """The text that is there, None if there is none. BadRow if there are two that differ."""
    found = {text for text in texts if text}
    if len(found) > 1:
        raise BadRow(reason)
    return found.pop() if found else None


def from_chats(image, prompt, chosen, rejected) -> Fields:
    """Fields of columns that hold texts or chats; `prompt` may be None where both answers bring the question."""
    chats = [read_chat("chosen", chosen, "answer"), read_chat("rejected", rejected, "answer")]
    if any(chat.answer is None for chat in chats):
        raise BadRow(NOT_ONE_TURN, "a response without an assistant's message")
    if prompt is not None:
        asked = read_chat("prompt", prompt, "question")
        if asked.answer is not None:
            raise BadRow(NOT_ONE_TURN, "the prompt holds an answer")
        chats.append(asked)
    questions = [bare_question(chat.question) for chat in chats if chat.question is not None]
    question = one_of(questions, "chosen and rejected answer different questions")
    if question is None and not questions:
        raise BadRow("no prompt", "neither a prompt column nor a user's message")
    system = one_of([chat.system for chat in chats], "several system texts in one row")
    inside = []
    for chat in chats:
        inside += [picture for picture in chat.images if picture not in inside]
    return Fields(one_picture(image, inside), question or "", chats[0].answer, chats[1].answer, system)


def one_picture(image, inside: list):
    """The picture of the image column, or the one inside the messages. BadRow if both are there and differ."""
    column = image if isinstance(image, list) else [image]
    column = [picture for picture in column if picture]
    if not column:
        return inside
    if any(picture not in column for picture in inside):
        raise BadRow("a message's picture differs from the image column")
    return image


# ---- one function per format ---------------------------------------------------------------------------------------


def mdpo(row: dict) -> Fields:
    return Fields(row["img_path"], row["prompt"], row["chosen"], row["rejected"])


def conversations(row: dict) -> Fields:
    """LLaVA's two turns, question and answer, once with each answer."""
    turns = []
    systems = []
    for column in ("conversations", "rejected_conversations"):
        messages = list(row[column])
        if messages and messages[0].get("from") == "system":
            systems.append(messages.pop(0)["value"])
        if len(messages) != 2:
            raise BadRow(NOT_ONE_TURN, f"{len(messages)} turns in {column}")
        for message, wanted in zip(messages, ("question", "answer"), strict=True):
            speaker = message.get("from")
            if speaker is not None and ROLES.get(speaker) != wanted:
                raise BadRow(NOT_ONE_TURN, f"the {wanted} in {column} is from {speaker!r}")
        turns.append([message["value"] for message in messages])
    (question, chosen), (other_question, rejected) = turns
    if question != other_question:
        raise BadRow("chosen and rejected answer different questions")
    return Fields(row["image"], question, chosen, rejected, one_of(systems, "several system texts in one row"))


def rlhf_v(row: dict) -> Fields:
    text = json.loads(row["text"])
    return Fields(row["image"], text["question"], text["chosen"], text["rejected"])


def rlaif_v(row: dict) -> Fields:
    return Fields(row["image"], row["question"], row["chosen"], row["rejected"])


def llamafactory(row: dict) -> Fields:
    return from_chats(row["images"], row["conversations"], row["chosen"], row["rejected"])


def vlfeedback(row: dict) -> Fields:
    """The response with the best mean rating against the one with the worst, the first of equals."""
    responses = row["completions"]
    if isinstance(responses, dict):  # parquet: a column of lists; jsonl: a list of rows
        responses = [dict(zip(responses, r, strict=True)) for r in zip(*responses.values(), strict=True)]
    rated = []
    for response in responses:
        ratings = [str(aspect["Rating"]) for aspect in response["annotations"].values()]
        if ratings and all(re.fullmatch(r"\d+(\.\d+)?", rating) for rating in ratings):  # some are "N/A"
            mean = sum(float(rating) for rating in ratings) / len(ratings)
            rated.append((mean, response["response"]))
    if len(rated) < 2:
        raise NoPair("fewer than two rated responses")
    best_mean, best = max(rated, key=lambda r: r[0])
    worst_mean, worst = min(rated, key=lambda r: r[0])
    if best_mean == worst_mean:
        raise NoPair("all ratings equal")
    return Fields(row["img_path"], row["prompt"], best, worst)


def swift(row: dict) -> Fields:
    """ms-swift: `messages` end in the chosen answer, `rejected_response` is the other."""
    return from_chats(row["images"], None, row["messages"], row["rejected_response"])


def openai_tags(row: dict) -> Fields:
    """LLaMA-Factory with OpenAI's tags: `messages` are the prompt."""
    return from_chats(row["images"], row["messages"], row["chosen"], row["rejected"])


def trl(row: dict) -> Fields:
    return from_chats(row["images"], row["prompt"], row["chosen"], row["rejected"])


def plain(row: dict) -> Fields:
    return from_chats(row["image"], row["prompt"], row["chosen"], row["rejected"])


def implicit_prompt(row: dict) -> Fields:
    """TRL: chosen and rejected are whole chats that begin with the same question; pictures may stand in them."""
    return from_chats(row.get("images") or row.get("image"), row.get("prompt"), row["chosen"], row["rejected"])


class Layout(NamedTuple):
    name: str
    needed: set[str]  # columns that tell it
    read: Callable[[dict], Fields]
    chat: str | None = None  # a column that must hold messages for it to be this layout
    optional: frozenset[str] = frozenset()


LAYOUTS = [  # the first fit wins
    Layout("mDPO", {"img_path", "prompt", "chosen", "rejected"}, mdpo),
    Layout(
        "PDS-DPO / POVID (LLaVA conversations)", {"image", "conversations", "rejected_conversations"}, conversations
    ),
    Layout("RLHF-V", {"image", "text"}, rlhf_v),
    Layout("RLAIF-V", {"image", "question", "chosen", "rejected"}, rlaif_v),
    Layout("LLaMA-Factory", {"images", "conversations", "chosen", "rejected"}, llamafactory),
    Layout("LLaMA-Factory, OpenAI tags", {"images", "messages", "chosen", "rejected"}, openai_tags),
    Layout("ms-swift", {"images", "messages", "rejected_response"}, swift),
    Layout("VLFeedback (ratings)", {"img_path", "prompt", "completions"}, vlfeedback),
    Layout("TRL", {"images", "prompt", "chosen", "rejected"}, trl),
    Layout("plain", {"image", "prompt", "chosen", "rejected"}, plain),
    Layout(
        "TRL, prompt inside",
        {"chosen", "rejected"},
        implicit_prompt,
        chat="chosen",
        optional=frozenset({"image", "images", "prompt"}),
    ),
]


def detect(row: dict, where: str) -> Layout:
    """The layout of a file whose first row this is, at `where`. SystemExit with what was found and the nearest one."""
    columns = set(row)
    for layout in LAYOUTS:
        if layout.needed <= columns and (layout.chat is None or isinstance(row[layout.chat], list)):
            return layout
    told = [layout for layout in LAYOUTS if layout.chat is None]
    nearest = max(told, key=lambda layout: len(layout.needed & columns) / len(layout.needed))
    known = "\n".join(f"  {layout.name}: {', '.join(sorted(layout.needed))}" for layout in LAYOUTS)
    raise SystemExit(
        f"{where}: unknown columns. Found: {printable(', '.join(sorted(columns))) or 'none'}.\n"
        f"Nearest format: {nearest.name}, lacking {', '.join(sorted(nearest.needed - columns))}.\n"
        f"Formats known:\n{known}\n"
        "Other data: write it as jsonl with the plain columns (docs/data.md)."
    )

"""Rows through an OpenAI-compatible endpoint: vLLM, SGLang, Ollama, a cloud; many requests in flight, a failure a row.

Not from a paper. How a request is made, retried and kept clear of the key is external/endpoint.py's work. Ours: every
row comes back, with what was made of its reply or with `error`, and an endpoint that has died is not asked for ever.
"""

import argparse
import asyncio
import base64
import io
from collections.abc import Callable
from pathlib import Path

from PIL import Image

import pictures
from external import endpoint
from external.endpoint import Endpoint, NoReply
from pds import runner
from pds.runner import Row

INLINE = {"PNG": "image/png", "JPEG": "image/jpeg", "WEBP": "image/webp"}  # formats that endpoints take


def add_flags(p: argparse.ArgumentParser) -> None:
    p.add_argument("--endpoint", metavar="URL", help="OpenAI-compatible, such as http://host/v1; key: $OPENAI_API_KEY")
    p.add_argument("--model", help="of the endpoint")
    endpoint.add_flags(p)


def from_flags(args: argparse.Namespace, url: str, model: str) -> Endpoint:
    endpoint.check_endpoint(url)
    return endpoint.from_flags(args, url, model)


def data_uri(path: Path) -> str:
    """A picture as a data: URL, as it lies on the disk where endpoints take its format. ValueError if it is none."""
    pictures.open_image(path)  # every check
    with Image.open(path) as image:
        kind = INLINE.get(image.format)
    data = path.read_bytes()
    if kind is None:
        buffer = io.BytesIO()
        pictures.open_image(path).save(buffer, "PNG")
        kind, data = "image/png", buffer.getvalue()
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def message(text: str, picture: str | None = None) -> dict:
    """A user's turn, with a picture as data: URL before the text."""
    if picture is None:
        return {"role": "user", "content": text}
    parts = [{"type": "image_url", "image_url": {"url": picture}}, {"type": "text", "text": text}]
    return {"role": "user", "content": parts}


class Asker:
    """Batches of rows -> their replies. `make_body` raises ValueError for a row that cannot be asked; `use` turns a
    reply into the row with more keys, and raises ValueError for one that cannot be used."""

    def __init__(self, where: Endpoint, make_body: Callable[[Row], dict], use: Callable[[Row, dict], Row]):
        self.where, self.make_body, self.use = where, make_body, use
        self.dead = ""

    async def one(self, client, row: Row, slots: asyncio.Semaphore) -> Row:
        try:
            body = {"model": self.where.model} | self.make_body(row)
            async with slots:
                reply = await endpoint.ask(client, body, lambda text: None, self.where.tries)
            return self.use(row, reply)
        except (NoReply, ValueError) as error:
            return runner.failed(row, f"{error}")

    async def all(self, rows: list[Row]) -> list[Row]:
        slots = asyncio.Semaphore(self.where.parallel)
        async with endpoint.connect(self.where) as client:
            return await asyncio.gather(*(self.one(client, row, slots) for row in rows))

    def __call__(self, rows: list[Row]) -> list[Row]:
        if self.dead:
            raise SystemExit(
                f"{self.where.url}: no row of the last batch got a reply ({self.dead}). What was done before is "
                "complete; --retry-failed resumes."
            )
        results = asyncio.run(self.all(rows))
        if all("error" in row for row in results):
            self.dead = results[0]["error"]
        return results

    def work(self) -> runner.Work:
        return runner.Work(self, row_bytes=1, rows=4 * self.where.parallel)


def describe(where: Endpoint) -> dict:
    """For the settings: the model's name. Its weights cannot be seen from here, and its address may change."""
    return {"model": where.model, "revision": None}

"""Asking a language model behind an OpenAI-compatible endpoint, with the `openai` package (pip install openai).

Retries with their waits, time-outs and several requests at once are openai's work. Ours: every reply is on the disk
before the next is asked, so that nothing is paid twice; the key comes from the environment, goes to the endpoint alone
and into no file or message; and no endpoint can hold a run up for ever or fill the memory.
"""

import argparse
import asyncio
import base64
import json
import os
import urllib.parse
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from external import files
from external.flags import number, whole
from external.progress import progress

KEY_VARIABLE = "OPENAI_API_KEY"
SHORTEST_KEY = 8  # a shorter one might be an ordinary word of a reply, which must not be changed
LARGEST_REPLY = 16 * 2**20  # bytes
MOST_PARALLEL = 1024  # requests at once


class Endpoint(NamedTuple):
    """Where to ask; without a url nothing is asked and every reply has to be saved already."""

    url: str | None
    model: str | None
    tries: int = 8
    timeout: float = 120.0  # seconds a try, from connecting to the last byte
    parallel: int = 4


class NoReply(Exception):
    """Why a request has no usable reply, for the user; without the key."""


def add_flags(parser: argparse.ArgumentParser) -> None:
    seconds = number(0, above=True)
    parser.add_argument("--tries", type=whole(1), default=8, help="attempts per reply before the run ends (default 8)")
    parser.add_argument("--timeout", type=seconds, default=120.0, help="seconds for one attempt, in all (default 120)")
    parser.add_argument("--parallel", type=whole(1, MOST_PARALLEL), default=4, help="requests at once (default 4)")


def from_flags(args: argparse.Namespace, url: str | None, model: str | None) -> Endpoint:
    return Endpoint(url, model, args.tries, args.timeout, args.parallel)


# ---- the key -------------------------------------------------------------------------------------------------------


def read_key() -> str:
    """The key, or "" for an endpoint that needs none. SystemExit, which does not show it, if it cannot be one."""
    key = os.environ.get(KEY_VARIABLE, "").strip()
    if not key.isascii() or not key.isprintable() or " " in key:
        raise SystemExit(f"{KEY_VARIABLE}: holds a blank, a line break or another odd character; set it to one key.")
    if key and len(key) < SHORTEST_KEY:
        raise SystemExit(
            f"{KEY_VARIABLE}: fewer than {SHORTEST_KEY} characters; unset it if the endpoint needs no key."
        )
    return key


def hide_key(text: str) -> str:
    """The text without the key: an endpoint that echoes its request must not bring it into a file or a message."""
    key = read_key()
    if not key:
        return text
    encoded = [base64.b64encode(form.encode()).decode().rstrip("=") for form in (key, f"Bearer {key}")]
    forms = [key, json.dumps(key)[1:-1], repr(key)[1:-1], urllib.parse.quote(key, safe=""), *encoded]
    for form in sorted(set(forms), key=len, reverse=True):
        text = text.replace(form, "[key]")
    return text


def hide_in_reply(value):
    """A parsed reply without the key; parsed, because JSON can spell every letter in two ways.

    Half of a surrogate pair, which JSON can spell and no file takes, becomes "?".
    """
    if isinstance(value, dict):
        return {hide_in_reply(name): hide_in_reply(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [hide_in_reply(inner) for inner in value]
    if isinstance(value, str):
        return hide_key(value.encode(errors="replace").decode())
    return value


def printable(text: str, length: int = 300) -> str:
    """Text of an endpoint for a message: one line, without the key and without a terminal's control characters."""
    kept = [char if char.isprintable() else " " for char in hide_key(text)]
    return " ".join("".join(kept).split())[:length]


# ---- one request ---------------------------------------------------------------------------------------------------


def import_openai():
    """The optional package and the HTTP client it brings. SystemExit with the command if it is not there."""
    try:
        import httpx2
        import openai
    except ImportError:
        raise SystemExit("Asking a language model needs the openai package: pip install 'openai>=3.50'.") from None
    return httpx2, openai


def connect(endpoint: Endpoint):
    """An openai client that follows no redirect, which would carry the key to another host, and has both limits."""
    httpx2, openai = import_openai()
    key = read_key()

    class Limited(httpx2.AsyncHTTPTransport):
        """Reads whole replies: openai's own time-out starts anew with every byte, and it knows no size limit."""

        async def handle_async_request(self, request):
            if not key:
                del request.headers["Authorization"]
            try:
                async with asyncio.timeout(endpoint.timeout):
                    reply = await super().handle_async_request(request)
                    data = await self.read(reply, request)
            except TimeoutError:
                reason = f"no whole reply in {endpoint.timeout:g} seconds"
                say(reason)
                raise httpx2.ReadTimeout(reason, request=request) from None
            except httpx2.TransportError as error:
                reason = f"{type(error).__name__}: {str(error) or 'the connection was closed'}"
                say(reason)
                raise type(error)(reason, request=request) from None
            if reply.status_code in (408, 409, 429) or reply.status_code >= 500:
                after = reply.headers.get("Retry-After")
                say(f"HTTP {reply.status_code}" + (f", Retry-After {after}" if after else ""))
            return httpx2.Response(reply.status_code, headers=reply.headers, content=data, request=request)

        async def read(self, reply, request) -> bytes:
            if reply.headers.get("Content-Encoding", "identity") != "identity":
                raise httpx2.ReadError("the reply is compressed, which was not asked for", request=request)
            data = bytearray()
            async for chunk in reply.stream:
                data += chunk
                if len(data) > LARGEST_REPLY:
                    raise httpx2.ReadError(f"the reply is larger than {LARGEST_REPLY} bytes", request=request)
            return bytes(data)

    return openai.AsyncOpenAI(
        api_key=key or "none",  # openai insists on one
        base_url=endpoint.url.rstrip("/").removesuffix("/chat/completions"),
        max_retries=endpoint.tries - 1,
        default_headers={"Accept-Encoding": "identity"},
        http_client=httpx2.AsyncClient(
            transport=Limited(proxy=proxy_of(endpoint.url)),
            follow_redirects=False,
            timeout=endpoint.timeout,
        ),
    )


def proxy_of(url: str) -> str | None:
    """The proxy that HTTPS_PROXY, HTTP_PROXY and NO_PROXY name for this address; a transport of our own has none."""
    parts = urllib.parse.urlsplit(url)
    if urllib.request.proxy_bypass(parts.netloc):
        return None
    return urllib.request.getproxies().get(parts.scheme)


def say(reason: str) -> None:
    """A failed attempt, so that a bar that stands still has an explanation."""
    print(f"no reply yet: {printable(reason)}", flush=True)


def reply_text(reply) -> str:
    """The text of a reply in the OpenAI layout; ValueError when there is none."""
    try:
        text = reply["choices"][0]["message"]["content"]
    except (KeyError, IndexError, TypeError) as error:
        raise ValueError(f"no choices[0].message.content in {str(reply)[:120]}") from error
    if not isinstance(text, str):
        raise ValueError(f"the content is {text!r}, not a text")
    return text


async def ask(client, body: dict, check: Callable[[str], object], tries: int) -> dict:
    """One reply that `check` does not refuse (ValueError). NoReply after as many tries as allowed."""
    import openai

    for attempt in range(tries):
        try:
            raw = await client.chat.completions.with_raw_response.create(**body)
            reply = hide_in_reply(json.loads(raw.http_response.content))
            check(reply_text(reply))
            return reply
        except openai.APIStatusError as error:
            detail = printable(error.response.text)
            if error.status_code in (408, 409, 429) or error.status_code >= 500:
                raise NoReply(
                    f"after {tries} tries, last HTTP {error.status_code}; run again. It said: {detail}"
                ) from None
            raise NoReply(f"HTTP {error.status_code}; check URL, model and {KEY_VARIABLE}. It said: {detail}") from None
        except openai.APIConnectionError as error:
            raise NoReply(f"after {tries} tries, last {printable(str(error.__cause__ or error))}; run again") from None
        except (ValueError, RecursionError) as error:  # not JSON, no text, or one that cannot be read
            reason = f"a reply that cannot be used ({printable(str(error))})"
            say(f"{reason}, try {attempt + 1} of {tries}")
    raise NoReply(f"after {tries} tries, last {reason}; run again")


# ---- all requests --------------------------------------------------------------------------------------------------


def ask_all(requests: dict[str, dict], path: str, check: Callable[[str], object], endpoint: Endpoint) -> list[dict]:
    """One reply per request body, saved to `path` after each; a second run asks only for what is missing.

    A saved reply is the endpoint's own JSON plus its key and the request's hash, so that a file made from other
    answers, another prompt or another model is refused, not scored.
    """
    if endpoint.url:
        check_endpoint(endpoint.url)
    marks = {key: {"key": key, "request_sha256": body_hash(body)} for key, body in requests.items()}
    saved = read_saved(path, marks, endpoint.model)
    missing = [key for key in requests if key not in saved]
    if missing and not endpoint.url:
        raise SystemExit(f"{path}: {len(missing)} of {len(requests)} replies are missing: {missing[:3]}; ask for them.")

    def save(key: str, reply: dict) -> None:
        saved[key] = {**reply, **marks[key], "request_model": endpoint.model}
        files.write_json(path, [saved[key] for key in requests if key in saved])

    if missing:
        files.write_json(path, [saved[key] for key in requests if key in saved])  # a place where nothing can be kept
        asyncio.run(ask_missing({key: requests[key] for key in missing}, check, endpoint, save, len(saved)))
    return [saved[key] for key in requests]


def check_endpoint(url: str) -> None:
    """SystemExit if nothing can be asked there: a wrong address, an odd key, a package that is not installed."""
    if not url.startswith(("http://", "https://")) or not url.isprintable() or " " in url:
        raise SystemExit(
            f"{printable(url)}: the endpoint must start with http:// or https://, such as https://host/v1, and hold "
            "no blank."
        )
    try:
        parts = urllib.parse.urlsplit(url)
        port = parts.port
    except ValueError as error:
        raise SystemExit(f"{printable(url)}: no address of an endpoint ({error}).") from None
    if not parts.hostname or port == 0:
        raise SystemExit(f"{printable(url)}: the endpoint has no host, such as https://host/v1.")
    if parts.username or parts.query:  # not shown: it may be a password
        raise SystemExit(f"The endpoint's address must have no user and no ?query; a key goes into {KEY_VARIABLE}.")
    read_key()
    proxy = proxy_of(url)
    if proxy and not proxy.startswith(("http://", "https://")):
        raise SystemExit(f"{parts.scheme.upper()}_PROXY is not the http:// or https:// address of a proxy; correct it.")
    httpx2, _ = import_openai()
    try:
        httpx2.create_ssl_context()
    except OSError as error:
        raise SystemExit(
            f"SSL_CERT_FILE: {error.strerror}; it must name the file of certificates, or be unset."
        ) from None


def body_hash(body: dict) -> str:
    """Of what is asked; the model is compared by its name."""
    return files.sha256(json.dumps({**body, "model": None}, sort_keys=True).encode())


def read_saved(path: str, marks: dict[str, dict], model: str | None) -> dict[str, dict]:
    """key -> saved reply. SystemExit if one is for another request or from another model."""
    saved = {}
    for reply in files.read_json(path, list) if Path(path).exists() else []:
        if not isinstance(reply, dict):
            raise SystemExit(f"{path}: a reply is {str(reply)[:60]!r}, not a JSON object; move the file to ask anew.")
        key = reply.get("key")
        same = key in marks and marks[key].items() <= reply.items()
        if not same or model not in (None, reply.get("request_model")):
            raise SystemExit(f"{path}: reply {key} is for other answers, prompt or model; move the file to ask anew.")
        saved[key] = reply
    return saved


async def ask_missing(
    requests: dict[str, dict],
    check: Callable[[str], object],
    endpoint: Endpoint,
    save: Callable[[str, dict], None],
    done: int,
) -> None:
    """Asks `parallel` at once. After a request that fails no new one is sent; those under way are kept."""
    waiting = list(requests)
    failed = []

    async def worker() -> None:
        while waiting and not failed:
            key = waiting.pop(0)
            try:
                save(key, await ask(client, requests[key], check, endpoint.tries))
                bar.update()
            except NoReply as error:
                failed.append(f"{endpoint.url}: no usable reply for {key}: {error}.")

    async with connect(endpoint) as client:
        with progress(what="replies", total=done + len(requests), done=done) as bar:
            await asyncio.gather(*(worker() for _ in range(endpoint.parallel)))
    if failed:
        raise SystemExit(hide_key(failed[0]))

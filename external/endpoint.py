"""Asking a language model behind an OpenAI-compatible endpoint."""

import http.client
import json
import os
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path

from external.files import read_rows, sha256, write_json


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *args):  # a redirect would carry the key to another host
        return None


def _key() -> str:
    return os.environ.get("OPENAI_API_KEY", "").strip()


def _hide_key(text: str) -> str:
    # an endpoint that echoes its request must not bring the key into a file or a message
    return text.replace(_key(), "[key]") if len(_key()) >= 8 else text


def reply_text(reply) -> str:
    """The text of a reply in the OpenAI layout; ValueError when there is none."""
    try:
        text = reply["choices"][0]["message"]["content"]
    except (KeyError, IndexError, TypeError) as error:
        raise ValueError(f"no choices[0].message.content in {str(reply)[:120]}") from error
    if not isinstance(text, str):
        raise ValueError(f"the content is {text!r}, not a text")
    return text


def _post(url: str, body: dict, timeout: float) -> dict:
    headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {_key()}"} if _key() else {})
    request = urllib.request.Request(url, json.dumps(body).encode(), headers)
    with urllib.request.build_opener(_NoRedirect).open(request, timeout=timeout) as response:
        return json.loads(_hide_key(response.read().decode("utf-8")))


def _ask(key: str, body: dict, check: Callable[[str], object], args) -> dict:
    """One reply that `check` does not refuse (ValueError), after as many tries as allowed."""
    url = args.url.rstrip("/").removesuffix("/chat/completions") + "/chat/completions"
    for attempt in range(args.tries):
        wait, started = args.backoff * 2**attempt, time.monotonic()
        try:
            reply = _post(url, body, args.timeout)
            check(reply_text(reply))
            time.sleep(max(0.0, started + 1 / args.rate - time.monotonic()))
            return reply
        except urllib.error.HTTPError as error:
            reason = f"HTTP {error.code} {error.reason}"
            if error.code not in (408, 409, 429) and error.code < 500:
                detail = _hide_key(error.read(300).decode("utf-8", "replace"))
                raise SystemExit(f"{url}: {reason}; check URL, model and OPENAI_API_KEY. It said: {detail}") from error
            after = error.headers.get("Retry-After", "")
            wait = max(wait, float(after)) if after.replace(".", "", 1).isdigit() else wait
        except (OSError, http.client.HTTPException, ValueError) as error:  # time-out, refused, half a body, garbage
            reason = f"{type(error).__name__}: {error}"
        if attempt + 1 < args.tries:
            time.sleep(max(min(wait, 120.0), started + 1 / args.rate - time.monotonic()))
    raise SystemExit(f"{url}: no usable reply for {key} after {args.tries} tries, last {_hide_key(reason)}; run again.")


def ask_all(requests: dict[str, dict], path: str, check: Callable[[str], object], args) -> list[dict]:
    """One reply per request body, saved to `path` after each; a second run asks only for what is missing.

    A saved reply is the endpoint's own JSON plus its key and the request's hash, so that a file made from other
    answers, another prompt or another model is refused, not scored. `args` holds `url`, `model` and the flags of
    `llm_flags`; without a url nothing is asked and every reply has to be there, of whichever model.
    """
    from tqdm import tqdm

    if args.url and not args.url.startswith(("http://", "https://")):
        raise SystemExit(f"{args.url}: the endpoint must start with http:// or https://, such as https://host/v1.")
    bodies = {key: json.dumps({**body, "model": None}, sort_keys=True) for key, body in requests.items()}
    marks = {key: {"key": key, "request_sha256": sha256(body.encode())} for key, body in bodies.items()}
    saved = read_rows(path) if Path(path).exists() else []
    saved = {row.get("key"): {name: row[name] for name in row if name != "_where"} for row in saved}
    for key, reply in saved.items():
        same = key in marks and marks[key].items() <= reply.items()
        if not same or args.model not in (None, reply.get("request_model")):
            raise SystemExit(f"{path}: reply {key} is for other answers, prompt or model; move the file to ask anew.")
    missing = [key for key in requests if key not in saved]
    if missing and not args.url:
        raise SystemExit(f"{path}: {len(missing)} of {len(requests)} replies are missing: {missing[:3]}; ask for them.")
    for key in tqdm(missing, desc="asking", unit="reply", disable=None):  # None: a bar on a terminal, not in a log
        saved[key] = {**_ask(key, requests[key], check, args), **marks[key], "request_model": args.model}
        write_json(path, [saved[key] for key in requests if key in saved])
    return [saved[key] for key in requests]


def llm_flags(parser) -> None:
    parser.add_argument("--rate", type=float, default=2.0, help="requests per second at most")
    parser.add_argument("--tries", type=int, default=8, help="attempts per reply before the run ends")
    parser.add_argument("--timeout", type=float, default=120.0, help="seconds to wait for one reply")
    parser.add_argument("--backoff", type=float, default=1.0, help="seconds before the second try, doubled each time")

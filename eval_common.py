"""What the benchmark scorers share: answer files, bootstrap intervals, the form of a result, asking a language model.

Not from a paper. Deviations: none. Run: imported by eval_chair.py, eval_pope.py, eval_amber.py and eval_mmhal.py.

Nothing here may shrink a denominator in silence: a row that cannot be read or matched ends the run with the file, the
row and what to do. A scorer hands over numbers per row (`Part`), so that a value, its interval and the paired
difference of two runs come from one formula of their sums.
"""

import argparse
import hashlib
import http.client
import json
import os
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

SEED, RESAMPLES = 0, 1000  # of every bootstrap
# ours; POPE, Object HalBench and LLaVA; AMBER; COCO caption files; a filled MMHal template. The first in a row counts.
ANSWER_KEYS = ("answer", "text", "response", "caption", "model_answer")


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def read_text(path: str | Path) -> str:
    if not Path(path).is_file():
        raise SystemExit(f"{path}: no such file.")
    data = Path(path).read_bytes()
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise SystemExit(f"{path}:{line}: not UTF-8 (byte {error.start}); save the file as UTF-8.") from error


def _unique_keys(pairs: list[tuple]) -> dict:
    # json keeps the last of two equal keys, which would drop an answer without a word
    if len(dict(pairs)) < len(pairs):
        raise ValueError(f"a key stands twice in one object: {sorted(key for key, _ in pairs)[:8]}")
    return dict(pairs)


def read_json(path: str | Path, text: str | None = None, where: str | None = None):
    """A JSON file, or `text` (answers) that stands at `where` in it."""
    try:
        return json.loads(read_text(path)) if text is None else json.loads(text, object_pairs_hook=_unique_keys)
    except ValueError as error:
        raise SystemExit(f"{where or path}: broken JSON ({error}); was the file cut off, or edited by hand?") from error


def read_rows(path: str | Path) -> list[dict]:
    """Rows of JSON Lines, of a JSON list, or of {"imgToEval": {image_id: row}}; `_where` is added for messages."""
    text = read_text(path)
    lines = [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    first = lines[0][1].strip() if lines else ""
    if first.startswith("[") or first == "{" or '"imgToEval"' in first:
        data = read_json(path, text)
        data = list(data.get("imgToEval", {}).values()) if isinstance(data, dict) else data
        rows = [(f"{path} row {i}", row) for i, row in enumerate(data)]
    else:
        rows = [(f"{path}:{number}", read_json(path, line, f"{path}:{number}")) for number, line in lines]
    if not rows:
        raise SystemExit(f"{path}: no rows; it must be JSON Lines, a JSON list of rows, or an object with `imgToEval`.")
    for where, row in rows:
        if not isinstance(row, dict):
            raise SystemExit(f"{where}: a row must be a JSON object, this is {str(row)[:60]!r}.")
    return [{**row, "_where": where} for where, row in rows]


def read_answers(path: str | Path) -> list[dict]:
    """Rows of an answer file, ours or an official layout, with the text under `answer`. Empty answers stay in."""
    rows = read_rows(path)
    for row in rows:
        key = next((key for key in ANSWER_KEYS if key in row), "")
        if not isinstance(row.get(key), str):
            found = f"`{key}` is {row[key]!r}, not a text" if key else "no answer"
            raise SystemExit(f"{row['_where']}: {found}; a row needs a text in one of {', '.join(ANSWER_KEYS)}.")
        row["answer"] = row[key]
    return rows


def word_forms(table: str) -> dict[str, str]:
    """Word -> singular or lemma, a table of assets/."""
    return read_json(Path(__file__).parent / "assets" / table)["forms"]


def check_unique(ids: list, rows: list[dict], name: str) -> dict:
    """id -> row. SystemExit naming both places if an id is there twice."""
    found = {}
    for key, row in zip(ids, rows, strict=True):
        if key in found:
            first = found[key]["_where"]
            raise SystemExit(f"{row['_where']}: {name} {key} was answered at {first} already; keep one of them.")
        found[key] = row
    return found


def write_rows(path: str | Path, rows: list, indent: int | None = None) -> None:
    """JSON Lines. Atomic: a killed run leaves the old file or the new one, never half of it."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    lines = (json.dumps(row, indent=indent, ensure_ascii=False) + "\n" for row in rows)
    Path(f"{path}.part").write_text("".join(lines), encoding="utf-8")
    os.replace(f"{path}.part", path)


def write_json(path: str | Path, data) -> None:
    write_rows(path, [data], indent=1)


class Part(NamedTuple):
    """Rows that are resampled together: ids, the numbers of each by name, the formula from their sums to metrics."""

    ids: list
    rows: list[dict]
    metrics: Callable[[dict], dict]


def ratio(a, b):
    """a / b for numbers or arrays, not-a-number where b is 0 (None in a result)."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(np.equal(b, 0), np.nan, np.divide(a, b))[()]


def sums(rows: list[dict]) -> dict:
    return {name: sum(row[name] for row in rows) for name in rows[0]}


def values(part: Part) -> dict[str, float | None]:
    metrics = part.metrics(sums(part.rows))
    return {name: None if np.isnan(value) else float(value) for name, value in metrics.items()}


def bootstrap(part: Part, seed: int = SEED) -> dict[str, np.ndarray]:
    """Metrics of RESAMPLES draws of n rows with replacement. Equal n and seed draw equal rows: that is the pairing."""
    table = np.array([list(row.values()) for row in part.rows], dtype=np.float64).T  # (n, sums) -> (sums, n)
    generator, n = np.random.default_rng(seed), table.shape[1]
    draws = [table @ np.bincount(generator.integers(n, size=n), minlength=n) for _ in range(RESAMPLES)]
    return part.metrics(dict(zip(part.rows[0], np.array(draws).T, strict=True)))


def interval(samples: np.ndarray) -> list[float] | None:
    """Middle 95 % of the resampled values; None when no resample has a value."""
    samples = samples[~np.isnan(samples)]
    return [float(x) for x in np.percentile(samples, [2.5, 97.5])] if len(samples) else None


def summary(part: Part) -> dict:
    return {"metrics": values(part), "intervals": {name: interval(x) for name, x in bootstrap(part).items()}}


def compare(a: Part, b: Part) -> dict:
    """B minus A on the same questions, with paired intervals."""
    if set(a.ids) != set(b.ids):
        odd = sorted(set(a.ids) ^ set(b.ids), key=str)
        raise SystemExit(f"--compare needs the same questions in A and B; {len(odd)} are in one only: {odd[:3]}.")
    row_of = dict(zip(b.ids, b.rows, strict=True))
    b = b._replace(rows=[row_of[key] for key in a.ids])
    va, vb, sa, sb, result = values(a), values(b), bootstrap(a), bootstrap(b), {}
    for name in va:
        difference = None if None in (va[name], vb[name]) else vb[name] - va[name]
        ends = interval(sb[name] - sa[name])
        result[name] = {"a": va[name], "b": vb[name], "difference": difference, "interval": ends}
    return result


def header(scorer: str, protocol: str, paths: list[str], rows: list[dict], n_expected: int | None = None) -> dict:
    """What all results share, None where the files do not say; `generation` is what generate.py wrote beside them."""
    n, tokens, ends = len(rows), [r.get("n_tokens") for r in rows], [r.get("finish") for r in rows]
    beside = [Path(path).with_suffix(".settings.json") for path in paths]
    settings = [read_json(path) if path.is_file() else None for path in beside]
    empty = sum(not r["answer"].strip() for r in rows)
    warnings = [f"{empty} empty answers, counted like any other"] if empty else []
    if n_expected not in (None, n):
        warnings.append(f"{n} rows, the official set has {n_expected}: not comparable with published numbers")
    return {
        "scorer": scorer, "protocol": protocol,
        "answers": [{"path": str(path), "sha256": sha256(Path(path).read_bytes())} for path in paths],
        "n": n, "n_expected": n_expected, "n_empty": empty,
        "mean_words": sum(len(r["answer"].split()) for r in rows) / n if n else None,
        "mean_tokens": None if None in tokens or not n else sum(tokens) / n,
        "share_at_token_limit": None if None in ends or not n else ends.count("length") / n,
        "generation": settings[0] if len(settings) == 1 else settings,
        "bootstrap": {"seed": SEED, "resamples": RESAMPLES, "level": 0.95, "unit": "rows"}, "warnings": warnings,
    }  # fmt: skip


def show(value) -> str:
    return "-" if value is None else f"{value:.4f}" if isinstance(value, float) else str(value)


def report(scored: list[tuple[dict, list[Part]]], json_path: str | None) -> None:
    """The table for the terminal and the JSON file, of one result or of the comparison of two."""
    for result, _ in scored:
        print(f"{result['scorer']} | {result['protocol']} | {[file['path'] for file in result['answers']]}")
        names = ("n", "n_expected", "n_empty", "mean_words", "mean_tokens", "share_at_token_limit")
        print(" | ".join(f"{name} {show(result[name])}" for name in names))
        for name, value in result["metrics"].items():
            print(f"{name:32s} {show(value):>10s}   [{', '.join(map(show, result['intervals'].get(name) or []))}]")
        print("".join(f"warning: {warning}\n" for warning in result["warnings"]), end="")
    result = scored[0][0]
    if len(scored) == 2:
        (a, parts_a), (b, parts_b) = scored
        if len(parts_a) != len(parts_b):
            raise SystemExit("--compare needs the same kinds of questions in A and B.")
        rows = [compare(*pair) for pair in zip(parts_a, parts_b, strict=True)]
        result = {"a": a, "b": b, "compare": {name: row for part in rows for name, row in part.items()}}
        for name, row in result["compare"].items():
            ends = ", ".join(map(show, row["interval"] or []))
            print(f"{name:32s} A {show(row['a'])}  B {show(row['b'])}  B - A {show(row['difference'])}   [{ends}]")
    print(f"[ ]: 95 % bootstrap interval over rows, seed {SEED}, {RESAMPLES} resamples")
    if json_path:
        write_json(json_path, result)


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


def parser_of(doc: str, source: str, what: str, compared: str, **more) -> argparse.ArgumentParser:
    """A scorer's flags: its source of answers or --compare of two, and --json."""
    parser = argparse.ArgumentParser(description=doc.split("\n")[0])
    either = parser.add_mutually_exclusive_group(required=True)
    either.add_argument(source, help=what, **more)
    either.add_argument("--compare", nargs=2, metavar=("A", "B"), help=f"two {compared}: differences B - A")
    parser.add_argument("--json", help="file for the result")
    return parser


def llm_flags(parser) -> None:
    parser.add_argument("--rate", type=float, default=2.0, help="requests per second at most")
    parser.add_argument("--tries", type=int, default=8, help="attempts per reply before the run ends")
    parser.add_argument("--timeout", type=float, default=120.0, help="seconds to wait for one reply")
    parser.add_argument("--backoff", type=float, default=1.0, help="seconds before the second try, doubled each time")

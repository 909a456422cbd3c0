"""A small OpenAI-compatible endpoint on 127.0.0.1 that can also misbehave in the ways real ones do."""

import contextlib
import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace
from unittest import mock

from external.endpoint import Endpoint


def endpoint_at(url: str | None, **changes) -> Endpoint:
    """An endpoint that is asked for one reply at a time, so that a script of behaviours is played in order."""
    return Endpoint(**{"url": url, "model": "m", "tries": 9, "timeout": 5.0, "parallel": 1} | changes)


@contextlib.contextmanager
def serve(script=(), answer=lambda body: "fine"):
    """Plays one behaviour of `script` per request, then answers; yields url and the requests it has seen.

    Behaviours: ok, timeout, drip (a byte now and then), flood (more than fits), garbage, half, no choices, null, echo
    (of all headers), or a status with headers such as (429, {"Retry-After": "1"}).
    """
    seen, script = [], list(script)

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *args):
            pass

        def send(self, status: int, data: bytes, headers: dict, length: int | None = None) -> None:
            self.send_response(status)
            for name, value in {"Content-Length": str(length or len(data)), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(data)

        def misbehave(self, behaviour: str) -> None:
            if behaviour == "drip headers":
                for _ in range(40):
                    self.wfile.write(b"H")
                    self.wfile.flush()
                    time.sleep(0.1)
                return
            self.send(200, b"{", {}, 2**31)
            for _ in range(40):
                self.wfile.write(b" " if behaviour == "drip" else b" " * 2**20)
                self.wfile.flush()
                time.sleep(0.1 if behaviour == "drip" else 0)

        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            key = self.headers.get("Authorization")
            seen.append(SimpleNamespace(time=time.monotonic(), path=self.path, body=body, authorization=key))
            behaviour = script.pop(0) if script else "ok"
            if isinstance(behaviour, tuple):
                status, headers = behaviour
                self.send(status, f"refused, your key is {key}".encode(), headers)
                return
            content = None if behaviour == "null" else key if behaviour == "echo" else answer(body)
            reply = {"id": "x", "model": "served", "choices": [{"index": 0, "message": {"content": content}}]}
            data = json.dumps(reply).encode()
            if behaviour == "timeout":
                time.sleep(0.6)
            if behaviour == "garbage":
                self.send(200, b"<html>busy</html>\xff", {})
            elif behaviour == "half":
                self.send(200, data[: len(data) // 2], {}, len(data))
            elif behaviour == "no choices":
                self.send(200, b'{"choices": []}', {})
            elif behaviour in ("drip", "drip headers", "flood"):
                with contextlib.suppress(ConnectionError):
                    self.misbehave(behaviour)
            else:
                with contextlib.suppress(ConnectionError):  # the client has gone after its time-out
                    self.send(200, data, {})

        def do_GET(self):  # where a followed redirect would arrive
            seen.append(SimpleNamespace(time=time.monotonic(), path=self.path, body=None, authorization=None))
            self.send(200, b"{}", {})

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    try:
        with mock.patch("openai._base_client.INITIAL_RETRY_DELAY", 0.0):  # retries come at once
            yield SimpleNamespace(url=f"http://127.0.0.1:{server.server_port}/v1", seen=seen)
    finally:
        server.shutdown()
        server.server_close()

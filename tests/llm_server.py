"""A small OpenAI-compatible endpoint on 127.0.0.1 that can also misbehave in the ways real ones do."""

import contextlib
import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace


def flags(url: str, **changes) -> SimpleNamespace:
    """What endpoint.ask_all reads from the command line, without waits."""
    return SimpleNamespace(
        **{"url": url, "model": "m", "rate": 1e6, "tries": 9, "timeout": 5.0, "backoff": 0.0} | changes
    )


@contextlib.contextmanager
def serve(script=(), answer=lambda body: "fine"):
    """Plays one behaviour of `script` per request, then answers; yields url and the requests it has seen.

    Behaviours: ok, timeout, garbage, half, no choices, null, echo (of all headers), or a status with headers such as
    (429, {"Retry-After": "1"}).
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

        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            key = self.headers.get("Authorization")
            seen.append(SimpleNamespace(time=time.monotonic(), path=self.path, body=body, authorization=key))
            behaviour = script.pop(0) if script else "ok"
            content = None if behaviour == "null" else key if behaviour == "echo" else answer(body)
            reply = {"id": "x", "model": "served", "choices": [{"index": 0, "message": {"content": content}}]}
            data = json.dumps(reply).encode()
            if behaviour == "timeout":
                time.sleep(0.6)
            if isinstance(behaviour, tuple):
                status, headers = behaviour
                self.send(status, f"refused, your key is {key}".encode(), headers)
            elif behaviour == "garbage":
                self.send(200, b"<html>busy</html>\xff", {})
            elif behaviour == "half":
                self.send(200, data[: len(data) // 2], {}, len(data))
            elif behaviour == "no choices":
                self.send(200, b'{"choices": []}', {})
            else:
                with contextlib.suppress(ConnectionError):  # the client has gone after its time-out
                    self.send(200, data, {})

        def do_GET(self):  # where a followed redirect would arrive
            seen.append(SimpleNamespace(time=time.monotonic(), path=self.path, body=None, authorization=None))
            self.send(200, b"{}", {})

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    try:
        yield SimpleNamespace(url=f"http://127.0.0.1:{server.server_port}/v1", seen=seen)
    finally:
        server.shutdown()
        server.server_close()

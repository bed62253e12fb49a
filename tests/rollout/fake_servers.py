"""Servers that answer as vLLM's do, made to fail at will: the faults that a real one cannot be given exactly."""

import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from megatron_dgpo.rollout.guard import EXIT

SECRET = "secret"


class FakeServer(ThreadingHTTPServer):
    """Its response is a function of the seed. `behaviour` of a request: ok, drop (the connection), fail (500), refuse
    (400), hang (until it is told to end) or slow (a second)."""

    daemon_threads = True
    request_queue_size = 256

    def __init__(self, version=0, behaviour="ok"):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.address = f"http://127.0.0.1:{self.server_port}"
        self.versions = [[version, 1.0]]
        """[version, share of a response's tokens that it makes], the latest last."""
        self.behaviour = behaviour
        self.asked: list[dict] = []
        self.under_way = self.most_under_way = 0
        self.made = 0
        self.ended = threading.Event()
        self.lock = threading.Lock()
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()

    def serve_version(self, version):
        self.versions = [[version, 1.0]]

    @property
    def seeds(self):
        return [body["sampling_params"]["seed"] for body in self.asked]

    def handle_error(self, request, client_address):
        """Whoever asked has gone: nothing to print."""

    def close(self):
        self.ended.set()
        self.shutdown()
        self.server_close()


def fake_tokens(seed):
    return [3 + (seed + seed // 1000 * 7 + place) % 50 for place in range(4 + seed % 5)]


class _Handler(BaseHTTPRequestHandler):
    server: FakeServer

    def do_GET(self):
        if self.server.behaviour == "hang":
            # Its API answers, its engine does not.
            self._answer({"is_paused": False} if self.path == "/is_paused" else None, b"")
            return
        counter = f'vllm:generation_tokens_total{{model_name="m"}} {self.server.made}.0\n'.encode()
        self._answer({"is_paused": False} if self.path == "/is_paused" else None, counter)

    def do_POST(self):
        length = int(self.headers.get("Content-Length", 0))
        raw = self.rfile.read(length)
        if len(raw) < length:
            # Whoever asked has gone in the middle of asking.
            self.close_connection = True
            return
        body = json.loads(raw or "{}")
        assert self.headers["Authorization"] == f"Bearer {SECRET}"
        if self.path == EXIT:
            self.server.ended.set()
            self._answer({}, b"")
            return
        server, behaviour = self.server, self.server.behaviour
        with server.lock:
            server.asked.append(body)
            server.under_way += 1
            server.most_under_way = max(server.most_under_way, server.under_way)
        time.sleep(1.0 if behaviour == "slow" else 0.01)
        if behaviour == "hang":
            server.ended.wait(60)
        with server.lock:
            server.under_way -= 1
        if behaviour in ("drop", "hang"):
            self.close_connection = True
        elif behaviour in ("fail", "refuse"):
            self.send_response(500 if behaviour == "fail" else 400)
            self.end_headers()
            self.wfile.write(b"EngineCore encountered an issue")
        else:
            self._answer({"choices": [self._choice(body)]}, b"")

    def _choice(self, body):
        seed = body["sampling_params"]["seed"]
        tokens = fake_tokens(seed)
        self.server.made += len(tokens)
        spans, start = [], 0
        for number, (version, share) in enumerate(self.server.versions, 1):
            end = len(tokens) if number == len(self.server.versions) else start + max(1, int(share * len(tokens)))
            spans.append({"version": str(version), "start": start, "end": end})
            start = end
        return {
            "index": 0,
            "token_ids": tokens,
            "finish_reason": "stop",
            "logprobs": {"content": [{"logprob": -token / 8} for token in tokens]},
            "weight_versions": spans,
        }

    def _answer(self, content, raw):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(raw if content is None else json.dumps(content).encode())

    def log_message(self, *_):
        pass

"""The lock on a vLLM server: vLLM's own --api-key leaves the endpoints that change weights or run code open."""

from __future__ import annotations

import hmac
import os

SECRET = "MEGATRON_DGPO_SECRET"
_OPEN = ("/health",)


class SecretMiddleware:
    """ASGI middleware: every path but /health needs `Authorization: Bearer <MEGATRON_DGPO_SECRET>`."""

    def __init__(self, app) -> None:
        secret = os.environ.get(SECRET, "")
        if not secret:
            raise RuntimeError(f"{SECRET} is not set: the server refuses to run unguarded")
        self._app = app
        self._expected = f"Bearer {secret}".encode()

    async def __call__(self, scope, receive, send) -> None:
        if scope["type"] in ("http", "websocket") and scope["path"] not in _OPEN:
            given = dict(scope["headers"]).get(b"authorization", b"")
            if not hmac.compare_digest(given, self._expected):
                await _refuse(scope, send)
                return
        await self._app(scope, receive, send)


async def _refuse(scope, send) -> None:
    if scope["type"] == "websocket":
        await send({"type": "websocket.close", "code": 1008})
        return
    body = b'{"error": "missing or wrong secret"}'
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": 401, "headers": headers})
    await send({"type": "http.response.body", "body": body})

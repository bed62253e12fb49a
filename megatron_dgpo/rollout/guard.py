"""The lock on a vLLM server: vLLM's own --api-key leaves the endpoints that change weights or run code open.

And its end: behind the lock is one path more than vLLM has.
"""

from __future__ import annotations

import asyncio
import hmac
import os

SECRET = "MEGATRON_DGPO_SECRET"
EXIT = "/megatron_dgpo/exit"
"""POST ends the API process at once, unanswered, whatever its engine does; what is left is its launcher's."""
_OPEN = ("/health",)
_LOOK_S = 1.0


class SecretMiddleware:
    """ASGI middleware: every path but /health needs `Authorization: Bearer <MEGATRON_DGPO_SECRET>`."""

    def __init__(self, app) -> None:
        secret = os.environ.get(SECRET, "")
        if not secret:
            raise RuntimeError(f"{SECRET} is not set: the server refuses to run unguarded")
        self._app = app
        self._expected = f"Bearer {secret}".encode()
        self._watch: asyncio.Task | None = None

    async def __call__(self, scope, receive, send) -> None:
        if scope["type"] in ("http", "websocket") and scope["path"] not in _OPEN:
            given = dict(scope["headers"]).get(b"authorization", b"")
            if not hmac.compare_digest(given, self._expected):
                await _refuse(scope, send)
                return
            if scope["path"] == EXIT and scope.get("method") == "POST":
                os._exit(1)
        if self._watch is None and scope["type"] == "http":
            self._watch = asyncio.create_task(_end_with_the_engine(scope["app"].state))
        await self._app(scope, receive, send)


async def _end_with_the_engine(state) -> None:
    """vLLM ends a server whose engine has died, too, but first waits for all requests, those that only the engine could
    answer among them: one that is under way then keeps the server, which listens no more, for ever."""
    while True:
        await asyncio.sleep(_LOOK_S)
        if getattr(state, "engine_client", None) is not None and state.engine_client.errored:
            os._exit(1)


async def _refuse(scope, send) -> None:
    if scope["type"] == "websocket":
        await send({"type": "websocket.close", "code": 1008})
        return
    body = b'{"error": "missing or wrong secret"}'
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": 401, "headers": headers})
    await send({"type": "http.response.body", "body": body})

"""The guard before a server: who may ask, and that nobody waits for an engine that has died."""

import asyncio
import os
import types

import pytest

from megatron_dgpo.rollout import guard


@pytest.fixture
def ask(monkeypatch):
    """(status of a request's answer, statuses with which the process would have ended)."""
    monkeypatch.setenv(guard.SECRET, "right")
    monkeypatch.setattr(guard, "_LOOK_S", 0.01)

    def ask(path="/generate", secret="right", method="POST", engine=None):
        ends, sent = [], []
        monkeypatch.setattr(os, "_exit", ends.append)

        async def app(scope, receive, send):
            # An answer that only the engine could give.
            await asyncio.sleep(0.1)
            await send({"type": "http.response.start", "status": 200})

        async def send(message):
            sent.append(message)

        headers = [(b"authorization", f"Bearer {secret}".encode())]
        scope = {"type": "http", "path": path, "method": method, "headers": headers}
        scope["app"] = types.SimpleNamespace(state=types.SimpleNamespace(engine_client=engine))
        asyncio.run(guard.SecretMiddleware(app)(scope, None, send))
        return sent[0]["status"], set(ends)

    return ask


def test_the_secret_opens_all_and_health_needs_none(ask):
    assert ask() == (200, set()) and ask(secret="wrong") == (401, set())
    assert ask("/health", secret="", method="GET")[0] == 200 and ask("/metrics", secret="", method="GET")[0] == 401


def test_it_ends_when_asked_by_who_may(ask):
    assert ask(guard.EXIT)[1] == {1}
    assert ask(guard.EXIT, secret="wrong") == (401, set()) and ask(guard.EXIT, method="GET") == (200, set())


def test_it_ends_with_its_engine_though_requests_are_under_way(ask):
    assert ask(engine=types.SimpleNamespace(errored=True))[1] == {1}
    assert ask(engine=types.SimpleNamespace(errored=False)) == (200, set())

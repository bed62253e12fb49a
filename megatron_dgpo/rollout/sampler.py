"""One response from whichever server has the fewest requests, asked for again when that server is lost."""

from __future__ import annotations

import asyncio
import contextlib
import heapq
import itertools
import logging
import re
import time
from collections import Counter
from collections.abc import Callable, Coroutine
from typing import Any

import httpx
import msgspec

from megatron_dgpo.config import Config
from megatron_dgpo.rollout.client import CONNECT_S, ENDS, Choice, EngineError, connections
from megatron_dgpo.rollout.guard import EXIT
from megatron_dgpo.rollout.response import Prompt, Response

# A response whose servers were lost so often is what they are lost by.
_MOST_LOSSES = 10
_GENERATED = re.compile(rb"^vllm:generation_tokens_total\{.*\} ([0-9.e+]+)$", re.MULTILINE)
_LOOKS = 4
"""Times in a row that a server shows no progress before it counts as stuck."""

logger = logging.getLogger(__name__)


class _Reply(msgspec.Struct):
    """Of /inference/v1/generate: a fifth of the time that reading all of it would take."""

    choices: list[Choice]


class _LostError(Exception):
    """This server answers no more; says why."""


class Sampler:
    """Of one event loop, in which all of its methods are called; an async context manager.

    A server serves from `admit`, after an update that reached it, until it is lost: its connection breaks, its engine
    fails, it makes no token for servers.stall_timeout_s, or it answers with weights that it should no longer have.
    Whatever was under way there is asked for again elsewhere, with the same seed.
    """

    def __init__(
        self,
        config: Config,
        secret: str,
        stop_token_ids: list[int],
        sharers: int,
        updating: Callable[[], bool] = lambda: False,
        number: int = 0,
    ) -> None:
        """sharers: replicas that ask the same servers, of which this is `number`. updating: whether a weight update,
        which has limits of its own, is under way; any thread may answer."""
        self._rollout, self._servers = config.rollout, config.servers
        self._stop = stop_token_ids
        # Together not more than a server decodes at once: one that is lost takes little with it, one that returns has
        # work at once, and none waits in a server for longer than it takes to answer.
        self._most = -(-self._servers.max_concurrent // sharers)
        self._most_in_all = max(1, connections() // 2)
        self._updating = updating
        self._replica, self._replicas = number, sharers
        self._load: dict[str, int] = {}
        """{server that serves: requests under way}"""
        self._version = -1
        self._under_way: dict[str, set[asyncio.Task]] = {}
        self._waiting: list[tuple[int, int, asyncio.Future[str]]] = []
        self._number = itertools.count()
        self._headers = {"Authorization": f"Bearer {secret}"}
        self.counts: Counter[str] = Counter()
        """asked: requests; lost: those whose server went; refused: responses of weights that may not train, and wasted:
        their tokens."""

    async def __aenter__(self) -> Sampler:
        self._http = httpx.AsyncClient(
            headers=self._headers,
            # Servers drop idle connections, and a request on one that is just being dropped would look like a loss.
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=0),
            verify=httpx.create_ssl_context(trust_env=False),
            trust_env=False,
        )
        return self

    async def __aexit__(self, *_) -> None:
        await self._http.aclose()

    @property
    def serving(self) -> list[str]:
        """Addresses; may be read by any thread."""
        return list(self._load)

    def admit(self, addresses: list[str], version: int) -> None:
        """From now on these serve, and no others: their last update was checked, and brought this version."""
        for address in set(self._load) - set(addresses):
            self._drop(address, "it was not reached by the last weight update")
        self._version = version
        # With fewer requests than servers not all replicas' go to the first ones.
        first = self._replica * len(addresses) // self._replicas
        for address in addresses[first:] + addresses[:first]:
            self._load.setdefault(address, 0)
            self._under_way.setdefault(address, set())
        self._hand_out()

    async def sample(
        self, prompt: Prompt, seed: int, temperature: float, priority: int = 0, top_p: float = 1.0
    ) -> Response:
        """temperature 0 is greedy; seed: below 2**31. priority: lower ones are sent first.

        The same seed, weights and batch of requests give the same response. Waits while no server serves. Raises
        EngineError when a server refuses the request or takes longer than rollout.request_timeout_s for it.
        """
        reason = ""
        for _ in range(_MOST_LOSSES):
            address = await self._place(priority)
            oldest = self._version
            self.counts["asked"] += 1
            try:
                request = self._ask(address, prompt, seed, temperature, priority, top_p)
                response = await self._guarded(address, request)
                if response.is_of(oldest, response.newest):
                    return response
                self.counts["refused"] += 1
                self.counts["wasted"] += len(response.token_ids)
                reason = f"it answered with weights that are not of version {oldest} or later"
                # After an update that broke off it had weights of no version, and has those of the next since.
                if response.newest < oldest:
                    self._drop(address, reason)
            except _LostError as loss:
                self.counts["lost"] += 1
                reason = str(loss)
                self._drop(address, reason)
            finally:
                self._give_back(address)
        raise EngineError(f"{_MOST_LOSSES} times a server had no response to problem {prompt.index}: {reason}")

    # Places

    async def _place(self, priority: int) -> str:
        """A server that may have one more request, which is counted as its; `_give_back` it."""
        future: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        heapq.heappush(self._waiting, (priority, next(self._number), future))
        self._hand_out()
        try:
            return await future
        except asyncio.CancelledError:
            if future.done() and not future.cancelled():
                self._give_back(future.result())
            raise

    def _hand_out(self) -> None:
        while self._waiting and self._load:
            address = min(self._load, key=lambda server: self._load[server])
            if self._load[address] >= self._most or sum(self._load.values()) >= self._most_in_all:
                return
            _, _, future = heapq.heappop(self._waiting)
            if not future.done():
                self._load[address] += 1
                future.set_result(address)

    def _give_back(self, address: str) -> None:
        # Of one that was lost meanwhile, and is back, too, nothing is under way.
        if self._load.get(address):
            self._load[address] -= 1
        self._hand_out()

    # Servers

    def _drop(self, address: str, reason: str) -> None:
        """It serves no more, and whoever waits for it asks another."""
        if self._load.pop(address, None) is None:
            return
        logger.warning("%s serves no more: %s", address, reason)
        for task in self._under_way.pop(address, ()):
            task.cancel(reason)

    async def _guarded(self, address: str, request: Coroutine[Any, Any, Response]) -> Response:
        """The request's result; _LostError when the server is dropped meanwhile."""
        task = asyncio.create_task(request)
        tasks = self._under_way.get(address)
        if tasks is None:
            task.cancel()
        else:
            tasks.add(task)
        try:
            return await task
        except asyncio.CancelledError as error:
            # Whoever waits here is cancelled at the end only.
            if asyncio.current_task().cancelling():  # type: ignore[union-attr]
                task.cancel()
                raise
            raise _LostError(str(error)) from None
        finally:
            if tasks is not None:
                tasks.discard(task)

    async def _ask(
        self, address: str, prompt: Prompt, seed: int, temperature: float, priority: int, top_p: float
    ) -> Response:
        body = {
            "token_ids": prompt.token_ids,
            "priority": priority,
            "sampling_params": {
                "seed": seed,
                "temperature": temperature,
                "top_p": top_p,
                "max_tokens": self._rollout.max_response_tokens,
                "logprobs": 0,
                "stop_token_ids": self._stop,
                "detokenize": False,
            },
        }
        place, limit_s = f"{address}/inference/v1/generate", self._rollout.request_timeout_s
        try:
            reply = await self._http.post(place, json=body, timeout=httpx.Timeout(limit_s, connect=CONNECT_S))
        except httpx.ReadTimeout:
            raise EngineError(
                f"{place} did not answer within rollout.request_timeout_s={limit_s:g}: raise it where a response of "
                f"rollout.max_response_tokens={self._rollout.max_response_tokens} may take longer"
            ) from None
        except httpx.HTTPError as error:
            raise _LostError(f"the server is gone ({error!r})") from None
        if reply.status_code >= 500:
            raise _LostError(f"it answered {reply.status_code}: {reply.text[:500]}")
        if reply.status_code != 200:
            raise EngineError(f"{place} answered {reply.status_code}: {reply.text[:500]}")
        [choice] = msgspec.json.decode(reply.content, type=_Reply).choices
        if choice.finish_reason not in ENDS:
            raise _LostError(f"it ended a response with {choice.finish_reason}")
        return choice.response(prompt)

    async def watch(self) -> None:
        """For ever: end servers whose requests get no token for servers.stall_timeout_s, so that they are replaced."""
        limit_s = self._servers.stall_timeout_s
        made: dict[str, int | None] = {}
        quiet: Counter[str] = Counter()
        while True:
            # By looks, not by the clock: this process may be stopped for a while, with its servers.
            await asyncio.sleep(limit_s / _LOOKS)
            busy = [address for address, load in self._load.items() if load]
            found = dict(zip(busy, await asyncio.gather(*map(self._sign_of_life, busy)), strict=True))
            for address, now in found.items():
                same = now is None or now == made.get(address)
                quiet[address] = quiet[address] + 1 if same and not self._updating() else 0
                if quiet[address] >= _LOOKS:
                    self._drop(address, f"its requests got no token for {limit_s:g} s (servers.stall_timeout_s)")
                    with contextlib.suppress(httpx.HTTPError):
                        await self._http.post(address + EXIT, timeout=limit_s / _LOOKS)
            made, quiet = found, Counter({address: quiet[address] for address in busy})

    async def _sign_of_life(self, address: str) -> int | None:
        """What differs from last time when the server goes on: tokens that it made so far, or that it was paused."""
        patience = self._servers.stall_timeout_s / _LOOKS
        try:
            if (await self._http.get(f"{address}/is_paused", timeout=patience)).json()["is_paused"]:
                return -time.monotonic_ns()
            reply = await self._http.get(f"{address}/metrics", timeout=patience)
        except (httpx.HTTPError, ValueError, KeyError):
            return None
        return sum(int(float(value)) for value in _GENERATED.findall(reply.content))

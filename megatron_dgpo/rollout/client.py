"""The trainer's side of the vLLM servers: sampling, and the steps of a weight update, over HTTP."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import itertools
import resource
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple, TypeVar

import httpx
import msgspec

from megatron_dgpo.config import Config
from megatron_dgpo.rollout import guard, server
from megatron_dgpo.rollout.response import NO_VERSION, Prompt, Response

T = TypeVar("T")

_POLL_S = 0.25
_FILES = 2**16

# Longest waits for what has no setting, because it takes no longer with a larger model or batch: a server that is up
# answers, and pauses after the step that it is in.
CONNECT_S = 30
_HEALTH_S = 30
_CONTROL_S = 60
# A worker's weights go to fresh, pinned host memory, about 1 GB/s, or come back.
_SLEEP_S = 180
# A server that did not answer is not waited for again, but does what it was sent when it is free.
_PARTING_S = 5
FIRST = -1
"""Priority of what ranks wait for, before what is sampled to be trained on, which has 0."""

ENDS = ("stop", "length")
"""Of a response that is whole."""

BROKEN = "broken"
"""Weight version of a server whose last update broke off: some of its layers may be of the one before."""


class EngineError(RuntimeError):
    """A server did not do what it was asked; names its address and the request."""


class Span(msgspec.Struct):
    version: str
    start: int
    end: int


class Logprob(msgspec.Struct):
    logprob: float


class Logprobs(msgspec.Struct):
    content: list[Logprob]


class Choice(msgspec.Struct):
    """Of a reply of /inference/v1/generate, as far as it is read."""

    token_ids: list[int]
    finish_reason: str
    logprobs: Logprobs
    weight_versions: list[Span] | None

    def response(self, prompt: Prompt) -> Response:
        return Response(
            prompt=prompt,
            token_ids=self.token_ids,
            logprobs=[entry.logprob for entry in self.logprobs.content],
            finish_reason=self.finish_reason,
            versions=[
                [int(span.version) if span.version.isdigit() else NO_VERSION, span.start, span.end]
                for span in self.weight_versions or [Span("", 0, len(self.token_ids))]
            ],
        )


class _Call(NamedTuple):
    method: str
    address: str
    path: str
    timeout_s: float
    body: dict | None = None


class Engines:
    """Several servers used as one; a request that fails on any raises EngineError at once.

    Every method opens its connections anew and closes them: the servers drop idle ones, and a request on a connection
    that is just being dropped would look like a dead server.
    """

    def __init__(
        self,
        addresses: list[str],
        secret: str,
        request_timeout_s: float,
        stop_token_ids: list[int],
        update_timeout_s: float = 600,
        start_timeout_s: float = 600,
    ) -> None:
        """request_timeout_s: longest wait for responses; update_timeout_s: for each of the steps of a weight update;
        start_timeout_s: for each server to be up."""
        self.addresses = addresses
        self._headers = {"Authorization": f"Bearer {secret}"}
        self._timeout_s, self._update_s, self._start_s = request_timeout_s, update_timeout_s, start_timeout_s
        self._stop = stop_token_ids
        # Reading the certificates takes longer than a request.
        self._certificates = httpx.create_ssl_context(trust_env=False)

    @classmethod
    def of_run(cls, config: Config, stop_token_ids: list[int]) -> Engines:
        """Those that this rank's launcher has started or the settings name; none where rollouts are replayed.

        Nothing is asked of them yet.
        """
        replayed = config.rollout.replay is not None
        return cls(
            [] if replayed else server.addresses(config),
            "" if replayed else server.secret(),
            config.rollout.request_timeout_s,
            stop_token_ids,
            config.weight_sync.timeout_s,
            config.servers.start_timeout_s,
        )

    def only(self, addresses: list[str]) -> Engines:
        """Some of them."""
        some = copy.copy(self)
        some.addresses = addresses
        return some

    def wait_until_healthy(self) -> None:
        deadline = time.monotonic() + self._start_s
        for address in self.addresses:
            while True:
                try:
                    self._call(_Call("GET", address, "/health", _HEALTH_S))
                    break
                except EngineError:
                    pass
                if time.monotonic() > deadline:
                    raise EngineError(f"{address} was not healthy within servers.start_timeout_s={self._start_s:g}")
                time.sleep(_POLL_S)

    def generate(
        self,
        prompts: list[Prompt],
        n: int,
        temperature: float,
        max_tokens: int,
        seeds: list[int],
    ) -> list[Response]:
        """`n` responses to each prompt, consecutive, in the order of the prompts, spread over the servers.

        temperature 0 is greedy. seeds: one for each prompt, below 2**31. The same seeds, weights and batch of requests
        give the same responses.
        """
        sampling = {
            "n": n,
            "temperature": temperature,
            "max_tokens": max_tokens,
            "logprobs": 0,
            "stop_token_ids": self._stop,
            "detokenize": False,
        }
        calls = []
        for prompt, seed, address in zip(prompts, seeds, itertools.cycle(self.addresses), strict=False):
            body = {"token_ids": prompt.token_ids, "sampling_params": sampling | {"seed": seed}}
            calls.append(_Call("POST", address, "/inference/v1/generate", self._timeout_s, body))
        return [
            _sample(prompt, choice)
            for prompt, reply in zip(prompts, self._call(*calls), strict=True)
            for choice in sorted(reply["choices"], key=lambda choice: choice["index"])
        ]

    def instances(self, timeout_s: float) -> tuple[dict[str, str], list[EngineError]]:
        """By address, of each server whose workers answer: what tells it from one that is started in its place.

        And why the others do not. /health would not do: it answers for an engine that hangs.
        """

        def ask(address: str) -> str | EngineError:
            try:
                call = _workers_call(address, "instance")._replace(timeout_s=timeout_s)
                return " ".join(self._call(call)[0]["results"])
            except EngineError as error:
                return error

        answers = dict(zip(self.addresses, self._each(ask), strict=True))
        found = {address: answer for address, answer in answers.items() if isinstance(answer, str)}
        return found, [answer for answer in answers.values() if isinstance(answer, EngineError)]

    def end(self, address: str) -> None:
        """Ask for the end of a server, so that its launcher starts it anew; it may be gone, or past hearing."""
        with contextlib.suppress(EngineError):
            self._call(_Call("POST", address, guard.EXIT, _PARTING_S))

    def weight_version(self, address: str) -> str:
        return self._call(_Call("GET", address, "/weight_info", _CONTROL_S))[0]["weight_version"]

    def call_workers(self, address: str, method: str) -> list:
        """Call a method of the worker extension on every worker of a server."""
        return self._call(_workers_call(address, method))[0]["results"]

    def sleep(self) -> None:
        """Free the KV cache, and keep the weights in host memory. No request may be under way.

        Level 1. Level 2 would spare the host that memory and seconds of copying, as the next push overwrites every
        weight; but one that breaks off would leave a server that holds no whole model, of any version.
        """
        self._post_to_all("/sleep?level=1", _SLEEP_S)

    def wake_up(self, what: str) -> None:
        """what: "weights" or "kv_cache"; with both, requests are served again."""
        self._post_to_all(f"/wake_up?tags={what}", _SLEEP_S)

    # vLLM's VLLMWeightSyncClient protocol, to all servers at once.

    def init_weight_transfer_engine(self, init_infos: list[dict]) -> None:
        """One for each server."""
        path, calls = "/init_weight_transfer_engine", zip(self.addresses, init_infos, strict=True)
        self._call(*(_Call("POST", address, path, self._update_s, {"init_info": info}) for address, info in calls))

    def start_weight_update(self) -> None:
        """Requests in flight are kept and go on after `resume`, their KV cache computed anew.

        Whatever breaks the update off, another one or `abandon_weight_update` must follow: servers stay paused.
        """
        self._post_to_all("/pause?mode=keep&clear_cache=true", _CONTROL_S)
        # To vLLM one that broke off, of a trainer that is gone perhaps, is still under way.
        self._call(*(_workers_call(address, "abandon_update") for address in self.addresses))
        self._post_to_all("/start_weight_update", self._update_s)

    def update_weights(self, update_info: dict) -> None:
        self._post_to_all("/update_weights", self._update_s, {"update_info": update_info})

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        self._post_to_all("/finish_weight_update", self._update_s, {"weight_version": weight_version})
        # Cached prefixes hold keys and values of the old weights; nothing in an update drops them.
        replies = self._post_to_all("/reset_prefix_cache", _CONTROL_S)
        for address, reply in zip(self.addresses, replies, strict=True):
            if not reply["success"]:
                raise EngineError(f"{address} kept its prefix cache after a weight update: old keys would be reused")

    def resume(self, probes: Sequence[list[int]] = ()) -> list[list[list[float]]]:
        """Serve again; [server][probe][token]: log π(token | those before it) of all but the first, at temperature 1.

        The probes are there before a paused server is resumed, and so computed before the requests in flight. Sent to a
        full server they would wait for a place, for a minute perhaps.
        """
        sampling = {"prompt_logprobs": 0, "max_tokens": 1, "temperature": 0, "detokenize": False}
        path, bodies = "/inference/v1/generate", [{"token_ids": p, "sampling_params": sampling} for p in probes]
        replies = self._call(
            *(
                _Call("POST", a, path, self._update_s, body | {"priority": FIRST})
                for a in self.addresses
                for body in bodies
            ),
            meanwhile=(
                # A round trip, in which the server takes what was sent before it.
                [_Call("GET", address, "/health", _HEALTH_S) for address in self.addresses],
                [_Call("POST", address, "/resume", _CONTROL_S) for address in self.addresses],
            ),
        )
        scores = [
            _prompt_logprobs(reply, probe)
            for reply, probe in zip(replies, list(probes) * len(self.addresses), strict=True)
        ]
        return [scores[i * len(probes) : (i + 1) * len(probes)] for i in range(len(self.addresses))]

    def abandon_weight_update(self) -> list[str]:
        """After a failure: servers leave the update and serve again, with weights of version BROKEN.

        All are asked, whatever any of them was told before: one whose request was cancelled may have got it. Returns a
        sentence for each that does not do as it is asked; raises nothing.
        """

        def leave(address: str) -> str | None:
            failure = None
            for call in (
                _Call("GET", address, "/health", _HEALTH_S),
                _workers_call(address, "abandon_update"),
                _Call("POST", address, "/update_weight_version", _CONTROL_S, {"new_version": BROKEN}),
                # It may have been updated in its sleep. This resumes, too, and only a server that is all awake.
                _Call("POST", address, "/wake_up", _CONTROL_S),
            ):
                try:
                    self._call(call if failure is None else call._replace(timeout_s=_PARTING_S))
                except EngineError as error:
                    failure = failure or str(error)
            return failure

        return [failure for failure in self._each(leave) if failure]

    def release_weight_transfer(self) -> None:
        """Workers leave the group that they share with the trainer, if any; those of a server that is gone have."""

        def release(address: str) -> None:
            with contextlib.suppress(EngineError):
                self._call(_Call("POST", address, "/shutdown_weight_transfer_engine", _CONTROL_S))

        self._each(release)

    def _each(self, ask: Callable[[str], T]) -> list[T]:
        """What `ask` returns for each address, asked at once: one's failure is not the others'."""
        with ThreadPoolExecutor(max(1, len(self.addresses))) as pool:
            return list(pool.map(ask, self.addresses))

    def _post_to_all(self, path: str, timeout_s: float, body: dict | None = None) -> list[dict]:
        return self._call(*(_Call("POST", address, path, timeout_s, body) for address in self.addresses))

    def _call(self, *calls: _Call, meanwhile: Sequence[list[_Call]] = ()) -> list[dict]:
        """All at once; their replies in order. The first failure cancels the rest.

        meanwhile: list by list, one after the other, while `calls` are under way.
        """

        async def gather() -> list[dict]:
            free = asyncio.Semaphore(connections())
            async with httpx.AsyncClient(
                headers=self._headers,
                limits=httpx.Limits(max_connections=None, max_keepalive_connections=0),
                verify=self._certificates,
                # Servers are addressed directly, whatever proxy the environment names.
                trust_env=False,
            ) as http:
                async with asyncio.TaskGroup() as group:
                    tasks = [group.create_task(self._request(http, call, free)) for call in calls]
                    for stage in meanwhile:
                        await asyncio.gather(*(self._request(http, call, free) for call in stage))
                return [task.result() for task in tasks]

        try:
            return asyncio.run(gather())
        except* EngineError as failures:
            first = failures.exceptions[0]
        raise first

    async def _request(self, http: httpx.AsyncClient, call: _Call, free: asyncio.Semaphore) -> dict:
        place = f"{call.address}{call.path}"
        try:
            async with free:
                limits = httpx.Timeout(call.timeout_s, connect=min(call.timeout_s, CONNECT_S))
                reply = await http.request(call.method, place, json=call.body, timeout=limits)
        except httpx.TimeoutException:
            raise EngineError(f"{place} did not answer within {call.timeout_s:g} s") from None
        except httpx.HTTPError as error:
            raise EngineError(f"{place} failed: the server is gone ({error!r})") from None
        if reply.status_code != 200:
            raise EngineError(f"{place} answered {reply.status_code}: {reply.text[:500]}")
        return reply.json() if reply.content else {}


def _workers_call(address: str, method: str) -> _Call:
    return _Call("POST", address, "/collective_rpc", _CONTROL_S, {"method": method})


def connections() -> int:
    """How many may be open at once: half of this process's files, of which it may have as many as the system allows.

    A request beyond them would fail as if its server were gone.
    """
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    files = _FILES if most == resource.RLIM_INFINITY else min(most, _FILES)
    resource.setrlimit(resource.RLIMIT_NOFILE, (files, most))
    return files // 2


def _prompt_logprobs(reply: dict, token_ids: list[int]) -> list[float]:
    entries = zip(reply["prompt_logprobs"][1:], token_ids[1:], strict=True)
    return [entry[str(token)]["logprob"] for entry, token in entries]


def _sample(prompt: Prompt, choice: dict) -> Response:
    if choice["finish_reason"] not in ENDS:
        raise EngineError(f"a response to problem {prompt.index} ended with {choice['finish_reason']}")
    return msgspec.convert(choice, Choice).response(prompt)

"""The trainer's side of the vLLM servers: sampling, and the steps of a weight update, over HTTP."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import httpx

from megatron_dgpo.rollout.sample import Prompt, Sample

_MOST_REQUESTS = 256
_POLL_S = 0.25


class EngineError(RuntimeError):
    """A server did not do what it was asked; names its address and the request."""


class Engines:
    """Several servers used as one; a request that fails on any raises EngineError at once."""

    def __init__(self, addresses: list[str], secret: str, request_timeout_s: float, stop_token_ids: list[int]) -> None:
        self.addresses = addresses
        self._stop = stop_token_ids
        self._http = httpx.Client(
            headers={"Authorization": f"Bearer {secret}"},
            timeout=httpx.Timeout(request_timeout_s, connect=30),
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=None),
            # Servers are addressed directly, whatever proxy the environment names.
            trust_env=False,
        )
        self._threads = ThreadPoolExecutor(_MOST_REQUESTS, thread_name_prefix="engine")

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)
        self._http.close()

    def wait_until_healthy(self, timeout_s: float) -> None:
        deadline = time.monotonic() + timeout_s
        for address in self.addresses:
            while True:
                try:
                    if self._http.get(f"{address}/health", timeout=5).status_code == 200:
                        break
                except httpx.HTTPError:
                    pass
                if time.monotonic() > deadline:
                    raise EngineError(f"{address} was not healthy within rollout.start_timeout_s={timeout_s:g}")
                time.sleep(_POLL_S)

    def generate(self, prompts: list[Prompt], n: int, temperature: float, max_tokens: int, seed: int) -> list[Sample]:
        """`n` responses to each prompt, consecutive, in the order of the prompts, spread over the servers.

        temperature 0 is greedy. The same seed, weights and batch of requests give the same responses.
        """

        def one(place: int, prompt: Prompt) -> list[Sample]:
            sampling = {
                "n": n,
                "temperature": temperature,
                "max_tokens": max_tokens,
                "seed": (seed + prompt.index * 7919) % 2**31,
                "logprobs": 0,
                "stop_token_ids": self._stop,
                "detokenize": False,
            }
            body = {"token_ids": prompt.token_ids, "sampling_params": sampling}
            address = self.addresses[place % len(self.addresses)]
            choices = self._post(address, "/inference/v1/generate", body)["choices"]
            return [_sample(prompt, choice) for choice in sorted(choices, key=lambda c: c["index"])]

        groups = self._all([lambda i=i, p=p: one(i, p) for i, p in enumerate(prompts)])
        return [sample for group in groups for sample in group]

    def prompt_logprobs(self, address: str, token_ids: list[int]) -> list[float]:
        """log π(token | those before it) of every token but the first, at temperature 1, recomputed."""
        sampling = {"prompt_logprobs": 0, "max_tokens": 1, "temperature": 0, "detokenize": False}
        reply = self._post(address, "/inference/v1/generate", {"token_ids": token_ids, "sampling_params": sampling})
        entries = reply["prompt_logprobs"][1:]
        return [entry[str(token)]["logprob"] for entry, token in zip(entries, token_ids[1:], strict=True)]

    def weight_version(self, address: str) -> str:
        return self._request("GET", address, "/weight_info")["weight_version"]

    def call_workers(self, address: str, method: str) -> list:
        """Call a method of the worker extension on every worker of a server."""
        return self._post(address, "/collective_rpc", {"method": method})["results"]

    def on_all(self, function: Callable[[str], object]) -> list:
        """`function(address)` for all servers at once."""
        return self._all([lambda a=a: function(a) for a in self.addresses])

    # vLLM's VLLMWeightSyncClient protocol, to all servers at once.

    def init_weight_transfer_engine(self, init_info: dict, workers_per_server: int = 0) -> None:
        """workers_per_server: where ranks of one NCCL group are given out, how many each server takes."""

        def one(address: str) -> None:
            info = dict(init_info)
            if "rank_offset" in info:
                info["rank_offset"] += self.addresses.index(address) * workers_per_server
            self._post(address, "/init_weight_transfer_engine", {"init_info": info})

        self.on_all(one)

    def start_weight_update(self) -> None:
        """Requests in flight are kept and go on after the update, their KV cache computed anew."""
        self.on_all(lambda a: self._post(a, "/pause?mode=keep&clear_cache=true"))
        self.on_all(lambda a: self._post(a, "/start_weight_update"))

    def update_weights(self, update_info: dict) -> None:
        self.on_all(lambda a: self._post(a, "/update_weights", {"update_info": update_info}))

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        self.on_all(lambda a: self._post(a, "/finish_weight_update", {"weight_version": weight_version}))
        self.on_all(self._forget_and_resume)

    def _forget_and_resume(self, address: str) -> None:
        # Cached prefixes hold keys and values of the old weights; nothing in an update drops them.
        if not self._post(address, "/reset_prefix_cache")["success"]:
            raise EngineError(f"{address} kept its prefix cache after a weight update: old keys would be reused")
        self._post(address, "/resume")

    def _all(self, calls: list[Callable]) -> list:
        futures = [self._threads.submit(call) for call in calls]
        try:
            return [future.result() for future in futures]
        except BaseException:
            for future in futures:
                future.cancel()
            raise

    def _post(self, address: str, path: str, body: dict | None = None) -> dict:
        return self._request("POST", address, path, body)

    def _request(self, method: str, address: str, path: str, body: dict | None = None) -> dict:
        try:
            reply = self._http.request(method, address + path, json=body)
        except httpx.TimeoutException:
            raise EngineError(f"{address}{path} did not answer within {self._http.timeout.read:g} s") from None
        except httpx.HTTPError as error:
            raise EngineError(f"{address}{path} failed: the server is gone ({error!r})") from None
        if reply.status_code != 200:
            raise EngineError(f"{address}{path} answered {reply.status_code}: {reply.text[:500]}")
        return reply.json() if reply.content else {}


def _sample(prompt: Prompt, choice: dict) -> Sample:
    if choice["finish_reason"] not in ("stop", "length"):
        raise EngineError(f"a response to problem {prompt.index} ended with {choice['finish_reason']}")
    spans = choice["weight_versions"] or [{"version": "-1"}]
    return Sample(
        prompt=prompt,
        token_ids=choice["token_ids"],
        logprobs=[entry["logprob"] for entry in choice["logprobs"]["content"]],
        finish_reason=choice["finish_reason"],
        weight_version=int(spans[0]["version"]) if spans[0]["version"].lstrip("-").isdigit() else -1,
    )

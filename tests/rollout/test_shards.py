"""Shard-exact updates of a real vLLM server from real Megatron ranks, in many layouts, and what breaks one off."""

import contextlib
import math
import os
import signal
import time

import pytest
import torch

from megatron_dgpo import process
from megatron_dgpo.cluster import Node
from megatron_dgpo.rollout import server
from megatron_dgpo.rollout.client import BROKEN, Engines
from tests.layouts import MIXTURE_LAYOUTS, make_config
from tests.ranks import run_ranks
from tools.tiny_models import MIXTURES, make_tiny_model

# Fixed: the ranks import this file anew.
SECRET = "of-this-test-only"
FAIL = -1
PROBE = [1, 50, 60, 70, 80, 90, 100]
# vLLM on CPU wants heads of at least 32.
SIZES = dict(hidden_size=256, num_hidden_layers=4, num_attention_heads=8, num_key_value_heads=4)


def make_test_config(folder, workers, parallel, transport="shards"):
    return make_config(
        folder / "model",
        parallel,
        run={"dir": folder},
        rollout={"context_tokens": 64},
        servers={"tensor": workers, "expert_parallel": folder.name.startswith("experts")},
        weight_sync={
            "transport": transport,
            # Many buckets, so that their order matters.
            "bucket_bytes": 2**14,
            "bucket_timeout_s": 20,
            "check_all": True,
        },
    )


SERVERS = {
    "{}-{}-workers".format(*server): server for server in (("qwen2", 1), ("qwen3", 2), ("mixtral", 1), ("qwen3_moe", 2))
}
one_server = pytest.mark.parametrize("live", [("qwen3", 2)], ids=["qwen3-2-workers"], indirect=True)


@pytest.fixture(scope="module", params=SERVERS.values(), ids=SERVERS)
def live(request, tmp_path_factory):
    """Engines of a server that started with other weights than those in `model`, and the folder."""
    family, tensor = request.param
    with running_server(tmp_path_factory.mktemp(family), family, tensor) as (engines, folder, children):
        yield engines, folder, family, tensor, children


@contextlib.contextmanager
def running_server(folder, family, tensor):
    make_tiny_model(folder / "model", family, **SIZES)
    config = make_test_config(folder, tensor, {})
    children, addresses = server.start(config, SECRET, Node(folder))
    try:
        engines = Engines(addresses, SECRET, 60, [2])
        engines.wait_until_healthy()
        yield engines, folder, children
    finally:
        process.stop(children)


def push(folder, model, tensor, parallel, addresses, version, kill=None, in_place=False):
    """On every trainer rank: load `model` and send it; which tensors differ then, and how many were compared.

    kill: process to end when the last rank has sent some of its buckets; 0 is that rank itself, which only fails for
    FAIL.
    """
    import torch.distributed as dist

    from megatron_dgpo.model.collectives import from_rank_0
    from megatron_dgpo.model.device import init_device
    from megatron_dgpo.model.parallel import initialize_parallel
    from megatron_dgpo.model.policy import Policy
    from megatron_dgpo.rollout.client import Engines
    from megatron_dgpo.weight_sync.shards import ShardSync
    from megatron_dgpo.weight_sync.sync import servers_resumed
    from megatron_dgpo.weights.architectures import read_architecture
    from megatron_dgpo.weights.load import named_shards

    init_device()
    config = make_test_config(folder, tensor, parallel, "memory" if in_place else "shards")
    initialize_parallel(config.parallel, 1)
    architecture = read_architecture(model)
    policy = Policy(config, architecture, 1)
    policy.load(model)
    engines = Engines(addresses, SECRET, 60, [2])
    sync = ShardSync(engines, dict(named_shards(policy.modules)), architecture, policy.layout, config)
    if kill is not None and dist.get_rank() == dist.get_world_size() - 1:
        make_piece, made = sync._piece, []

        def piece(move):
            made.append(move)
            if len(made) == 12:
                if kill == FAIL:
                    raise RuntimeError("injected")
                os.kill(kill, signal.SIGKILL) if kill else os._exit(9)
            return make_piece(move)

        sync._piece = piece
    with servers_resumed(engines):
        sync.push(version)
    from_rank_0(engines.resume)
    return from_rank_0(lambda: (sync.differing_tensors(addresses[0]), len(sync._expected)))


def served_gap(engines, model):
    from transformers import AutoModelForCausalLM

    policy = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    with torch.no_grad():
        logprobs = torch.log_softmax(policy(torch.tensor([PROBE])).logits[0], -1)
    expected = [logprobs[i, token].item() for i, token in enumerate(PROBE[1:])]
    [[served]] = engines.resume([PROBE])
    return max(abs(a - b) for a, b in zip(expected, served, strict=True))


LAYOUTS = [
    (1, {}),
    (2, {"tensor": 2}),
    (4, {"tensor": 4}),
    (2, {"pipeline": 2}),
    (4, {"tensor": 2, "pipeline": 2}),
    (2, {"pipeline": 2, "chunks_per_stage": 2}),
    (2, {"data": 2}),
    (8, {"tensor": 4, "pipeline": 2}),
]
MIXTURE = {"tensor": 4, "sequence": True, "expert": 2}
LAYOUTS_OF_MIXTURES = [*MIXTURE_LAYOUTS.values(), (4, MIXTURE), (8, MIXTURE | {"pipeline": 2})]


def test_every_layout_updates_the_server(live):
    """All parameters read back from the workers, before vLLM packs them, and the log-probs after it."""
    engines, folder, family, tensor, _ = live
    layouts = LAYOUTS_OF_MIXTURES if family in MIXTURES else LAYOUTS
    for version, (world, parallel) in enumerate(layouts, start=1):
        model = make_tiny_model(folder / f"model-{version}", family, seed=version, **SIZES)
        [(differing, compared), *_] = run_ranks(
            push, world, folder, model, tensor, parallel, engines.addresses, version
        )
        assert differing == [], parallel
        assert compared >= 30 * tensor
        assert engines.weight_version(engines.addresses[0]) == str(version)
        assert served_gap(engines, model) < 1e-4, parallel


def test_workers_with_whole_experts_are_updated(tmp_path_factory):
    """Read back only: the experts of vLLM 0.32 on a CPU end the server when some of them are elsewhere."""
    with running_server(tmp_path_factory.mktemp("experts"), "qwen3_moe", 2) as (engines, folder, _):
        for version, layout in enumerate(("tp1", "tp2-dp2-ep4"), start=1):
            world, parallel = MIXTURE_LAYOUTS[layout]
            model = make_tiny_model(folder / f"model-{version}", "qwen3_moe", seed=version, **SIZES)
            [(differing, compared), *_] = run_ranks(push, world, folder, model, 2, parallel, engines.addresses, version)
            assert differing == [] and compared >= 2 * 4 * 9


@one_server
def test_workers_read_in_place(live):
    engines, folder, family, tensor, _ = live
    model = make_tiny_model(folder / "model-in-place", family, seed=40, **SIZES)
    layout = {"tensor": 2, "pipeline": 2}
    [(differing, compared), *_] = run_ranks(push, 4, folder, model, tensor, layout, engines.addresses, 40, None, True)
    assert differing == [] and compared >= 30 * tensor
    assert served_gap(engines, model) < 1e-4


@one_server
def test_an_update_that_breaks_off_leaves_a_server_that_serves(live):
    """The next test's update heals what it serves."""
    engines, folder, family, tensor, _ = live
    with pytest.raises(AssertionError, match="the weight update broke off: .*trainer rank 1: injected"):
        run_ranks(push, 2, folder, folder / "model", tensor, {"tensor": 2}, engines.addresses, 45, FAIL)
    assert engines.weight_version(engines.addresses[0]) == BROKEN
    assert all(math.isfinite(x) for x in engines.resume([PROBE])[0][0])


@one_server
def test_a_trainer_that_dies_leaves_the_server_stale_and_the_next_update_heals_it(live):
    engines, folder, family, tensor, children = live
    model = make_tiny_model(folder / "model-dying", family, seed=50, **SIZES)
    with pytest.raises(AssertionError, match="rank 1 died"):
        run_ranks(push, 2, folder, model, tensor, {"tensor": 2}, engines.addresses, 50, 0)
    start = time.monotonic()
    assert engines.weight_version(engines.addresses[0]) != "50"
    # The broken update has ended on its own by then.
    [(differing, _), *_] = run_ranks(push, 2, folder, model, tensor, {"tensor": 2}, engines.addresses, 51)
    assert differing == [] and time.monotonic() - start < 60
    assert served_gap(engines, model) < 1e-4
    assert "the other side is gone or stuck" in children[0].log.read_text()


@one_server
def test_a_server_that_dies_in_an_update_is_an_error_on_every_rank(live):
    engines, folder, family, tensor, children = live
    start = time.monotonic()
    with pytest.raises(AssertionError) as failure:
        # Its workers end with it, and its resource tracker, which frees shared memory, after them.
        run_ranks(
            push, 2, folder, folder / "model", tensor, {"tensor": 2}, engines.addresses, 60, children[0].process.pid
        )
    assert time.monotonic() - start < 30
    assert str(failure.value).count("StaleWeightsError: the weight update broke off") == 2

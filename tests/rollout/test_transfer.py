"""What a weight update asks of the group of trainer and workers, and of the servers when it breaks off; no server."""

import dataclasses
import json
import threading
from collections import defaultdict
from datetime import timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from megatron_dgpo.config_file import load_config
from megatron_dgpo.layout import Layout, ServerLayout
from megatron_dgpo.planning.plan import sides_of
from megatron_dgpo.rollout import client
from megatron_dgpo.rollout.client import BROKEN, EngineError, Engines
from megatron_dgpo.rollout.plugin import WorkerMethods
from megatron_dgpo.rollout.response import Prompt
from megatron_dgpo.weight_sync import gathered, stream
from megatron_dgpo.weight_sync.canary import check_servers
from megatron_dgpo.weight_sync.gathered import IpcSync, SummedSource, content_sum
from megatron_dgpo.weight_sync.shards import ShardSync, StaleWeightsError
from megatron_dgpo.weight_sync.stream import CalledOffError, call_off, join_group, receive_buckets, send_buckets
from megatron_dgpo.weight_sync.sync import WeightSync, servers_resumed
from megatron_dgpo.weights.architectures import read_architecture
from megatron_dgpo.weights.resharding import (
    Move,
    block,
    plan_buckets,
    vllm_blocks,
    vllm_parameters,
    vllm_shape,
)
from tests.full_tensors import megatron_shard
from tests.layouts import make_config
from tests.planning.test_recipes import RECIPES, ROOT, command
from tools import plan_parallelism
from tools.tiny_models import make_tiny_model

# The group: one communicator, one call a bucket


class StubGroup:
    """Of NCCL, as far as calls go; ProcessGroupNCCL's own signatures."""

    supports_coalescing = True

    def __init__(self):
        self.calls = []

    def _start_coalescing(self):
        self.calls.append(("start",))

    def _end_coalescing(self):
        self.calls.append(("end",))
        return StubWork(self.calls)

    def send(self, tensors, peer, tag):
        self.calls.append(("send", peer, tag, tensors[0].numel()))

    def recv(self, tensors, peer, tag):
        self.calls.append(("recv", peer, tag, tensors[0].numel()))

    def allreduce(self, tensors):
        self.calls.append(("allreduce", tensors[0].numel()))
        return StubWork(self.calls)

    def set_timeout(self, timeout):
        self.calls.append(("limit", timeout.total_seconds()))


@dataclasses.dataclass
class StubWork:
    calls: list

    def wait(self, timeout=timedelta(0)):
        self.calls.append(("wait", timeout.total_seconds()))


def recorded(layout, vllm, architecture, bucket_numel):
    """{member: its calls} of a whole update, on tensors without memory."""
    plan = plan_buckets(architecture, layout, vllm, bucket_numel)
    of_rank, of_worker = (defaultdict(lambda: [[] for _ in plan]) for _ in range(2))
    for index, bucket in enumerate(plan):
        for move in bucket:
            of_rank[move.rank][index].append(move)
            of_worker[move.worker][index].append(move)
    found = {}
    for rank in range(layout.world_size):
        group = found[rank] = StubGroup()
        send_buckets(group, of_rank[rank], lambda m: torch.empty(m.shape, device="meta"), layout.world_size, 30)
    for worker in range(vllm.num_workers):
        group = found[layout.world_size + worker] = StubGroup()
        receive_buckets(group, of_worker[worker], check_shape, torch.bfloat16, torch.device("meta"), 30)
    return plan, {member: group.calls for member, group in found.items()}


def check_shape(move, piece):
    assert piece.shape == move.shape


def group_calls(calls):
    """The messages of each of NCCL's group calls, in order; asserts that there are none outside."""
    found, inside = [], None
    for name, *what in calls:
        if name == "start":
            assert inside is None
            inside = []
        elif name == "end":
            assert inside
            found.append(inside)
            inside = None
        elif name in ("send", "recv"):
            # Outside it would make a communicator for this pair.
            assert inside is not None
            inside.append((name, *what))
    assert inside is None
    return found


def runs_to_its_end(messages):
    """Whether members get through their group calls, one after the other, when a message needs both of its ends."""
    place = dict.fromkeys(messages, 0)
    waiting = {member: set(calls[0]) for member, calls in messages.items() if calls}
    posted = defaultdict(int)
    ready = []

    def post(member):
        for message in messages[member][place[member]]:
            posted[message] += 1
            if posted[message] == 2:
                ready.append(message)

    for member in waiting:
        post(member)
    while ready:
        message = ready.pop()
        for member in message[:2]:
            waiting[member].remove(message)
            if not waiting[member]:
                place[member] += 1
                if place[member] < len(messages[member]):
                    waiting[member] = set(messages[member][place[member]])
                    post(member)
    return all(place[member] == len(calls) for member, calls in messages.items())


@pytest.mark.parametrize("recipe", RECIPES)
def test_recipes_need_one_communicator(recipe, tmp_path, monkeypatch):
    """One group call for each bucket in which a member has a part, none for others, and both sides in one order.

    Of every pipeline chunk one layer: the others move alike.
    """
    # Its own, without memory, would take most of this test's time.
    monkeypatch.setattr(torch, "cat", lambda parts: torch.empty(sum(part.numel() for part in parts), device="meta"))
    config = load_config(ROOT / "examples" / recipe / "config.yaml")
    trainer, rollout = sides_of(config, plan_parallelism._parse(command(recipe)).gpus, 8)
    settings = json.loads((ROOT / "examples" / recipe / "model" / "config.json").read_text())
    settings["num_hidden_layers"] = trainer.pipeline * trainer.chunks
    (tmp_path / "config.json").write_text(json.dumps(settings))
    plan, calls = recorded(trainer, rollout, read_architecture(tmp_path), config.weight_sync.bucket_bytes // 2)
    assert len(plan) > 1
    taking_part = defaultdict(set)
    for index, bucket in enumerate(plan):
        for move in bucket:
            taking_part[move.rank].add(index)
            taking_part[trainer.world_size + move.worker].add(index)
    messages = {}
    for member, own in calls.items():
        groups = group_calls(own)
        # Each bucket once, in order, and everything waited for by the CPU.
        assert [{tag for _, _, tag, _ in group} for group in groups] == [{i} for i in sorted(taking_part[member])]
        assert [call for call in own if call[0] == "wait"] == [("wait", 30)] * len(groups)
        messages[member] = [
            [(member, peer, *rest) if name == "send" else (peer, member, *rest) for name, peer, *rest in group]
            for group in groups
        ]
    assert runs_to_its_end(messages)


def test_joining_is_a_collective(monkeypatch):
    """Which makes NCCL's communicator of all members; waited for longer than a message is."""
    group = StubGroup()
    monkeypatch.setattr(dist, "ProcessGroupGloo", lambda *_: group)
    meeting, store = stream.open_meeting("127.0.0.1", 70, 5)
    assert join_group(meeting, 0, 1, store) is group
    assert group.calls == [("allreduce", 1), ("wait", 70), ("limit", 5)]


def test_calls_are_those_of_this_pytorch():
    """What the stub stands for, on a group that is at hand: gloo knows no group calls, and says so."""
    group = dist.ProcessGroupGloo(dist.HashStore(), 0, 1, timedelta(seconds=5))
    assert not group.supports_coalescing
    for call in (group._start_coalescing, group._end_coalescing):
        with pytest.raises(RuntimeError, match="does not"):
            call()
    group.set_timeout(timedelta(seconds=1))
    group.abort()


def test_buckets_over_gloo():
    """Two members of one process; then one is gone."""
    meeting, store = stream.open_meeting("127.0.0.1", 60, 1)
    joined = {}

    def join(rank, store=None):
        joined[rank] = join_group(meeting, rank, 2, store)

    other = threading.Thread(target=join, args=(1,))
    other.start()
    join(0, store)
    other.join()
    source, target = torch.arange(24.0).view(6, 4), torch.zeros(6, 4)
    # Nothing in the second bucket.
    moves = [[Move(0, 0, "a", (row, 0), "b", (row, 0), (2, 4))] if row != 2 else [] for row in (0, 2, 4)]

    def send():
        send_buckets(joined[0], moves, lambda move: move.of_source(source), 1, 20)

    sender = threading.Thread(target=send)
    sender.start()
    receive = receive_buckets, (lambda move, piece: move.of_target(target).copy_(piece)), torch.float32
    receive[0](joined[1], moves, *receive[1:], torch.device("cpu"), 20)
    sender.join()
    assert target.tolist() == (source * torch.tensor([1, 1, 0, 0, 1, 1])[:, None]).tolist()
    with pytest.raises(RuntimeError, match="bucket 1 of 3 from trainer rank 0 did not arrive: the other side is gone"):
        receive[0](joined[1], moves, *receive[1:], torch.device("cpu"), 0.5)


def test_a_member_that_cannot_join_is_told_to_all_at_once(monkeypatch):
    meeting, store = stream.open_meeting("127.0.0.1", 60, 60)
    failures = []

    def join(rank, store=None):
        try:
            join_group(meeting, rank, 3, store)
        except CalledOffError as error:
            failures.append(str(error))

    threads = [threading.Thread(target=join, args=(0, store)), threading.Thread(target=join, args=(1,))]
    for thread in threads:
        thread.start()
    call_off(meeting, "worker 2 has another shape")
    for thread in threads:
        thread.join(timeout=20)
    assert failures == ["worker 2 has another shape"] * 2


def test_members_that_do_not_come_are_counted():
    meeting, store = stream.open_meeting("127.0.0.1", 0.5, 60)
    with pytest.raises(RuntimeError, match="1 of 3 trainer ranks and workers came within 0:00:00.5"):
        join_group(meeting, 0, 3, store)


# Servers that break an update off


class Server(ThreadingHTTPServer):
    """Records what it is asked; answers `failing` (a path) with an error, or not at all if it `hangs`."""

    daemon_threads = True

    def __init__(self, failing="", hangs=False):
        super().__init__(("127.0.0.1", 0), Handler)
        self.asked, self.failing, self.hangs, self.workers = [], failing, hangs, {}
        self.closing = threading.Event()
        self.address = f"http://127.0.0.1:{self.server_port}"
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()

    def paused(self):
        """As vLLM would be, by the order of requests."""
        states = [path for path in self.asked if path in ("/pause", "/resume", "/wake_up")]
        return bool(states) and states[-1] == "/pause"

    def close(self):
        self.closing.set()
        self.shutdown()
        self.server_close()


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers.get("Content-Length", 0))) or "{}")
        path = self.path.partition("?")[0]
        name = body.get("method", path)
        self.server.asked.append(name)
        if name == self.server.failing and self.server.hangs:
            self.server.closing.wait(30)
            return
        self.send_response(500 if name == self.server.failing else 200)
        self.end_headers()
        reply = {"success": True, "weight_version": "3", "results": self.server.workers.get(name, [None])}
        self.wfile.write(json.dumps(reply).encode())

    do_GET = do_POST

    def log_message(self, *_):
        pass


@pytest.fixture
def servers():
    found = []

    def start(*settings):
        found.extend(Server(*setting) for setting in settings)
        return found, Engines([server.address for server in found], "secret", 20, [2], 20)

    yield start
    for server in found:
        server.close()


STEPS = (
    "/pause",
    "abandon_update",
    "/start_weight_update",
    "/update_weights",
    "/finish_weight_update",
    "/reset_prefix_cache",
    "/resume",
)


def update(engines):
    with servers_resumed(engines):
        engines.start_weight_update()
        engines.update_weights({})
        engines.finish_weight_update("3")
        engines.resume()


@pytest.mark.parametrize("step", STEPS)
def test_whatever_breaks_off_the_others_serve_again(servers, one_rank, step):
    (bad, good), engines = servers((step,), ())
    with pytest.raises(EngineError, match=f"{bad.address}/.*answered 500") as failure:
        update(engines)
    assert not good.paused()
    assert good.asked[-1] == "/wake_up"
    assert "/update_weight_version" in good.asked
    # The first error is the one that is raised; what cannot be helped is told beside it.
    notes = getattr(failure.value, "__notes__", [])
    assert bool(notes) == (step == "abandon_update")
    assert all(bad.address in note for note in notes)


def test_a_server_that_does_not_answer_is_named_and_the_others_serve_again(servers, monkeypatch):
    """With the limit of its kind of request; what it is sent in parting waits no longer."""
    monkeypatch.setattr(client, "_CONTROL_S", 1)
    monkeypatch.setattr(client, "_PARTING_S", 0.2)
    (bad, good), engines = servers(("/pause", True), ())
    with pytest.raises(EngineError, match=f"{bad.address}/pause.* did not answer within 1 s"):
        update(engines)
    assert good.asked[-1] == "/wake_up"
    # When it is free again it finds this.
    assert bad.asked[-1] == "/wake_up"


@pytest.mark.parametrize(
    "step, limit_s",
    [("/update_weights", 20), ("/finish_weight_update", 20), ("/pause", 60), ("/resume", 60), ("/sleep", 180)],
)
def test_limits_of_requests(monkeypatch, step, limit_s):
    """weight_sync.timeout_s for an update's steps, never that of a whole step's responses."""
    engines, limits = Engines(["http://nowhere"], "secret", 7200, [2], 20), {}

    def call(*calls, meanwhile=()):
        everything = [*calls, *(call for stage in meanwhile for call in stage)]
        limits.update({call.path.partition("?")[0]: call.timeout_s for call in everything})
        return [{"success": True, "results": []} for _ in calls]

    monkeypatch.setattr(engines, "_call", call)
    update(engines)
    engines.sleep()
    assert limits[step] == limit_s


@pytest.fixture(scope="module")
def one_rank():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture(scope="module", params=["qwen2", "qwen3_moe"])
def model(request, tmp_path_factory):
    """Architecture and full tensors; of the vocabulary of 131 vLLM pads rows."""
    folder = make_tiny_model(tmp_path_factory.mktemp(request.param) / "model", request.param, vocab_size=131)
    architecture = read_architecture(folder)
    generator = torch.Generator().manual_seed(0)
    shapes = architecture.hf_shapes.items()
    return architecture, {name: torch.randn(shape, generator=generator).bfloat16() for name, shape in shapes}


def shards_of(architecture, full):
    return {name: megatron_shard(architecture, full, name, 0, 1) for name in architecture.parameters}


def test_a_push_that_breaks_off_resumes_the_servers(servers, one_rank, model):
    """Of the trainer's own doing, too."""
    architecture, full = model
    found, engines = servers((), ())
    config = make_config("unused", weight_sync={"transport": "memory"}, servers={"dtype": "bfloat16"})
    sync = ShardSync(engines, shards_of(architecture, full), architecture, Layout(), config)
    sync._piece = None
    with pytest.raises(StaleWeightsError, match="trainer rank 0"), servers_resumed(engines):
        sync.push(1)
    assert [server.asked[-1] for server in found] == ["/wake_up"] * 2
    with sync:
        pass
    assert [server.asked[-1] for server in found] == ["/shutdown_weight_transfer_engine"] * 2


def test_layers_that_a_broken_reload_left_empty_have_their_weights_again():
    """A complete one has its new ones; vLLM's own reload of a toy model, and the worker's method."""
    from vllm.model_executor.model_loader.reload import initialize_layerwise_reload, record_metadata_for_reloading

    model = torch.nn.Sequential(*(torch.nn.Linear(2, 2, bias=False) for _ in range(3)))
    weights = [layer.weight for layer in model]
    before = [weight.detach().clone() for weight in weights]
    record_metadata_for_reloading(model)
    initialize_layerwise_reload(model)
    assert all(layer.weight.is_meta for layer in model)
    model[0].weight.weight_loader(model[0].weight, torch.ones(2, 2))
    runner = SimpleNamespace(get_model=lambda: model)
    worker = SimpleNamespace(model_runner=runner, _weight_update_active=True)
    for _ in range(2):
        WorkerMethods.abandon_update(worker)
        assert not worker._weight_update_active
        # In their old places, which compiled code knows.
        assert all(layer.weight is weight for layer, weight in zip(model, weights, strict=True))
        assert model[0].weight.tolist() == [[1, 1], [1, 1]]
        assert all(layer.weight.equal(old) for layer, old in list(zip(model, before, strict=True))[1:])


# Who is a member of a push


class Fleet(Engines):
    """Engines whose servers answer as `answers` says, one look after the other, the last one for ever."""

    def __init__(self, *answers):
        super().__init__(["a", "b"], "secret", 20, [2])
        self.answers, self.ended = list(answers), []

    def instances(self, timeout_s):
        found = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        return found, [EngineError(f"{address} is gone") for address in self.addresses if address not in found]

    def wait_until_healthy(self):
        pass

    def end(self, address):
        self.ended.append(address)


def answering(fleet, members, failure=None, **servers):
    config = make_config("unused", servers={"count": 2, "start_timeout_s": 0.2, **servers})
    weight_sync = WeightSync(config, fleet, None, None, [Prompt(0, [1, 2], "", "")])
    weight_sync._instances = members
    return weight_sync._answering(failure)


BOTH = {"a": "1", "b": "1"}


def test_the_first_push_needs_every_server():
    assert answering(Fleet(BOTH), {}) == BOTH
    with pytest.raises(EngineError, match="b is gone"):
        answering(Fleet({"a": "1"}), {})


def test_a_push_goes_to_those_that_answer():
    fleet = Fleet({"b": "1"})
    assert answering(fleet, BOTH) == {"b": "1"}
    # It may hang.
    assert fleet.ended == ["a"]
    fleet = Fleet({"a": "2", "b": "1"})
    assert answering(fleet, BOTH) == {"a": "2", "b": "1"} and fleet.ended == []


def test_too_few_servers_are_waited_for(monkeypatch):
    monkeypatch.setattr("megatron_dgpo.weight_sync.sync._POLL_S", 0.01)
    assert answering(Fleet({}, {}, {"a": "2"}), BOTH) == {"a": "2"}
    reason = r"1 of 2 servers answer, fewer than servers.min_serving=2, after servers.start_timeout_s=0.2: b is gone"
    with pytest.raises(EngineError, match=reason):
        answering(Fleet({"a": "1"}), BOTH, min_serving=2)


def test_a_failure_that_cost_no_member_is_raised():
    failure = StaleWeightsError("of a push")
    with pytest.raises(StaleWeightsError, match="of a push"):
        answering(Fleet(BOTH), BOTH, failure)
    # One that was killed, and one that is up again already.
    assert answering(Fleet({"a": "1"}), BOTH, failure) == {"a": "1"}
    assert answering(Fleet({"a": "1", "b": "2"}), BOTH, failure) == {"a": "1", "b": "2"}


# ipc


class Full:
    """A vLLM WeightSource."""

    def __init__(self, tensors):
        self.tensors = tensors

    def metadata(self):
        from vllm.distributed.weight_transfer.base import ParamMeta

        return [ParamMeta(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in self.tensors.items()]

    def held_names(self):
        return None

    def __iter__(self):
        yield from self.tensors.items()


class StubTrainer:
    """vLLM's, as far as it talks: its own needs a GPU. A request for every buffer, then the last one."""

    def __init__(self, info, client, source):
        self.info, self.client, self.source = info, client, source
        client.init_weight_transfer_engine({"packed": info.packed})

    def send_weights(self):
        self.client.start_weight_update()
        for name, _ in self.source:
            self.client.update_weights({"names": [name]})
        self.client.finish_weight_update()

    def shutdown(self):
        pass


SERVER = ServerLayout(2, 1)


@pytest.fixture
def ipc(servers, one_rank, model, monkeypatch):
    from vllm.distributed.weight_transfer.factory import WeightTransferTrainerFactory

    architecture, full = model
    monkeypatch.setattr(WeightTransferTrainerFactory, "trainer_init", StubTrainer)

    def start(*settings, bucket_bytes=256 * 2**20, layout=SERVER):
        found, engines = servers(*settings)
        return found, IpcSync(engines, Full(full), architecture, layout, bucket_bytes)

    return start


def held_by_workers(architecture, full, layout):
    """{parameter: content} of each worker, padded with zeros; experts in an order of the kernels' own."""
    found = [{} for _ in range(layout.tensor)]
    for name, parameter in vllm_parameters(architecture).items():
        for worker, held in enumerate(found):
            tensor = held[name] = torch.zeros(vllm_shape(architecture, parameter, layout), dtype=torch.bfloat16)
            for part in vllm_blocks(architecture, parameter, worker, layout):
                stack = len(part.shard_start) - len(part.shape)
                place = tensor[part.shard_start[:stack]] if stack else tensor
                block(place, part.shard_start[stack:], part.shape).copy_(block(full[part.name], part.start, part.shape))
            if parameter.stacked:
                held[name] = tensor.flip(1)
    return found


def test_ipc_holds_one_buffer(ipc, model):
    """vLLM would keep the whole model otherwise, and refuse a tensor that is larger than the buffer."""
    largest = max(tensor.nbytes for tensor in model[1].values())
    for bucket_bytes, expected in ((16, largest), (2**30, 2**30)):
        _, sync = ipc((), bucket_bytes=bucket_bytes)
        assert (sync._trainer.info.packed, sync._trainer.info.packed_buffer_size_bytes) == (True, expected)


@pytest.mark.parametrize("layout", [SERVER, ServerLayout(2, 1, expert_parallel=True)], ids=["", "whole experts"])
def test_ipc_checks_what_each_worker_holds(ipc, model, layout):
    """Exactly, for fused and stacked parameters: one that kept an element of before is named."""
    architecture, full = model
    [server], sync = ipc((), layout=layout)
    held = held_by_workers(architecture, full, layout)
    sync.push(3)

    def report():
        server.workers["held_sums"] = [{n: int(content_sum(t)) for n, t in worker.items()} for worker in held]
        return sync.differing_tensors(server.address)

    assert report() == []
    for name in list(held[1])[::5]:
        before = held[1][name].view(-1)[3].clone()
        # The smallest step of bfloat16.
        held[1][name].view(torch.int16).view(-1)[3] += 1
        assert report() == [name]
        held[1][name].view(-1)[3] = before
    # A worker that no update has reached.
    held[0] = {name: tensor * 0.5 for name, tensor in held[0].items()}
    assert len(report()) > len(held[0]) // 2
    with pytest.raises(StaleWeightsError, match="tensors that differ: .*"):
        check_servers(sync._engines, sync, 3, [], [], 1.0)


@pytest.mark.parametrize("step", ["/start_weight_update", "/update_weights", "/finish_weight_update"])
def test_ipc_meets_all_ranks_before_it_raises(ipc, model, step):
    """The others are in collectives between the requests: rank 0 goes through all of them."""
    found, sync = ipc((step,), ())
    seen = []
    sync._source._source.tensors = Counted(model[1], seen)
    with pytest.raises(EngineError, match=f"{found[0].address}{step} answered 500"), servers_resumed(sync._engines):
        sync.push(3)
    assert len(seen) == len(model[1])
    assert found[1].asked[-1] == "/wake_up"
    # Nothing is asked after a failure but to abandon it.
    assert found[1].asked.count("/update_weights") == {STEPS[2]: 0, STEPS[3]: 1}.get(step, len(seen))


def test_ipc_that_cannot_begin_says_so_on_every_rank(ipc):
    with pytest.raises(EngineError, match="/init_weight_transfer_engine answered 500"):
        ipc(("/init_weight_transfer_engine",))


class Counted(dict):
    def __init__(self, tensors, seen):
        super().__init__(tensors)
        self.seen = seen

    def items(self):
        for item in super().items():
            self.seen.append(item[0])
            yield item


def test_content_sums_add_up():
    tensor = torch.randn(64, 48).bfloat16()
    whole, padded = content_sum(tensor), torch.cat([tensor, torch.zeros(3, 48).bfloat16()])
    parts = content_sum(tensor[:, :20]) + content_sum(tensor[:, 20:])
    assert parts == whole
    assert content_sum(padded) == content_sum(tensor.flip(0)) == whole
    # Changes that would cancel out in a plain sum.
    changed = tensor.clone().view(torch.int16)
    changed[0, 0] += 1
    changed[0, 1] -= 1
    assert content_sum(changed.view(torch.bfloat16)) != whole


def test_broken_weights_are_of_no_version():
    """Neither are the responses that they give."""
    choice = {"index": 0, "finish_reason": "stop", "token_ids": [], "logprobs": {"content": []}}
    sample = client._sample(None, choice | {"weight_versions": [{"version": BROKEN, "start": 0, "end": 0}]})
    assert sample.newest == -1


def test_bounded_sums(monkeypatch, model):
    """A large tensor in parts, as one whole."""
    tensor = next(iter(model[1].values()))
    whole = content_sum(tensor)
    monkeypatch.setattr(gathered, "_SUM_NUMEL", 100)
    assert content_sum(tensor) == whole
    source = SummedSource(Full(model[1]), model[0], SERVER)
    assert [name for name, _ in source] == list(model[1])

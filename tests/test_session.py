"""What ranks agree on at the start, and what a resumed run takes from where; without a server."""

import copy
import functools
import http.server
import json
import threading
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch

from megatron_dgpo.config import Checkpoint
from megatron_dgpo.errors import UsageError
from megatron_dgpo.manifest import changes, check_origins, fingerprint, origins, read_manifest, write_manifest
from megatron_dgpo.rollout.response import Response
from megatron_dgpo.weight_sync.canary import Canary
from megatron_dgpo.weight_sync.shards import StaleWeightsError
from tests.checkpoints import save
from tests.layouts import make_config
from tests.model.test_policy import build
from tests.ranks import run_ranks
from tools.tiny_models import make_tiny_model


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_tiny_model(tmp_path_factory.mktemp("session") / "tiny", "qwen3", num_hidden_layers=2)


# Groups


def limits_and_flag(model_dir):
    """(time limits of Megatron's groups, that of the default group, whether `Pace` looked for a device)."""
    import torch.distributed as dist

    from megatron_dgpo.model.device import init_device
    from megatron_dgpo.model.parallel import initialize_parallel
    from megatron_dgpo.pace import Pace
    from megatron_dgpo.session import time_limits

    init_device()
    config = make_config(model_dir, {"tensor": 2}, run={"collective_timeout_s": 60}, servers={"start_timeout_s": 7200})
    initialize_parallel(config.parallel, 1, time_limits(config))
    limits = {
        group: group._get_backend(torch.device("cpu")).options._timeout for group in dist.distributed_c10d._world.pg_map
    }
    world = limits.pop(dist.group.WORLD)
    asked, current_device = [], torch.cuda.current_device
    torch.cuda.current_device = lambda: asked.append(True) or current_device()
    assert not Pace(config.checkpoint).stopped()
    torch.cuda.current_device = current_device
    return list(limits.values()), world, asked


def test_time_limits_of_groups(model):
    for limits, world, asked in run_ranks(limits_and_flag, 2, model):
        assert len(limits) > 10 and set(limits) == {timedelta(seconds=60)}
        assert world == timedelta(seconds=7200 + 60)
        # A flag on a device would make an NCCL communicator of the whole world.
        assert not asked


# Servers that share the GPUs


class SlowToStart(http.server.BaseHTTPRequestHandler):
    def answer(self):
        self.server.events.append(f"{self.command} {self.path}")
        up = self.path != "/health" or self.server.events.count("GET /health") > 2
        self.send_response(200 if up else 503)
        self.end_headers()

    do_GET = do_POST = answer

    def log_message(self, *_):
        pass


def events_of_a_start(model_dir, data, command):
    import os

    from megatron_dgpo import evaluation, session, trainer
    from megatron_dgpo.rollout.guard import SECRET

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), SlowToStart)
    events = server.events = []
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    os.environ[SECRET] = "secret"
    servers = {"sleep": True, "addresses": [f"http://127.0.0.1:{server.server_port}"]}
    files = {"train": data, "eval": data}
    config = make_config(model_dir, {}, data=files, servers=servers, weight_sync={"transport": "ipc"})

    class Made(Exception):
        pass

    def make(*_):
        events.append("policy")
        raise Made

    session.Policy, initialize = make, session.initialize_parallel
    session.initialize_parallel = lambda *arguments: events.append("groups") or initialize(*arguments)
    try:
        with pytest.raises(Made):
            trainer.train(config) if command == "train" else evaluation.evaluate_policy(config, None, from_model=True)
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
    return events


@pytest.mark.parametrize("command", ["train", "eval"])
def test_shared_servers_sleep_before_the_trainer_takes_memory(model, tmp_path, command):
    data = tmp_path / "problems.jsonl"
    data.write_text('{"question": "1+1", "answer": "2"}\n')
    [events] = run_ranks(events_of_a_start, 1, model, data, command, joined=False)
    assert events == ["GET /health"] * 3 + ["POST /sleep?level=1", "groups", "policy"]


# Checkpoints


def resumed_with_other_settings(model_dir, folder):
    """(all_gathers while saving, what a policy with other settings has after loading)."""
    import torch.distributed as dist

    from megatron_dgpo import checkpoint
    from megatron_dgpo.manifest import Progress
    from megatron_dgpo.model.policy import Policy

    parallel = {"data": 2, "distributed_optimizer": True}
    config, architecture, policy, batches, loss = build(model_dir, parallel, dtype="bfloat16")
    policy.step(batches(2), loss)
    gathered, all_gather = [], dist.all_gather
    dist.all_gather = lambda *arguments, **named: gathered.append(arguments) or all_gather(*arguments, **named)
    save(folder, policy, architecture, Progress(1), Checkpoint(keep=1))
    dist.all_gather = all_gather
    settings = {"lr": 4e-3, "min_lr": 1e-3, "schedule": "linear", "weight_decay": 0.5, "beta2": 0.5}
    config = config.model_copy(update={"optimizer": config.optimizer.model_copy(update=settings)})
    other = Policy(config, architecture, 4)
    assert checkpoint.load_newest(folder, other, architecture) == Progress(1)
    rates = [other.step(batches(2), loss).lr for _ in range(3)]
    groups = [(g["max_lr"], g["min_lr"], g["betas"][1], g["weight_decay"]) for g in other.optimizer.param_groups]
    return len(gathered), rates, groups


def test_a_resumed_run_takes_the_settings_it_is_given_and_saves_without_filling_gpus(model, tmp_path):
    for gathered, rates, groups in run_ranks(resumed_with_other_settings, 2, model, tmp_path):
        assert gathered == 0
        # Two steps of warm-up, of which one was done before; from the peak the rate falls over the new run's length.
        assert rates == pytest.approx([4e-3, 2.5e-3, 1e-3])
        assert {(peak, least, beta) for peak, least, beta, _ in groups} == {(4e-3, 1e-3, 0.5)}
        assert {decay for *_, decay in groups} == {0.0, 0.5}


def flat_weights(policy):
    return torch.cat([parameter.detach().flatten() for parameter in policy.modules[0].parameters()])


def saved(model_dir, folder, parallel):
    """({rank: bytes} of a checkpoint's tensors, the weights in it, and after another step)."""
    from megatron_dgpo.manifest import Progress, read_manifest, total_bytes

    _, architecture, policy, batches, loss = build(model_dir, parallel)
    policy.step(batches(2), loss)
    path = save(folder, policy, architecture, Progress(1), Checkpoint())
    manifest = read_manifest(path)
    written = {0: 0, 1: 0}
    for file, (size, _) in manifest["files"].items():
        # Megatron's writer calls them __RANK_NUMBER.distcp.
        if file.endswith(".distcp"):
            written[int(file.split("_")[2])] += size
    assert total_bytes(manifest) == sum(file.stat().st_size for file in path.iterdir() if file.name != "manifest.json")
    before = flat_weights(policy)
    policy.step(batches(2), loss)
    return written, before, flat_weights(policy)


def loaded(model_dir, folder, parallel):
    """(the weights of the checkpoint, and after another step)."""
    from megatron_dgpo import checkpoint

    _, architecture, policy, batches, loss = build(model_dir, parallel)
    assert checkpoint.load_newest(folder, policy, architecture)
    before = flat_weights(policy)
    policy.step(batches(2), loss)
    return before, flat_weights(policy)


@pytest.mark.parametrize("distributed", [False, True])
def test_replicas_share_the_writing_of_a_checkpoint(model, tmp_path, distributed):
    parallel = {"distributed_optimizer": distributed}
    [(shared, weights, later), _] = run_ranks(saved, 2, model, tmp_path, parallel)
    # One has the moments and master weights of the distributed optimizer, 12 bytes a parameter, and the other then
    # writes the float32 weights, 4 bytes.
    share = 1 / 4 if distributed else 1 / 2
    assert min(shared.values()) == pytest.approx(share * sum(shared.values()), rel=0.1)
    [(found, next_found)] = run_ranks(loaded, 1, model, tmp_path, parallel)
    assert torch.equal(found, weights)
    torch.testing.assert_close(next_found, later, rtol=1e-5, atol=1e-5)


def saved_while_training(model_dir, folder, parallel):
    """(what there was of the checkpoint while its writer waited, the weights when it began, and after another step)."""
    from megatron_dgpo import checkpoint
    from megatron_dgpo.manifest import Progress

    def waiting(write, *arguments):
        while not (folder / "go").exists():
            time.sleep(0.01)
        write(*arguments)

    def save_later(*arguments, **named):
        request = original(*arguments, **named)
        return request._replace(async_fn=functools.partial(waiting, request.async_fn))

    original, checkpoint.dist_checkpointing.save = checkpoint.dist_checkpointing.save, save_later
    _, architecture, policy, batches, loss = build(model_dir, parallel)
    policy.step(batches(2), loss)
    before = flat_weights(policy)
    writing = checkpoint.begin(folder, policy, architecture, Progress(1), Checkpoint(asynchronous=True))
    policy.step(batches(2), loss)
    early = writing.is_complete(wait=False), writing.path.exists()
    (folder / "go").touch()
    assert writing.is_complete(wait=True) and writing.path.exists()
    return early, before, flat_weights(policy)


def test_training_goes_on_while_a_checkpoint_is_written(model, tmp_path):
    parallel = {"data": 2, "distributed_optimizer": True}
    for early, weights, later in run_ranks(saved_while_training, 2, model, tmp_path, parallel):
        assert early == (False, False)
        assert not torch.equal(weights, later)
    for found, next_found in run_ranks(loaded, 2, model, tmp_path, parallel):
        assert torch.equal(found, weights)
        assert torch.equal(next_found, later)


def saved_on_a_full_disk(model_dir, folder):
    """(the error of a second save, what is in the folder after it, and after a start that follows a cut-off save)."""
    from megatron_dgpo import checkpoint
    from megatron_dgpo.manifest import Progress

    _, architecture, policy, batches, loss = build(model_dir, {})
    policy.step(batches(2), loss)
    save(folder, policy, architecture, Progress(1), Checkpoint())
    checkpoint.shutil.disk_usage = lambda path: (10**12, 10**12 - 10_000, 10_000)
    try:
        save(folder, policy, architecture, Progress(2), Checkpoint())
        error = "none"
    except UsageError as refused:
        error = str(refused)
    after = sorted(path.name for path in folder.iterdir())
    left = folder / ".writing_step_00000007"
    left.mkdir()
    (left / "common.pt").write_bytes(b"cut off")
    assert checkpoint.load_newest(folder, policy, architecture) == Progress(1)
    return error, after, sorted(path.name for path in folder.iterdir())


def test_a_full_disk_is_told_before_anything_is_written_and_nothing_of_a_cut_off_save_stays(model, tmp_path):
    [(error, after, later)] = run_ranks(saved_on_a_full_disk, 1, model, tmp_path)
    assert f"{tmp_path} has 0.0 GiB free, and the last checkpoint took 0." in error
    assert "make room or lower checkpoint.keep" in error
    assert after == later == ["step_00000001"]


def test_fingerprints_tell_weights_apart_and_not_places(model, tmp_path):
    same = make_tiny_model(tmp_path / "same", "qwen3", num_hidden_layers=2)
    other = make_tiny_model(tmp_path / "other", "qwen3", num_hidden_layers=2, seed=1)
    assert fingerprint(model) == fingerprint(same) != fingerprint(other)


@pytest.fixture
def rows(tmp_path):
    """A file of problems and solutions."""
    file = tmp_path / "rows.jsonl"
    file.write_text('{"question": "1+1", "answer": "2", "response": "2"}\n' * 3)
    return file


@pytest.mark.parametrize("setting", ["path", "reference", "start"])
def test_another_start_or_reference_is_refused(model, tmp_path, rows, setting):
    other = make_tiny_model(tmp_path / "other", "qwen3", num_hidden_layers=2, seed=1)
    data = {"train": rows}
    # Beyond its teacher, so that all of the models are asked for.
    taught = {"teacher": 1.0, "teacher_extrapolation": 1.25}
    manifest = {"origins": origins(make_config(model, data=data, algorithm=taught), "train")}
    changed = origins(make_config(model, model={setting: other}, data=data, algorithm=taught), "train")
    with pytest.raises(UsageError, match=f"model.{setting}={other} holds other weights than {model}"):
        check_origins(Path("step_1"), manifest, changed)
    moved = make_tiny_model(tmp_path / "moved", "qwen3", num_hidden_layers=2)
    check_origins(Path("step_1"), manifest, origins(make_config(moved, data=data), "train"))
    # Neither GRPO nor fine-tuning has a reference.
    check_origins(Path("step_1"), manifest, {"model.path": manifest["origins"]["model.path"]})
    uniform = make_config(model, model={setting: model}, data=data, algorithm={"credit": "uniform"})
    check_origins(Path("step_1"), manifest, origins(uniform, "train"))
    check_origins(Path("step_1"), {"origins": origins(uniform, "train")}, manifest["origins"])


@pytest.mark.parametrize(
    "command, setting, value, began_with",
    [
        ("train", "run.seed", 2, "1"),
        ("sft", "run.seed", 2, "1"),
        ("train", "data.prompt_field", "problem", "question"),
        ("train", "data.template", "Q: {prompt}", "{prompt}"),
        ("sft", "data.chat", True, "false"),
        ("sft", "data.shuffle", False, "true"),
        ("train", "rollout.prompts_per_step", 7, "32"),
        ("train", "rollout.group_size", 7, "8"),
        ("sft", "sft.response_field", "solution", "response"),
        ("sft", "sft.batch_size", 7, "64"),
        ("train", "model.dtype", "bfloat16", "float32"),
        ("sft", "parallel.distributed_optimizer", True, "false"),
    ],
)
def test_what_must_stay_is_refused(model, rows, command, setting, value, began_with):
    files = {"data": {"train": rows}, "sft": {"data": rows}}
    section, name = setting.split(".")
    changed = files | {section: files.get(section, {}) | {name: value}}
    manifest = {"origins": origins(make_config(model, **files), command)}
    given = value if isinstance(value, str) else json.dumps(value)
    with pytest.raises(UsageError) as error:
        check_origins(Path("step_1"), manifest, origins(make_config(model, **changed), command))
    assert str(error.value).startswith(f"{setting}={given}, but it is {began_with} in the run that")
    assert f"Choose another run.dir, or {setting}={began_with} as it was" in str(error.value)


@pytest.mark.parametrize("command, setting", [("train", "data.train"), ("sft", "sft.data")])
def test_other_rows_are_refused_and_the_same_in_another_place_are_not(model, tmp_path, rows, command, setting):
    def with_rows(path):
        return origins(make_config(model, data={"train": path}, sft={"data": path}), command)

    manifest = {"origins": with_rows(rows)}
    moved = tmp_path / "moved.jsonl"
    moved.write_bytes(rows.read_bytes())
    check_origins(Path("step_1"), manifest, with_rows(moved))
    assert f"{setting} {rows} → {moved}" in changes(manifest, with_rows(moved))
    # One figure of the last row.
    moved.write_bytes(rows.read_bytes()[:-5] + b"3" + rows.read_bytes()[-4:])
    with pytest.raises(UsageError, match=f"{setting}={moved} holds other rows than {rows}, the "):
        check_origins(Path("step_1"), manifest, with_rows(moved))
    rows.write_bytes(moved.read_bytes())
    with pytest.raises(UsageError, match=f"{setting}={rows} holds other rows than .* or {setting}={rows} as it was"):
        check_origins(Path("step_1"), manifest, with_rows(rows))


def test_a_checkpoint_of_fine_tuning_is_not_trained_on(model, rows):
    config = make_config(model, data={"train": rows}, sft={"data": rows})
    with pytest.raises(UsageError, match="command=train, but it is sft in the run"):
        check_origins(Path("step_1"), {"origins": origins(config, "sft")}, origins(config, "train"))


def test_what_may_change_is_told_and_nothing_else(model, rows):
    data = {"train": rows}
    ours = origins(make_config(model, data=data), "train")
    assert changes({"origins": ours}, ours) == []
    new = {"run": {"steps": 200}, "optimizer": {"lr": 2e-6, "schedule": "cosine"}, "rollout": {"max_staleness": 2}}
    new |= {"algorithm": {"credit": "uniform"}, "servers": {"addresses": ["http://a:1", "http://b:2"]}}
    changed = origins(make_config(model, {"data": 2}, data=data, **new), "train")
    check_origins(Path("step_1"), {"origins": ours}, changed)
    assert changes({"origins": ours}, changed) == [
        "run.steps 100 → 200",
        f"model.reference {model} → null",
        "parallel.data null → 2",
        "optimizer.lr 1e-06 → 2e-06",
        "optimizer.schedule constant → cosine",
        "algorithm.credit distribution_guided → uniform",
        "rollout.max_staleness 0 → 2",
        'servers.addresses [] → ["http://a:1", "http://b:2"]',
    ]
    # Of before there were such entries, or with settings that are gone.
    for origin in ({}, {"model.path": ours["model.path"]}, {"rollout.gone": ["1", "1"]}):
        check_origins(Path("step_1"), {"origins": origin}, changed)
        assert changes({"origins": origin}, changed) == []
    assert changes({}, changed) == []


@pytest.mark.parametrize(
    "content",
    [
        "[" * 100_000,
        "[]",
        json.dumps({"progress": {"step": "1"}, "architecture": {}, "files": {}}),
        json.dumps({"progress": {}, "architecture": {}, "files": []}),
        json.dumps({"progress": {}, "architecture": {}, "files": {"a": 1}}),
        json.dumps({"progress": {}, "architecture": {}, "files": {}, "origins": 1}),
    ],
)
def test_what_is_no_manifest_is_none(tmp_path, content):
    (tmp_path / "manifest.json").write_text(content)
    assert read_manifest(tmp_path) is None


def test_a_bit_that_flips_in_a_manifest_is_found(tmp_path):
    content = {"progress": {"step": 5, "prompts": 40, "weight_version": 5}, "architecture": {"heads": 2, "tied": True}}
    content |= {"files": {"a.distcp": [12, 3_000_000_000]}, "layout": {"tensor": 2}, "origins": {"run.seed": ["1"]}}
    write_manifest(tmp_path, content)
    written = (tmp_path / "manifest.json").read_bytes()
    assert read_manifest(tmp_path) == content
    for place in range(8 * len(written)):
        flipped = bytearray(written)
        flipped[place // 8] ^= 1 << place % 8
        (tmp_path / "manifest.json").write_bytes(flipped)
        found = read_manifest(tmp_path)
        # In the checksum's own name it changes nothing else.
        assert found is None or content.items() <= found.items(), bytes(flipped)


# The canary


class Served:
    """A server whose bfloat16 model is at hand."""

    addresses = ("here",)

    def __init__(self, model):
        self.model = model

    def weight_version(self, address):
        return "0"

    def differing_tensors(self, address):
        return []

    def resume(self, probes):
        return [[logprobs(self.model, token_ids) for token_ids in probes]]

    def generate(self, prompts, n, temperature, max_tokens, seeds):
        ids = torch.tensor([prompt.token_ids for prompt in prompts])
        rows = self.model.generate(ids, max_new_tokens=max_tokens, do_sample=False, pad_token_id=0, eos_token_id=None)
        return [Response(p, r[ids.shape[1] :].tolist(), [], "length", 0) for p, r in zip(prompts, rows, strict=True)]


@torch.no_grad()
def logprobs(model, token_ids):
    ids = torch.tensor(token_ids)
    return torch.log_softmax(model(ids[None]).logits[0, :-1].float(), -1).gather(-1, ids[1:, None])[:, 0].tolist()


@pytest.fixture(scope="module")
def policy_and_server(tmp_path_factory):
    """Float32 and bfloat16 of the same values, with logits as large as real models have (standard deviation 12)."""
    from transformers import AutoModelForCausalLM

    path = make_tiny_model(tmp_path_factory.mktemp("deep") / "model", "qwen3", num_hidden_layers=24)
    policy = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16)
    policy.lm_head.weight.data *= 16
    return copy.deepcopy(policy).float(), policy


def settings(dtype, **weight_sync):
    return make_config("unused", servers={"dtype": dtype}, weight_sync=weight_sync)


def ask(canary, policy, server):
    generator = torch.Generator().manual_seed(1)
    prompts, texts = canary.probes(server, torch.randint(3, 131, (2, 8), generator=generator).tolist())
    expected = [logprobs(policy, p + t)[-len(t) :] for p, t in zip(prompts, texts, strict=True)]
    return canary.check(server, server, 0, [p + t for p, t in zip(prompts, texts, strict=True)], expected)


def test_rounding_does_not_alarm_the_canary_and_a_wrong_server_does(policy_and_server):
    policy, served = policy_and_server
    random = torch.randint(3, 131, (48,), generator=torch.Generator().manual_seed(0)).tolist()
    pairs = zip(logprobs(policy, random), logprobs(served, random), strict=True)
    # What was asked before, of a tolerance of 0.1.
    assert sum(abs(a - b) for a, b in pairs) / 47 > 0.1
    server, canary = Served(served), Canary(settings("bfloat16"))
    assert ask(canary, policy, server) < 0.1
    assert ask(canary, policy, server) < 0.1
    with pytest.raises(StaleWeightsError, match=r"at most 0\.001 expected"):
        ask(Canary(settings("float32")), policy, server)
    with pytest.raises(StaleWeightsError, match="weight_sync.canary_tolerance"):
        ask(Canary(settings("bfloat16", canary_tolerance=1e-4)), policy, server)
    wrong = copy.deepcopy(served)
    wrong.model.layers[12].mlp.down_proj.weight.data *= -1
    for alarmed in (canary, Canary(settings("bfloat16"))):
        with pytest.raises(StaleWeightsError, match="computes them differently"):
            ask(alarmed, policy, Served(wrong))

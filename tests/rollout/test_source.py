"""Which groups a step trains on, and who samples them with which weights: however many replicas, whatever is lost."""

import dataclasses
import itertools
import re
import threading

import pytest

from megatron_dgpo.config import Rollout
from megatron_dgpo.errors import UsageError
from megatron_dgpo.manifest import Progress
from megatron_dgpo.rollout import guard, source
from megatron_dgpo.rollout.recording import file_of_step, remove_beyond, write_responses
from megatron_dgpo.rollout.response import Prompt, Response
from megatron_dgpo.rollout.source import RolloutSource, Window, dealt_share, request_seed
from tests.layouts import make_config
from tests.rollout.fake_servers import SECRET, FakeServer
from tests.rollout.test_producer import GRADER, Tokenizer

PROMPTS = [Prompt(index, [10 + index], f"problem {index}", "0", {"reward": 1}) for index in range(12)]
STEPS, SIZE = 6, 4


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    """Of one replica, whose leader this is."""
    monkeypatch.setenv(guard.SECRET, SECRET)
    monkeypatch.setattr(source, "replica", lambda: (0, 1))
    monkeypatch.setattr(source, "is_replica_leader", lambda: True)
    monkeypatch.setattr(source, "from_rank_0", lambda function: function())
    monkeypatch.setattr(source, "from_leader", lambda function: function())
    monkeypatch.setattr(source, "from_leaders", lambda function: [function()])
    monkeypatch.setattr(source, "all_gathered", lambda value, group: [value])
    monkeypatch.setattr(source, "data_group", lambda: None)


class Updates:
    """Weight updates that reach whoever is in `servers`."""

    def __init__(self, servers):
        self.servers, self.updates, self.pushed, self.under_way = servers, 0, [], False

    @property
    def members(self):
        return [server.address for server in self.servers]

    def push(self, version):
        for server in self.servers:
            server.serve_version(version)
            server.behaviour = "ok"
        self.updates += 1
        self.pushed.append(version)


@pytest.fixture
def run(tmp_path):
    """Steps of a run on one or two servers: (groups of each step, the fakes)."""
    servers = [FakeServer(), FakeServer()]

    def run(first=1, last=STEPS, between=None, evaluation=None, **rollout):
        config = make_config(
            "unused",
            run={"dir": tmp_path, "steps": STEPS},
            rollout={"prompts_per_step": SIZE, "group_size": 3, "record": True, **rollout},
            reward={"grader": GRADER, "workers": 1},
            servers={"max_concurrent": 4},
            eval=evaluation or {},
        )
        updates, steps = Updates(servers), []
        with RolloutSource(config, [2], Tokenizer(), updates, PROMPTS) as rollouts:
            progress = run.progress if first > 1 else Progress()
            rollouts.begin(warnings.append)
            updates.push(first - 1)
            for step in range(first, last + 1):
                taken = rollouts.take(progress)
                steps.append(taken.groups)
                if between:
                    between(step, rollouts, progress)
                updates.push(step)
                progress = run.progress = Progress(step, taken.next_position, step)
                rollouts.proceed(progress)
                metrics.append(rollouts.metrics())
        return steps

    run.servers, run.folder = servers, tmp_path / "rollouts"
    warnings, metrics = [], []
    run.warnings, run.metrics = warnings, metrics
    yield run
    for server in servers:
        server.close()
    assert not [thread.name for thread in threading.enumerate() if thread.name in ("rollouts", "graders")]


def versions(groups):
    return {version for group in groups.values() for r in group for version, _, _ in r.versions}


@pytest.mark.parametrize("staleness", [0, 1, 3])
def test_order_stays_and_staleness_is_bounded(run, staleness):
    steps = run(max_staleness=staleness)
    assert [list(groups) for groups in steps] == [list(range(SIZE * k, SIZE * (k + 1))) for k in range(STEPS)]
    for step, groups in enumerate(steps, 1):
        assert versions(groups) <= set(range(max(0, step - 1 - staleness), step))
        for group in groups.values():
            assert len(group) == 3 and len({response.prompt.index for response in group}) == 1
    asked = [seed for server in run.servers for seed in server.seeds]
    assert len(asked) == len(set(asked)) == 3 * SIZE * STEPS
    if staleness == 0:
        assert all(versions(groups) == {step} for step, groups in enumerate(steps))
    else:
        # Ahead of the step that trains them.
        assert 0 in versions(steps[1])
    # Whatever the staleness, each position has its prompt and seed.
    epochs = [[group[0].prompt.index for groups in steps[i : i + 3] for group in groups.values()] for i in (0, 3)]
    assert [sorted(epoch) for epoch in epochs] == [list(range(12))] * 2 and epochs[0] != epochs[1]


def test_a_run_begun_again_asks_for_nothing_twice(run):
    whole = run(last=3, max_staleness=2)
    asked = [seed for server in run.servers for seed in server.seeds]
    lines = "".join(file.read_text() for file in (run.folder.parent / "journal").glob("groups_*"))
    journaled = {int(found) for found in re.findall(r'"position": (\d+)', lines)}
    assert journaled >= set(range(3 * SIZE))
    run.progress = Progress(1, SIZE, 1)
    again = run(first=2, max_staleness=2)
    # Steps 2 and 3, and what was finished of those ahead.
    assert again[:2] == whole[1:]
    total = [seed for server in run.servers for seed in server.seeds]
    assert len(set(total)) == 3 * SIZE * STEPS
    # Those alone whose groups were in flight when the first run ended.
    repeated = {seed for seed in asked if total.count(seed) > 1}
    assert not repeated & {request_seed(1, str(position)) + i for position in journaled for i in range(3)}
    assert not run.warnings


def test_many_steps_after_the_last_checkpoint_are_read_again(run):
    whole = run(last=5)
    asked = sum(len(server.asked) for server in run.servers)
    run.progress = Progress(1, SIZE, 1)
    assert run(first=2)[:4] == whole[1:]
    assert sum(len(server.asked) for server in run.servers) == asked + 3 * SIZE


def test_from_the_first_step_that_is_sampled_anew_nothing_of_before_is_used(run):
    """Its weights are others than those that the killed run went on to make."""
    whole = run(last=5)
    [file] = (run.folder.parent / "journal").glob("groups_*")
    lines = file.read_bytes().split(b"\n")
    # A group of step 3 is lost.
    file.write_bytes(b"\n".join(line for line in lines if b'"position": 9,' not in line))
    for server in run.servers:
        server.asked = []
    run.progress = Progress(1, SIZE, 1)
    again = run(first=2, last=5)
    assert again == whole[1:]
    asked = {seed for server in run.servers for seed in server.seeds}
    anew = [9, *range(3 * SIZE, 5 * SIZE)]
    assert asked == {request_seed(1, str(position)) + i for position in anew for i in range(3)}
    # And by the third start all of it is there.
    for server in run.servers:
        server.asked = []
    run.progress = Progress(1, SIZE, 1)
    assert run(first=2, last=5) == again and not any(server.asked for server in run.servers)


def test_what_is_too_old_for_a_smaller_bound_is_sampled_anew(run):
    run(last=3, max_staleness=2)
    run.progress = Progress(3, 3 * SIZE, 3)
    again = run(first=4, max_staleness=0)
    assert [versions(groups) for groups in again] == [{3}, {4}, {5}]


def test_changed_settings_are_named_and_nothing_of_before_is_used(run):
    run(last=2, max_staleness=1)
    run.progress = Progress(1, SIZE, 1)
    run(first=2, last=2, max_staleness=1, temperature=0.5)
    assert run.warnings == [
        f"{run.warnings[0].split(':')[0]}: what was sampled before is not used, as rollout.temperature changed since"
    ]


def test_when_all_servers_are_lost_they_are_updated_again(run):
    def between(step, rollouts, progress):
        if step == 2:
            for server in run.servers:
                server.behaviour = "drop"

    # What is in flight after step 2 is lost with both; the step after it brings them back.
    steps = run(between=between)
    assert [versions(groups) for groups in steps] == [{step} for step in range(STEPS)]


def test_evaluations_are_of_the_weights_now_while_training_goes_on(run):
    found = {}

    def between(step, rollouts, progress):
        # Of two sets, in each of which problems are counted from 0.
        found[step] = rollouts.evaluate(PROMPTS[:5] + PROMPTS[:2], progress)

    run(between=between, max_staleness=2, evaluation={"samples": 2, "temperature": 0.6, "top_p": 0.95})
    for step, responses in found.items():
        assert [r.prompt.index for r in responses] == [i for i in (*range(5), *range(2)) for _ in range(2)]
        assert {r.versions[0][0] for r in responses} == {step - 1}
    asked = [body["sampling_params"] for server in run.servers for body in server.asked]
    # What is trained on is of the whole distribution.
    assert {(s["temperature"], s["top_p"]) for s in asked} == {(1.0, 1.0), (0.6, 0.95)}
    assert sum(s["top_p"] == 0.95 for s in asked) == STEPS * 7 * 2


# Dynamic sampling


@pytest.mark.parametrize("staleness", [0, 2])
def test_groups_of_equal_rewards_are_left_out_in_order(run, monkeypatch, staleness):
    uniform = {0, 1, 2, 5, 6, 8, 11}
    grade_by_prompt(monkeypatch, uniform)
    steps = run(max_staleness=staleness, dynamic_sampling=True)
    order = source.PromptOrder(12, 1, True)
    varied = [position for position in range(200) if order.row(position) not in uniform]
    assert [list(groups) for groups in steps] == [varied[SIZE * k : SIZE * (k + 1)] for k in range(STEPS)]
    for step, groups in enumerate(steps, 1):
        assert versions(groups) <= set(range(max(0, step - 1 - staleness), step))
    assert run.progress.prompts == varied[SIZE * STEPS - 1] + 1
    assert sum(m["rollout/groups_dropped"] for m in run.metrics) == run.progress.prompts - SIZE * STEPS
    # Its recording has what was trained on.
    assert [list(groups) for groups in run(max_staleness=0, dynamic_sampling=True, replay=run.folder)] == [
        list(groups) for groups in steps
    ]


def test_dynamic_sampling_ends(run, monkeypatch):
    grade_by_prompt(monkeypatch, set(range(12)) - {3})
    steps = run(last=2, dynamic_sampling=True, dynamic_limit=2)
    order = source.PromptOrder(12, 1, True)
    for step, groups in enumerate(steps):
        window = range(2 * SIZE * step, 2 * SIZE * (step + 1))
        varied = [position for position in window if order.row(position) == 3]
        assert len(groups) == SIZE and set(varied) <= groups.keys() <= set(window)
    assert run.progress.prompts == 2 * 2 * SIZE


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("uniform", [set(), {0, 1, 5}, set(range(0, 40, 2)), set(range(3, 30))])
def test_windows_allow_no_more_than_these_steps_will_need(uniform, steps):
    """Whatever becomes known when, the same groups are kept, and none is allowed before the bound lets it."""
    rollout = Rollout(prompts_per_step=SIZE, dynamic_sampling=True, dynamic_limit=8)
    varied = [position for position in range(100) if position not in uniform]
    window = Window(0, rollout)
    while True:
        allowed = window.allowed(steps)
        assert len([p for p in allowed if p not in window._uniform]) == SIZE * steps
        assert set(window.needed) <= set(allowed)
        if window.look({position: position not in uniform for position in window.needed}):
            break
    assert sorted(window.kept) == varied[:SIZE] and window.needed.stop == varied[SIZE - 1] + 1
    # Nothing is asked for that the limit leaves out.
    small = Window(0, Rollout(prompts_per_step=SIZE, dynamic_sampling=True, dynamic_limit=1.5))
    small.look({position: False for position in range(50)})
    assert small.allowed(steps).stop <= steps * 6
    # With all known at once, too.
    window = Window(0, rollout)
    while not window.look({position: position not in uniform for position in range(100)}):
        pass
    assert sorted(window.kept) == varied[:SIZE]


def grade_by_prompt(monkeypatch, uniform):
    """Rewards that differ within the groups of all prompts but the uniform ones."""

    async def graded(self, responses):
        return [
            dataclasses.replace(r, reward=float(i == 1 and r.prompt.index not in uniform))
            for i, r in enumerate(responses)
        ]

    monkeypatch.setattr("megatron_dgpo.rollout.producer.Producer._graded", graded)


# Shares, seeds and recordings


@pytest.mark.parametrize("replicas", [1, 2, 8, 64])
def test_shares_are_all_prompts_once(replicas):
    for count in (1, 60, 128):
        shares = [dealt_share(range(count), replica, replicas) for replica in range(replicas)]
        assert sorted(itertools.chain(*shares)) == list(range(count))


def test_seeds_are_of_the_position_whoever_asks():
    seeds = [request_seed(1, str(position)) for position in range(10_000)]
    assert len(set(seeds)) == len(seeds) and all(0 <= seed < 2**31 for seed in seeds)
    assert request_seed(2, "0") != seeds[0]


def test_of_a_step_that_is_made_again_nothing_of_more_replicas_stays(tmp_path):
    for name in ("step_00000002.0.jsonl", "step_00000002.1.jsonl", "step_00000002.1.npz", "step_00000003.1.jsonl"):
        (tmp_path / name).touch()
    remove_beyond(tmp_path, 2, 1)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["step_00000002.0.jsonl", "step_00000003.1.jsonl"]


def replayed(config, weights):
    """The first step's groups, trained on with these weights."""
    reward = config.reward.model_copy(update={"weights": weights})
    other = config.model_copy(update={"reward": reward})
    return RolloutSource(other, [2], None, None, PROMPTS[:6]).take(Progress()).groups


def test_replay_weighs_several_rewards_anew(tmp_path, monkeypatch):
    monkeypatch.setattr(source, "replica", lambda: (0, 1))
    rollout = {"prompts_per_step": 1, "group_size": 2, "replay": tmp_path}
    config = make_config(tmp_path, run={"dir": tmp_path}, rollout=rollout, data={"shuffle": False})
    rows = [{"right": 1.0, "brief": 0.1}, {"right": 0.0, "brief": 0.3}]
    made = [
        Response(PROMPTS[0], [i], [-1.0], "stop", [[0, 0, 1]], reward=r["right"] + r["brief"] / 2, components=r)
        for i, r in enumerate(rows)
    ]
    write_responses(file_of_step(tmp_path, 1, 0), made, [0, 0])
    assert replayed(config, {"right": 1, "brief": 0.5}) == {0: made}
    found = replayed(config, {"brief": 2.0, "right": -1.0})[0]
    assert [response.reward for response in found] == [2 * 0.1 - 1, 2 * 0.3]
    assert [list(response.components) for response in found] == [["brief", "right"]] * 2
    for weights, text in (({}, "none"), ({"right": 1}, "right")):
        match = f"has the rewards right, brief, and reward.weights names {text}; give these a weight each"
        with pytest.raises(UsageError, match=match):
            replayed(config, weights)


@pytest.mark.parametrize("recorded_by, replayed_by", [(1, 2), (2, 1), (4, 2)])
def test_replay_gives_each_group_once(tmp_path, monkeypatch, recorded_by, replayed_by):
    config = make_config(
        tmp_path,
        run={"dir": tmp_path},
        rollout={"prompts_per_step": 8, "group_size": 2, "replay": tmp_path / "rollouts"},
    )
    order = source.PromptOrder(6, 1, True)
    groups = {
        position: [
            Response(PROMPTS[order.row(position)], [position, i], [-1.0, -2.0], "stop", [[0, 0, 2]]) for i in (0, 1)
        ]
        for position in range(8)
    }
    for replica in range(recorded_by):
        own = [position for position in groups if position % recorded_by == replica]
        file = file_of_step(tmp_path / "rollouts", 1, replica + 8)
        write_responses(file, [r for position in own for r in groups[position]], [p for p in own for _ in range(2)])
    got = {}
    for replica in range(replayed_by):
        monkeypatch.setattr(source, "replica", lambda replica=replica: (replica, replayed_by))
        taken = RolloutSource(config, [2], None, None, PROMPTS[:6]).take(Progress())
        assert taken.next_position == 8 and not got.keys() & taken.groups.keys()
        got |= taken.groups
    assert got == groups
    monkeypatch.setattr(source, "replica", lambda: (0, 1))
    with pytest.raises(UsageError, match="has one reward without a name, and reward.weights names a; set it to null"):
        replayed(config, {"a": 1})
    for problems, start, text in [(PROMPTS[:5], 0, "responses to problem"), (PROMPTS[:6], 8, "not 8 to 15")]:
        monkeypatch.setattr(source, "replica", lambda: (0, 1))
        with pytest.raises(UsageError, match=text):
            RolloutSource(config, [2], None, None, problems).take(Progress(0, start, 0))

"""Who samples what, where and with which seed: the same for a step, however many replicas share it."""

import itertools

import pytest

from megatron_dgpo.rollout import source
from megatron_dgpo.rollout.client import Engines
from megatron_dgpo.rollout.recording import file_of_step, write_responses
from megatron_dgpo.rollout.response import Prompt, Response
from megatron_dgpo.rollout.source import RolloutSource, consecutive_share, dealt_share
from tests.layouts import make_config

# Of 8 prompts the fifth comes again on the second of two replicas, and on the last of four.
INDICES = [4, 1, 2, 3, 5, 6, 4, 7]
PROMPTS = [Prompt(index, [10 + index], f"problem {index}", "0") for index in INDICES]


@pytest.mark.parametrize("replicas", [1, 2, 8, 64])
def test_shares_are_all_prompts_once(replicas):
    for count in (replicas, 2 * replicas, 5 * replicas):
        shares = [consecutive_share(count, replica, replicas) for replica in range(replicas)]
        assert list(itertools.chain(*shares)) == list(range(count))
    for count in (1, 60, 128):
        shares = [dealt_share(count, replica, replicas) for replica in range(replicas)]
        assert sorted(itertools.chain(*shares)) == list(range(count))
    if replicas > 1:
        with pytest.raises(ValueError, match="do not split evenly"):
            consecutive_share(replicas + 1, 0, replicas)


class RecordingEngines(Engines):
    """Answers at once, and keeps the calls."""

    def __init__(self, servers):
        super().__init__([f"http://server-{i}" for i in range(servers)], "secret", 1, [2])
        self.calls = []

    def _call(self, *calls):
        self.calls += calls
        choice = {"index": 0, "token_ids": [5], "finish_reason": "stop", "logprobs": {"content": [{"logprob": -1.0}]}}
        return [{"choices": [choice | {"weight_versions": []}]}] * len(calls)


@pytest.fixture
def ask(tmp_path, monkeypatch):
    """(address, token ids, seed) of every request of all replicas of a training step or an evaluation."""
    config = make_config(tmp_path, run={"dir": tmp_path}, rollout={"group_size": 1})
    monkeypatch.setattr(source, "is_replica_leader", lambda: True)
    monkeypatch.setattr(source, "broadcast_from_leader", lambda value: value)
    monkeypatch.setattr(RolloutSource, "_grade", lambda self, responses: responses)

    def ask(prompts, replicas, servers, evaluate=False):
        engines = RecordingEngines(servers)
        for replica in range(replicas):
            made = RolloutSource(config, engines, None)
            share = dealt_share if evaluate else consecutive_share
            made._collect(prompts, share(len(prompts), replica, replicas), 1, 1.0, 8, 3)
        return [(c.address, c.body["token_ids"], c.body["sampling_params"]["seed"]) for c in engines.calls]

    return ask


@pytest.mark.parametrize("replicas, count, servers", [(64, 128, 16), (4, 64, 6), (8, 64, 3), (2, 2, 4)])
@pytest.mark.parametrize("evaluate", [False, True])
def test_all_servers_get_the_same_number_of_prompts(ask, replicas, count, servers, evaluate):
    prompts = [Prompt(i, [i], "", "") for i in range(count if not evaluate else count - 1)]
    found = [address for address, _, _ in ask(prompts, replicas, servers, evaluate)]
    per_server = [found.count(f"http://server-{i}") for i in range(servers)]
    assert sum(per_server) == len(prompts) and max(per_server) - min(per_server) <= 1


@pytest.mark.parametrize("replicas", [2, 4])
def test_a_problem_that_comes_again_has_another_seed(ask, replicas):
    alone, shared = ask(PROMPTS, 1, 2), ask(PROMPTS, replicas, 2)
    assert shared == alone
    seeds = [seed for _, _, seed in shared]
    assert len(set(seeds)) == len(seeds)


@pytest.mark.parametrize("recorded_by, replayed_by", [(1, 2), (2, 1), (4, 2)])
def test_replay_gives_each_group_once(tmp_path, monkeypatch, recorded_by, replayed_by):
    config = make_config(tmp_path, run={"dir": tmp_path}, rollout={"group_size": 2, "replay": tmp_path / "rollouts"})
    groups = [
        [Response(prompt, [place, i], [-1.0, -2.0], "stop", 0, reward=1.0) for i in range(2)]
        for place, prompt in enumerate(PROMPTS)
    ]
    for replica in range(recorded_by):
        share = consecutive_share(len(PROMPTS), replica, recorded_by)
        # Numbers that names would sort in another order.
        file = file_of_step(tmp_path / "rollouts", 1, replica + 8)
        write_responses(file, [response for place in share for response in groups[place]])
    got = []
    for replica in range(replayed_by):
        monkeypatch.setattr(source, "replica", lambda replica=replica: (replica, replayed_by))
        got += RolloutSource(config, RecordingEngines(0), None).sample(PROMPTS, 1)
    assert [response.token_ids for response in got] == [[place, i] for place in range(len(PROMPTS)) for i in (0, 1)]

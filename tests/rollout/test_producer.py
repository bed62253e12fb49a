"""Groups in flight on servers that fail: all arrive, with their own seeds, and nothing of a stale server does."""

import json
import threading
import time

import pytest

from megatron_dgpo.rollout.client import EngineError
from megatron_dgpo.rollout.journal import Journal, forget, open_journal
from megatron_dgpo.rollout.producer import Group, Producer, Wait
from megatron_dgpo.rollout.response import Prompt, Response
from megatron_dgpo.rollout.sampler import Sampler
from tests.layouts import make_config
from tests.rollout.fake_servers import SECRET, FakeServer, fake_tokens

GRADER = "tests.rewards.graders:by_response"
PROMPTS = [Prompt(place, [10 + place], f"problem {place}", "0", {"reward": place}) for place in range(8)]


class Tokenizer:
    """Whatever the response, its text is what tests.rewards.graders does."""

    def __init__(self, texts=None):
        self.texts = texts or {}

    def batch_decode(self, token_ids, skip_special_tokens):
        return [self.texts.get(tuple(ids), "good") for ids in token_ids]


@pytest.fixture
def servers():
    made = []

    def start(*behaviours):
        made.extend(FakeServer(behaviour=behaviour) for behaviour in behaviours)
        return made[-len(behaviours) :]

    yield start
    for server in made:
        server.close()


@pytest.fixture
def start(tmp_path):
    """A producer that is closed at the end."""
    made = []

    def start(journal=None, tokenizer=None, sharers=1, reward=None, **sections):
        reward = {"grader": GRADER, "workers": 2, **(reward or {})}
        config = make_config("unused", run={"dir": tmp_path}, reward=reward, **sections)
        made.append(Producer(config, Sampler(config, SECRET, [2], sharers), tokenizer or Tokenizer(), journal))
        return made[-1]

    yield start
    before = time.monotonic()
    for producer in made:
        producer.__exit__()
    assert time.monotonic() - before < 30
    assert not [thread.name for thread in threading.enumerate() if thread.name in ("rollouts", "graders")]


def test_each_replica_begins_with_other_servers():
    """With fewer requests than servers all would go to the first ones."""
    config, addresses = make_config("unused"), [f"http://{place}:1" for place in range(6)]
    first = []
    for number in range(4):
        sampler = Sampler(config, SECRET, [2], sharers=4, number=number)
        sampler.admit(addresses, 0)
        assert sorted(sampler.serving) == addresses
        first.append(addresses.index(sampler.serving[0]))
    assert first == [0, 1, 3, 4]


def groups(prompts=PROMPTS, size=4):
    return {p.index: Group(p, seed=1000 * p.index, size=size, temperature=1.0) for p in prompts}


def expected_tokens(group):
    seeds = range(group.seed, group.seed + group.size)
    return [fake_tokens(seed) for seed in seeds]


def complete(producer, asked, limit_s=60):
    """Wait for all of them, and check that they are what was asked for, in order."""
    producer.allow(asked)
    assert producer.wait(asked, limit_s) is Wait.DONE
    responses = producer.take(asked)
    wanted = [tokens for group in asked.values() for tokens in expected_tokens(group)]
    assert [r.token_ids for r in responses] == wanted
    assert [r.prompt.index for r in responses] == [g.prompt.index for g in asked.values() for _ in range(g.size)]
    assert [r.reward for r in responses] == [g.prompt.index for g in asked.values() for _ in range(g.size)]
    return responses


def test_requests_are_spread_evenly_and_no_server_has_more_than_it_decodes(servers, start):
    found = servers("ok", "ok", "ok")
    producer = start(servers={"max_concurrent": 4})
    producer.serve([server.address for server in found], 0)
    complete(producer, groups())
    assert sum(len(server.asked) for server in found) == 32
    assert all(len(server.asked) >= 6 and server.most_under_way <= 4 for server in found)
    body = found[0].asked[0]
    assert body["sampling_params"]["max_tokens"] == 1024 and body["sampling_params"]["stop_token_ids"] == [2]


@pytest.mark.parametrize("behaviour", ["drop", "fail"])
def test_what_a_lost_server_had_is_asked_of_another(servers, start, behaviour):
    good, bad = servers("ok", behaviour)
    producer = start(servers={"max_concurrent": 8})
    producer.serve([good.address, bad.address], 0)
    complete(producer, groups())
    counts = producer.counted()
    assert counts["lost"] == len(bad.asked) and 1 <= len(bad.asked) <= 8
    # Each once where it was answered, with the seeds that were lost among them.
    assert sorted(good.seeds) == sorted(1000 * i + j for i in range(8) for j in range(4))
    # It serves again after the next update, and not before.
    bad.behaviour, bad.asked = "ok", []
    complete(producer, {8 + key: group for key, group in groups().items()})
    assert not bad.asked
    producer.serve([good.address, bad.address], 0)
    complete(producer, {16 + key: group for key, group in groups().items()})
    assert len(bad.asked) >= 10


def test_a_server_that_hangs_while_its_health_is_well_is_ended(servers, start):
    good, bad = servers("ok", "hang")
    producer = start(servers={"max_concurrent": 4, "stall_timeout_s": 4})
    producer.serve([good.address, bad.address], 0)
    begin = time.monotonic()
    complete(producer, groups())
    assert 4 <= time.monotonic() - begin < 4 + 20
    assert bad.ended.is_set() and not good.ended.is_set()


def test_a_server_that_is_slow_is_not_ended(servers, start):
    [slow] = servers("slow")
    producer = start(servers={"max_concurrent": 8, "stall_timeout_s": 6})
    producer.serve([slow.address], 0)
    complete(producer, groups())
    assert not slow.ended.is_set() and producer.counted() == {"asked": 32}


@pytest.mark.parametrize("versions", [[[6, 1.0]], [["default", 1.0]], [["default", 0.5], [5, 0.5]]])
def test_nothing_of_a_stale_server_arrives(servers, start, versions):
    good, stale = servers("ok", "ok")
    good.serve_version(7)
    stale.versions = versions
    producer = start(servers={"max_concurrent": 8})
    producer.serve([good.address, stale.address], 7)
    assert {tuple(map(tuple, r.versions)) for r in complete(producer, groups())} <= {
        ((7, 0, length),) for length in range(20)
    }
    counts = producer.counted()
    assert counts["refused"] >= 1 and counts["refused"] + counts["lost"] == len(stale.asked)
    stale.asked = []
    complete(producer, {8 + key: group for key, group in groups().items()})
    assert not stale.asked


def test_what_an_update_that_broke_off_spoilt_is_asked_again_of_the_same_server(servers, start):
    [server] = servers("ok")
    server.versions = [[7, 0.3], ["broken", 0.3], [8, 1.0]]
    producer = start(servers={"max_concurrent": 1})
    producer.serve([server.address], 7)
    producer.allow(asked := groups(size=1))
    while len(server.asked) < 3:
        time.sleep(0.01)
    server.versions = [[7, 0.5], [8, 1.0]]
    responses = complete(producer, asked)
    assert all([version for version, _, _ in r.versions] == [7, 8] for r in responses)
    assert producer.counted()["refused"] >= 2 and producer.counted()["lost"] == 0


def test_without_a_server_it_says_so_and_goes_on_with_the_next(servers, start):
    bad, good = servers("drop", "ok")
    producer = start()
    producer.allow(asked := groups())
    assert producer.wait(asked, 30) is Wait.STARVED
    producer.serve([bad.address], 0)
    while producer.wait(asked, 30) is not Wait.STARVED:
        pass
    producer.serve([good.address], 0)
    complete(producer, asked)


def test_waiting_has_a_limit(servers, start):
    [server] = servers("slow")
    producer = start(servers={"max_concurrent": 1})
    producer.serve([server.address], 0)
    producer.allow(asked := groups())
    assert producer.wait(asked, 0.1) is Wait.ONGOING


@pytest.mark.parametrize(
    "behaviour, text",
    [("refuse", "answered 400: EngineCore"), ("slow", "did not answer within rollout.request_timeout_s=0.5")],
)
def test_what_no_other_server_would_answer_ends_the_run(servers, start, behaviour, text):
    [server] = servers(behaviour)
    producer = start(rollout={"request_timeout_s": 0.5})
    producer.serve([server.address], 0)
    producer.allow(asked := groups())
    with pytest.raises(EngineError, match=text):
        while True:
            producer.wait(asked, 30)


def test_a_response_that_ends_every_server_ends_the_run(servers, start):
    found = servers(*["fail"] * 12)
    producer = start()
    producer.serve([server.address for server in found], 0)
    producer.allow(asked := groups(PROMPTS[:1], size=1))
    with pytest.raises(
        EngineError, match="10 times a server had no response to problem 0: it answered 500: EngineCore"
    ):
        producer.wait(asked, 30)


def test_evaluations_come_before_training(servers, start):
    [server] = servers("ok")
    producer = start(servers={"max_concurrent": 1})
    producer.serve([server.address], 0)
    training = groups()
    first = {("eval", 0, 0): Group(PROMPTS[0], 99_000, 4, 0.0, priority=-1)}
    producer.allow(training)
    producer.allow(first)
    complete(producer, training)
    assert max(server.seeds.index(seed) for seed in range(99_000, 99_004)) < 16


def test_graders_that_hang_hold_up_their_own_groups_alone(servers, start):
    [server] = servers("ok")
    asked = groups()
    hanging = {tuple(tokens): "hang" for tokens in expected_tokens(asked[0])}
    producer = start(tokenizer=Tokenizer(hanging), reward={"timeout_s": 1})
    producer.serve([server.address], 0)
    producer.allow(asked)
    others = [key for key in asked if key]
    assert producer.wait(others, 60) is Wait.DONE
    # Both workers have hung once, and not again before all others were graded.
    assert not producer.finished(0)
    assert producer.wait(asked, 60) is Wait.DONE
    responses = producer.take(asked)
    assert [r.failure is None for r in responses] == [False] * 4 + [True] * 28


# Journal


@pytest.fixture
def journal(tmp_path):
    """That of a replica in the first start of the run, or a later one."""
    folder = tmp_path / "journal"
    assert open_journal(folder, make_config("unused", run={"dir": tmp_path}), PROMPTS) == (1, [])
    return lambda replica=0, start=1: Journal(folder, replica, start)


def prompts_at(positions):
    return {position: PROMPTS[position % 8] for position in positions}


def test_a_finished_group_is_in_the_journal_before_anyone_may_have_it(servers, start, journal):
    [server] = servers("ok")
    producer = start(journal())
    producer.serve([server.address], 0)
    evaluation = {("eval", 0, 0): Group(PROMPTS[0], 99_000, 4, 0.0)}
    producer.allow(groups() | evaluation)
    assert producer.wait(list(groups()), 30) is Wait.DONE
    assert journal(start=2).read(prompts_at(range(16)), 4) == {key: producer.finished(key) for key in groups()}
    # Whoever begins again asks for none of them.
    server.asked = []
    again = start(journal(start=2))
    again.serve([server.address], 0)
    complete(again, groups())
    assert not server.asked
    # Unless they turn out to be of no use.
    third = start(journal(start=3))
    third.serve([server.address], 0)
    third.allow(groups())
    third.drop(list(groups())[:3])
    complete(third, groups())
    assert len(server.asked) == 3 * 4


def test_several_rewards_are_graded_and_in_the_journal(servers, start, journal):
    [server] = servers("ok")
    weights = {"right": 1, "brief": 0.5}
    rows = [Prompt(place, [10 + place], f"problem {place}", "7777", {"right": place}) for place in range(8)]
    texts = {tuple(expected_tokens(groups(rows)[3])[1]): "one number"}
    reward = {"grader": "tests.rewards.graders:several", "weights": weights}
    producer = start(journal(), Tokenizer(texts), reward=reward)
    producer.serve([server.address], 0)
    producer.allow(asked := groups(rows))
    assert producer.wait(asked, 60) is Wait.DONE
    assert journal(start=2).read(dict(enumerate(rows)), 4) == {key: producer.finished(key) for key in asked}
    found = producer.take(asked)
    [failed] = [response for response in found if response.failure]
    assert failed is found[13] and failed.reward == 0 and failed.components == {"right": 0, "brief": 0}
    found.remove(failed)
    assert all(r.components == {"right": r.prompt.index, "brief": 0.25} for r in found)
    assert all(r.reward == r.prompt.index + 0.125 for r in found)


def test_a_journal_cut_anywhere_or_with_a_bit_turned_holds_nothing_wrong(servers, start, journal, tmp_path):
    [server] = servers("ok")
    producer = start(journal())
    producer.serve([server.address], 0)
    complete(producer, groups(PROMPTS[:2], size=2))
    whole = journal(start=2).read(prompts_at(range(2)), 2)
    [file] = (tmp_path / "journal").glob("groups_*")
    content = file.read_bytes()
    ends = [place + 1 for place in range(len(content)) if content[place : place + 2] == b"}\n"]
    for length in range(len(content)):
        file.write_bytes(content[:length])
        found = journal(start=2).read(prompts_at(range(2)), 2)
        assert all(whole[position] == group for position, group in found.items())
        assert len(found) == sum(end <= length for end in ends)
    # What follows the cut counts.
    file.write_bytes(content[:100])
    journal().append(1, whole[1])
    assert journal(start=2).read(prompts_at(range(2)), 2) == {1: whole[1]}
    for place in range(0, len(content), 7):
        file.write_bytes(content[:place] + bytes([content[place] ^ 4]) + content[place + 1 :])
        found = journal(start=2).read(prompts_at(range(2)), 2)
        assert all(whole[position] == group for position, group in found.items())


def test_replicas_find_what_others_have_written(servers, start, journal, tmp_path):
    [server] = servers("ok")
    for replica in (0, 1):
        producer = start(journal(replica))
        producer.serve([server.address], 0)
        complete(producer, groups(PROMPTS[replica::2]))
    found = journal(5, start=2).read(prompts_at(range(8)), 4)
    assert sorted(found) == list(range(8)) and found[3][0].prompt.index == 3
    # Of the last 64 positions some may be asked for again.
    journal().append(64, found[0])
    forget(tmp_path / "journal", 70)
    assert [file.name for file in (tmp_path / "journal").glob("groups_*")] == ["groups_00000001.0.jsonl"]
    assert list(journal(start=2).read(prompts_at(range(100)), 4)) == [64]


def of_version(version, position=0):
    return [Response(PROMPTS[position], [3, 4], [-1.0, -2.0], "stop", [[version, 0, 2]])]


def test_groups_of_weights_that_a_later_start_has_made_differently_are_of_no_use(tmp_path):
    """The first start sampled up to version 9. The second began at 3, trained on what there was, and for step 6 sampled
    itself: version 6 is its own. So are those of the third from 8 on."""
    folder, config = tmp_path / "journal", make_config("unused", run={"dir": tmp_path})

    def begin():
        start, changed = open_journal(folder, config, PROMPTS)
        assert not changed
        return Journal(folder, 0, start)

    first, second = begin(), None
    first.versions_are_own_from(1, first=True)
    for position, version in enumerate([3, 4, 5, 6, 7, 9]):
        first.append(position, of_version(version, position))
    second = begin()
    assert sorted(second.read(prompts_at(range(8)), 1)) == [0, 1, 2, 3, 4, 5]
    second.versions_are_own_from(6, first=True)
    assert sorted(second.read(prompts_at(range(8)), 1)) == [0, 1, 2]
    second.append(3, of_version(6, 3))
    second.append(4, of_version(8, 4))
    # Sampled anew although it was there: the later one counts.
    second.append(1, of_version(3, 1))
    third = begin()
    found = third.read(prompts_at(range(8)), 1)
    assert {position: group[0].newest for position, group in found.items()} == {0: 3, 1: 3, 2: 5, 3: 6, 4: 8}
    third.versions_are_own_from(8, first=False)
    assert sorted(third.read(prompts_at(range(8)), 1)) == [0, 1, 2, 3]
    # Not told by the process that tells: whoever begins after it does not know.
    assert sorted(begin().read(prompts_at(range(8)), 1)) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    "changed, names",
    [
        ({"rollout": {"temperature": 0.7, "group_size": 3}}, ["rollout.group_size", "rollout.temperature"]),
        ({"optimizer": {"lr": 1e-4}}, ["optimizer.lr"]),
        ({"reward": {"grader": "exact"}}, ["reward.grader"]),
        ({"reward": {"weights": {"right": 1}}}, ["reward.weights"]),
        ({"rollout": {"max_staleness": 2, "request_timeout_s": 5}, "batch": {"micro_batch_tokens": 99}}, []),
    ],
)
def test_changed_settings_make_it_useless_and_are_named(journal, tmp_path, changed, names):
    (tmp_path / "journal" / "groups_00000000.0.jsonl").write_text("")
    config = make_config("unused", run={"dir": tmp_path}, **changed)
    assert open_journal(tmp_path / "journal", config, PROMPTS) == (2, names)
    assert len(list((tmp_path / "journal").glob("groups_*"))) == (not names)
    (tmp_path / "journal" / "groups_00000000.0.jsonl").write_text("")
    assert open_journal(tmp_path / "journal", config, PROMPTS) == (3, [])
    assert open_journal(tmp_path / "journal", config, PROMPTS[1:]) == (4, ["data.train"])


@pytest.mark.parametrize("name", ["settings.json", "starts.json"])
def test_a_journal_whose_settings_cannot_be_read_is_emptied(journal, tmp_path, name):
    (tmp_path / "journal" / name).write_text('{"run.seed": ')
    (tmp_path / "journal" / "groups_00000000.0.jsonl").write_text("")
    _, changed = open_journal(tmp_path / "journal", make_config("unused", run={"dir": tmp_path}), PROMPTS)
    assert "run.seed" in changed
    assert json.loads((tmp_path / "journal" / "settings.json").read_text())["run.seed"] == 1
    assert not list((tmp_path / "journal").glob("groups_*"))

"""Settings files and overrides: `load_config` and the checks of a run."""

import json
import string

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from megatron_dgpo import preflight
from megatron_dgpo.config import Config
from megatron_dgpo.config_file import load_config, setting_names
from megatron_dgpo.errors import UsageError
from tests.fuzz import fuzz
from tools.tiny_models import make_tiny_model

NAMES = setting_names()
SECTIONS = sorted(Config.model_fields)

integers = st.one_of(
    st.integers(-3, 70), st.sampled_from([2**31, 2**63, 2**64, 10**18, 10**400]), st.integers(-(10**12), 10**12)
)
digits = st.integers(4000, 6000).map(lambda count: "7" * count)
numbers = st.one_of(
    integers.map(str),
    st.floats().map(repr),
    st.sampled_from(["inf", ".inf", "nan", "1e999", "0x10", "1:30", "010", "1_0", "+1", "1e-5", "-0.0", "१", "."]),
    digits,
)
choices = [
    "null",
    "~",
    "",
    "true",
    "no",
    "auto",
    "te",
    "memory",
    "ipc",
    "shards",
    "full",
    "uniform",
    "exact",
    "float32",
]
addresses = st.one_of(
    st.text(alphabet="[]:/.@#?%a1\u00e9 ", max_size=12).map(lambda text: f"http://{text}"),
    st.sampled_from(["http://[::1]:80", "http://[bad", "http://h:99999", "http://" + "a" * 300, "https://h", "//h"]),
)
# Every code point, half a pair, NUL and line ends among them.
texts = st.one_of(
    st.text(st.characters(codec=None), max_size=30),
    st.sampled_from(["\ud83d{prompt}", "a\0b", "~", "~x/y", "/", "x" * 5000, "/dev/full", "{prompt}", "math", "a:b"]),
)
nested = st.sampled_from(
    ["[" * 3000, "{a: " * 3000, "- " * 3000, "? " * 3000, "&a [*a]", "!!python/tuple [1]", "!!timestamp x"]
)
values = st.one_of(
    numbers, st.sampled_from(choices), addresses, addresses.map(lambda a: json.dumps([a])), texts, nested
)  # fmt: skip
overrides = st.one_of(
    st.tuples(st.sampled_from(NAMES), values).map("=".join),
    st.text(st.characters(codec=None), max_size=20),
    st.tuples(st.text(string.ascii_letters + "._=", max_size=30), values).map("=".join),
)
trees = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=10), st.dates()),
    lambda children: st.one_of(
        st.lists(children, max_size=3), st.dictionaries(st.text(max_size=8), children, max_size=3)
    ),
    max_leaves=4,
)
sections = st.dictionaries(
    st.one_of(st.sampled_from(sorted({name.partition(".")[2] for name in NAMES})), st.text(max_size=8)),
    trees,
    max_size=4,
)
files = st.dictionaries(
    st.one_of(st.sampled_from(SECTIONS), st.text(max_size=8)), st.one_of(trees, sections), max_size=5
)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """(a file of settings that pass, its text)."""
    folder = tmp_path_factory.mktemp("settings")
    model = make_tiny_model(folder / "model", "llama")
    (folder / "problems.jsonl").write_text('{"question": "1+1", "answer": "2"}\n')
    settings = {
        "run": {"dir": str(folder / "run")},
        "model": {"path": str(model), "dtype": "float32"},
        "rollout": {"context_tokens": 32, "max_response_tokens": 16, "prompts_per_step": 2, "group_size": 2},
        "data": {"train": "problems.jsonl"},
        "reward": {"grader": "exact"},
    }
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path, path.read_bytes()


def sentence(error: UsageError) -> str:
    text = str(error)
    assert text and len(text.splitlines()) == 1 and len(text) <= 2000
    return text


def accepted(path, overrides) -> Config | None:
    try:
        return load_config(path, overrides)
    except UsageError as error:
        sentence(error)
        return None


@fuzz
@given(given=st.lists(overrides, max_size=4))
def test_overrides(base, given):
    accepted(base[0], given)


@fuzz
@given(tree=files)
def test_files_that_are_yaml(tmp_path, tree):
    path = tmp_path / "config.yaml"
    path.write_bytes(yaml.safe_dump(tree, allow_unicode=True).encode(errors="surrogatepass"))
    accepted(path, [])


@fuzz
@given(content=st.one_of(st.binary(max_size=200), values.map(lambda v: v.encode(errors="surrogatepass"))))
def test_files_of_anything(tmp_path, content):
    path = tmp_path / "config.yaml"
    path.write_bytes(content)
    accepted(path, [])
    path.write_bytes(b"run: {dir: x}\nmodel:\n  path: " + content)
    accepted(path, [])


@fuzz
@given(place=st.floats(0, 1, exclude_max=True), cut=st.integers(0, 8), put=st.binary(max_size=8))
def test_files_with_a_wrong_place(base, tmp_path, place, cut, put):
    path = tmp_path / "config.yaml"
    start = int(place * len(base[1]))
    path.write_bytes(base[1][:start] + put + base[1][start + cut :])
    accepted(path, [])


# What passes `load_config` by far more often than any value would.
plausible = st.one_of(
    st.tuples(st.sampled_from(NAMES), st.one_of(st.integers(0, 9).map(str), st.sampled_from(choices), texts)).map(
        "=".join
    ),
    st.tuples(st.sampled_from(NAMES), numbers).map("=".join),
    addresses.map(lambda address: f"servers.addresses={json.dumps([address])}"),
)


@fuzz
@given(given=st.lists(plausible, max_size=3), command=st.sampled_from(["train", "sft", "eval"]))
def test_checks_of_what_was_accepted(base, given, command):
    config = accepted(base[0], given)
    if config is None:
        return
    from megatron_dgpo.cluster import Node
    from megatron_dgpo.launcher import trainer_size

    with pytest.MonkeyPatch.context() as patch:
        # A process each; names that are none are refused before it is started.
        patch.setattr("megatron_dgpo.preflight.GraderPool", _NoPool)
        try:
            size = trainer_size(config, Node.here(config.run.dir, {}))
            preflight.check(command, config, size, size, None, from_model=False)
        except UsageError as error:
            sentence(error)
        except OSError as error:
            # Told by its file's name (cli.py).
            assert error.strerror


class _NoPool:
    def __init__(self, config) -> None:
        from megatron_dgpo.rewards.grade import check_grader_name

        check_grader_name(config.grader)

    def __enter__(self):
        return self

    def __exit__(self, *_) -> None:
        pass

    def unusable(self, answers) -> dict:
        return {}

"""Settings from files and overrides: what is text stays as it is written, and what is wrong is one line."""

import json
from pathlib import Path

import pytest
from pydantic import TypeAdapter

from megatron_dgpo.config import Config
from megatron_dgpo.config_file import config_text, load_config
from megatron_dgpo.errors import UsageError, shown

BASE = "model: {path: model}\ndata: {train: train.jsonl}\n"


@pytest.fixture
def load(tmp_path):
    def load(*overrides: str, text: str | bytes = BASE):
        path = tmp_path / "config.yaml"
        path.write_bytes(text.encode() if isinstance(text, str) else text)
        return load_config(path, list(overrides))

    return load


def refusal(load, *overrides, **content) -> str:
    with pytest.raises(UsageError) as error:
        load(*overrides, **content)
    message = str(error.value)
    assert "\n" not in message and len(message) <= 2000
    return message


@pytest.mark.parametrize(
    "override",
    [
        "data.template=Q: {prompt}",
        "data.template={prompt}",
        "data.template= 'x' #{prompt}\\n\n",
        "data.prompt_field=yes",
        "data.answer_field=null",
        "reward.grader=42",
    ],
)
def test_a_text_in_an_override_is_taken_as_it_is(load, override):
    name, _, text = override.partition("=")
    section, _, key = name.partition(".")
    assert getattr(getattr(load(override), section), key) == text


@pytest.mark.parametrize("name", ["2024-01-01", "42", "x #y", "1:30", "010", "[a]", "'q'", "null"])
def test_a_path_in_an_override_is_taken_as_it_is(load, name):
    assert load(f"run.dir={name}").run.dir == Path(name)


@pytest.mark.parametrize("name", ["2024-01-01", "42", "1:30", "010", "1e3", "yes"])
def test_a_path_or_text_in_a_file_needs_no_quotes(load, tmp_path, name):
    config = load(text=f"{BASE}run: {{dir: {name}}}\nreward: {{grader: {name}}}\n")
    assert config.run.dir == tmp_path / name and config.reward.grader == name


@pytest.mark.parametrize("name", ["2024-01-01", "42", "x #y", "1:30", "a, b", "'q'", "{a: b}"])
def test_one_set_of_problems_is_a_path_like_any_other(load, tmp_path, name):
    assert load(f"data.eval={name}").data.eval == (Path(name),)
    assert load(text=f"model: {{path: model}}\ndata: {{train: x, eval: {json.dumps(name)}}}").data.eval == (
        tmp_path / name,
    )


def test_several_sets_of_problems(load, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    text = "model: {path: model}\ndata:\n  train: x\n  eval: [a/aime24.jsonl, /b/2025.parquet, ~/c.jsonl]\n"
    expected = (tmp_path / "a" / "aime24.jsonl", Path("/b/2025.parquet"), Path("/home/me/c.jsonl"))
    assert load(text=text).data.eval == expected
    # As they are, beside the folder of the command.
    assert load("data.eval=[x.jsonl, 010]", text=text).data.eval == (Path("x.jsonl"), Path("010"))
    for nothing in ("null", "[]"):
        assert load(f"data.eval={nothing}", text=text).data.eval == ()
        assert load(text=f"model: {{path: model}}\ndata: {{train: x, eval: {nothing}}}").data.eval == ()
    assert load().data.eval == ()


def test_home_folders(load, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", "/home/me")
    assert load("run.dir=~/x").run.dir == Path("/home/me/x")
    assert load(text=BASE + "run: {dir: ~/x}").run.dir == Path("/home/me/x")
    assert load("run.dir=./~/x").run.dir == Path("~/x")
    assert "write ./~nobody-here/x" in refusal(load, "run.dir=~nobody-here/x")


def test_other_values_are_yaml(load):
    config = load(
        "servers.addresses=[http://a:1, 'http://[::1]:2']",
        "parallel.data=null",
        "model.reference=null",
        "data.chat=true",
        "optimizer.lr=1e-5",
        "run.steps=1_000",
        text=BASE + "run:\nparallel: {data: 2}\n",
    )
    assert config.servers.addresses == ("http://a:1", "http://[::1]:2")
    assert config.parallel.data is None and config.model.reference is None and config.data.chat is True
    assert (config.optimizer.lr, config.run.steps) == (1e-5, 1000)


def test_weights_of_rewards(load):
    expected = {"right": 1.0, "format_2": -0.25, "watched": 0.0}
    flow = "{right: 1, format_2: -2.5e-1, watched: 0}"
    config = load(f"reward.weights={flow}")
    assert config.reward.weights == expected and list(config.reward.weights) == list(expected)
    assert load(text=f"{BASE}reward: {{weights: {flow}}}").reward.weights == expected
    for nothing in ("null", "{}"):
        assert load(f"reward.weights={nothing}", text=f"{BASE}reward: {{weights: {flow}}}").reward.weights == {}
        assert load(text=f"{BASE}reward: {{weights: {nothing}}}").reward.weights == {}
    assert load().reward.weights == {}


def test_later_files_and_settings_win(load, tmp_path):
    (tmp_path / "more").mkdir()
    first, second = tmp_path / "more" / "first.yaml", tmp_path / "second.yml"
    first.write_text("algorithm: {tau: 0.3, kappa: 2}\nrun: {dir: out}\nreward:\n")
    second.write_text("algorithm: {tau: 0.4}")
    config = load("run.steps=7", str(first), str(second), "algorithm.clip_low=0.1")
    assert (config.algorithm.tau, config.algorithm.kappa, config.algorithm.clip_low) == (0.4, 2.0, 0.1)
    # A file's paths are relative to it.
    assert config.run.dir == tmp_path / "more" / "out" and config.run.steps == 7
    assert load(str(second), "algorithm.tau=1", str(first)).algorithm.tau == 0.3
    assert "no such config file" in refusal(load, str(tmp_path / "none.yaml"))
    second.write_text("algorithm: 5")
    assert "algorithm='5': expected a section" in refusal(load, str(second))
    second.write_text("algorithn: {tau: 1}")
    assert "unknown setting 'algorithn'" in refusal(load, str(second))


def test_what_is_written_is_what_a_run_has(load, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = load(
        "run.dir=here",
        "servers.addresses=[http://a:1]",
        "optimizer.lr=1e-7",
        "model.reference=null",
        "data.template=null",
        "data.prompt_field=1:30",
        "reward.overlong=filter",
        "reward.weights={b: 1, a: 0.5}",
        "data.chat=true",
        "data.eval=[one.jsonl, ~/two.jsonl]",
    )
    written = tmp_path / "elsewhere" / "config.yaml"
    written.parent.mkdir()
    written.write_text(config_text(config))
    run = config.run.model_copy(update={"dir": tmp_path / "here"})
    data = config.data.model_copy(update={"eval": (tmp_path / "one.jsonl", Path("~/two.jsonl").expanduser())})
    expected = config.model_copy(update={"run": run, "data": data})
    assert load_config(written) == expected


@pytest.mark.parametrize(
    "overrides, needed",
    [
        ([], True),
        (["algorithm.credit=uniform"], False),
        (["algorithm.credit=future_kl"], False),
        (["algorithm.credit=uniform", "algorithm.kl=k3"], True),
        (["algorithm.credit=none", "algorithm.teacher=1"], True),
    ],
)
def test_the_reference_is_loaded_if_a_term_asks_for_it(load, overrides, needed):
    assert load(*overrides).needs_reference is needed


def _numbers() -> list[str]:
    found = []
    for section, field in Config.model_fields.items():
        for name, setting in field.annotation.model_fields.items():
            schema = TypeAdapter(setting.annotation).json_schema()
            kinds = {part.get("type") for part in [schema, *schema.get("anyOf", [])]}
            found += [f"{section}.{name}"] if "number" in kinds else []
    return found


@pytest.mark.parametrize("name", _numbers())
def test_no_setting_is_infinite(load, name):
    assert len(_numbers()) > 15
    for value in ("inf", "-inf", "nan", ".inf", "1e999", "9" * 5000):
        assert f"{name}=" in refusal(load, f"{name}={value}")
    with pytest.raises(ValueError, match="finite"):
        section, _, key = name.partition(".")
        Config.model_fields[section].annotation.model_validate({key: float("inf")})


@pytest.mark.parametrize(
    "override, expected",
    [
        ("run.steps=" + "9" * 5000, "run.steps='999"),
        ("run.steps=9999999999", "less than 2147483648"),
        ("run.seed=-1", "run.seed='-1': input should be greater than or equal to 0"),
        # timedelta, poll and time.sleep all have an end.
        ("rollout.request_timeout_s=1e15", "less than or equal to 2000000"),
        ("run.dir=", "run.dir='': expected a path"),
        ("run.dir=a\0b", "holds a NUL character"),
        ("run.dir=" + "x" * 300, "longer than file systems allow"),
        ("run.dir=" + "x/" * 3000, "longer than file systems allow"),
        ("data.template=\ud83d {prompt}", "data.template='\\ud83d {prompt}': is not UTF-8 text"),
        ("run.dir=\ud83d", "is not UTF-8 text"),
        ("reward.grader=a:\0b", "holds a NUL character"),
        ("optimizer.lr=" + "[" * 5000, "nested too deeply"),
        ("optimizer.lr=[", "optimizer.lr='[': not valid YAML: expected the node content"),
        ("x" * 5000, "expected section.name=value"),
        ("x" * 5000 + ".y=1", "unknown setting 'xxxx"),
        ("data.eval=", "data.eval.0='': expected a path"),
        ("data.eval=[", "data.eval='[': not valid YAML"),
        ("data.eval=[a, [b]]", "data.eval.1=['b']: input is not a valid path"),
        ("data.eval=[a/test.jsonl, b/test.parquet]", "two sets have the name 'test', their file's: give one of the"),
        ("eval.top_p=0", "eval.top_p='0': input should be greater than 0"),
        ("eval.top_p=1.1", "less than or equal to 1"),
        ("reward.weights=right", "reward.weights='right': input should be a valid dictionary"),
        ("reward.weights={right: x}", "reward.weights.right='x': input should be a valid number"),
        ("reward.weights={right: inf}", "reward.weights.right='inf': input should be a finite number"),
        ("reward.weights={right: }", "reward.weights.right=None: input should be a valid number"),
        ("reward.weights={a b: 1}", "a reward cannot be named 'a b': use letters, digits and _"),
        ("reward.weights={größe: 1}", "a reward cannot be named 'größe'"),
        ("reward.weights={a: 0, b: 0}", "all weights are 0: nothing would be trained for"),
        ("run=5", "expected section.name=value"),
        ("data.template.x=5", "expected section.name=value"),
    ],
    ids=range(30),
)
def test_an_override_that_cannot_be_meant(load, override, expected):
    message = refusal(load, override)
    assert expected in message and len(message) < 500


def _bomb(doubled: str) -> str:
    """Aliases that hold the one before them several times."""
    letters = [chr(code) for code in range(ord("a"), ord("y"))]
    lines = (f"k{n}: &{n} {doubled.format(before)}\n" for before, n in zip(letters, letters[1:], strict=False))
    return "k: &a {x: 1}\n" + "".join(lines)


@pytest.mark.parametrize(
    "text, expected",
    [
        ("a: " + "[" * 50_000, "not valid YAML: nested too deeply in line 1, column 24"),
        ("- " * 50_000, "nested too deeply"),
        ("a: !!timestamp x", "unknown setting 'a'"),
        ("a: !!python/object/apply:os.getcwd []", "unknown setting 'a'"),
        ("[a, b", "not valid YAML: expected ',' or ']', but got '<stream end>' in line 1"),
        ("a: b: c", "not valid YAML: mapping values are not allowed here in line 1, column 5"),
        ("\0", "special characters are not allowed: U+0000 at character 1"),
        (b"model: \xff\n", "not UTF-8 text: invalid start byte at byte 8"),
        ("x" * 300_000, "larger than 256 KiB"),
        ("[]", "expected sections such as 'model:' and 'data:', found []"),
        ("5", "found '5'"),
        ("~: 1", "unknown setting 'None'"),
        ("? [a]\n: 1", "found unhashable key"),
        ("model: &a {path: *a}", "recursive"),
        ("run: 5", "run='5': expected a section of settings"),
        ("data: {eval: {a: b}}", "data.eval.0={'a': 'b'}: input is not a valid path"),
        ("run: {dir: {x: 1}}", "run.dir={'x': '1'}: "),
        ("", "setting 'model.path' is missing: give it in the file or as model.path=VALUE"),
        ("data:\n", "setting 'data.train' is missing"),
        ("".join(f"k{i}: 1\n" for i in range(50)), "and 47 more"),
        # 2 to the 24th items in 600 bytes; with merge keys 3 to the 24th.
        (_bomb("[*{0}, *{0}]"), "and 21 more"),
        (_bomb("{{<<: [*{0}, *{0}, *{0}]}}"), "and 21 more"),
    ],
    ids=range(22),
)  # fmt: skip
def test_a_file_that_is_no_file_of_settings(load, text, expected):
    assert expected in refusal(load, text=text)


@pytest.mark.parametrize("path", ["a\0b", "x" * 5000, "/", "no/such/file.yaml", "/dev/zero"])
def test_a_file_that_cannot_be_read(path):
    with pytest.raises(UsageError, match="cannot be read|no such config file|larger than") as error:
        load_config(path)
    assert len(str(error.value)) < 400


def test_errors_are_one_short_line():
    assert str(UsageError("a\n  b\r\n\nc")) == "a b c"
    assert len(str(UsageError("x" * 10_000))) == 2000
    assert len(shown("x" * 10_000)) < 100 and len(shown([["x" * 100] * 100] * 100)) < 1000
    assert shown(Path("a b")) == "a b" and len(shown(Path("x" * 4000))) < 310

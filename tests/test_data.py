import json
import re
from collections import Counter
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from megatron_dgpo.config import Config
from megatron_dgpo.data import PromptOrder, load_prompts, load_solutions
from megatron_dgpo.errors import UsageError
from tools.tiny_models import make_tokenizer

_GSM8K = Path(__file__).parents[2] / "shared" / "data" / "gsm8k" / "test.jsonl"


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer(131)


def _config(path: Path, **settings) -> Config:
    sections = {"model": {"path": "model"}, "data": {"train": path}, "sft": {"data": path}}
    for name, value in settings.items():
        section, _, key = name.partition("__")
        sections.setdefault(section, {})[key] = value
    return Config.model_validate(sections)


def _load(path: Path, tokenizer, **settings):
    return load_prompts(_config(path, **settings), path, "data.train", tokenizer)


@pytest.fixture
def jsonl(tmp_path):
    def write(*rows) -> Path:
        path = tmp_path / "train.jsonl"
        path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
        return path

    return write


def test_rows_become_prompts(jsonl, tokenizer):
    path = jsonl({"question": "1+1?", "answer": "#### 2", "level": 3}, "", {"question": "2+2?", "answer": 4})
    first, second = _load(path, tokenizer, data__template="Solve {prompt} in {braces}:")
    assert tokenizer.decode(first.token_ids) == "Solve 1+1? in {braces}:"
    assert (first.index, first.text, first.answer) == (0, "1+1?", "#### 2")
    assert first.row == {"question": "1+1?", "answer": "#### 2", "level": 3}
    assert (second.index, second.answer) == (1, "4")


def test_parquet_gives_the_same_prompts(jsonl, tmp_path, tokenizer):
    rows = [{"question": f"{n}+{n}?", "answer": str(2 * n), "level": n} for n in range(5)]
    parquet = tmp_path / "train.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), parquet)
    assert _load(parquet, tokenizer) == _load(jsonl(*rows), tokenizer)


def test_chat_template(jsonl, tokenizer):
    path = jsonl({"question": "1+1?", "answer": "2"})
    with pytest.raises(UsageError, match="data.chat=true, but the tokenizer of model has no chat template"):
        _load(path, tokenizer, data__chat=True)
    tokenizer = make_tokenizer(131)
    tokenizer.chat_template = (
        "<bos>{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    (prompt,) = _load(path, tokenizer, data__chat=True, data__template="{prompt} Think.")
    expected = tokenizer.apply_chat_template(
        [{"role": "user", "content": "1+1? Think."}], add_generation_prompt=True, return_dict=False
    )
    assert prompt.token_ids == expected
    assert prompt.text == "1+1?"


def test_solutions_end_with_the_end_token(jsonl, tokenizer):
    path = jsonl({"question": "1+1?", "response": "2"}, {"question": "2+2?", "response": "I say 4"})
    first, second = load_solutions(_config(path, data__template="{prompt} "), tokenizer)
    assert tokenizer.decode(first.prompt) == "1+1? "
    assert tokenizer.decode(first.response) == "2<eos>"
    assert tokenizer.decode(second.response) == "I say 4<eos>"


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (['{"question": "1"', '{"question": 1}'], "train.jsonl:1: not JSON: Expecting ',' delimiter at column 17"),
        ([{"question": "1", "answer": "1"}, "", "hello"], "train.jsonl:3: not JSON: Expecting value at column 1"),
        (["[1, 2]"], "train.jsonl:1: expected a JSON object, found list"),
        (
            [{"question": "1", "answer": "1"}, {"qestion": "1", "answer": "1"}],
            "train.jsonl:2: no field 'question' (data.prompt_field); did you mean data.prompt_field=qestion?",
        ),
        ([{"question": "1", "gold": "1"}], "train.jsonl:1: no field 'answer' (data.answer_field); it has question, g"),
        ([{"question": "1", "answer": None}], "train.jsonl:1: field 'answer' (data.answer_field) holds NoneType"),
        ([{"question": ["1"], "answer": "1"}], "train.jsonl:1: field 'question' (data.prompt_field) holds list"),
        ([{"question": "1", "answer": True}], "holds bool, expected text or a number"),
        ([{"question": "", "answer": "1"}], "train.jsonl:1: field 'question' (data.prompt_field) is empty"),
        (
            ['{"question": "\\ud83d 1+1", "answer": "2"}'],
            "'question' (data.prompt_field) holds half a character, '\\ud83d' at",
        ),
        (
            ['{"question": "1", "answer": NaN}'],
            "field 'answer' (data.answer_field) holds nan, expected text or a finite",
        ),
        (['{"question": "1", "answer": 1e999}'], "field 'answer' (data.answer_field) holds inf"),
        (
            ['{"question": "1", "answer": ' + "9" * 5000 + "}"],
            "train.jsonl:1: holds an integer of more than 4,300 digits",
        ),
        # Pickle, by which graders get rows, ends before JSON does.
        (['{"question": "1", "answer": "1", "x": ' + "[" * 600 + "]" * 600 + "}"], "nested more than 100 levels deep"),
        (['{"a":' * 100_000], "train.jsonl:1: nested more than 100 levels deep"),
        (["[" * 100_000], "train.jsonl:1: nested more than 100 levels deep"),
        ([{"x" * 5000: 1}], "no field 'question' (data.prompt_field); it has " + "x" * 100),
        ([], "train.jsonl holds no rows"),
        (["", "  "], "train.jsonl holds no rows"),
    ],
)
def test_a_bad_row_is_named(jsonl, tokenizer, rows, message):
    with pytest.raises(UsageError) as error:
        _load(jsonl(*rows), tokenizer)
    assert message in str(error.value) and len(str(error.value)) < 500


def test_a_prompt_that_is_too_long_is_named_with_both_numbers(jsonl, tokenizer):
    path = jsonl(*({"question": "x" * length, "answer": "1"} for length in (40, 41, 5, 60)))
    settings = dict(rollout__context_tokens=100, rollout__max_response_tokens=60)
    with pytest.raises(UsageError) as error:
        _load(path, tokenizer, **settings)
    assert str(error.value) == (
        f"{path}:2: prompt of 41 tokens, but rollout.context_tokens=100 leaves 40 beside "
        "rollout.max_response_tokens=60 (2 rows are too long, up to 60 tokens); raise rollout.context_tokens or take "
        "such rows out"
    )
    assert len(_load(path, tokenizer, rollout__context_tokens=120, rollout__max_response_tokens=60)) == 4


def test_a_solution_that_is_too_long_is_named(jsonl, tokenizer):
    path = jsonl({"question": "x" * 50, "response": "y" * 49}, {"question": "x" * 50, "response": "y" * 50})
    with pytest.raises(UsageError, match=r"train.jsonl:2: prompt and solution of 101 tokens, but .*context_tokens=100"):
        load_solutions(_config(path, rollout__context_tokens=100), tokenizer)


def test_a_missing_file_is_named_with_its_neighbours(jsonl, tmp_path, tokenizer):
    path = jsonl({"question": "1", "answer": "1"})
    for given, message in [
        (path.with_name("trian.jsonl"), f"data.train={tmp_path}/trian.jsonl does not exist; did you mean {path}?"),
        (tmp_path / "data" / "train.jsonl", f"does not exist; nor does its folder {tmp_path}/data"),
        (tmp_path, f"is a folder; did you mean {path}?"),
    ]:
        with pytest.raises(UsageError, match=re.escape(message)):
            _load(given, tokenizer)


def test_files_of_another_kind_are_refused(tmp_path, tokenizer):
    parquet, latin = tmp_path / "train.parquet", tmp_path / "train.jsonl"
    parquet.write_text("not parquet")
    with pytest.raises(UsageError, match="is not a readable Parquet file"):
        _load(parquet, tokenizer)
    latin.write_bytes('{"question": "1", "answer": "1"}\n{"question": "é", "answer": "1"}\n'.encode("latin-1"))
    with pytest.raises(UsageError, match=r"train.jsonl:2: not UTF-8 text: .* at byte 15"):
        _load(latin, tokenizer)


def test_a_chat_template_that_refuses_is_told(jsonl, tokenizer):
    tokenizer = make_tokenizer(131)
    tokenizer.chat_template = "{{ raise_exception('system message first') }}"
    with pytest.raises(UsageError, match="data.chat=true: the chat template of model refuses .*: system message first"):
        _load(jsonl({"question": "1", "answer": "1"}), tokenizer, data__chat=True)


def test_a_parquet_file_whose_rows_python_cannot_hold(tmp_path, tokenizer):
    """A time that its datetime has no digits for, text that is not UTF-8: in columns that nobody asked for."""
    path = tmp_path / "train.parquet"
    texts = {"question": ["1"], "answer": ["1"]}
    year_300_000 = pyarrow.array([2**53], pyarrow.timestamp("ms"))
    not_utf_8 = pyarrow.StringArray.from_buffers(1, pyarrow.py_buffer(b"\0\0\0\0\1\0\0\0"), pyarrow.py_buffer(b"\xff"))
    for column in (year_300_000, not_utf_8):
        pyarrow.parquet.write_table(pyarrow.table(texts | {"x": column}), path)
        with pytest.raises(UsageError, match="data.train=.*train.parquet is not a readable Parquet file"):
            _load(path, tokenizer)


def test_a_file_that_cannot_be_read_says_why(tmp_path, tokenizer):
    loop = tmp_path / "train.jsonl"
    loop.symlink_to(loop)
    with pytest.raises(UsageError, match="data.train=.*train.jsonl cannot be read: Too many levels of symbolic links"):
        _load(loop, tokenizer)


def test_a_template_without_the_problem_is_refused(jsonl, tokenizer):
    with pytest.raises(UsageError, match=r"data.template='Solve: ' has no \{prompt\}"):
        _load(jsonl({"question": "1", "answer": "1"}), tokenizer, data__template="Solve: ")


def test_gsm8k(tokenizer):
    if not _GSM8K.is_file():
        pytest.skip(f"{_GSM8K} is not there: the real problems are not part of the repository")
    prompts = _load(_GSM8K, tokenizer, rollout__context_tokens=2048)
    assert len(prompts) == 1319
    # Graders, not the loader, take the final answer out of the solution.
    assert prompts[0].answer.endswith("\n#### 18") and prompts[0].row["question"] == prompts[0].text


def test_every_epoch_visits_every_row_once_in_its_own_order():
    order = PromptOrder(50, seed=1, shuffle=True)
    epochs = [order.take(50 * epoch, 50) for epoch in range(3)]
    assert all(sorted(epoch) == list(range(50)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert PromptOrder(50, seed=2, shuffle=True).take(0, 50) != epochs[0]
    assert PromptOrder(50, seed=1, shuffle=False).take(45, 10) == [45, 46, 47, 48, 49, 0, 1, 2, 3, 4]


def test_the_order_is_stable():
    # A resumed run must meet the same problems, under any later version of Python and its libraries.
    assert PromptOrder(10, seed=1, shuffle=True).take(0, 12) == [5, 1, 2, 6, 9, 8, 7, 4, 3, 0, 8, 6]


def test_shuffling_favours_no_place():
    # Where does row 0 land over 2,000 epochs? 10 places, 200 each; a chi-squared of 9 degrees above 28 has p < 0.001.
    order = PromptOrder(10, seed=3, shuffle=True)
    counts = Counter(order.take(10 * epoch, 10).index(0) for epoch in range(2000))
    assert sum((counts[place] - 200) ** 2 / 200 for place in range(10)) < 28


@pytest.mark.parametrize("consumed", [0, 7, 48, 96, 995])
def test_resuming_needs_only_the_number_of_prompts_used(consumed):
    running = PromptOrder(50, seed=5, shuffle=True)
    for start in range(consumed % 8, consumed, 8):
        running.take(start, 8)
    assert running.take(consumed, 8) == PromptOrder(50, seed=5, shuffle=True).take(consumed, 8)

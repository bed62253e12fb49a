"""Files of problems and solutions: JSONL and Parquet."""

import io
import json
import multiprocessing.reduction

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_dgpo.data import load_prompts, load_solutions
from megatron_dgpo.errors import UsageError
from tests.fuzz import fuzz
from tests.layouts import make_config
from tools.tiny_models import make_tokenizer

scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.sampled_from([10**400, -(10**4000), 2**63]),
    st.floats(),
    st.text(st.characters(codec=None), max_size=20),
)
trees = st.recursive(
    scalars, lambda t: st.one_of(st.lists(t, max_size=3), st.dictionaries(st.text(max_size=5), t, max_size=3))
)
names = st.one_of(
    st.sampled_from(["question", "answer", "response", "qestion"]), st.text(st.characters(codec=None), max_size=9)
)
rows = st.dictionaries(names, trees, max_size=5)
problems = st.fixed_dictionaries(
    {"question": scalars, "answer": scalars, "response": scalars}, optional={"level": trees}
)
lines = st.one_of(
    st.one_of(rows, problems, trees).map(lambda value: json.dumps(value).encode()),
    problems.map(lambda value: json.dumps(value, ensure_ascii=False).encode(errors="surrogatepass")),
    st.binary(max_size=40),
    st.sampled_from(
        [b"[" * 5000, b'{"a":' * 5000, b'{"x":' + b"[" * 700 + b"]" * 700 + b"}", b'{"question": ' + b"7" * 5000 + b"}"]
    ),
)


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer(131)


def read(path, tokenizer) -> None:
    """As problems and as solutions: both, or a sentence; and what is read can be given to a grader."""
    config = make_config("model", data={"train": path}, sft={"data": path})
    for load in (
        lambda: load_prompts(config, path, "data.train", tokenizer),
        lambda: load_solutions(config, tokenizer),
    ):
        try:
            found = load()
        except UsageError as error:
            assert str(error) and len(str(error).splitlines()) == 1 and len(str(error)) <= 2000
        else:
            assert found
            for item in found:
                multiprocessing.reduction.ForkingPickler.dumps(item)


@fuzz
@given(content=st.lists(lines, max_size=4))
def test_jsonl(tmp_path, tokenizer, content):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\n".join(content))
    read(path, tokenizer)


column_types = st.sampled_from(
    [
        pyarrow.string(),
        pyarrow.large_string(),
        pyarrow.binary(),
        pyarrow.int64(),
        pyarrow.uint64(),
        pyarrow.float32(),
        pyarrow.bool_(),
        pyarrow.decimal128(20, 2),
        pyarrow.timestamp("ns", "UTC"),
        pyarrow.timestamp("s", "nowhere/at-all"),
        pyarrow.date32(),
        pyarrow.time64("ns"),
        pyarrow.duration("ns"),
        pyarrow.list_(pyarrow.string()),
        pyarrow.struct({"a": pyarrow.int8(), "b": pyarrow.string()}),
        pyarrow.map_(pyarrow.string(), pyarrow.int64()),
        pyarrow.dictionary(pyarrow.int8(), pyarrow.string()),
        pyarrow.null(),
    ]
)


@st.composite
def tables(draw) -> bytes:
    """A Parquet file whose columns may hold anything, bits that no writer would put there among it."""
    size = draw(st.integers(0, 3))
    columns = {"question": pyarrow.array(["1+1"] * size), "answer": pyarrow.array([2] * size)}
    for name in draw(st.lists(names.filter(lambda name: name.isascii()), max_size=3, unique=True)):
        kind = draw(column_types)
        if kind in (pyarrow.string(), pyarrow.timestamp("ns", "UTC"), pyarrow.date32(), pyarrow.time64("ns")):
            content = draw(st.binary(min_size=8 * size, max_size=8 * size))
            width = kind.bit_width // 8 if kind != pyarrow.string() else None
            ends = pyarrow.py_buffer(b"".join(n.to_bytes(4, "little") for n in range(0, 8 * size + 1, 8)))
            buffers = [None, ends, pyarrow.py_buffer(content)] if width is None else [None, pyarrow.py_buffer(content)]
            columns[name] = pyarrow.Array.from_buffers(kind, size, buffers)
        else:
            columns[name] = pyarrow.nulls(size, kind)
    file = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table(columns), file)
    return file.getvalue()


@fuzz
@given(content=tables())
def test_parquet_of_any_columns(tmp_path, tokenizer, content):
    path = tmp_path / "rows.parquet"
    path.write_bytes(content)
    read(path, tokenizer)


@fuzz
@given(content=tables(), place=st.floats(0, 1, exclude_max=True), cut=st.integers(0, 8), put=st.binary(max_size=8))
def test_parquet_with_a_wrong_place(tmp_path, tokenizer, content, place, cut, put):
    path = tmp_path / "rows.parquet"
    start = int(place * len(content))
    path.write_bytes(content[:start] + put + content[start + cut :])
    read(path, tokenizer)

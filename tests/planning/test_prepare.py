"""examples/math/prepare.py: one form out of the published ones."""

import importlib.util
import json
from pathlib import Path

import huggingface_hub
import pyarrow
import pyarrow.parquet
import pytest

from megatron_dgpo.rewards.grade import math

spec = importlib.util.spec_from_file_location("prepare", Path(__file__).parents[2] / "examples" / "math" / "prepare.py")
prepare = importlib.util.module_from_spec(spec)
spec.loader.exec_module(prepare)

DAPO = (
    "Solve the following math problem step by step. The last line of your response should be of the form "
    "Answer: $Answer (without quotes) where $Answer is the answer to the problem.\n\nWhat is 1+1?\n\n"
    'Remember to put your answer on its own line after "Answer:".'
)


def test_published_forms(tmp_path, capsys):
    row = {"prompt": [{"role": "user", "content": DAPO}], "reward_model": {"ground_truth": "2", "style": "rule"}}
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row, row]), tmp_path / "dapo.parquet")
    (tmp_path / "aime.jsonl").write_text(
        json.dumps({"problem": "Find x.", "solution": "Long.", "answer": 70})
        + "\n\n"
        + json.dumps({"prompt": "Find y.", "answer": "", "solution": "Lines\n#### 3"})
        + "\n"
        + json.dumps({"prompt": "Find z.", "answer": 0})
    )
    out = tmp_path / "data" / "all.jsonl"
    assert prepare.main([str(tmp_path / "dapo.parquet"), str(tmp_path / "aime.jsonl"), "--out", str(out)]) == 0
    assert [json.loads(line) for line in out.read_text().splitlines()] == [
        {"question": "What is 1+1?", "answer": "2"},
        {"question": "Find x.", "answer": "70"},
        {"question": "Find y.", "answer": "Lines\n#### 3"},
        {"question": "Find z.", "answer": "0"},
    ]
    assert "4 problems" in capsys.readouterr().out


def test_bad_input_is_one_sentence(tmp_path, capsys):
    bad = tmp_path / "bad.jsonl"
    for row in ({"text": "no problem"}, {"problem": "no answer", "answer": " "}, {"problem": "1", "answer": ["1"]}):
        bad.write_text(json.dumps(row))
        assert prepare.main([str(bad), "--out", str(tmp_path / "out")]) == 2
        assert "bad.jsonl, row 1" in capsys.readouterr().err
    assert prepare.main([str(tmp_path / "missing.jsonl"), "--out", str(tmp_path / "out")]) == 2
    assert "missing.jsonl" in capsys.readouterr().err


# Sets. The hub is not reached from here: rows have the fields that its data sets have.

ROWS = {
    "aime24": {"id": 60, "problem": " Find $x$. ", "solution": "Long.", "answer": "033", "url": "u", "year": "2024"},
    "aime25": {"problem": "Find y.", "answer": "70", "id": "0"},
    "amc23": {"id": 0, "question": "How many?", "answer": 27.0, "url": "u"},
    "math500": {"problem": "Polar?", "solution": "Long.", "answer": "\\left( 3, \\frac{\\pi}{2} \\right)", "level": 2},
    "minerva": {"question": "How far?", "answer": "$4.5e33$"},
    "olympiadbench": {
        "question": "Which?",
        "final_answer": ["$2$"],
        "solution": ["Long."],
        "is_multiple_answer": False,
    },
}
ANSWERS = {
    "aime24": "033",
    "aime25": "70",
    "amc23": "27.0",
    "math500": ROWS["math500"]["answer"],
    "minerva": "$4.5e33$",
    "olympiadbench": "$2$",
}


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_every_set_in_the_hubs_shape(tmp_path, capsys, monkeypatch):
    asked = []

    def snapshot_download(hub, repo_type, allow_patterns):
        name = next(name for name, source in prepare.SETS.items() if source.hub == hub)
        folder = tmp_path / "hub" / name / "data"
        folder.mkdir(parents=True)
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist([ROWS[name]] * 2), folder / "test-0.parquet")
        asked.append((name, repo_type, allow_patterns))
        return str(folder.parent)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert prepare.main(["--sets", *prepare.SETS, "--out", str(tmp_path / "out")]) == 0
    assert asked == [(name, "dataset", ["*.parquet", "*.jsonl"]) for name in prepare.SETS]
    for name, row in ROWS.items():
        question = str(row.get("problem") or row.get("question")).strip()
        # A set is what is published: what is there twice stays.
        assert read(tmp_path / "out" / f"{name}.jsonl") == [{"question": question, "answer": ANSWERS[name]}] * 2
    assert "2 of 674 problems" in capsys.readouterr().out


def test_a_set_from_what_is_here(tmp_path, capsys):
    file, folder = tmp_path / "any.jsonl", tmp_path / "MATH-500"
    folder.mkdir()
    file.write_text(json.dumps(ROWS["amc23"]) + "\n")
    several = {"question": "Both?", "final_answer": ["1", " -1 "]}
    (folder / "test.jsonl").write_text(json.dumps(ROWS["math500"]) + "\n")
    (tmp_path / "olympiad.jsonl").write_text(json.dumps(several) + "\n")
    sets = [f"amc23={file}", f"math500={folder}", f"olympiadbench={tmp_path / 'olympiad.jsonl'}"]
    assert prepare.main(["--sets", *sets, "--out", str(tmp_path / "out")]) == 0
    assert read(tmp_path / "out" / "amc23.jsonl") == [{"question": "How many?", "answer": "27.0"}]
    assert [row["question"] for row in read(tmp_path / "out" / "math500.jsonl")] == ["Polar?"]
    assert [row["answer"] for row in read(tmp_path / "out" / "olympiadbench.jsonl")] == ["1, -1"]
    assert "1 of 40 problems" in capsys.readouterr().out


@pytest.mark.parametrize(
    "name, response",
    [
        ("aime24", "33"),
        ("amc23", "27"),
        ("math500", "(3, \\frac{\\pi}{2})"),
        ("minerva", "4.5 \\times 10^{33}"),
        ("olympiadbench", "2"),
    ],
)
def test_answers_of_the_sets_are_ones_that_the_grader_takes(name, response):
    assert math(f"So it is \\boxed{{{response}}}.", ANSWERS[name], {}) == 1.0


def test_a_set_that_cannot_be_had_is_one_sentence(tmp_path, capsys, monkeypatch):
    def refuse(*_, **__):
        raise ConnectionError("no way out\nof here")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    wrong, empty = tmp_path / "wrong.jsonl", tmp_path / "empty"
    wrong.write_text(json.dumps({"question": "Q", "answer": "1"}))
    empty.mkdir()
    for entry, expected in (
        ("aime26", "--sets aime26: no such set; expected aime24, aime25, amc23"),
        ("aime24", "HuggingFaceH4/aime_2024 does not come from the hub: no way out; give a file of it as aime24=FILE"),
        (
            f"aime24={wrong}",
            "wrong.jsonl, row 1: no problem and answer (looked for problem and answer, as",
        ),
        (f"aime24={empty}", "holds no *.parquet or *.jsonl"),
        (f"aime24={tmp_path / 'none.jsonl'}", "none.jsonl"),
    ):
        assert prepare.main(["--sets", entry, "--out", str(tmp_path / "out")]) == 2
        error = capsys.readouterr().err
        assert expected in error and len(error.splitlines()) == 1
    for arguments in ([], [str(wrong), "--sets", "aime24"]):
        with pytest.raises(SystemExit):
            prepare.main([*arguments, "--out", str(tmp_path / "out")])

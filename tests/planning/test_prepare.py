"""examples/math/prepare.py: one form out of the published ones."""

import importlib.util
import json
from pathlib import Path

import pyarrow
import pyarrow.parquet

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

"""Answers of the data that a grader cannot work with are named before anything starts."""

import json

import pytest

from tests.test_cli import Case
from tools.tiny_models import make_tiny_model


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_tiny_model(tmp_path_factory.mktemp("model") / "tiny", "llama")


@pytest.mark.parametrize(
    ("grader", "answers", "expected"),
    [
        ("math", ["2", "", "4", ""], ["problems.jsonl:2: no response can be right", "(data.answer_field)", "is empty"]),
        ("math", ["2", "see (1", "see (2"], ["problems.jsonl:2: ", "'see (1'", "(2 different answers are like that)"]),
        ("exact", ["2", "3", "####"], ["problems.jsonl:3: no response can be right, because reward.grader=exact"]),
    ],
)
def test_an_answer_that_no_response_could_meet(tmp_path, model, capsys, grader, answers, expected):
    case = Case(tmp_path, model)
    case.settings["reward"]["grader"] = grader
    case.data.write_text("".join(json.dumps({"question": "1+1", "answer": answer}) + "\n" for answer in answers))
    case.fails(capsys, expected)

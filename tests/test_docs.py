"""What the pages say of the code is there: every `file.py:name` is defined, every relative link leads somewhere."""

import ast
import functools
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [
    "README.md",
    "CONTRIBUTING.md",
    "CHANGELOG.md",
    "docs/architecture.md",
    "docs/method.md",
    "docs/settings.md",
    "docs/metrics.md",
    "docs/your_own.md",
]
_NAME = re.compile(r"`([\w/.]+\.py):(\w+(?:\.\w+)?)`")
_LINK = re.compile(r"\]\(([^)#:]+)(?:#[^)]*)?\)")


def undocumented(metrics) -> set[str]:
    """Of the names of metrics, those that docs/metrics.md does not have; N there stands for any number, NAME for any
    reward's name, and eval/ for any set's."""
    rows = [line.split("|")[1] for line in (ROOT / "docs" / "metrics.md").read_text().splitlines() if "|" in line]
    known = {name for row in rows for name in re.findall(r"`([\w/]+)`", row)}
    named = {name: re.sub("^rollout/reward/.*", "rollout/reward/NAME", name) for name in metrics}
    named = {name: re.sub(r"_\d+$", "_N", re.sub("^eval/.*/", "eval/", row)) for name, row in named.items()}
    return {name for name, row in named.items() if row not in known} - {"step"}


@functools.cache
def _definitions(file: Path) -> set[str]:
    """Functions, classes and values of a module, and of its classes as `Class.name`."""
    found = set()
    for node in ast.parse(file.read_text()).body:
        found |= set(_names(node))
        if isinstance(node, ast.ClassDef):
            found |= {f"{node.name}.{name}" for inner in node.body for name in _names(inner)}
    return found


def _names(node: ast.stmt) -> list[str]:
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return [node.name]
    targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    return [target.id for target in targets if isinstance(target, ast.Name)]


def _missing(text: str) -> list[str]:
    missing = []
    for path, name in _NAME.findall(text):
        files = [file for file in (ROOT / "megatron_dgpo" / path, ROOT / path) if file.is_file()]
        if not files or name not in _definitions(files[0]):
            missing.append(f"{path}:{name}")
    return missing


@pytest.mark.parametrize("page", PAGES)
def test_names_are_defined(page):
    assert not _missing((ROOT / page).read_text())


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    links = _LINK.findall((ROOT / page).read_text())
    assert not [link for link in links if not (ROOT / page).parent.joinpath(link).exists()]


def test_a_wrong_name_is_found():
    text = "`trainer.py:train`, `trainer.py:trane`, `nowhere.py:f`, `layout.py:Layout.rank`, `layout.py:Layout.rang`"
    assert _missing(text) == ["trainer.py:trane", "nowhere.py:f", "layout.py:Layout.rang"]


def test_a_metric_that_is_not_on_the_page_is_found():
    known = ["step", "eval/pass_at_8", "eval/aime24/accuracy", "rollout/tokens_at_lag_0", "policy/clip_high"]
    known += ["time/step_s", "rollout/reward/right", "rollout/reward/of_format_2"]
    assert undocumented([*known, "policy/clip_height", "eval/pass_at_k"]) == {"policy/clip_height", "eval/pass_at_k"}

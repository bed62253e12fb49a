"""Make problem files of one form, {"question", "answer"} a line, from what is published in many.

    python examples/math/prepare.py dapo-math-17k.parquet --out runs/data/dapo-math-17k.jsonl
    python examples/math/prepare.py --sets aime24 aime25 math500 --out runs/data            # from the Hugging Face hub
    python examples/math/prepare.py --sets aime24=aime.parquet math500=MATH-500 --out runs/data       # what is here

Takes Parquet and JSONL: DAPO-Math-17k (its 17,000 problems are repeated a hundred times there: each is kept once), its
processed mirrors, and the sets that papers evaluate on, each into a file of its name: aime24, aime25, amc23, math500,
minerva, olympiadbench. A problem is a text or a list of chat messages.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple


class Source(NamedTuple):
    """Of a set: a data set of the hub, whose files hold nothing else, the fields of its rows, and how many it has."""

    hub: str
    problem: str
    answer: str
    count: int


# As others read them: not run here, where there is no hub.
SETS = {
    "aime24": Source("HuggingFaceH4/aime_2024", "problem", "answer", 30),
    "aime25": Source("math-ai/aime25", "problem", "answer", 30),
    "amc23": Source("math-ai/amc23", "question", "answer", 40),
    "math500": Source("HuggingFaceH4/MATH-500", "problem", "answer", 500),
    "minerva": Source("math-ai/minervamath", "question", "answer", 272),
    "olympiadbench": Source("math-ai/olympiadbench", "question", "final_answer", 674),
}
_FORMS = ("*.parquet", "*.jsonl")

_PROBLEMS = ("question", "problem", "prompt")
_ANSWERS = ("answer", "solution")
# What DAPO-Math-17k writes around every problem; data.template says it our way.
_DAPO_HEAD, _DAPO_TAIL = (
    "Answer: $Answer (without quotes) where $Answer is the answer to the problem.",
    "Remember to put",
)


def rows(path: Path) -> Iterator[dict]:
    if path.suffix == ".parquet":
        import pyarrow.parquet

        for batch in pyarrow.parquet.ParquetFile(path).iter_batches():
            yield from batch.to_pylist()
    else:
        for line in path.read_text().splitlines():
            if line.strip():
                yield json.loads(line)


def problem(row: dict) -> str:
    value = next(row[name] for name in _PROBLEMS if row.get(name))
    text = value if isinstance(value, str) else next(m["content"] for m in value if m["role"] == "user")
    if _DAPO_HEAD in text:
        text = text.split(_DAPO_HEAD, 1)[1].rsplit(_DAPO_TAIL, 1)[0]
    return text.strip()


def answer(row: dict) -> str:
    """The whole of the first answer that is not empty. StopIteration if there is none."""
    graded = row.get("reward_model") or {}
    values = [graded.get("ground_truth"), *(row.get(name) for name in _ANSWERS)]
    texts = (str(value).strip() for value in values if isinstance(value, str | int | float))
    return next(text for text in texts if text)


def written(question: str, text: str) -> str:
    return json.dumps({"question": question, "answer": text}, ensure_ascii=False) + "\n"


def joined(files: list[Path]) -> list[str]:
    """The problems of all files, each once. Raises ValueError naming file and row."""
    found: dict[str, str] = {}
    for path in files:
        number = 0
        try:
            for row in rows(path):
                number += 1
                found.setdefault(problem(row), answer(row))
        except (StopIteration, ValueError):
            names = f"{', '.join(_PROBLEMS)}; {', '.join(_ANSWERS)} or reward_model.ground_truth"
            raise ValueError(f"{path}, row {max(number, 1)}: no problem and answer (looked for {names})") from None
    return [written(question, text) for question, text in found.items()]


def files_of(name: str, place: str) -> list[Path]:
    """Of a set: the file or folder that is given, or the hub's. Raises ValueError."""
    if place:
        folder = Path(place)
    else:
        from huggingface_hub import snapshot_download

        try:
            folder = Path(snapshot_download(SETS[name].hub, repo_type="dataset", allow_patterns=list(_FORMS)))
        except Exception as error:
            # httpx's, huggingface_hub's and the system's.
            reason = str(error).strip().split("\n")[0]
            raise ValueError(
                f"{SETS[name].hub} does not come from the hub: {reason}; give a file of it as {name}=FILE"
            ) from None
    found = sorted(path for form in _FORMS for path in folder.rglob(form)) if folder.is_dir() else [folder]
    if not found:
        raise ValueError(f"{folder} holds no {' or '.join(_FORMS)}; give the set's file as {name}=FILE")
    return found


def of_set(name: str, files: list[Path]) -> list[str]:
    """The problems of a set, all of them. Raises ValueError naming file and row."""
    lines, source = [], SETS[name]
    for path in files:
        number = 0
        try:
            for row in rows(path):
                number += 1
                # OlympiadBench has a list, of one answer to a question nearly always.
                values = row[source.answer] if isinstance(row[source.answer], list) else [row[source.answer]]
                text = ", ".join(str(value).strip() for value in values)
                lines.append(written(row[source.problem].strip(), text))
        except (KeyError, AttributeError, TypeError, ValueError):
            names = f"{source.problem} and {source.answer}, as {source.hub} has"
            raise ValueError(f"{path}, row {max(number, 1)}: no problem and answer (looked for {names})") from None
    return lines


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", type=Path, nargs="*")
    parser.add_argument("--sets", nargs="+", metavar="NAME[=PLACE]", help="from the hub, or from a file or folder")
    parser.add_argument("--out", type=Path, required=True, help="the file; with --sets the folder of NAME.jsonl")
    options = parser.parse_args(arguments)
    if bool(options.files) == bool(options.sets):
        parser.error("give files, or --sets")
    try:
        if options.files:
            write(options.out, joined(options.files))
        for name, _, place in (entry.partition("=") for entry in options.sets or ()):
            if name not in SETS:
                raise ValueError(f"--sets {name}: no such set; expected {', '.join(SETS)}")
            write(options.out / f"{name}.jsonl", of_set(name, files_of(name, place)), f" of {SETS[name].count}")
    except (OSError, ValueError) as error:
        print(f"prepare: {error}", file=sys.stderr)
        return 2
    return 0


def write(path: Path, lines: list[str], expected: str = "") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(lines))
    print(f"{len(lines)}{expected} problems in {path}")


if __name__ == "__main__":
    sys.exit(main())

"""Make problem files of one form, {"question", "answer"} a line, from what is published in many.

    python examples/math/prepare.py dapo-math-17k.parquet --out runs/data/dapo-math-17k.jsonl
    python examples/math/prepare.py aime_2024.parquet aime_2025.jsonl --out runs/data/aime.jsonl

Takes Parquet and JSONL: DAPO-Math-17k (its 17,000 problems are repeated a hundred times there: each is kept once), its
processed mirrors, and AIME's. A problem is a text or a list of chat messages.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path

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


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", type=Path, nargs="+")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args(arguments)
    found: dict[str, str] = {}
    for path in options.files:
        number = 0
        try:
            for row in rows(path):
                number += 1
                found.setdefault(problem(row), answer(row))
        except OSError as error:
            print(f"prepare: {path}: {error.strerror or error}", file=sys.stderr)
            return 2
        except (StopIteration, ValueError):
            names = f"{', '.join(_PROBLEMS)}; {', '.join(_ANSWERS)} or reward_model.ground_truth"
            print(f"prepare: {path}, row {max(number, 1)}: no problem and answer (looked for {names})", file=sys.stderr)
            return 2
    options.out.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps({"question": question, "answer": text}, ensure_ascii=False) for question, text in found.items()]
    options.out.write_text("\n".join(lines) + "\n")
    print(f"{len(lines)} problems in {options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

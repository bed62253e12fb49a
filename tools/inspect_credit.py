"""A recorded step's responses as one HTML page: where each rule of credit puts its weight, token by token.

    python tools/inspect_credit.py runs/arithmetic/dgpo --step 40 --pivots examples.arithmetic.carries:carries

The run needs rollout.record=true. Tokens are coloured by log2 w; on hover each has its w, d, H, score s, log π, log ρ
and ratio; a switch changes the rule. The page refers to nothing outside itself. With --pivots it has the credit on the
tokens that a function of the text marks, and how many times that of uniform credit it is. The function, like a grader,
is your own code and is run.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    # This file is run as a script; what it uses are modules of the folder above.
    sys.path.insert(0, str(ROOT))

from megatron_dgpo.algorithm.credit import credit_concentration  # noqa: E402
from megatron_dgpo.data import load_tokenizer  # noqa: E402
from megatron_dgpo.errors import UsageError  # noqa: E402
from tools.credit.recorded import RecordedStep, Rule, open_run, read_step, rules_of  # noqa: E402
from tools.credit.text import Spans, load_spans, marked, spans_of, text_of, token_texts  # noqa: E402

_TEMPLATE = Path(__file__).parent / "credit" / "page.html"
_DIGITS = 7


def main(arguments: list[str] | None = None) -> int:
    options = _parse(arguments)
    # Tensors are small here: threads would wait for one another.
    torch.set_num_threads(1)
    try:
        spans = load_spans(options.pivots) if options.pivots else None
        step = read_step(open_run(options.run), options.step)
        content = content_of(step, options.position, spans, options.pivots)
        page = page_of(content)
        out = options.out or Path(f"credit_step_{options.step}.html")
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(page, encoding="utf-8")
    except (UsageError, OSError) as error:
        print(f"inspect_credit: {error}", file=sys.stderr)
        return 2
    print(f"{len(content['responses'])} responses, {len(content['rules'])} rules, {len(page) / 1e6:.1f} MB in {out}")
    return 0


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, metavar="RUN", help="run.dir of a training run")
    parser.add_argument("--step", type=int, required=True)
    parser.add_argument("--position", type=int, help="only the group at this position of the run's order of prompts")
    parser.add_argument("--out", type=Path, metavar="FILE", help="default: credit_step_N.html")
    parser.add_argument("--pivots", metavar="MODULE:FUNCTION", help="of a response's text: [(start, end), ...]")
    return parser.parse_args(arguments)


def content_of(step: RecordedStep, position: int | None, spans: Spans | None = None, pivots: str = "") -> dict:
    """All that the page shows, as JSON holds it. Raises UsageError for a position that the step has not."""
    chosen = [place for place, key in enumerate(step.keys) if position in (None, key[0])]
    if not chosen:
        known = sorted({key[0] for key in step.keys})
        raise UsageError(
            f"--position={position}: step {step.number} has no such group; its positions are {known[0]} to {known[-1]}"
        )
    tokenizer = load_tokenizer(step.run.config.model.path)
    texts = [token_texts(tokenizer, step.responses[place].token_ids) for place in chosen]
    marks = None
    if spans:
        marks = [marked(text, spans_of(spans, pivots, text_of(text))) for text in texts]
    algorithm = step.run.algorithm
    return {
        "title": f"Credit of {step.run.folder.resolve().name}, step {step.number}",
        "settings": f"credit {algorithm.credit}, deviation {algorithm.deviation}, κ {algorithm.kappa:g}, entropy over "
        f"{'log V' if algorithm.entropy_norm == 'log_vocab' else 'its largest'}, V {step.run.vocab_size:,}"
        + (f"; underlined: pivots by {pivots}" if pivots else ""),
        "rules": [_rule(rule, step, chosen, marks) for rule in rules_of(step)],
        "responses": [
            _response(step, place) | {"tokens": [token.shown for token in text], "pivots": marks[at] if marks else []}
            for at, (place, text) in enumerate(zip(chosen, texts, strict=True))
        ],
        # By response: those whose names are scores' are looked up for s.
        "values": {name: _rounded(step, values, chosen) for name, values in _values(step).items()},
    }


def _response(step: RecordedStep, place: int) -> dict:
    response, key = step.responses[place], step.keys[place]
    return {
        "position": key[0],
        "member": key[1],
        "question": response.prompt.text,
        "answer": response.prompt.answer,
        "reward": response.reward,
        "advantage": _number(float(step.advantages[place])),
        "counted": step.counted[place],
        "finish": response.finish_reason,
        "tau": step.taus[place],
    }


def _values(step: RecordedStep) -> dict[str, torch.Tensor]:
    """By the names that a hover shows: what was recorded, and every score."""
    names = {"deviation": "d", "entropy": "H", "logprobs": "log π", "reference_logprobs": "log ρ"}
    found = {shown: step.tokens[name] for name, shown in names.items() if name in step.tokens}
    return found | step.scores | {"ratio": step.tokens["log_ratio"].exp()}


def _rule(rule: Rule, step: RecordedStep, chosen: list[int], marks: list[list[bool]] | None) -> dict:
    """Its weights and, of each response and of all, the effective share and the credit on marked tokens."""
    weights = rule.weigh(step)
    share = credit_concentration(weights, step.cu_seqlens)["effective_share"]
    by_response = step.split(weights)
    found: dict = {
        "name": rule.name,
        "score": rule.score,
        "weights": _rounded(step, weights, chosen),
        "share": [_number(float(share[place])) for place in chosen],
        "mean_share": _number(float(share[chosen].mean())),
        "largest": _number(max((max(by_response[place], default=0.0) for place in chosen), default=0.0)),
    }
    if marks:
        own = [by_response[place] for place in chosen]
        found["on_pivots"] = [on_pivots([w], [m]) for w, m in zip(own, marks, strict=True)]
        found["all_on_pivots"] = on_pivots(own, marks)
    return found


def on_pivots(weights: list[list[float]], marks: list[list[bool]]) -> dict[str, float | None] | None:
    """{credit: marked tokens' share of all weight, lift: how many times their share of tokens}; None without any."""
    pairs = [pair for ws, ms in zip(weights, marks, strict=True) for pair in zip(ws, ms, strict=True)]
    total, on = sum(w for w, _ in pairs), sum(w for w, mark in pairs if mark)
    count = sum(mark for _, mark in pairs)
    if not count or not total:
        return None
    return {"credit": _number(on / total), "lift": _number(on / total * len(pairs) / count)}


def _rounded(step: RecordedStep, values: torch.Tensor, chosen: list[int]) -> list[list[float | None]]:
    by_response = step.split(values)
    return [[_number(value) for value in by_response[place]] for place in chosen]


def _number(value: float) -> float | None:
    """JSON has no infinity."""
    return float(f"{value:.{_DIGITS}g}") if math.isfinite(value) else None


def page_of(content: dict) -> str:
    """The template with the content in it, from which no text of a response gets out, nor looks like an address."""
    text = json.dumps(content, separators=(",", ":"), allow_nan=False)
    # JSON takes \/ for /. An HTML parser would end the script at </script, and not see its end after <!--<script.
    text = text.replace("/", "\\/").replace("<!", "\\u003c!")
    return _TEMPLATE.read_text(encoding="utf-8").replace("CONTENT", text, 1)


if __name__ == "__main__":
    sys.exit(main())

"""What rules of credit do to a recorded step: how concentrated they are, how alike, and which tokens they favour."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise

import numpy as np
import torch

from megatron_dgpo.algorithm.credit import credit_concentration, credit_weights, segment_ids
from tools.credit.recorded import RecordedStep, rules_of

TAUS = [10 ** (-4 + i / 4) for i in range(21)]
"""From where one token takes all to where all are alike."""
KAPPAS = (0.0, 0.5, 1.0, 2.0)
SHARE = 0.8
DECILES = 10
_TOP = 0.1
_TOKENS = 20
_REFINEMENTS = 10


def measure(step: RecordedStep, text_of: Callable[[int], str]) -> dict:
    """Every figure of the sweep for this step, as JSON holds it. text_of: of a token."""
    weights = {rule.name: rule.weigh(step) for rule in rules_of(step)}
    concentrations = {name: credit_concentration(values, step.cu_seqlens) for name, values in weights.items()}
    right = torch.tensor([response.correct for response in step.responses])
    rewards = torch.tensor([response.reward for response in step.responses])
    kappas = sorted({*KAPPAS, step.run.algorithm.kappa}) if "deviation" in step.tokens else []
    correlation, overlap = likeness(weights, step.cu_seqlens)
    return {
        "step": step.number,
        "responses": len(step.responses),
        "tokens": len(step.tokens["logprobs"]),
        "reward": float(rewards.double().mean()),
        "accuracy": float(right.double().mean()),
        "entropy": _mean(step.tokens["entropy"]),
        "deviation": _mean(step.tokens["deviation"]) if "deviation" in step.tokens else None,
        "own_tau": own_tau(step),
        "groups": groups(step),
        "rules": {
            name: means(concentrations[name])
            | {"right": means_of(concentrations[name], right), "wrong": means_of(concentrations[name], ~right)}
            | {"deciles": by_position(values, step.cu_seqlens), "by_token": by_token(values, step, text_of)}
            for name, values in weights.items()
        },
        "kappas": {f"{kappa:g}": temperatures(step, kappa) for kappa in kappas},
        "rank_correlation": correlation,
        "top10_overlap": overlap,
        "cosine": cosines(weights, step) if "square_prob" in step.tokens else {},
    }


def own_tau(step: RecordedStep) -> float | None:
    """The run's; where each response has its own, their geometric mean."""
    if "deviation" not in step.tokens:
        return None
    own = [tau for tau in step.taus if tau is not None]
    return math.exp(np.mean(np.log(own))) if own else step.run.algorithm.tau


def means(values: dict[str, torch.Tensor]) -> dict[str, float]:
    """Over responses, as training logs them."""
    return {name: _mean(value) for name, value in values.items()}


def means_of(values: dict[str, torch.Tensor], chosen: torch.Tensor) -> dict[str, float] | None:
    """Over some of the responses, [B] bool; None over none."""
    return means({name: value[chosen] for name, value in values.items()}) if chosen.any() else None


def temperatures(step: RecordedStep, kappa: float) -> dict:
    """{curve: concentration at each of TAUS, tau_at_share: the one τ at which the mean effective share is SHARE}."""
    scores = step.gated(step.tokens["deviation"], kappa)

    def at(tau: float) -> dict[str, float]:
        return means(credit_concentration(credit_weights(scores, step.cu_seqlens, tau), step.cu_seqlens))

    curve = [{"tau": tau} | at(tau) for tau in TAUS]
    return {"tau_at_share": _crossing(curve, lambda tau: at(tau)["effective_share"]), "curve": curve}


def _crossing(curve: list[dict], share_at: Callable[[float], float]) -> float | None:
    """Regula falsi in log τ from the interval in which the curve passes SHARE; None where it does not."""
    points = [(math.log(point["tau"]), point["effective_share"] - SHARE) for point in curve]
    around = [(a, b) for a, b in pairwise(points) if a[1] < 0 <= b[1]]
    if not around:
        return None
    low, high = around[0]
    for _ in range(_REFINEMENTS):
        place = low[0] - low[1] * (high[0] - low[0]) / (high[1] - low[1])
        middle = place, share_at(math.exp(place)) - SHARE
        low, high = (middle, high) if middle[1] < 0 else (low, middle)
    return math.exp(min(low, high, key=lambda point: abs(point[1]))[0])


def groups(step: RecordedStep) -> dict:
    """How many there are, and those that dynamic sampling would drop, whose rewards are all equal, by position."""
    rewards: dict[int, set[float]] = {}
    for (position, _), response in zip(step.keys, step.responses, strict=True):
        rewards.setdefault(position, set()).add(response.reward)
    equal = {position: found for position, found in rewards.items() if len(found) == 1}
    right = sorted(position for position, [reward] in equal.items() if reward >= 1)
    return {"all": len(rewards), "right": right, "wrong": sorted(equal.keys() - set(right))}


def by_position(weights: torch.Tensor, cu_seqlens: torch.Tensor) -> list[float | None]:
    """Mean w of the tokens in each tenth of their response."""
    lengths, ids = cu_seqlens.diff(), segment_ids(cu_seqlens)
    place = torch.arange(len(weights)) - cu_seqlens[:-1][ids]
    tenth = place * DECILES // lengths[ids]
    count = torch.bincount(tenth, minlength=DECILES)
    total = torch.bincount(tenth, weights.double(), minlength=DECILES)
    return [float(w / n) if n else None for w, n in zip(total, count, strict=True)]


def by_token(weights: torch.Tensor, step: RecordedStep, text_of: Callable[[int], str]) -> list[dict]:
    """The tokens that get the most credit beyond the uniform rule's, first."""
    ids = torch.tensor([token for response in step.responses for token in response.token_ids], dtype=torch.int64)
    tokens, place, counts = ids.unique(return_inverse=True, return_counts=True)
    sums = torch.bincount(place, weights.double(), minlength=len(tokens))
    total = max(float(sums.sum()), 1e-30)
    first = (sums - counts).argsort(descending=True, stable=True)[:_TOKENS].tolist()
    return [
        {
            "token": text_of(int(tokens[i])),
            "count": int(counts[i]),
            "share_of_tokens": float(counts[i]) / len(ids),
            "share_of_credit": float(sums[i]) / total,
            "mean_weight": float(sums[i] / counts[i]),
        }
        for i in first
    ]


def likeness(
    weights: dict[str, torch.Tensor], cu_seqlens: torch.Tensor
) -> tuple[dict[str, dict[str, float | None]], dict[str, dict[str, float | None]]]:
    """(Spearman's rank correlation, common part of the ⌈10 %⌉ heaviest tokens) of each rule with each.

    Within a response, which is where weights are shared out; means over the responses in which both rules tell tokens
    apart. None without any; a rule that never does is left out. Of equally heavy tokens the first are taken.
    """
    ids, lengths = segment_ids(cu_seqlens).numpy(), cu_seqlens.diff().numpy()

    def sums(values: np.ndarray) -> np.ndarray:
        return np.bincount(ids, values, minlength=len(lengths))

    most = np.ceil(_TOP * lengths)
    ranks = {name: ranks_of(values, cu_seqlens) - ((lengths - 1) / 2)[ids] for name, values in weights.items()}
    squares = {name: sums(values * values) for name, values in ranks.items()}
    names = [name for name, values in squares.items() if values.any()]
    heaviest = {name: _place(-ranks[name], cu_seqlens) < most[ids] for name in names}
    correlation: dict[str, dict[str, float | None]] = {name: {} for name in names}
    overlap: dict[str, dict[str, float | None]] = {name: {} for name in names}
    for a in names:
        for b in names:
            both = (squares[a] > 0) & (squares[b] > 0)
            products, shared = sums(ranks[a] * ranks[b])[both], sums(heaviest[a] & heaviest[b])[both]
            spearman = products / np.sqrt(squares[a] * squares[b])[both]
            correlation[a][b] = float(spearman.mean()) if both.any() else None
            overlap[a][b] = float((shared / most[both]).mean()) if both.any() else None
    return correlation, overlap


def cosines(weights: dict[str, torch.Tensor], step: RecordedStep) -> dict[str, dict[str, float | None]]:
    """How alike the directions are in which the rules' losses move the step's logits: of each with each, the cosine
    Σ A²·u·v·q / √(Σ A²u²q · Σ A²v²q) over the tokens that count. None where a rule moves none.

    At a ratio of 1, as in the first optimizer step, the loss's gradient at a token's logits is −A·w·(onehot − π), and
    q = ‖onehot − π‖² = 1 − 2·π(a) + Σπ². The weights' gradients, which add those of all tokens up, are not compared.
    """
    counts = torch.tensor(step.counted, dtype=torch.float64) * step.advantages.double() ** 2
    chosen = step.tokens["logprobs"].double().exp()
    # Rounding must give no negative square.
    squares = (1 - 2 * chosen + step.tokens["square_prob"].double()).clamp(min=0)
    scale = (counts[segment_ids(step.cu_seqlens)] * squares).sqrt()
    moved = {name: scale * values.double() for name, values in weights.items()}
    norms = {name: float(values.norm()) for name, values in moved.items()}

    def cosine(a: str, b: str) -> float | None:
        return float(moved[a] @ moved[b]) / (norms[a] * norms[b]) if norms[a] and norms[b] else None

    return {a: {b: cosine(a, b) for b in moved} for a in moved}


def ranks_of(weights: torch.Tensor, cu_seqlens: torch.Tensor) -> np.ndarray:
    """[N] float64: from 0, of each token in its response; equal weights have the mean of their ranks."""
    values, ids = weights.numpy(), segment_ids(cu_seqlens).numpy()
    order = np.lexsort((values, ids))
    starts_run: np.ndarray = np.ones(len(order), bool)
    starts_run[1:] = (np.diff(values[order]) != 0) | (np.diff(ids[order]) != 0)
    run = np.cumsum(starts_run) - 1
    place = _place(values, cu_seqlens)
    ranks = np.empty(len(order))
    ranks[order] = (np.bincount(run, place[order]) / np.bincount(run))[run]
    return ranks


def _place(values: np.ndarray, cu_seqlens: torch.Tensor) -> np.ndarray:
    """[N] int64: from 0, of each token among those of its response, the least first, equal ones in their order."""
    ids = segment_ids(cu_seqlens).numpy()
    order = np.lexsort((values, ids))
    place: np.ndarray = np.empty(len(order), np.int64)
    place[order] = np.arange(len(order)) - cu_seqlens.numpy()[ids[order]]
    return place


def _mean(values: torch.Tensor) -> float:
    return float(values.double().mean())

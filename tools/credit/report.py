"""A sweep as one HTML file: figures as inline SVG, the same to the byte for the same sweep, and tables."""

from __future__ import annotations

import html
import io
import re
from collections.abc import Sequence

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from tools.credit.measures import DECILES, SHARE
from tools.credit.recorded import UNIFORM
from tools.html_page import note, table

# Okabe and Ito's colours, which colour-blind readers tell apart.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999999")
_STYLE = {
    "svg.hashsalt": "sweep_credit",
    "svg.fonttype": "none",
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "axes.prop_cycle": matplotlib.cycler(color=_COLOURS),
}
_WIDTH = 10.8
_NO_METADATA = dict.fromkeys(("Creator", "Date", "Format", "Type"))
_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<title>{title}</title>
<style>
body {{ margin: 28px auto 60px; max-width: 1080px; padding: 0 20px; color: #1a1a1a; font: 14px/1.45 "Helvetica Neue",
  Helvetica, Arial, "Liberation Sans", sans-serif; }}
h1 {{ font-size: 19px; }} h2 {{ font-size: 15px; margin: 34px 0 6px; }} p {{ margin: 4px 0 10px; max-width: 76ch; }}
svg {{ width: 100%; height: auto; margin: 4px 0; }}
table {{ border-collapse: collapse; font-variant-numeric: tabular-nums; }}
th, td {{ padding: 2px 14px 2px 0; text-align: right; }} th {{ font-weight: 600; border-bottom: 1px solid #888; }}
th:first-child, td:first-child {{ text-align: left; }}
td code {{ background: #f3f3f3; padding: 0 4px; white-space: pre; }}
</style>
</head>
<body>
{body}
</body>
</html>
"""


def report(found: dict) -> str:
    """The page. found: what `sweep_credit.sweep` gives."""
    last = found["steps"][-1]
    title = f"Credit of {found['run']}"
    settings, steps = found["algorithm"], [step["step"] for step in found["steps"]]
    parts = [
        f"<h1>{html.escape(title)}</h1>",
        f"<p>The run's own rule: <b>{html.escape(found['own'])}</b> (deviation {settings['deviation']}, "
        f"κ = {settings['kappa']:g}, V = {found['vocab_size']:,}). Steps {', '.join(map(str, steps))}; figures of one "
        f"step are of the last. E is the effective share (Σw)²/(T·Σw²), mean over responses.</p>",
    ]
    if last["kappas"]:
        parts += ["<h2>Effective share and concentration against temperature</h2>", _temperatures(found)]
        parts += [note("Thin line: E = 0.8, with a dot at the τ that gives it. Dashed: the run's own τ.")]
    parts += ["<h2>Drift over steps</h2>", _drift(found), _steps(found)]
    parts += [f"<h2>Rules at step {last['step']}</h2>", _rules(last), _alike_and_positions(last)]
    parts += [f"<h2>Tokens at step {last['step']}</h2>", _tokens(found)]
    return _PAGE.format(title=html.escape(title), body="\n".join(parts))


# Figures


def _svg(figure: Figure) -> str:
    """As HTML holds it: without the prologue and the names of name spaces, which look like addresses."""
    text = io.StringIO()
    FigureCanvasSVG(figure).print_svg(text, metadata=_NO_METADATA)
    return re.sub(r' xmlns(:\w+)?="[^"]*"', "", text.getvalue()[text.getvalue().index("<svg") :])


def _figure(height: float, left: float, bottom: float, between: float) -> tuple[Figure, Sequence[Axes]]:
    """Three panels; margins in inches, `between` in their widths. A layout engine would draw it all twice more."""
    figure = Figure(figsize=(_WIDTH, height))
    panels = figure.subplots(1, 3)
    figure.subplots_adjust(left / _WIDTH, bottom / height, 1 - 0.1 / _WIDTH, 1 - 0.3 / height, wspace=between)
    return figure, panels


@matplotlib.rc_context(_STYLE)
def _temperatures(found: dict) -> str:
    figure, (by_step, by_kappa, shares) = _figure(3.2, left=0.45, bottom=0.5, between=0.2)
    own, steps = f"{found['algorithm']['kappa']:g}", found["steps"]
    shades = matplotlib.colormaps["viridis"]
    for place, step in enumerate(steps):
        label = f"step {step['step']}" if place in (0, len(steps) - 1) or len(steps) <= 6 else None
        colour = shades(0.85 * place / max(len(steps) - 1, 1))
        _curve(by_step, step["kappas"][own], label, color=colour)
    for place, (kappa, swept) in enumerate(steps[-1]["kappas"].items()):
        _curve(by_kappa, swept, f"κ = {kappa}", color=_COLOURS[place])
    curve = steps[-1]["kappas"][own]["curve"]
    for name, label in (("top10_share", "heaviest 10 %"), ("top1_share", "heaviest 1 %")):
        shares.plot([point["tau"] for point in curve], [point[name] for point in curve], label=label)
    for axis, title in ((by_step, "E, by step"), (by_kappa, "E, by gate"), (shares, "share of credit on tokens")):
        axis.set(title=title, xscale="log", xlabel="τ", ylim=(0, 1.03))
        axis.axvline(steps[-1]["own_tau"], color="#444", linestyle="--", linewidth=0.9)
        axis.legend()
    for axis in (by_step, by_kappa):
        axis.axhline(SHARE, color="#444", linewidth=0.6)
    return _svg(figure)


def _curve(axis: Axes, swept: dict, label: str | None, **style) -> None:
    curve = swept["curve"]
    taus, shares = [point["tau"] for point in curve], [point["effective_share"] for point in curve]
    axis.plot(taus, shares, label=label, linewidth=1.4, **style)
    if swept["tau_at_share"]:
        axis.plot(swept["tau_at_share"], SHARE, "o", markersize=4, **style)


def _legend_below(axis: Axes, left: float = -0.05) -> None:
    if axis.lines:
        axis.legend(loc="upper left", bbox_to_anchor=(left, -0.2), ncols=2, columnspacing=1.2, handlelength=1.5)


@matplotlib.rc_context(_STYLE)
def _drift(found: dict) -> str:
    figure, (shares, signals, taus) = _figure(3.7, left=0.45, bottom=1.3, between=0.2)
    steps = found["steps"]
    numbers = [step["step"] for step in steps]
    for name in steps[-1]["rules"]:
        values = [step["rules"][name]["effective_share"] for step in steps]
        shares.plot(numbers, values, ".-", label=name, linewidth=1.2)
    for name, label in (("entropy", "mean entropy H, nats"), ("deviation", "mean deviation d")):
        if steps[-1][name] is not None:
            signals.plot(numbers, [step[name] for step in steps], ".-", label=label, linewidth=1.2)
    for kappa in steps[-1]["kappas"]:
        values = [step["kappas"][kappa]["tau_at_share"] or float("nan") for step in steps]
        taus.plot(numbers, values, ".-", label=f"κ = {kappa}", linewidth=1.2)
    shares.set(title="E of each rule", ylim=(0, 1.03))
    signals.set(title="what credit is made of", ylim=(0, None))
    taus.set(title=f"τ that gives E = {SHARE:g}", yscale="log")
    for axis in (shares, signals, taus):
        axis.set_xlabel("step")
        axis.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        _legend_below(axis)
    return _svg(figure)


@matplotlib.rc_context(_STYLE)
def _alike_and_positions(step: dict) -> str:
    figure, (ranks, heaviest, positions) = _figure(4.0, left=1.3, bottom=1.3, between=0.58)
    for axis, name, title, least, colours in (
        (ranks, "rank_correlation", "rank correlation (Spearman)", -1, "RdBu_r"),
        (heaviest, "top10_overlap", "overlap of the heaviest 10 %", 0, "Reds"),
    ):
        names = list(step[name])
        table = [[float("nan") if step[name][a][b] is None else step[name][a][b] for b in names] for a in names]
        if names:
            axis.imshow(table, vmin=least, vmax=1, cmap=colours)
        for row, values in enumerate(table):
            for column, value in enumerate(values):
                colour = "white" if abs(value) > 0.75 else "black"
                axis.text(column, row, f"{value:.2f}", ha="center", va="center", fontsize=7, color=colour)
        axis.set_title(title)
        axis.set_xticks(range(len(names)), names, rotation=45, ha="right", fontsize=7)
        axis.set_yticks(range(len(names)), names, fontsize=7)
        axis.spines[:].set_visible(False)
        axis.tick_params(length=0)
    for name, rule in step["rules"].items():
        points = [(place, value) for place, value in enumerate(rule["deciles"], 1) if value is not None]
        positions.plot(*zip(*points, strict=True), ".-", label=name, linewidth=1.2)
    positions.set(title="mean w by tenth of a response", xlabel="tenth", xticks=range(1, DECILES + 1), ylim=(0, None))
    _legend_below(positions, left=-0.4)
    return _svg(figure)


# Tables


def _steps(found: dict) -> str:
    lines = []
    for step in found["steps"]:
        groups = step["groups"]
        dropped = len(groups["right"]) + len(groups["wrong"])
        lines.append(
            [step["step"], step["responses"], f"{step['tokens']:,}", _shown(step["accuracy"]), groups["all"], dropped]
            + [len(groups["right"]), len(groups["wrong"])]
        )
    names = ["step", "responses", "tokens", "accuracy", "groups", "dropped", "all right", "others"]
    return note("Dropped: groups whose rewards are all equal, which rollout.dynamic_sampling leaves out.") + table(
        names, lines
    )


def _rules(step: dict) -> str:
    lines = []
    for name, rule in step["rules"].items():
        sides = [rule[side] and rule[side][value] for value in ("effective_share", "max_weight") for side in _SIDES]
        values = [rule[value] for value in ("effective_share", "max_weight", "top1_share", "top10_share")]
        direction = step["cosine"].get(name, {}).get(UNIFORM.name)
        lines.append([name, *map(_shown, [*values, *sides, direction])])
    names = ["rule", "E", "max w", "top 1 %", "top 10 %", "E, right", "E, wrong", "max w, right", "max w, wrong"]
    return note(
        "Means over responses; right are those with a reward of 1 or more. Cosine: of the direction in which the "
        "rule's loss moves the logits with that of uniform credit, in a step's first update."
    ) + table([*names, "cosine"], lines)


_SIDES = ("right", "wrong")


def _tokens(found: dict) -> str:
    """Of the run's own rule, or of the first that tells tokens apart."""
    rules = found["steps"][-1]["rules"]
    telling = [name for name, rule in rules.items() if rule["max_weight"] > 1]
    name = telling[0] if telling else found["own"]
    lines = [
        [
            f"<code>{html.escape(repr(row['token'])[1:-1].replace(' ', '␣'))}</code>",
            row["count"],
            f"{row['share_of_tokens']:.1%}",
        ]
        + [f"{row['share_of_credit']:.1%}", _shown(row["mean_weight"])]
        for row in rules[name]["by_token"]
    ]
    names = ["token", "count", "share of tokens", "share of credit", "mean w"]
    introduction = note(f"The {len(lines)} that gain most over uniform credit, by {name}.")
    return introduction + table(names, lines, plain=False)


def _shown(value: float | None) -> str:
    return "–" if value is None else f"{value:.3g}"

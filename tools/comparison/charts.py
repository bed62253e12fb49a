"""Curves of a comparison as SVG: what a run or an arm was, against steps, tokens and hours."""

from __future__ import annotations

import io
import re

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import EngFormatter, LogFormatter, MaxNLocator

from tools.comparison.intervals import Estimate
from tools.comparison.report import CREDIT, ArmReport, Comparison, Point

# Of Okabe and Ito, which colour-blind readers tell apart; a second round of them is dashed.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_AXES = {"step": "training step", "tokens": "tokens sampled", "hours": "hours of steps"}
# Text stays text, and is never taken for a formula.
_STYLE = {"svg.fonttype": "none", "text.parse_math": False, "font.size": 9}
# Tick labels that do not meet in a panel of this width.
_MOST_TICKS = 6
# A mean of fewer points has a mark at each.
_FEW = 25
_NO_METADATA = {"Date": None, "Creator": None, "Format": None, "Type": None}


def style(place: int) -> tuple[str, str]:
    """Colour of the arm at this place, and solid or dashed."""
    return _COLOURS[place % len(_COLOURS)], "solid" if place // len(_COLOURS) % 2 == 0 else "dashed"


def of_metric(comparison: Comparison) -> str:
    """The metric against each of the three axes."""
    return _drawn(comparison, [(comparison.metric, across) for across in _AXES], intervals=True)


def of_credit(comparison: Comparison) -> str | None:
    """Effective share and temperature against steps; None where no arm has either."""
    measured = [name for name in CREDIT if any(run.curves[name] for arm in comparison.arms for run in arm.runs)]
    return _drawn(comparison, [(name, "step") for name in measured], intervals=False) if measured else None


def _drawn(comparison: Comparison, panels: list[tuple[str, str]], intervals: bool) -> str:
    # Names inside an SVG are hashes: the same for the same panels, and others in each chart of a page.
    with matplotlib.rc_context(_STYLE | {"svg.hashsalt": repr(panels)}):
        figure = Figure(figsize=(4.0 * len(panels), 3.2), layout=ConstrainedLayoutEngine())
        FigureCanvasSVG(figure)
        for axis, (metric, across) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
            for place, arm in enumerate(comparison.arms):
                _draw_runs(axis, arm, metric, across, *style(place), intervals)
            _finish(axis, metric, across)
        stream = io.StringIO()
        figure.savefig(stream, format="svg", metadata=_NO_METADATA)
    return _inline(stream.getvalue())


def _draw_runs(axis: Axes, arm: ArmReport, metric: str, across: str, colour: str, line: str, intervals: bool) -> None:
    for run in arm.runs:
        xs, values = _known(run.curves[metric], across)
        axis.plot(xs, [v.mean for v in values], color=colour, linewidth=0.6, alpha=0.45)
    xs, values = _known(arm.curves[metric], across)
    marker = "o" if len(xs) < _FEW else None
    axis.plot(xs, [v.mean for v in values], color=colour, linestyle=line, linewidth=1.8, marker=marker, markersize=3.5)
    if intervals and len(arm.runs) > 1:
        axis.fill_between(xs, [v.low for v in values], [v.high for v in values], color=colour, alpha=0.15, linewidth=0)


def _known(points: list[Point], across: str) -> tuple[list[float], list[Estimate]]:
    found = [(getattr(point, across), point.value) for point in points]
    known = [(x, value) for x, value in found if x is not None]
    return [x for x, _ in known], [value for _, value in known]


def _finish(axis: Axes, metric: str, across: str) -> None:
    axis.set_xlabel(_AXES[across])
    axis.set_title(metric, fontsize=9, loc="left")
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)
    axis.xaxis.set_major_locator(MaxNLocator(_MOST_TICKS, steps=[1, 2, 5, 10], integer=across != "hours"))
    if across == "tokens":
        axis.xaxis.set_major_formatter(EngFormatter(sep=""))
    if metric == "credit/tau":
        axis.set_yscale("log")
        axis.yaxis.set_major_formatter(LogFormatter())
        axis.yaxis.set_minor_formatter(LogFormatter())
    if not any(line.get_xdata().size for line in axis.lines):
        axis.text(0.5, 0.5, "not measured in these runs", transform=axis.transAxes, ha="center", color="grey")


def _inline(svg: str) -> str:
    """As a part of a page: no XML header, and no names of groups, which two charts of a page would share."""
    return re.sub(r'<g id="[^"]*">', "<g>", svg[svg.index("<svg") :])

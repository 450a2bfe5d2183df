"""The plots of the report as SVG, drawn from result files alone."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from bench.grid.cells import COLOCATED, TARGET
from bench.setup.results import Results, Row, number

mpl.rcParams["svg.hashsalt"] = "edgedraft"  # the same results give the same file
_SIZE = (7.0, 4.2)


def plot_uplink(results: Results, path: Path) -> None:
    """Acceptance over the bytes of a drafted token, a line per temperature."""
    figure, axes = _figure()
    temperatures = sorted({number(row, "temperature") for row in results.rows})
    for temperature in temperatures:
        rows = [row for row in results.rows if row["temperature"] == temperature and row["acceptance"] is not None]
        topk = [row for row in rows if str(row["case"]).startswith("topk")]
        line = axes.plot(*_points(topk), "o-", label=f"topk, temperature {temperature:g}")[0]
        rest = [row for row in rows if row not in topk]
        axes.plot(*_points(rest), "x", color=line.get_color())
        for row in rest if temperature == temperatures[-1] else []:
            axes.annotate(str(row["case"]), (number(row, "bytes_per_token"), number(row, "acceptance")), fontsize=7)
    axes.set(xscale="log", xlabel="bytes per drafted token at the socket", ylabel="acceptance rate")
    _save(figure, path)


def plot_speedup(results: Results, temperature: float, path: Path) -> None:
    """Speedup over the round trip, a panel per uplink rate: measured as points, predicted as lines."""
    rows = [row for row in results.rows if row["temperature"] == temperature and row["round_trip_ms"] is not None]
    colocated = [
        row
        for row in results.rows
        if row["case"] == COLOCATED and row["temperature"] == temperature and row["speedup"] is not None
    ]
    rates = sorted({number(row, "uplink_mbit") for row in rows})
    figure = Figure((4.0 * len(rates), 4.6), layout="constrained")
    panels: Any = figure.subplots(1, len(rates), sharey=True, squeeze=False)
    names = [name for name in dict.fromkeys(str(row["case"]) for row in rows) if name != TARGET.name]
    for axes, rate in zip(panels[0], rates, strict=True):
        for index, name in enumerate(names):
            color = f"C{index % 10}"
            of_case = [row for row in rows if row["case"] == name and row["uplink_mbit"] == rate]
            for column, style in (("speedup", "o"), ("predicted_speedup", "-")):
                known = [row for row in of_case if row[column] is not None]
                points = [number(row, "round_trip_ms") for row in known], [number(row, column) for row in known]
                axes.plot(*points, style, color=color, markersize=4, linewidth=1, label=name if style == "o" else None)
        axes.axhline(1, color="black", linewidth=0.8)
        if colocated:
            axes.axhline(number(colocated[0], "speedup"), color="grey", linestyle=":", label=COLOCATED)
        axes.set(title=f"uplink {rate:g} Mbit/s", xlabel="round trip, ms")
    panels[0][0].set_ylabel("speedup over the target alone")
    figure.legend(*panels[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=7)
    _save(figure, path)


def plot_draft_lens(results: Results, path: Path) -> None:
    """The optimal draft length over α and L; white where the target alone is as fast."""
    rows = [row for row in results.rows if row["case"] == "map"]
    alphas = sorted({number(row, "alpha") for row in rows})
    costs = sorted({number(row, "cost") for row in rows})
    lengths = {(number(row, "alpha"), number(row, "cost")): number(row, "adaptive") for row in rows}
    grid = np.array([[lengths[alpha, cost] for cost in costs] for alpha in alphas])
    figure, axes = _figure()
    mesh = axes.pcolormesh(
        costs, alphas, np.ma.masked_equal(np.minimum(grid, 16), 0), cmap="viridis", shading="nearest", rasterized=True
    )
    figure.colorbar(mesh, ax=axes, label="optimal draft length (capped at 16)")
    axes.set(xlabel="L: time to draft and send a token, in forward passes of the target", ylabel="α")
    _save(figure, path, legend=False)


def _figure() -> tuple[Figure, Any]:
    figure = Figure(_SIZE, layout="constrained")
    return figure, figure.subplots()


def _points(rows: Sequence[Row] | Any) -> tuple[list[float], list[float]]:
    return [number(row, "bytes_per_token") for row in rows], [number(row, "acceptance") for row in rows]


def _save(figure: Figure, path: Path, legend: bool = True) -> None:
    if legend and len(figure.axes) == 1:
        figure.axes[0].legend(fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    FigureCanvasSVG(figure).print_svg(str(path), metadata={"Date": None})

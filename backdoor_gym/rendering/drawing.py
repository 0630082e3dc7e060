"""The picture of a network in repair: its neurons layer by layer, and the course of accuracy and danger beside them.

Frames of ``render`` and the report show the same drawing. A neuron's area is its connection strength over the largest of
its layer, its colour is its suspicion, a cross says that it is pruned.
"""

from dataclasses import dataclass
from functools import cache
from math import ceil
from typing import Any, Self

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LinearSegmentedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ..session import RepairSession
from ..wording import printable

#: Frame size in pixels, always the same, and such as video codecs like.
WIDTH, HEIGHT, DPI = 1024, 640, 100
#: Suspicion from this one on has the strongest colour.
SUSPICION_LIMIT = 5.0
#: From inconspicuous to suspicious; every step is darker, so that it can be read without colours too.
COLOURS = LinearSegmentedColormap.from_list(
    "suspicion", [(0, "#d6dce4"), (0.2, "#d9d3c7"), (0.45, "#efab38"), (0.7, "#d9381e"), (1, "#6b0010")]
)
INK, FAINT, ACC_COLOUR, DANGER_COLOUR, ASR_COLOUR = "#1b1f24", "#6a737d", "#1f6fb4", "#d97706", "#b3123a"
#: Largest distance of two neurons, and of two layers in these distances.
CELL, GAP = 24.0, 0.5
#: Sizes of neurons are rounded to so many steps.
SIZES = 8


@dataclass(frozen=True)
class Snapshot:
    """What is drawn of a network.

    Attributes:
        name: of the model.
        layers: name and number of neurons of each layer, in network order.
        suspicion: how far each neuron stands out in its layer, in standard deviations, float (neurons,).
        strengths: connection strength of each neuron over the largest of its layer, float in [0, 1] (neurons,).
        pruned: bool (neurons,).
        undone: pruned once and put back, bool (neurons,).
        latest: what was pruned last and still is, bool (neurons,).
        acc: accuracy on the clean images at the beginning, after each prune, and after each unit that was given back.
        danger: the same of the suspected danger.
        asr: the same of the attack success rate, empty where no trigger is known.
        least_acc: accuracy below which the budget is broken, None where there is no budget.
        given_back: how many of the last figures are of units given back.
    """

    name: str
    layers: tuple[tuple[str, int], ...]
    suspicion: np.ndarray
    strengths: np.ndarray
    pruned: np.ndarray
    undone: np.ndarray
    latest: np.ndarray
    acc: tuple[float, ...]
    danger: tuple[float, ...]
    asr: tuple[float, ...]
    least_acc: float | None = None
    given_back: int = 0

    @classmethod
    def of(cls, session: RepairSession) -> Self:
        """What is to be drawn of a repair as it is now."""
        prepared, state = session.prepared, session.state
        given_back = sum(restored for _, restored in state.changes)
        latest = np.zeros(len(prepared), dtype=bool)
        if state.changes and not given_back:
            latest[state.changes[-1][0]] = True
        return cls(
            name=prepared.name,
            layers=tuple((layer.name, layer.size) for layer in prepared.neurons.layers),
            suspicion=prepared.suspicion,
            strengths=prepared.strengths,
            pruned=~prepared.neuron_mask(state.pruned),
            undone=~prepared.neuron_mask(state.tried),
            latest=~prepared.neuron_mask(latest),
            acc=tuple(figures.acc for figures in state.history),
            danger=() if prepared.inverted is None else tuple(figures.suspected_danger for figures in state.history),
            asr=tuple(figures.asr for figures in state.history if figures.asr is not None),
            least_acc=None if session.accuracy_budget is None else session.least_acc,
            given_back=given_back,
        )


@dataclass(frozen=True)
class Places:
    """Where neurons are drawn, in pixels from the upper left corner.

    Attributes:
        cell: distance of two neighbours.
        x: float (neurons,).
        y: float (neurons,).
        rows: middle of the first line of each layer, float (layers,).
    """

    cell: float
    x: np.ndarray
    y: np.ndarray
    rows: np.ndarray


def arrange(sizes: list[int], width: float, height: float) -> Places:
    """Layers from top to bottom, each in as many lines of even length as it needs, as large as the room allows."""
    cell = CELL
    while cell > 1 and _lines(sizes, width, cell) * cell + GAP * cell * (len(sizes) - 1) > height:
        cell *= 0.98
    x, y, rows, top = [], [], [], 0.0
    for size in sizes:
        lines = _lines([size], width, cell)
        line, column = np.divmod(np.arange(size), ceil(size / lines))
        rows.append(top + cell / 2)
        x.append((column + 0.5) * cell)
        y.append(top + (line + 0.5) * cell)
        top += (lines + GAP) * cell
    return Places(cell, np.concatenate(x), np.concatenate(y), np.array(rows))


def _lines(sizes: list[int], width: float, cell: float) -> int:
    fit = max(1, int(width / cell))
    return sum(ceil(size / fit) for size in sizes)


def frame(snapshot: Snapshot) -> np.ndarray:
    """A picture of the network, its course and the key, uint8 (HEIGHT, WIDTH, 3)."""
    figure = blank(WIDTH, HEIGHT)
    count = f"{int(snapshot.pruned.sum())} of {len(snapshot.pruned)} neurons pruned"
    _write(figure, 20, 26, _shortened(snapshot.name, 60), size=13, weight="bold")
    _write(figure, WIDTH - 20, 26, count, size=11, ha="right")
    draw_network(place(figure, 20, 50, 660, 574), snapshot)
    draw_course(place(figure, 738, 98, 266, 276), snapshot)
    picture, key = to_rgb(figure), _key()
    picture[HEIGHT - len(key) :, WIDTH - key.shape[1] :] = key
    return picture


@cache
def _key() -> np.ndarray:
    """The key, which is the same in every frame, uint8 (height, width, 3)."""
    figure = blank(300, 212)
    draw_key(place(figure, 14, 6, 266, 196))
    return to_rgb(figure)


def draw_network(axes: Axes, snapshot: Snapshot) -> Places:
    """The neurons, with the names of their layers, on axes of which a unit becomes a pixel."""
    axes.set_axis_off()
    box = axes.get_window_extent()
    axes.set_xlim(0, box.width)
    axes.set_ylim(box.height, 0)
    labels = [_shortened(name, 24) for name, _ in snapshot.layers]
    margin = 42 + 5.6 * max(map(len, labels))
    places = arrange([size for _, size in snapshot.layers], box.width - margin - 4, box.height - 4)
    x, y, cell = places.x + margin, places.y, places.cell
    _draw_names(axes, snapshot, labels, places, margin)
    colours = COLOURS(Normalize(0, SUSPICION_LIMIT)(snapshot.suspicion))
    levels = size_levels(snapshot.strengths)
    for level in range(1, SIZES + 1):
        mine = levels == level
        diameter = 0.94 * cell * (level / SIZES) ** 0.5
        axes.scatter(
            x[mine], y[mine], s=_area(diameter), c=colours[mine], linewidths=0, gid=f"neurons-{level}", zorder=2
        )
    ring: dict[str, Any] = {"facecolors": "none", "linewidths": max(0.8, 0.07 * cell), "zorder": 3}
    axes.scatter(x[snapshot.undone], y[snapshot.undone], s=_area(cell), marker="s", edgecolors=FAINT, **ring)
    gone, thick = snapshot.pruned, max(1.0, 0.08 * cell)
    for colour, width in (("white", thick + 1.1), (INK, thick)):  # a dark cross is to be seen on a dark neuron
        axes.scatter(x[gone], y[gone], s=_area(max(8, cell)), marker="x", c=colour, linewidths=width, zorder=4)
    latest = snapshot.latest
    axes.scatter(
        x[latest], y[latest], s=_area(1.5 * max(cell, 7)), facecolors="none", edgecolors=ACC_COLOUR, linewidths=2,
        zorder=5, clip_on=False,
    )  # fmt: skip
    return places


def size_levels(strengths: np.ndarray) -> np.ndarray:
    """Strengths in [0, 1] as sizes from 1 to ``SIZES``, int (neurons,); all of a size are drawn at once."""
    return np.ceil(np.clip(strengths, 0.1, 1) * SIZES).astype(int)


def _draw_names(axes: Axes, snapshot: Snapshot, labels: list[str], places: Places, margin: float) -> None:
    """Name of each layer, and how many of its neurons are pruned; not every one where they are too close to be read."""
    start, last = 0, -np.inf
    for label, (_, size), row in zip(labels, snapshot.layers, places.rows, strict=True):
        gone = int(snapshot.pruned[start : start + size].sum())
        start += size
        if row - last < 9:
            continue
        last = row
        plain: dict[str, Any] = {"va": "center_baseline", "ha": "right", "fontsize": 7.5, "parse_math": False}
        axes.text(margin - 42, row, label, color=INK, **plain)
        axes.text(margin - 6, row, f"{gone}/{size}", color=ASR_COLOUR if gone else FAINT, **plain)


def draw_course(axes: Axes, snapshot: Snapshot) -> None:
    """Accuracy on the clean images, suspected danger, and the attack success rate where it is known, after each prune."""
    steps = np.arange(len(snapshot.acc))
    marker = "o" if len(steps) <= 60 else None
    for values, colour, label in (
        (snapshot.acc, ACC_COLOUR, "clean accuracy"),
        (snapshot.danger, DANGER_COLOUR, "suspected danger"),
        (snapshot.asr, ASR_COLOUR, "attack success"),
    ):
        if values:
            said = f"{label} {values[-1]:.3f}"
            axes.plot(
                steps, values, color=colour, marker=marker, markersize=3, linewidth=1.8, label=said, clip_on=False
            )
    if snapshot.least_acc is not None:
        axes.axhline(snapshot.least_acc, color=ACC_COLOUR, linestyle=(0, (2, 2)), linewidth=1, label="accuracy budget")
    most = max(10, len(steps) - 1)
    prunes = len(steps) - 1 - snapshot.given_back
    if snapshot.given_back:
        axes.axvspan(prunes, len(steps) - 1, color=FAINT, alpha=0.15, linewidth=0)
    axes.set_ylim(0, 1)
    axes.set_xlim(0, most)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.set_xlabel("prunes, then neurons given back" if snapshot.given_back else "prunes", fontsize=8.5, color=INK)
    axes.tick_params(labelsize=8, colors=FAINT, length=0)
    axes.grid(color="#e3e7ec", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[:].set_visible(False)
    axes.legend(
        loc="lower left", bbox_to_anchor=(-0.06, 1.0), ncols=2, fontsize=7.5, frameon=False, handlelength=1.4,
        columnspacing=1.2, borderpad=0.2, labelcolor=INK,
    )  # fmt: skip


def draw_key(axes: Axes) -> None:
    """What colours, sizes and marks of ``draw_network`` mean."""
    axes.set_axis_off()
    box = axes.get_window_extent()
    width = box.width
    axes.set_xlim(0, width)
    axes.set_ylim(box.height, 0)
    axes.imshow(np.linspace(0, 1, 256)[None], cmap=COLOURS, extent=(0, width, 30, 18), aspect="auto")
    axes.set_xlim(0, width)
    axes.set_ylim(box.height, 0)
    plain: dict[str, Any] = {"fontsize": 8, "color": INK, "va": "center"}
    axes.text(0, 8, "suspicion: how far it stands out in its layer", **plain)
    for value in range(0, int(SUSPICION_LIMIT) + 1):
        at = value / SUSPICION_LIMIT
        align = "left" if value == 0 else "right" if at == 1 else "center"
        text = f"{value}+ std" if at == 1 else str(value)
        axes.text(at * width, 41, text, ha=align, **{**plain, "color": FAINT})
    grey = COLOURS(0.0)
    for column, share in enumerate((0.125, 0.5, 1.0)):
        axes.scatter(8 + 20 * column, 68, s=_area(15 * share**0.5), color=[grey], edgecolors=FAINT, linewidths=0.6)
    axes.text(68, 68, "weakly to strongly connected", **plain)
    axes.scatter(28, 94, s=_area(14), color=[COLOURS(0.6)])
    axes.scatter(28, 94, s=_area(12), marker="x", c=INK, linewidths=1.5)
    axes.text(68, 94, "pruned", **plain)
    axes.scatter(28, 120, s=_area(14), color=[COLOURS(0.6)])
    axes.scatter(28, 120, s=_area(12), marker="x", c=INK, linewidths=1.5)
    axes.scatter(28, 120, s=_area(20), facecolors="none", edgecolors=ACC_COLOUR, linewidths=2)
    axes.text(68, 120, "pruned last", **plain)
    axes.scatter(28, 146, s=_area(14), color=[grey])
    axes.scatter(28, 146, s=_area(16), marker="s", facecolors="none", edgecolors=FAINT, linewidths=1.2)
    axes.text(68, 146, "tried and put back: accuracy fell", **plain)


def to_rgb(figure: Figure) -> np.ndarray:
    """uint8 (height, width, 3)."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[:, :, :3].copy()


def text(snapshot: Snapshot) -> str:
    """The same as text: a line for each layer, X for what is pruned, digits for how far a neuron stands out."""
    lines = [f"{snapshot.name}: {int(snapshot.pruned.sum())} of {len(snapshot.pruned)} neurons pruned"]
    figures = (("ACC", snapshot.acc), ("suspected danger", snapshot.danger), ("ASR", snapshot.asr))
    lines.append("  ".join(f"{name} {values[-1]:.3f}" for name, values in figures if values))
    width = max(len(name) for name, _ in snapshot.layers)
    start = 0
    for name, size in snapshot.layers:
        suspicion, pruned = snapshot.suspicion[start : start + size], snapshot.pruned[start : start + size]
        marks = "".join(_mark(score, gone) for score, gone in zip(suspicion, pruned, strict=True))
        shown = marks if len(marks) <= 96 else f"{marks[:93]}..."
        lines.append(f"{name:<{width}} {int(pruned.sum()):>4}/{size:<4} {shown}")
        start += size
    return "\n".join(lines)


def _mark(score: float, gone: bool) -> str:
    return "X" if gone else "." if score < 1 else str(min(9, int(score)))


def _area(diameter: float) -> float:
    """Size of a marker in square points whose diameter is so many pixels."""
    return (diameter * 72 / DPI) ** 2


def blank(width: float, height: float) -> Figure:
    """An empty figure of that many pixels, which pyplot knows nothing of."""
    return Figure(figsize=(width / DPI, height / DPI), dpi=DPI, facecolor="white")


def place(figure: Figure, left: float, top: float, width: float, height: float) -> Axes:
    """Axes at a place in pixels from the upper left corner."""
    across, down = figure.get_size_inches() * DPI
    return figure.add_axes((left / across, 1 - (top + height) / down, width / across, height / down))


def _write(figure: Figure, x: float, y: float, said: str, *, size: float, **style: Any) -> None:
    across, down = figure.get_size_inches() * DPI
    figure.text(
        x / across, 1 - y / down, said, fontsize=size, color=INK, va="center_baseline", parse_math=False, **style
    )


def _shortened(name: str, most: int) -> str:
    """The end of a name tells it apart."""
    name = " ".join(printable(name).split())
    return name if len(name) <= most else f"…{name[1 - most :]}"

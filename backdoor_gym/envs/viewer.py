"""Drawing: a network as rows of neurons coloured by UCLC, pruned ones crossed out, accuracy beside it."""

import os
import sys
from dataclasses import dataclass
from typing import Any

import gymnasium as gym
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from ..errors import UnknownNameError

#: Frame size in pixels, always the same.
WIDTH, HEIGHT, DPI = 1000, 640, 100
#: Scores from this one on have the strongest colour.
SCORE_LIMIT = 5.0


@dataclass(frozen=True)
class Snapshot:
    """What is drawn of a network.

    Attributes:
        name: of the model.
        layers: name and number of neurons of each layer, in network order.
        scores: UCLC standardised within the layer, float (neurons,).
        pruned: bool (neurons,).
        acc: accuracy at the beginning, after each prune, and after each unit that was given back.
        asr: the same of the attack success rate, empty where no trigger is known.
        given_back: how many of the last figures are of units given back.
    """

    name: str
    layers: tuple[tuple[str, int], ...]
    scores: np.ndarray
    pruned: np.ndarray
    acc: tuple[float, ...]
    asr: tuple[float, ...]
    given_back: int = 0


def draw(snapshot: Snapshot) -> Figure:
    """The picture of a network."""
    figure = Figure(figsize=(WIDTH / DPI, HEIGHT / DPI), dpi=DPI, layout="constrained")
    network, curve = figure.subplots(1, 2, width_ratios=(2.4, 1))
    _draw_network(figure, network, snapshot)
    _draw_curve(curve, snapshot)
    return figure


def text(snapshot: Snapshot) -> str:
    """The same as text: a line for each layer, X for what is pruned, digits for how far UCLC stands out."""
    lines = [f"{snapshot.name}: {int(snapshot.pruned.sum())} of {len(snapshot.pruned)} neurons pruned"]
    asr = f"  ASR {snapshot.asr[-1]:.3f}" if snapshot.asr else ""
    lines.append(f"ACC {snapshot.acc[-1]:.3f}{asr}")
    width = max(len(name) for name, _ in snapshot.layers)
    start = 0
    for name, size in snapshot.layers:
        scores, pruned = snapshot.scores[start : start + size], snapshot.pruned[start : start + size]
        marks = "".join(_mark(score, gone) for score, gone in zip(scores, pruned, strict=True))
        shown = marks if len(marks) <= 96 else f"{marks[:93]}..."
        lines.append(f"{name:<{width}} {int(pruned.sum()):>4}/{size:<4} {shown}")
        start += size
    return "\n".join(lines)


class Viewer:
    """Renders snapshots in one of the render modes; keeps the window of "human" between frames."""

    def __init__(self, fps: int) -> None:
        self._pause = 1 / fps
        self._window: Any = None
        self._warned = False

    def render(self, snapshot: Snapshot, mode: str) -> np.ndarray | str | None:
        """uint8 (HEIGHT, WIDTH, 3) for "rgb_array", a string for "ansi", None for "human"."""
        if mode == "ansi":
            return text(snapshot)
        if mode == "rgb_array":
            return to_rgb(draw(snapshot))
        if mode == "human":
            self._show(snapshot)
            return None
        raise UnknownNameError("render mode", mode, ("human", "rgb_array", "ansi"))

    def close(self) -> None:
        """Close the window."""
        if self._window is not None:
            from matplotlib import pyplot

            pyplot.close(self._window.figure)
            self._window = None

    def _show(self, snapshot: Snapshot) -> None:
        if not _has_screen():
            if not self._warned:
                gym.logger.warn('render_mode="human" needs a screen and there is none; nothing is shown')
                self._warned = True
            return
        from matplotlib import pyplot

        frame = to_rgb(draw(snapshot))
        if self._window is None:
            figure = pyplot.figure(snapshot.name, figsize=(WIDTH / DPI, HEIGHT / DPI), dpi=DPI)
            self._window = figure.add_axes((0, 0, 1, 1)).imshow(frame)
            self._window.axes.set_axis_off()
            figure.show()
        self._window.set_data(frame)
        self._window.figure.canvas.draw_idle()
        self._window.figure.canvas.start_event_loop(self._pause)


def to_rgb(figure: Figure) -> np.ndarray:
    """uint8 (HEIGHT, WIDTH, 3)."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[:, :, :3].copy()


def _has_screen() -> bool:
    """Whether a window can be opened."""
    if sys.platform.startswith("linux") and not (os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")):
        return False
    from matplotlib import pyplot
    from matplotlib.backends import BackendFilter, backend_registry

    interactive = {name.lower() for name in backend_registry.list_builtin(BackendFilter.INTERACTIVE)}
    return pyplot.get_backend().lower() in interactive


def _mark(score: float, gone: bool) -> str:
    return "X" if gone else "." if score < 1 else str(min(9, int(score)))


def _draw_network(figure: Figure, axes: Any, snapshot: Snapshot) -> None:
    most = max(size for _, size in snapshot.layers)
    columns = np.concatenate([(np.arange(size) + 0.5) / size for _, size in snapshot.layers])
    rows = np.repeat(np.arange(len(snapshot.layers)), [size for _, size in snapshot.layers])
    order = np.argsort(np.where(np.isfinite(snapshot.scores), snapshot.scores, 0))  # the suspicious ones on top
    dots = axes.scatter(
        columns[order],
        rows[order],
        c=snapshot.scores[order],
        cmap="coolwarm",
        norm=Normalize(-SCORE_LIMIT, SCORE_LIMIT),
        s=float(np.clip(25_000 / most / len(snapshot.layers), 4, 60)),
        linewidths=0,
    )
    axes.scatter(columns[snapshot.pruned], rows[snapshot.pruned], marker="x", c="black", s=36, linewidths=1.2)
    axes.set_yticks(range(len(snapshot.layers)), [f"{name} ({size})" for name, size in snapshot.layers], fontsize=7)
    axes.set_ylim(len(snapshot.layers) - 0.4, -0.6)
    axes.set_xlim(-0.01, 1.01)
    axes.set_xticks([])
    axes.spines[["top", "right", "bottom"]].set_visible(False)
    axes.set_title(
        f"{snapshot.name}: {int(snapshot.pruned.sum())} of {len(snapshot.pruned)} neurons pruned", fontsize=10
    )
    bar = figure.colorbar(dots, ax=axes, location="bottom", shrink=0.6, aspect=40, extend="both")
    bar.set_label("UCLC, standardised within the layer (x: pruned)", fontsize=8)
    bar.ax.tick_params(labelsize=7)


def _draw_curve(axes: Any, snapshot: Snapshot) -> None:
    axes.plot(snapshot.acc, color="tab:blue", marker=".", label=f"ACC {snapshot.acc[-1]:.3f}")
    if snapshot.asr:
        axes.plot(snapshot.asr, color="tab:red", marker=".", label=f"ASR {snapshot.asr[-1]:.3f}")
    axes.set_ylim(-0.02, 1.02)
    axes.set_xlim(-0.5, max(10, len(snapshot.acc)))
    if snapshot.given_back:
        axes.axvline(len(snapshot.acc) - 1 - snapshot.given_back, color="grey", linestyle=":", linewidth=1)
    axes.set_xlabel("prunes" + (", then neurons given back" if snapshot.given_back else ""), fontsize=8)
    axes.set_title("clean accuracy" + (", attack success" if snapshot.asr else ""), fontsize=10)
    axes.tick_params(labelsize=7)
    axes.grid(alpha=0.3)
    axes.legend(loc="lower left", fontsize=9)

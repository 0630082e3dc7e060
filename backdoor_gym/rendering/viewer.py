"""The render modes: pictures of a network as arrays, as text, or in a window."""

import os
import sys
from typing import Any

import gymnasium as gym
import numpy as np

from ..errors import UnknownNameError
from .drawing import DPI, HEIGHT, WIDTH, Snapshot, frame, text


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
            return frame(snapshot)
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

        picture = frame(snapshot)
        if self._window is None:
            figure = pyplot.figure(snapshot.name, figsize=(WIDTH / DPI, HEIGHT / DPI), dpi=DPI)
            self._window = figure.add_axes((0, 0, 1, 1)).imshow(picture)
            self._window.axes.set_axis_off()
            figure.show()
        self._window.set_data(picture)
        self._window.figure.canvas.draw_idle()
        self._window.figure.canvas.start_event_loop(self._pause)


def _has_screen() -> bool:
    """Whether a window can be opened."""
    if sys.platform.startswith("linux") and not (os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")):
        return False
    from matplotlib import pyplot
    from matplotlib.backends import BackendFilter, backend_registry

    interactive = {name.lower() for name in backend_registry.list_builtin(BackendFilter.INTERACTIVE)}
    return pyplot.get_backend().lower() in interactive

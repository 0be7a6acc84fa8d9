# SPDX-License-Identifier: Apache-2.0
"""A progress bar without dependencies."""

from __future__ import annotations

import shutil
from typing import TextIO


class Bar:
    """A progress bar, redrawn on a terminal, a line per tenth elsewhere.

    Args:
        total: what has to be done until the bar is full.
        unit: what it is counted in.
        stream: where to draw.
        redraw: the least progress between two drawings on a terminal.
    """

    WIDTH = 20

    def __init__(self, total: float, unit: str, stream: TextIO, *, redraw: float) -> None:
        self._total, self._unit, self._stream = total, unit, stream
        self._terminal = stream.isatty()
        self._interval = redraw if self._terminal else total / 10
        self._next, self._length = 0.0, 0

    def show(self, done: float, text: str) -> None:
        """Draw the bar, with a text behind it, if it is time to."""
        if done >= self._next:
            self._draw(done, text)
            self._next = (done // self._interval + 1) * self._interval

    def finish(self, text: str) -> None:
        """Draw the full bar and end the line."""
        self._draw(self._total, text)
        if self._terminal:
            print(file=self._stream)

    def _draw(self, done: float, text: str) -> None:
        bar = "#" * round(self.WIDTH * done / self._total)
        line = f"[{bar:-<{self.WIDTH}}] {done:.0f}/{self._total:.0f} {self._unit}, {text}"
        if self._terminal:
            # Cut, since a line that wraps is not overwritten; padded over a longer one before.
            line = line[: shutil.get_terminal_size().columns - 1]
            print(f"\r{line:{self._length}}", end="", file=self._stream, flush=True)
            self._length = len(line)
        else:
            print(line, file=self._stream, flush=True)

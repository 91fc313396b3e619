"""Pictures of runs as SVG text: requests kept within target by the minute, and times to first and further tokens.

Written by hand, so that no drawing library is needed. It takes the figures that `figures.measure` gives and returns
text; where it is saved is the caller's affair.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any
from xml.sax.saxutils import escape

INK, FAINT, GRID = "#222222", "#6b6b6b", "#dddddd"
COLOURS = {
    "shoal": "#0b6e99",
    "petals": "#d1662f",
    "petals-fresh": "#e6ac8c",
    "parallax": "#7a4fa3",
    "parallax-mending": "#b79ad0",
    "random": "#9a9a9a",
}
WIDTH, HEIGHT = 860, 420
LEFT, RIGHT, TOP, BOTTOM = 70, 150, 62, 52
LABEL_APART = 15.0


class _Sheet:
    """An SVG being written."""

    def __init__(self, title: str, note: str) -> None:
        self._parts = [
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{HEIGHT}"'
            f' viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" role="img">',
            f"<title>{escape(title)}</title>",
            f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
        ]
        self.text(LEFT - 50, 24, title, size=16, weight="bold")
        self.text(LEFT - 50, 44, note, size=12, colour=FAINT)

    def text(
        self, x: float, y: float, text: str, *, size: int = 12, colour: str = INK,
        anchor: str = "start", weight: str = "normal",
    ) -> None:  # fmt: skip
        self._parts.append(
            f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" fill="{colour}" text-anchor="{anchor}"'
            f' font-weight="{weight}">{escape(text)}</text>'
        )

    def line(self, points: Sequence[tuple[float, float]], colour: str, width: float, dash: str = "") -> None:
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        dashed = f' stroke-dasharray="{dash}"' if dash else ""
        self._parts.append(
            f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="{width}"{dashed}'
            ' stroke-linejoin="round"/>'
        )

    def bar(self, x: float, y: float, width: float, height: float, colour: str, opacity: float) -> None:
        self._parts.append(
            f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}" fill="{colour}"'
            f' fill-opacity="{opacity}"/>'
        )

    def done(self) -> str:
        return "\n".join([*self._parts, "</svg>", ""])


def steps(top: float) -> list[float]:
    """Round figures from 0 to at least `top`, about five of them."""
    if top <= 0:
        return [0.0, 1.0]
    raw = top / 4
    size = 10.0 ** math.floor(math.log10(raw))
    step = next(size * k for k in (1, 2, 2.5, 5, 10) if size * k >= raw)
    count = math.ceil(top / step - 1e-9)
    return [step * k for k in range(count + 1)]


def goodput_picture(runs: Mapping[str, Mapping[str, Any]]) -> str:
    """Requests a second by minute of arrival: asked for (dashed), and kept within both targets by each policy."""
    some = next(iter(runs.values()))
    targets = some["targets"]
    sheet = _Sheet(
        "Requests answered within target",
        f"a second, by minute; first token in {targets['ttft_s']:g} s, {targets['tpot_s']:g} s for each further one;"
        f" {some['nodes']} nodes, {some['nodes_left']} left and {some['nodes_joined']} came",
    )
    asked = some["series"]["asked_per_s"]
    marks = steps(max([*asked, 0.1]))
    minutes = max(1, len(asked) - 1)

    def place(k: float, value: float) -> tuple[float, float]:
        x = LEFT + (WIDTH - LEFT - RIGHT) * k / minutes
        return x, HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * value / marks[-1]

    for mark in marks:
        sheet.line([place(0, mark), place(minutes, mark)], GRID, 1)
        sheet.text(LEFT - 8, place(0, mark)[1] + 4, f"{mark:g}", colour=FAINT, anchor="end")
    for mark in steps(minutes):
        if mark <= minutes:
            sheet.text(place(mark, 0)[0], HEIGHT - BOTTOM + 18, f"{mark:g}", colour=FAINT, anchor="middle")
    sheet.text(place(minutes / 2, 0)[0], HEIGHT - 12, "minutes", colour=FAINT, anchor="middle")
    sheet.line([place(k, v) for k, v in enumerate(asked)], INK, 1.5, "5 4")
    ends = [(place(minutes, asked[-1])[1], "asked for", INK)]
    for name, figures in runs.items():
        kept = figures["series"]["kept_per_s"]
        sheet.line([place(k, v) for k, v in enumerate(kept)], COLOURS[name], 3 if name == "shoal" else 1.8)
        ends.append((place(minutes, kept[-1])[1], name, COLOURS[name]))
    for y, name, colour in _apart(ends):
        sheet.text(WIDTH - RIGHT + 8, y + 4, name, colour=colour, weight="bold")
    return sheet.done()


def _apart(ends: Sequence[tuple[float, str, str]]) -> list[tuple[float, str, str]]:
    """Labels moved so that none covers another, in their order, within the picture."""
    ordered = sorted(ends)
    placed: list[float] = []
    for y, _, _ in ordered:
        placed.append(max(y, placed[-1] + LABEL_APART) if placed else max(y, float(TOP)))
    over = placed[-1] - (HEIGHT - BOTTOM) if placed else 0.0
    for k in range(len(placed) - 1, -1, -1):
        limit = HEIGHT - BOTTOM if k == len(placed) - 1 else placed[k + 1] - LABEL_APART
        if over > 0:
            placed[k] = min(placed[k], limit)
    return [(y, name, colour) for y, (_, name, colour) in zip(placed, ordered, strict=True)]


def times_picture(runs: Mapping[str, Mapping[str, Any]]) -> str:
    """p50, p90 and p99 of the time to the first token, and of the time for each further one, with the targets."""
    some = next(iter(runs.values()))
    sheet = _Sheet(
        "Time to the first token, and for each further one",
        "seconds; bars are p50, p90 and p99 of what was answered",
    )
    width = (WIDTH - LEFT - 40) / 2
    for k, (key, label) in enumerate((("ttft_s", "first token"), ("tpot_s", "each further token"))):
        left = LEFT + k * (width + 30)
        _bars(sheet, left, width - 30, runs, key, label, some["targets"][key])
    return sheet.done()


def _bars(
    sheet: _Sheet, left: float, width: float, runs: Mapping[str, Mapping[str, Any]], key: str, label: str, target: float
) -> None:  # fmt: skip
    highest = max([target, *(figures[key]["p99"] or 0.0 for figures in runs.values())])
    marks = steps(highest)
    tall = HEIGHT - TOP - BOTTOM

    def level(value: float) -> float:
        return HEIGHT - BOTTOM - tall * value / marks[-1]

    for mark in marks:
        sheet.line([(left, level(mark)), (left + width, level(mark))], GRID, 1)
        sheet.text(left - 6, level(mark) + 4, f"{mark:g}", colour=FAINT, anchor="end", size=11)
    each = width / max(1, len(runs))
    for n, (name, figures) in enumerate(runs.items()):
        for j, share in enumerate(("p50", "p90", "p99")):
            value = figures[key][share] or 0.0
            x = left + n * each + 4 + j * (each - 8) / 3
            sheet.bar(
                x, level(value), (each - 8) / 3 - 1, tall * value / marks[-1], COLOURS[name], 1 - 0.28 * j
            )
        words = name.split("-")
        for row, word in enumerate(words):
            sheet.text(
                left + (n + 0.5) * each, HEIGHT - BOTTOM + 15 + 12 * row, word, size=11, anchor="middle"
            )
    sheet.line([(left, level(target)), (left + width, level(target))], INK, 1.2, "5 4")
    sheet.text(left + width, level(target) - 4, f"target {target:g} s", size=11, anchor="end")
    sheet.text(left + width / 2, HEIGHT - 8, label, colour=FAINT, anchor="middle")

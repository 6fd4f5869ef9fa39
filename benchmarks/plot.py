"""A small plot as SVG, by hand: panels side by side, both axes logarithmic, a line of slope 1 for comparison."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

from benchmarks.harness import Series, figure

_WIDTH, _HEIGHT, _LEFT, _TOP, _BOTTOM, _RIGHT = 300, 300, 54, 40, 58, 16
_COLOURS = ("#1f6feb", "#d1242f", "#1a7f37")
_STYLE = "font: 11px system-ui, sans-serif; fill: #57606a"


@dataclass(frozen=True)
class Panel:
    """Curves by what they show, each a value by size."""

    size: str
    curves: Mapping[str, Mapping[int, Series]]


def draw(panels: Sequence[Panel]) -> str:
    """The plot. A point is a median, the bar through it goes from the lowest to the highest; dashes show slope 1."""
    parts = [_panel(panel, number * _WIDTH) for number, panel in enumerate(panels)]
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {len(panels) * _WIDTH} {_HEIGHT}" '
        f'width="{len(panels) * _WIDTH}" height="{_HEIGHT}" style="{_STYLE}">\n'
        f'<rect width="100%" height="100%" fill="#ffffff"/>\n{"".join(parts)}</svg>\n'
    )


def _panel(panel: Panel, left: int) -> str:
    sizes = sorted({size for curve in panel.curves.values() for size in curve})
    series = [value for curve in panel.curves.values() for value in curve.values()]
    bottom, top = 10 ** math.floor(math.log10(min(s.low for s in series))), max(s.high for s in series) * 1.3
    x0, x1, y0, y1 = left + _LEFT, left + _WIDTH - _RIGHT, _HEIGHT - _BOTTOM, _TOP

    def x(size: float) -> float:
        return x0 + (x1 - x0) * math.log(size / sizes[0]) / math.log(sizes[-1] / sizes[0])

    def y(value: float) -> float:
        return y0 + (y1 - y0) * math.log(value / bottom) / math.log(top / bottom)

    found = [f'<path d="M{x0} {y1}V{y0}H{x1}" fill="none" stroke="#8c959f"/>\n']
    found += [f'<text x="{x(size):.1f}" y="{y0 + 16}" text-anchor="middle">{size:,}</text>\n' for size in sizes]
    tick = bottom
    while tick <= top:
        found.append(f'<path d="M{x0} {y(tick):.1f}H{x1}" stroke="#eaeef2"/>\n')
        found.append(f'<text x="{x0 - 6}" y="{y(tick) + 4:.1f}" text-anchor="end">{figure(tick)}</text>\n')
        tick *= 10
    found.append(f'<text x="{(x0 + x1) / 2}" y="{y0 + 34}" text-anchor="middle">{escape(panel.size)}</text>\n')
    for number, (what, curve) in enumerate(panel.curves.items()):
        colour = _COLOURS[number]
        points = [(x(size), y(value.median)) for size, value in curve.items()]
        line = "L".join(f"{px:.1f} {py:.1f}" for px, py in points)
        found.append(f'<path d="M{line}" fill="none" stroke="{colour}" stroke-width="2"/>\n')
        for size, value in curve.items():
            px, py = x(size), y(value.median)
            found.append(f'<path d="M{px:.1f} {y(value.low):.1f}V{y(value.high):.1f}" stroke="{colour}"/>\n')
            found.append(f'<circle cx="{px:.1f}" cy="{py:.1f}" r="3" fill="{colour}"/>\n')
        # From the first point, as far as it stays inside.
        first = curve[sizes[0]].median
        end = min(sizes[-1], sizes[0] * top / first)
        dashes = f"M{x(sizes[0]):.1f} {y(first):.1f}L{x(end):.1f} {y(first * end / sizes[0]):.1f}"
        found.append(f'<path d="{dashes}" stroke="{colour}" stroke-dasharray="2 4" opacity="0.6"/>\n')
        found.append(f'<text x="{x0 + 8}" y="{_TOP - 22 + 13 * number}" style="fill: {colour}">{escape(what)}</text>\n')
    return "".join(found)

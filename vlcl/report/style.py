"""How the pictures of all reports look: colours, markers, axes. No torch; matplotlib comes with the axes given."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from matplotlib.axes import Axes

INK, MUTED, RULE, GOOD = "#1b1f24", "#5c6570", "#dfe3e8", "#178a4c"
# Told apart with any colour vision (after Okabe and Ito), and by their markers in print.
COLOURS = ("#2563c9", "#d2600f", "#00836a", "#b0448f", "#8a6d00", "#3f9fd6", "#555c64", "#c22f3d")
MARKERS = "osD^vPX*"


def style_axes(
    axes: Axes,
    size: float,
    pad: float = 5,
    rules: Literal["y", "both"] | None = "y",
    spines: Collection[str] = ("bottom",),
    marks: bool = False,
    muted: str = MUTED,
    rule: str = RULE,
) -> None:
    """Bare axes: muted numbers of `size` points, thin rules behind the lines, few spines; `marks` at the numbers only
    where they tell more than the rules, as on logarithmic axes."""
    if marks:
        axes.tick_params(which="both", color=rule, labelcolor=muted, labelsize=size)
    else:
        axes.tick_params(colors=muted, labelsize=size, length=0, pad=pad)
    if rules:
        axes.grid(axis=rules, color=rule, linewidth=0.8)
    axes.set_axisbelow(True)
    for side, spine in axes.spines.items():
        spine.set_visible(side in spines)
        spine.set_color(rule)

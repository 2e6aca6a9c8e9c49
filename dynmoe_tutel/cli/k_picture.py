"""Draws k over the tokens of a conversation: image patches over the image, the text's tokens as words in colour."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

COLUMNS = 100  # characters of text in a line
LINE = 0.28  # inches


def draw(path: Path, k_T: Tensor, groups: Sequence[str], tokens: Sequence[str], image: Any = None) -> None:
    """Write a picture of `k_T` [T], the mean k of each token over the layers, to `path`.

    `groups` says "image", "text" or "answer" for each token, of which the last may have no k: nobody read it.
    """
    try:
        from matplotlib.cm import ScalarMappable
        from matplotlib.colors import Normalize
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("a picture needs matplotlib: pip install 'dynmoe_tutel[experiments]'") from error
    known = min(len(k_T), len(tokens))
    k = k_T[:known].tolist()
    colours: Any = ScalarMappable(Normalize(1, max([*k, 2.0])), "viridis")
    lines = _lines([(tokens[i], k[i]) for i in range(known) if groups[i] != "image"])
    patches = [k[i] for i in range(known) if groups[i] == "image"]
    side = math.isqrt(len(patches))
    seen = side * side == len(patches) > 0
    height = (4.2 if seen else 0) + LINE * (len(lines) + 2)
    figure = Figure(figsize=(9, height), layout="constrained")
    top: Any = None
    bottom: Any = figure
    if seen:
        top, bottom = np.asarray(figure.subfigures(2, 1, height_ratios=[4.2, height - 4.2]))
        plain, over = top.subplots(1, 2)
        grid = [patches[i * side : (i + 1) * side] for i in range(side)]
        for axes in (plain, over):
            axes.set_axis_off()
        if image is not None:
            plain.imshow(image, extent=(0, side, side, 0))
            over.imshow(image.convert("L"), extent=(0, side, side, 0), cmap="gray")
        over.imshow(grid, extent=(0, side, side, 0), cmap=colours.cmap, norm=colours.norm, alpha=0.65)
        plain.set_title("image")
        over.set_title("k of its patches")
    axes = bottom.subplots()
    axes.set(xlim=(0, COLUMNS), ylim=(len(lines), 0))
    axes.set_axis_off()
    for row, line in enumerate(lines):
        at = 0
        for word, value in line:
            shade = {"facecolor": colours.to_rgba(value, alpha=0.55), "edgecolor": "none", "pad": 0.6}
            axes.text(at, row + 0.5, word, family="monospace", fontsize=7, va="center", bbox=shade, parse_math=False)
            at += len(word)
    holder, beside = (bottom, axes) if top is None else (top, top.axes)
    holder.colorbar(colours, ax=beside, label="mean k over the layers", shrink=0.8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def _lines(words: Sequence[tuple[str, float]]) -> list[list[tuple[str, float]]]:
    """The words in lines of at most COLUMNS characters; control characters become visible."""
    lines: list[list[tuple[str, float]]] = [[]]
    room = COLUMNS
    for word, value in words:
        shown = "".join(c if c.isprintable() else "\N{RETURN SYMBOL}" for c in word)[:COLUMNS] or " "
        if len(shown) > room and lines[-1]:
            lines.append([])
            room = COLUMNS
        lines[-1].append((shown, value))
        room -= len(shown)
        if "\n" in word:
            lines.append([])
            room = COLUMNS
    return lines

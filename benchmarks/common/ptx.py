"""Reads NVIDIA's assembly (PTX): which matrix products may read shared memory before its copies are visible to them.

`cp.async` writes shared memory through the generic proxy, and `wgmma` and `tcgen05.mma` read it through the async
proxy. Between the wait for the copies and the product every path needs `fence.proxy.async`; else the product may read
what was there before.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

_WAIT = re.compile(r"cp\.async\.wait_(group|all)\b")
_FENCE = re.compile(r"fence\.proxy\.async(\.shared::\w+)?;")
_PRODUCT = re.compile(r"(wgmma\.mma_async|tcgen05\.mma)\b")
_LABEL = re.compile(r"(\$?\w+):$")
_JUMP = re.compile(r"(@!?%\w+\s+)?bra(\.uni)?\s+(\$?\w+);")
_END = re.compile(r"(ret|exit|trap);")


@dataclass
class _Block:
    """Instructions that run one after the other."""

    label: str
    events: list[str] = field(default_factory=list)  # "wait", "fence" or "product", in order
    jumps: list[str] = field(default_factory=list)
    falls_through: bool = True


def _blocks(ptx: str) -> list[_Block]:
    """The blocks in the order of the text."""
    blocks = [_Block("")]
    for line in ptx.splitlines():
        code = line.partition("//")[0].strip()
        if label := _LABEL.fullmatch(code):
            blocks.append(_Block(label[1]))
        elif jump := _JUMP.fullmatch(code):
            blocks[-1].jumps.append(jump[3])
            if jump[1] is None:
                blocks[-1].falls_through = False
            blocks.append(_Block(""))
        elif _END.fullmatch(code):
            blocks[-1].falls_through = False
            blocks.append(_Block(""))
        elif _WAIT.search(code):
            blocks[-1].events.append("wait")
        elif _FENCE.match(code):  # a fence under a predicate is none
            blocks[-1].events.append("fence")
        elif _PRODUCT.search(code):
            blocks[-1].events.append("product")
    return blocks


def unfenced_products(ptx: str) -> int:
    """The number of matrix products that some path reaches from a wait for copies without a fence between."""
    blocks = _blocks(ptx)
    position = {block.label: i for i, block in enumerate(blocks) if block.label}
    exposed = [False] * len(blocks)  # whether copies may be unfenced at the start of a block
    found: set[tuple[int, int]] = set()
    waiting = list(range(len(blocks)))
    while waiting:
        i = waiting.pop()
        state = exposed[i]
        for n, event in enumerate(blocks[i].events):
            if event == "product" and state:
                found.add((i, n))
            elif event != "product":
                state = event == "wait"
        following = [position[label] for label in blocks[i].jumps] + [i + 1] * blocks[i].falls_through
        for j in following:
            if state and j < len(blocks) and not exposed[j]:
                exposed[j] = True
                waiting.append(j)
    return len(found)

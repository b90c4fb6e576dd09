"""The flow graph of a disassembled kernel: its instructions in blocks, its loops, and shortest ways through them.

Read from ``nvdisasm -hex``. Instructions have 128 bits; bits 105 to 108 are the cycles that a warp waits after one.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

_LINE = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?P<text>.*?)\s*;\s*/\* 0x[0-9a-f]{16} \*/")
_CONTROL = re.compile(r"^\s*/\* 0x(?P<bits>[0-9a-f]{16}) \*/")
_LABEL = re.compile(r"^(?P<name>[.$][\w$.]+):")
_TARGET = re.compile(r"`\((?P<label>[.$][\w$.]+)\)")


class Instruction(NamedTuple):
    """One instruction of 128 bits."""

    guard: str  # ``@P0``, ``@!UP1`` or nothing
    name: str  # ``FADD.FTZ``
    operands: str
    stall: int  # cycles before the same warp's next instruction

    @property
    def ends(self) -> bool:
        """Whether nothing after it may run."""
        jumps = self.name in ("BRA", "BRA.U") and self.operands.startswith("`")
        return not self.guard and (jumps or self.name.split(".")[0] in ("EXIT", "RET"))

    @property
    def label(self) -> str | None:
        """Where a branch goes; a call comes back, so it is none."""
        found = _TARGET.search(self.operands) if self.name.startswith("BRA") else None
        return found["label"] if found else None


def instructions(text: str) -> Iterator[tuple[list[str], Instruction]]:
    """Each instruction of ``nvdisasm -hex`` with the labels before it. Raises ValueError where one is half there."""
    labels: list[str] = []
    lines = iter(text.splitlines())
    for line in lines:
        if label := _LABEL.match(line):
            labels.append(label["name"])
        elif found := _LINE.match(line):
            control = _CONTROL.match(next(lines, ""))
            if not control:
                raise ValueError(f"sass: expected 128-bit instructions with -hex, got {line.strip()!r}")
            guard, _, rest = (
                found["text"].partition(" ") if found["text"].startswith("@") else ("", "", found["text"])
            )
            name, _, operands = rest.strip().partition(" ")
            stall = int(control["bits"], 16) >> 41 & 15
            yield labels, Instruction(guard, name, operands.strip(), stall)
            labels = []


@dataclass
class Flow:
    """Basic blocks, numbered in the order of their addresses, and where each may go; the last is the end, empty."""

    blocks: list[list[Instruction]]
    successors: list[list[int]]

    @classmethod
    def read(cls, text: str) -> Flow:
        blocks: list[list[Instruction]] = [[]]
        names: dict[str, int] = {}
        for labels, instruction in instructions(text):
            if blocks[-1] and (labels or blocks[-1][-1].label or blocks[-1][-1].ends):
                blocks.append([])
            names |= dict.fromkeys(labels, len(blocks) - 1)
            blocks[-1].append(instruction)
        successors: list[list[int]] = []
        for index, block in enumerate(blocks):
            last = block[-1]
            leaves = last.name == "EXIT" and not last.guard
            after = [len(blocks)] if leaves else [] if last.ends else [index + 1]
            successors.append(after + ([names[last.label]] if last.label else []))
        return cls([*blocks, []], [*successors, []])

    def loops(self) -> dict[int, set[int]]:
        """The blocks of each natural loop by its header: a jump back to a block that all ways to it pass."""
        reached, todo = set[int](), [0]
        while todo:
            if (block := todo.pop()) not in reached:
                reached.add(block)
                todo += self.successors[block]
        before: dict[int, list[int]] = {block: [] for block in reached}
        for block in reached:
            for after in self.successors[block]:
                before[after].append(block)
        dominators = {block: set(reached) for block in reached} | {0: {0}}
        changed = True
        while changed:
            changed = False
            for block in sorted(reached - {0}):
                found = {block} | set.intersection(*(dominators[b] for b in before[block]))
                changed, dominators[block] = changed or found != dominators[block], found
        loops: dict[int, set[int]] = {}
        for block in reached:
            for header in set(self.successors[block]) & dominators[block]:
                body, todo = loops.setdefault(header, {header}), [block]
                while todo:
                    if (member := todo.pop()) not in body:
                        body.add(member)
                        todo += before[member]
        return loops

    def shortest(self, starts: set[int], ends: set[int], within: set[int]) -> list[int]:
        """Blocks from one of ``starts`` to before one of ``ends`` with the fewest instructions, inside ``within``."""
        best: dict[int, tuple[int, list[int]]] = {start: (0, []) for start in starts}
        todo = set(starts)
        while todo:
            block = min(todo, key=lambda b: best[b][0])
            todo.remove(block)
            length, path = best[block]
            if block in ends:
                return path
            for after in self.successors[block]:
                found = length + len(self.blocks[block]), [*path, block]
                if (after in within or after in ends) and (after not in best or found[0] < best[after][0]):
                    best[after] = found
                    todo.add(after)
        raise ValueError(f"sass: expected a way from {sorted(starts)} to one of {sorted(ends)}, found none")

    def around(self, header: int, body: set[int]) -> list[int]:
        """One turn of a loop, by the shortest way."""
        return [header, *self.shortest(set(self.successors[header]) & body, {header}, body)]

"""The sizes that are measured: N rows, vocabulary V, hidden size D; SFTMix pairs all rows, so M = N / 2."""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Shape:
    """One problem size. N is even, so that every row has a partner."""

    N: int
    V: int
    D: int

    def __post_init__(self) -> None:
        if min(self.N, self.V, self.D) < 1 or self.N % 2:
            raise ValueError(f"shape: expected N even and N, V, D at least 1, got {self.N}x{self.V}x{self.D}")

    @property
    def M(self) -> int:
        return self.N // 2

    @property
    def num_kept_pairs(self) -> int:
        """Pairs that a row plan keeps where 40 % of the tokens are prompt."""
        return max(self.M * 3 // 5, 1)

    def __str__(self) -> str:
        return f"{self.N}x{self.V}x{self.D}"


_OTHER_HEADS = ((151936, 3584), (256000, 2304), (49152, 576), (32000, 4096))
# toy rehearses the GPU run in the interpreter, small serves pytest-benchmark, the others are published: mid is a small
# call on a CPU, call one that is all overhead; ends are the
# least and the most rows of the heads that record has with 8192.
SHAPE_SETS: dict[str, tuple[Shape, ...]] = {
    "toy": (Shape(16, 128, 32),),
    "small": (Shape(128, 4096, 64), Shape(96, 1031, 72)),
    "mid": (Shape(128, 4096, 64),),
    "call": (Shape(8, 16, 8),),
    "cpu": (Shape(1024, 49152, 576), Shape(2048, 32000, 2048)),
    "record": (
        Shape(8192, 128256, 4096),
        Shape(8192, 151936, 3584),
        Shape(8192, 256000, 2304),
        Shape(8192, 49152, 576),
        Shape(8192, 32000, 4096),
        Shape(4096, 128256, 4096),
        Shape(2048, 128256, 4096),
        Shape(1024, 128256, 4096),
        Shape(16384, 128256, 4096),
        Shape(32768, 128256, 4096),
    ),
    "ends": tuple(Shape(N, V, D) for V, D in _OTHER_HEADS for N in (1024, 32768)),
}
DEFAULT_DTYPE = {
    "toy": "float32",
    "small": "float32",
    "mid": "float32",
    "call": "float32",
    "cpu": "float32",
    "record": "bfloat16",
    "ends": "bfloat16",
}


def parse_shapes(text: str) -> list[tuple[Shape, str]]:
    """``cpu``, ``1024x49152x576`` or a comma list of both → (shape, its default dtype), in the order given.

    Raises ``ValueError`` for a name that is not a set and not N x V x D.
    """
    chosen: list[tuple[Shape, str]] = []
    for item in text.split(","):
        size = re.fullmatch(r"(\d+)x(\d+)x(\d+)", item.strip())
        if size:
            chosen.append((Shape(*map(int, size.groups())), "float32"))
        elif item.strip() in SHAPE_SETS:
            chosen += [(shape, DEFAULT_DTYPE[item.strip()]) for shape in SHAPE_SETS[item.strip()]]
        else:
            raise ValueError(f"shapes: expected {', '.join(SHAPE_SETS)} or NxVxD, got {item.strip()!r}")
    return chosen

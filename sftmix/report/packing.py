"""Numbers and texts as an HTML page can hold them: rounded decimals in planes of bytes, gzip, base64.

Floats hardly compress, decimals of a stated number of digits do; the page shows exactly these digits. A plane holds
one byte of every number, so that bytes of a kind stand together. The page's part of this is ``page/data.js``.
"""

from __future__ import annotations

import base64
import gzip
import json
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

_BIAS = 1 << 15
_SPECIAL = (1 << 16) - 1  # the exponent of what is not finite


def pack_decimals(values: Sequence[float] | NDArray[np.float64], digits: int) -> bytes:
    """Numbers [E] rounded to ``digits`` significant digits (2 to 6): planes of the mantissa, then of the exponent.

    A number is (mantissa - 10^digits) * 10^(exponent - 2^15); NaN and the infinities have exponent 2^16 - 1. Raises
    ``ValueError`` for other digits.
    """
    if not 2 <= digits <= 6:
        raise ValueError(f"digits: expected 2 to 6, got {digits}")
    mantissas, exponents = np.zeros(len(values), np.int64), np.zeros(len(values), np.int64)
    for i, value in enumerate(np.asarray(values, np.float64).tolist()):
        mantissas[i], exponents[i] = _decimal(value, digits)
    mantissas += 10**digits
    size = 3 if 2 * 10**digits >= 1 << 16 else 2
    exponents += _BIAS
    planes = [(mantissas >> 8 * k) & 255 for k in range(size)] + [exponents & 255, exponents >> 8]
    return b"".join(plane.astype(np.uint8).tobytes() for plane in planes)


def _decimal(value: float, digits: int) -> tuple[int, int]:
    """(mantissa, exponent) of the nearest decimal with so many digits; the rounding is Python's, exact."""
    if not math.isfinite(value):
        return (0 if math.isnan(value) else 1 if value > 0 else -1), _SPECIAL - _BIAS
    if value == 0:
        return 0, 0
    head, _, exponent = f"{value:.{digits - 1}e}".partition("e")
    return int(head.replace(".", "")), int(exponent) - digits + 1


def pack_counts(values: Sequence[int] | NDArray[np.int64]) -> bytes:
    """Counts [E] below 2^32 as four planes. Raises ``ValueError`` for others."""
    counts = np.asarray(values, np.int64)
    if len(counts) and not 0 <= int(counts.min()) <= int(counts.max()) < 1 << 32:
        raise ValueError(f"counts: expected 0 to 2^32 - 1, got {int(counts.min())} to {int(counts.max())}")
    return b"".join(((counts >> 8 * k) & 255).astype(np.uint8).tobytes() for k in range(4))


def pack_texts(texts: Sequence[str]) -> bytes:
    """Texts, whatever characters they have: their lengths in bytes as counts, then UTF-8.

    A lone surrogate, which UTF-8 has no bytes for, becomes what the page shows as U+FFFD.
    """
    encoded = [text.encode("utf-8", "surrogatepass") for text in texts]
    return pack_counts([len(each) for each in encoded]) + b"".join(encoded)


def deflated(content: bytes) -> bytes:
    """gzip, the same bytes for the same content at any time."""
    return gzip.compress(content, compresslevel=9, mtime=0)


def in_base64(content: bytes) -> str:
    """Content as text that means nothing in HTML: gzip, then base64."""
    return base64.b64encode(deflated(content)).decode("ascii")


def size_in_base64(content: bytes) -> int:
    """The length of ``in_base64(content)``."""
    return -(-len(deflated(content)) // 3) * 4


def as_json(value: Any) -> bytes:
    """Plain data as JSON of ASCII alone; a number that is not finite is the text ``inf``, ``-inf`` or ``nan``."""
    return json.dumps(_finite(value), allow_nan=False, separators=(",", ":")).encode("ascii")


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value

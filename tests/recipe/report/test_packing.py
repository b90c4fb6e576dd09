"""Columns of a page: the decimals that were meant, any text, and JSON that a browser takes."""

from __future__ import annotations

import base64
import gzip
import json
import math

import numpy as np
import pytest

from sftmix.report.packing import as_json, in_base64, pack_counts, pack_decimals, pack_texts, size_in_base64
from tests.recipe.report.conftest import Open
from tests.recipe.report.folders import HOSTILE

NUMBERS = [
    0.0, 1.0, -1.0, 123456.0, 0.000123456, 9.999996, 99999.95, 1e-300, 1.7e308, 2.5, -0.0456789, 1 / 3, math.pi,
    math.inf, -math.inf, math.nan, 4.44445, 65535.5,
]  # fmt: skip


def decimals(packed: bytes, size: int, digits: int) -> list[float]:
    """Read back by another road: columns of bytes as little-endian integers, decimals by Python's own parser."""
    width = 3 if digits >= 5 else 2
    planes = np.frombuffer(packed, np.uint8).reshape(width + 2, size).T.tolist()
    found = []
    for row in planes:
        mantissa = int.from_bytes(bytes(row[:width]), "little") - 10**digits
        exponent = int.from_bytes(bytes(row[width:]), "little")
        special = {0: math.nan, 1: math.inf, -1: -math.inf}
        found.append(special[mantissa] if exponent == 65535 else float(f"{mantissa}e{exponent - 32768}"))
    return found


@pytest.mark.parametrize("digits", [2, 4, 5, 6])
def test_decimals_are_rounded_as_python_rounds_them(digits: int) -> None:
    found = decimals(pack_decimals(NUMBERS, digits), len(NUMBERS), digits)
    assert list(map(repr, found)) == [repr(float(f"{value:.{digits - 1}e}")) for value in NUMBERS]


def test_the_page_reads_the_same_decimals_texts_and_counts(open_page: Open, whole: object) -> None:
    """The browser's part, called with the very bytes."""
    page = open_page(whole)
    texts = [*HOSTILE, "", "lone \ud800 surrogate"]
    counts = [0, 1, 255, 256, 1 << 24, (1 << 32) - 1]
    blob = pack_decimals(NUMBERS, 4) + pack_decimals(NUMBERS, 6) + pack_counts(counts) + pack_texts(texts)
    told = page.evaluate(
        """([packed, n, c, t]) => {
          const columns = new Columns(Uint8Array.from(atob(packed), (x) => x.charCodeAt(0)));
          const say = (v) => (Object.is(v, NaN) ? "nan" : v === Infinity ? "inf" : v === -Infinity ? "-inf" : v);
          const found = [4, 6].map((digits) => Array.from(columns.decimals(n, digits), say));
          const counts = Array.from(columns.counts(c)), text = columns.texts(t);
          return [...found, counts, Array.from({ length: t }, (_, i) => text(i))];
        }""",
        [base64.b64encode(blob).decode(), len(NUMBERS), len(counts), len(texts)],
    )
    for found, digits in zip(told[:2], (4, 6), strict=True):
        expected = [float(f"{value:.{digits - 1}e}") for value in NUMBERS]
        assert [float(value) for value in found[:15]] == expected[:15] and found[15] == "nan"
        assert [float(value) for value in found[16:]] == expected[16:]
    assert told[2] == counts
    assert told[3] == [*HOSTILE, "", "lone \ufffd\ufffd\ufffd surrogate"]


def test_numbers_are_shown_with_all_their_digits(open_page: Open, whole: object) -> None:
    page = open_page(whole)
    shown = page.evaluate(
        "[0, 1, -2.5, 0.000123, 0.00001234, 12345678, 123456, Infinity, -Infinity, NaN].map(show)"
    )
    assert shown == ["0", "1", "−2.5", "0.000123", "1.234e−5", "1.2345678e7", "123456", "∞", "−∞", "unknown"]


def test_blobs_are_plain_and_the_same_at_any_time() -> None:
    content = pack_texts(HOSTILE)
    text = in_base64(content)
    assert set(text) <= set("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/=")
    assert gzip.decompress(base64.b64decode(text)) == content
    assert len(text) == size_in_base64(content) and in_base64(content) == text


def test_json_is_ascii_and_names_what_json_lacks() -> None:
    text = as_json({"a": [math.inf, -math.inf, math.nan, 1.5], "b": "é\u2028\ud800"})
    assert text.isascii() and json.loads(text)["a"] == ["inf", "-inf", "nan", 1.5]
    assert json.loads(text)["b"] == "é\u2028\ud800"


@pytest.mark.parametrize("digits", [1, 7])
def test_other_digits_are_refused(digits: int) -> None:
    with pytest.raises(ValueError, match=f"digits: expected 2 to 6, got {digits}"):
        pack_decimals([1.0], digits)


@pytest.mark.parametrize("counts", [[-1], [1 << 32]])
def test_other_counts_are_refused(counts: list[int]) -> None:
    with pytest.raises(ValueError, match=r"counts: expected 0 to 2\^32 - 1"):
        pack_counts(counts)

"""One HTML file from data: template, style and script inside it, nothing of the data as markup, no request allowed.

The data are base64 in script elements that no browser runs; the page inflates them and puts them in as text. Its
Content-Security-Policy admits the one script and the styles by their hashes, and no address at all.
"""

from __future__ import annotations

import base64
import hashlib
import html
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from sftmix.files import replacing
from sftmix.progress import say
from sftmix.report.content import content
from sftmix.report.examples import packed
from sftmix.report.gather import Found
from sftmix.report.packing import as_json, in_base64, size_in_base64
from sftmix.report.texts import Texts

HERE = Path(__file__).parent
LIMIT = 2_000_000  # bytes of a report
_SPARE = 2_000  # bytes of the elements around the data
PARTS = ("data", "parts", "scatter", "table", "charts", "map")  # scripts that both pages have, in this order
_STYLES = ("uplot/uPlot.min.css", "page/page.css")
_UPLOT = "uplot/uPlot.iife.min.js"


def write_report(found: Found, texts: Texts) -> Path:
    """Write ``report.html`` of a run into its folder; the file is whole or absent.

    It is below ``LIMIT`` bytes where there are at most 50,000 examples with ids of ordinary length; more is said.
    """
    told = content(found, texts)
    columns: dict[str, bytes] = {}
    if found.scores is not None:
        told["examples"] = {}
        left = LIMIT - _SPARE - len(page("report", told["title"], {})) - size_in_base64(as_json(told))
        columns, told["examples"] = packed(found.scores, texts, most_bytes=left)
    text = page("report", told["title"], {"content": as_json(told), **columns})
    if len(text.encode()) > LIMIT:  # texts are cut to nothing by now
        say(f"report: {len(text.encode()):,} bytes, more than {LIMIT:,}: ids and numbers alone take them")
    return write(found.folder.report, text)


def write(path: Path, text: str) -> Path:
    """Write a page; the file is whole or absent."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="\n")
    return path


def page(name: str, title: str, blobs: Mapping[str, bytes]) -> str:
    """The HTML of ``page/<name>.html`` with its script, and ``blobs`` by name."""
    script = _joined([*(f"page/{part}.js" for part in PARTS), _UPLOT, f"page/{name}.js"])
    style = _joined(_STYLES)
    policy = (
        f"default-src 'none'; script-src '{_hash(script)}'; style-src '{_hash(style)}'; img-src data:; "
        "base-uri 'none'; form-action 'none'"
    )
    data = "\n".join(
        f'<script type="text/plain" id="data-{name}">{in_base64(blob)}</script>'
        for name, blob in blobs.items()
    )
    slots = {
        "policy": html.escape(policy), "title": html.escape(_visible(title)), "style": style, "script": script,
        "data": data, "licence": html.escape(_read("uplot/LICENSE.txt").strip()),
    }  # fmt: skip
    # One pass: what is filled in is not looked at again.
    return re.sub(r"@@(\w+)@@", lambda slot: slots[slot[1]], _read(f"page/{name}.html"))


def _visible(text: str) -> str:
    """Text without what UTF-8 or HTML cannot hold."""
    return "".join(c if c.isprintable() and not 0xD800 <= ord(c) < 0xE000 else "\ufffd" for c in text)


def _joined(names: Sequence[str]) -> str:
    return "\n" + "\n".join(_read(name).strip() for name in names) + "\n"


def _read(name: str) -> str:
    return (HERE / name).read_text(encoding="utf-8").replace("\r\n", "\n")


def _hash(text: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"

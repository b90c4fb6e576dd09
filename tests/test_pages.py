"""The pages of the project: links resolve, every file has its whole sentence, generated pages are current."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from sftmix import knobs_page
from sftmix.config import describe
from tests import file_lists

ROOT = file_lists.ROOT
PAGES = sorted(name for name in file_lists.files_of_the_project() if name.endswith(".md"))
FENCED = re.compile(r"^```.*?^```", flags=re.MULTILINE | re.DOTALL)
LINK = re.compile(r"!?\[[^\]]*\]\(([^()\s]+)\)|<(?:img|a)\b[^>]*?(?:src|href)=\"([^\"]+)\"")


def links(text: str) -> list[str]:
    """Targets of the links and pictures of a page; what stands in code is none."""
    text = re.sub(r"`[^`\n]*`", lambda code: code[0] if "](" not in code[0] else "", FENCED.sub("", text))
    return [first or second for first, second in LINK.findall(text)]


def anchors(text: str) -> set[str]:
    """The names that headings can be linked by, as GitHub makes them."""
    titles = re.findall(r"^#+ (.*)$", FENCED.sub("", text), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-") for title in titles}


def broken_links(page: Path) -> list[str]:
    text, broken = page.read_text(encoding="utf-8"), []
    for link in links(text):
        if re.match(r"[a-z]+:", link):
            continue
        name, _, anchor = link.partition("#")
        target = page.parent / name if name else page
        if not target.exists() or not target.resolve().is_relative_to(ROOT):
            broken.append(link)
        elif anchor and anchor not in anchors(target.read_text(encoding="utf-8")):
            broken.append(link)
    return broken


@pytest.mark.parametrize("page", PAGES)
def test_every_relative_link_resolves(page: str) -> None:
    assert broken_links(ROOT / page) == []


def test_a_broken_link_is_seen() -> None:
    text = '[a](b.md) ![c](d/e.png) `x[i](j)` <img src="f.png"> [g](#h)\n```\n[k](l.md)\n```\n# H, i `j`!\n'
    assert links(text) == ["b.md", "d/e.png", "f.png", "#h"]
    assert anchors(text) == {"h-i-j"}


# ---- lists of files ----


def test_lists_have_every_file_and_no_other() -> None:
    assert file_lists.check() == []


def test_every_file_is_on_exactly_one_page() -> None:
    parts = [
        {file_lists.PAGES[page] + name for name in file_lists.files_of(page)} for page in file_lists.PAGES
    ]
    real = {
        name for name in file_lists.files_of_the_project() if not re.fullmatch(r"tests.*/__init__\.py", name)
    }
    assert sum(map(len, parts)) == len(real)
    assert set().union(*parts) == real


@pytest.mark.parametrize("page", list(file_lists.PAGES))
def test_a_python_file_is_described_by_its_whole_first_sentence(page: str) -> None:
    """Read here once more, not by the command that writes: what a page says is never a part of the docstring's line."""
    folder = ROOT / file_lists.PAGES[page]
    for name, text in file_lists.listed(page).items():
        if name.endswith(".py"):
            docstring = ast.get_docstring(ast.parse((folder / name).read_text(encoding="utf-8"))) or ""
            assert text.replace("`", "") == docstring.splitlines()[0].replace("`", "").replace("|", "\\|"), (
                name
            )


@pytest.mark.parametrize(
    "text,why",
    [
        ("", "missing"), ("MISSING DESCRIPTION", "missing"), (file_lists.MISSING, "missing"),
        ("TODO: say it.", "missing"),
        ("the loss with the vocabulary's rows of weight and bias spread over the ranks of a pro", "cut off"),
        ("time candidate tiles of the Triton kernels on this GPU and print rows for sftmix_kern", "cut off"),
        ("the numerical contract over a grid of options and over random draws, and identities t", "cut off"),
        ("What it does (and for.", "cut off"), ("Rows of `lo.", "cut off"), ("And so on...", "cut off"),
        ("Ours.", "characters"), ("Documentation.", "characters"), ("word " * 40 + "end.", "characters"),
        ("Rows of logits to rows of gradients, in torch.", ""), ("Times the losses: `python -m bench.loss`.", ""),
    ],
)  # fmt: skip
def test_a_missing_or_cut_off_description_is_refused(text: str, why: str) -> None:
    found = file_lists.complaint(text)
    assert why in found if why else found == ""


def test_a_new_file_gets_a_line_and_is_refused_until_it_is_described(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        f"# Page\n\n{file_lists.BEGIN}\n\n| file | what it is |\n|---|---|\n| [gone.txt](gone.txt) | It is gone. |\n"
        f"\n{file_lists.END}\nafter\n"
    )
    (tmp_path / "new.py").write_text('"""What ``new`` gives, in one line.\n\nMore.\n"""\n')
    (tmp_path / "data.json").write_text("{}")
    monkeypatch.setattr(file_lists, "ROOT", tmp_path)
    monkeypatch.setattr(file_lists, "PAGES", {"page.md": ""})
    monkeypatch.setattr(file_lists, "files_of_the_project", lambda: {"new.py", "data.json"})
    assert any("differs from the files" in fault for fault in file_lists.check(["page.md"]))
    page.write_text(file_lists.rewritten("page.md"))
    assert file_lists.check(["page.md"]) == ["page.md: data.json: missing"]
    assert file_lists.listed("page.md")["new.py"] == "What `new` gives, in one line."
    page.write_text(page.read_text().replace(file_lists.MISSING, "The data, by hand."))
    assert file_lists.check(["page.md"]) == []
    assert "gone" not in page.read_text() and page.read_text().endswith("after\n")


# ---- knobs ----


def test_the_page_of_knobs_is_that_of_the_configuration() -> None:
    assert knobs_page.main(["--check"]) == 0, "run `python -m sftmix.knobs_page`"
    text = knobs_page.PAGE.read_text(encoding="utf-8")
    for name, default, meaning in describe():
        (row,) = re.findall(
            rf"^\| `{re.escape(name)}` \| (.*?) \| .* \| {re.escape(meaning)} \|$", text, flags=re.M
        )
        shown = row.strip("`")
        is_words = isinstance(default, str) or row == "required"
        assert is_words or json.loads(shown) == default, name
        assert not isinstance(default, str) or shown in (default, "required"), name


def test_a_changed_page_of_knobs_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copy = tmp_path / "KNOBS.md"
    copy.write_text(knobs_page.page().replace("`2e-06`", "`1e-06`"))
    monkeypatch.setattr(knobs_page, "PAGE", copy)
    assert knobs_page.main(["--check"]) == 1
    assert knobs_page.main([]) == 0 and knobs_page.main(["--check"]) == 0


def test_the_page_of_knobs_is_written_without_torch() -> None:
    code = "import sys; from sftmix import knobs_page; knobs_page.page(); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert not set(done.stdout.split()) & {"torch", "transformers", "numpy", "sftmix_kernels"}

"""The report in headless Chromium: opened from a file it asks for nothing, and shows, chooses and sorts rightly."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sftmix.report.examples import scores
from sftmix.scores.confidence import make_split
from tests.recipe.report import folders
from tests.recipe.report.conftest import Open

RUN = folders.dynamics()
FOUND = scores(RUN, make_split(RUN))
SAID = folders.texts(RUN, folders.HOSTILE)
WIDTHS = (1280, 390)
AUDIT = (Path(__file__).parent / "audit.js").read_text(encoding="utf-8")


def shown(value: float) -> str:
    """Six significant digits, as the page writes them."""
    return f"{float(f'{value:.6g}')!r}".removesuffix(".0").replace("-", "−")


def positions(page: Any, picture: str = "#map-picture") -> np.ndarray:
    """[E, 2] pixels in the picture, from the scores and the page's own box: confidence down, variability across."""
    box = page.eval_on_selector(f"{picture} .scatter", "e => JSON.parse(e.dataset.box)")

    def along(values: np.ndarray) -> np.ndarray:
        margin = max((values.max() / values.min()) ** 0.04, 1.05)
        low, high = values.min() / margin, values.max() * margin
        return np.log(values / low) / math.log(high / low)

    x = box["left"] + box["width"] * along(FOUND.variability)
    return np.stack([x, box["top"] + box["height"] * along(FOUND.perplexity)], axis=1)


def audit(page: Any, name: str) -> Any:
    """One of the looks at a page that audit.js takes."""
    return page.evaluate(f"({AUDIT}).{name}()")


def corner(page: Any, picture: str = "#map-picture") -> tuple[float, float]:
    place = page.locator(f"{picture} canvas.over")
    place.scroll_into_view_if_needed()
    box = place.bounding_box()
    return box["x"], box["y"]


def winding(point: np.ndarray, corners: np.ndarray) -> bool:
    """Whether a polygon's corners turn around the point: by angles, not by crossings."""
    arms = corners - point
    angles = np.arctan2(arms[:, 1], arms[:, 0])
    turns = np.diff(np.append(angles, angles[0]))
    turns = (turns + math.pi) % (2 * math.pi) - math.pi
    return abs(turns.sum()) > math.pi


def draw_lasso(page: Any, corners: np.ndarray, *, add: bool = False) -> None:
    left, top = corner(page)
    if add:
        page.keyboard.down("Shift")
    page.mouse.move(left + corners[0][0], top + corners[0][1])
    page.mouse.down()
    for x, y in corners[1:]:
        page.mouse.move(left + x, top + y)
    page.mouse.up()
    if add:
        page.keyboard.up("Shift")


def ids_in_table(page: Any) -> list[str]:
    """All ids of the table, over its pages."""
    found = []
    while True:
        found += page.locator("#map-table tbody td:first-child").all_inner_texts()
        following = page.locator("#map-table .paging button", has_text="Next")
        if following.is_disabled():
            return found
        following.click()


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", WIDTHS)
def test_it_opens_from_a_file_without_a_word_or_a_request(
    whole: Path, open_page: Open, width: int, dark: bool
) -> None:
    page = open_page(whole, width=width, dark=dark)
    page.wait_for_timeout(200)
    assert page.seen == []
    assert page.locator("#failed").is_hidden()
    assert page.locator("canvas").count() >= 4 and page.locator(".uplot").count() == 7


def test_the_watch_sees_a_request_and_an_error(whole: Path, open_page: Open, tmp_path: Path) -> None:
    """What the test above asserts can fail; and the policy stops what asks."""
    hurt = tmp_path / "hurt.html"
    hurt.write_text(whole.read_text().replace("</h1>", "</h1><img src='http://127.0.0.1:9/x.png'>", 1))
    page = open_page(hurt)
    page.wait_for_timeout(200)
    assert any("Content Security Policy" in line for line in page.seen)


def test_nothing_of_the_data_is_markup(whole: Path, open_page: Open) -> None:
    page = open_page(whole)
    draw_lasso(page, np.array([[1.0, 1], [560, 1], [560, 400], [1, 400]]))
    assert page.evaluate("window.bad") is None
    assert page.locator("main img, main script, main svg[onload], #facts b").count() == 0
    prompts = {SAID.short[name].prompt for name in FOUND.ids}
    texts = set(
        page.locator(".extremes .quoted:not(.answer)").evaluate_all("all => all.map(e => e.textContent)")
    )
    assert texts <= prompts and len(texts) > 8
    assert page.title().startswith("SFTMix run run <b>&amp; co")
    assert page.locator("h1").inner_text() == "run <b>&amp; co"


def test_hover_shows_the_right_example_with_its_numbers(whole: Path, open_page: Open) -> None:
    page = open_page(whole)
    at = positions(page)
    left, top = corner(page)
    far = [i for i in range(len(at)) if np.sort(np.hypot(*(at - at[i]).T))[1] > 3]
    assert len(far) > 20
    for i in far[:: len(far) // 8]:
        name = FOUND.ids[i]
        page.mouse.move(left + at[i][0], top + at[i][1])
        card = page.locator("#map-picture .card")
        text = card.inner_text()
        lines = dict(
            zip(card.locator("dt").all_inner_texts(), card.locator("dd").all_inner_texts(), strict=True)
        )
        assert card.locator(".id").inner_text() == name
        assert lines["confidence"] == "−" + shown(FOUND.perplexity[i])
        assert lines["variability"] == shown(FOUND.variability[i])
        assert lines["top-1 share"] == shown(FOUND.share[i])
        assert lines["last loss"] == shown(FOUND.loss[i]) + " nats per token"
        assert lines["tokens that bear loss"] == str(FOUND.num_tokens[i])
        assert lines["half"] == ("confident" if i < 20 else "unconfident")
        assert lines["source"] == SAID.source[name] and SAID.short[name].answer in text
    page.mouse.move(left + 2, top + 2)
    assert card.is_hidden()


@pytest.mark.parametrize("zoom", [1, 1.5])
@pytest.mark.parametrize("scroll", [-200, 100])
def test_hover_is_right_on_a_scrolled_page_a_fine_screen_and_a_zoomed_one(
    whole: Path, open_page: Open, scroll: int, zoom: float
) -> None:
    page = open_page(whole, device_scale_factor=2)
    page.evaluate("zoom => (document.body.style.zoom = zoom)", zoom)
    page.wait_for_timeout(100)  # the picture is drawn again at its new size
    at = positions(page)
    corner(page)
    page.evaluate(f"window.scrollBy(0, {scroll})")
    box = page.locator("#map-picture canvas.over").bounding_box()
    page.mouse.move(box["x"] + zoom * at[0][0], box["y"] + zoom * at[0][1])
    assert page.locator("#map-picture .card .id").inner_text() == FOUND.ids[0]


SHAPES = {
    "box": [[120, 70], [330, 75], [335, 230], [118, 226]],
    "hook": [[80, 60], [400, 60], [400, 380], [330, 380], [330, 130], [80, 130]],
    "empty": [[60, 300], [90, 300], [90, 330]],
}


@pytest.mark.parametrize("shape", ["box", "hook", "empty"])
def test_the_lasso_chooses_exactly_the_points_inside(whole: Path, open_page: Open, shape: str) -> None:
    page = open_page(whole)
    at, corners = positions(page), np.array(SHAPES[shape], float)
    inside = {FOUND.ids[i] for i in range(len(at)) if winding(at[i], corners)}
    assert bool(inside) == (shape != "empty") and len(inside) < len(at)
    draw_lasso(page, corners)
    assert set(ids_in_table(page)) == (inside or set(FOUND.ids))  # nothing chosen: the table has all
    word = f"{len(inside)} example{'s' * (len(inside) != 1)} inside the lasso"
    assert page.locator("#map-picture .spoken").inner_text() == word


def test_shift_adds_a_click_chooses_one_and_clear_takes_all_back(whole: Path, open_page: Open) -> None:
    page = open_page(whole)
    untouched = pixels(page)
    at = positions(page)
    first, second = np.array(SHAPES["box"], float), np.array(SHAPES["hook"], float)
    draw_lasso(page, first)
    draw_lasso(page, second, add=True)
    expected = {FOUND.ids[i] for i in range(len(at)) if winding(at[i], first) or winding(at[i], second)}
    assert set(ids_in_table(page)) == expected
    left, top = corner(page)
    page.mouse.click(left + at[0][0], top + at[0][1])
    assert ids_in_table(page) == [FOUND.ids[0]]
    assert pixels(page) != untouched
    page.get_by_role("button", name="Clear").click()
    assert len(ids_in_table(page)) == len(FOUND.ids) and pixels(page) == untouched


def test_a_finger_scrolls_until_the_lasso_is_asked_for(whole: Path, open_page: Open) -> None:
    page = open_page(whole, width=390, has_touch=True, is_mobile=True)
    button, picture = (
        page.get_by_role("button", name="Lasso by finger"),
        page.locator("#map-picture canvas.over"),
    )
    for action, pressed in (("pan-y", "false"), ("none", "true"), ("pan-y", "false")):
        assert picture.evaluate("e => getComputedStyle(e).touchAction") == action
        assert button.get_attribute("aria-pressed") == pressed
        button.click()
    at = positions(page)
    left, top = corner(page)
    page.touchscreen.tap(left + at[0][0], top + at[0][1])
    assert page.locator("#map-picture .card .id").inner_text() == FOUND.ids[0]
    assert ids_in_table(page) == [FOUND.ids[0]]


def test_sorting_is_by_size_and_by_letters(whole: Path, open_page: Open) -> None:
    page = open_page(whole)
    values = {
        "id": list(FOUND.ids), "variability": FOUND.variability.tolist(), "confidence": (-FOUND.perplexity).tolist(),
        "tokens": FOUND.num_tokens.tolist(), "top-1": FOUND.share.tolist(), "last loss": FOUND.loss.tolist(),
        "text": [SAID.short[name].prompt for name in FOUND.ids],
    }  # fmt: skip
    for column, of in values.items():
        key = [(value.lower(), value) if isinstance(value, str) else float(f"{value:.6g}") for value in of]
        header = page.locator("#map-table th", has=page.get_by_role("button", name=column, exact=True))
        for falling in (False, True):
            header.get_by_role("button").click()
            assert header.get_attribute("aria-sort") == ("descending" if falling else "ascending")
            order = sorted(range(len(key)), key=key.__getitem__)
            if falling:  # equal ones stay in the order of confidence
                order = [
                    i for value in sorted(set(key), reverse=True) for i in range(len(key)) if key[i] == value
                ]
            assert ids_in_table(page) == [FOUND.ids[i] for i in order], (column, falling)
            page.locator("#map-table .paging button", has_text="Previous").click()


def test_unknown_numbers_are_sorted_last(whole: Path, open_page: Open) -> None:
    page = open_page(whole)
    column = "{kind: 'number', value: i => [10, NaN, 9, -Infinity, 100, Infinity][i]}"
    code = f"falling => sorted([0, 1, 2, 3, 4, 5], {column}, falling)"
    assert page.evaluate(code, False) == [3, 2, 0, 4, 5, 1]
    assert page.evaluate(code, True) == [5, 4, 0, 2, 3, 1]


def pixels(page: Any) -> str:
    return str(page.eval_on_selector("#map-picture canvas", "e => e.toDataURL()"))


def test_colours_change_with_their_legend(whole: Path, open_page: Open) -> None:
    page = open_page(whole)
    pictures, legends = set(), set()
    for name in ("half", "share", "source", "length", "loss"):
        page.select_option("#colour", name)
        pictures.add(pixels(page))
        legends.add(page.locator("#map-legend").inner_text())
    assert len(pictures) == 5 and len(legends) == 5
    page.select_option("#colour", "source")
    assert page.locator("#map-legend").inner_text().split("\n") == ["a.jsonl (20)", "b.jsonl (20)"]
    page.select_option("#colour", "half")
    assert page.locator("#map-legend").inner_text().split("\n") == ["confident (20)", "unconfident (20)"]


def test_every_control_is_reached_by_the_keyboard_in_order(whole: Path, open_page: Open) -> None:
    page = open_page(whole)
    wanted = audit(page, "reachable")
    assert len(wanted) > 60
    reached = []
    for _ in wanted:
        page.keyboard.press("Tab")
        reached.append(page.evaluate("Number(document.activeElement.dataset.k)"))
        outline = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
        assert outline != "none"
    assert reached == wanted


def test_points_are_chosen_without_a_mouse(whole: Path, open_page: Open) -> None:
    page = open_page(whole)
    page.focus("#map-picture .scatter")
    spoken = page.locator("#map-picture .spoken")
    for i in range(3):  # from the most confident downwards
        page.keyboard.press("ArrowDown")
        assert spoken.inner_text().startswith(f"{FOUND.ids[i]}, rank {i + 1}, confident, confidence −")
    page.keyboard.press("Space")
    assert ids_in_table(page) == [FOUND.ids[2]]
    order = np.argsort(FOUND.variability, kind="stable").tolist()
    page.keyboard.press("ArrowRight")  # from there to the next more variable one
    assert spoken.inner_text().startswith(FOUND.ids[order[order.index(2) + 1]])
    page.keyboard.press("Escape")
    assert len(ids_in_table(page)) == len(FOUND.ids)


def test_examples_are_chosen_by_numbers(whole: Path, open_page: Open) -> None:
    page = open_page(whole)
    low, high = -FOUND.perplexity[30] - 1e-3, -FOUND.perplexity[5] + 1e-3
    page.fill("input[name=low]", str(low))
    page.fill("input[name=high]", str(high))
    page.fill("input[name=least]", "0.3")
    page.get_by_role("button", name="Choose").click()
    expected = {FOUND.ids[i] for i in range(5, 31) if FOUND.variability[i] >= 0.3}
    assert 0 < len(expected) < 26 and set(ids_in_table(page)) == expected
    page.get_by_role("button", name="unconfident half").click()
    assert set(ids_in_table(page)) == set(FOUND.ids[20:])
    with page.expect_download() as download:
        page.get_by_role("button", name="Save ids").click()
    assert json.loads(Path(download.value.path()).read_text()) == FOUND.ids[20:]


@pytest.mark.parametrize("width", WIDTHS)
def test_the_page_is_as_wide_as_the_window(whole: Path, open_page: Open, width: int) -> None:
    page = open_page(whole, width=width)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert audit(page, "tooWide") == []


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_text_stands_out_from_its_ground(whole: Path, open_page: Open, dark: bool) -> None:
    """WCAG's AA: 4.5 to 1, of every element with text, and of what canvases write."""
    page = open_page(whole, dark=dark)
    page.locator("details").evaluate_all("all => all.forEach(e => e.open = true)")
    found, drawn = audit(page, "contrasts")
    assert len(found) > 300
    assert [line for line in found if line[0] < 4.5] == []
    assert min(drawn) >= 4.5


def test_the_two_grounds_differ(whole: Path, open_page: Open) -> None:
    grounds = {
        open_page(whole, dark=dark).evaluate("getComputedStyle(document.body).backgroundColor")
        for dark in (False, True)
    }
    assert grounds == {"rgb(255, 255, 255)", "rgb(21, 22, 23)"}


def test_pictures_follow_a_change_of_scheme(whole: Path, open_page: Open) -> None:
    page = open_page(whole)
    before = pixels(page)
    page.emulate_media(color_scheme="dark")
    page.wait_for_timeout(100)
    assert pixels(page) != before and page.seen == []


def test_without_scripts_it_says_so(whole: Path, open_page: Open) -> None:
    page = open_page(whole, scripts=False)
    assert "JavaScript, which is switched off" in page.locator("noscript").inner_text()


def test_one_source_has_nothing_to_colour_by(open_page: Open, tmp_path: Path) -> None:
    page = open_page(
        folders.report(folders.write_run(tmp_path / "r"), folders.texts(RUN, sources=["only.jsonl"]))
    )
    option = page.locator("option[value=source]")
    assert option.is_disabled() and option.inner_text() == "source: all from one"
    assert page.seen == []


def test_the_script_and_the_style_are_those_of_the_policy(whole: Path) -> None:
    text = whole.read_text()
    (policy,) = re.findall(r'http-equiv="Content-Security-Policy" content="([^"]*)"', text)
    assert (
        policy.startswith("default-src &#x27;none&#x27;; script-src &#x27;sha256-") and "unsafe" not in policy
    )
    assert "http" not in policy

"""The records of ``bench.loop`` in words: ratios of the same step, how sure they are, and what was asked of them."""

from __future__ import annotations

import random
import statistics
from typing import Any

MOST_OVER_BARE, LEAST_OVER_TRL, LEAST_OF_NTP, MOST_HOST = 1.03, 1.4, 0.97, 0.02
DRAWS = 2000


def together(record: dict[str, Any], *ways: str) -> dict[str, list[float]] | None:
    """The session in which these ways took turns."""
    return next((session for session in record["sessions"] if set(ways) <= session.keys()), None)


def ratios(record: dict[str, Any], one: str, other: str) -> list[float]:
    """``one``'s seconds by ``other``'s, of the same step in the same turn; none where they took no turns."""
    seconds = together(record, one, other)
    return [] if seconds is None else [a / b for a, b in zip(seconds[one], seconds[other], strict=True)]


def interval(values: list[float]) -> tuple[float, float, float]:
    """The median and its 95 % interval by the bootstrap (Efron 1979): ``DRAWS`` draws, always the same ones."""
    draw = random.Random(0)
    medians = sorted(statistics.median(draw.choices(values, k=len(values))) for _ in range(DRAWS))
    return statistics.median(values), medians[int(0.025 * DRAWS)], medians[int(0.975 * DRAWS) - 1]


def verdict(values: list[float], asked: float, *, at_most: bool) -> str:
    """The median, its interval, what was asked, and whether it is met, missed, or not told apart by these steps."""
    middle, low, high = interval(values)
    good, bad = (high <= asked, low > asked) if at_most else (low >= asked, high < asked)
    told = "met" if good else "missed" if bad else "not decided by so few steps"
    return (
        f"{middle:.3f} ({low:.3f} to {high:.3f}; asked: at {'most' if at_most else 'least'} {asked}; {told})"
    )


def judged(record: dict[str, Any]) -> str:
    """What was asked of the loop, each with its figure."""
    said = []
    for what, one, other, asked, at_most in (
        ("our loop's time over the bare one's", "ntp", "bare", MOST_OVER_BARE, True),
        ("SFTMix's tokens/s over our next-token loss's", "ntp", "sftmix", LEAST_OF_NTP, False),
        ("SFTMix's over TRL's next-token loss's", "trl", "sftmix", LEAST_OVER_TRL, False),
    ):
        found = ratios(record, one, other)
        if found:
            said.append(f"{what} {verdict(found, asked, at_most=at_most)}")
    packed = ratios(record, "padded", "ntp")
    if packed:
        middle, low, high = interval(packed)
        said.append(f"packed over padded {middle:.3f} ({low:.3f} to {high:.3f})")
    host, batches = record["host"]["host"], record["host"]["batches"]
    said.append(
        f"the loop's own work on the host {host:.1f} ms a step ({batches:.1f} ms of it the batches), "
        f"{host / 100:.3f} of a step of 100 ms (asked: at most {MOST_HOST}; "
        f"{'met' if host / 100 <= MOST_HOST else 'missed'})"
    )
    return "Medians over steps, with their 95 % intervals: " + "; ".join(said) + "."


def profile_table(record: dict[str, Any]) -> str:
    """Where a step's time goes, by kind of operator."""
    ways = list(record["profile"])
    kinds = dict.fromkeys(kind for way in ways for kind in record["profile"][way] if kind != "step")
    head = [f"| ms a step, profiled | {' | '.join(ways)} |", f"|---|{'--:|' * len(ways)}"]
    rows = []
    for kind in kinds:
        times = [f"{record['profile'][way].get(kind, 0.0):,.0f}" for way in ways]
        rows.append(f"| {kind} | {' | '.join(times)} |")
    return "\n".join([*head, *rows])


def around(record: dict[str, Any]) -> str:
    """What a run costs around its steps."""
    stages, saved = record["stages"], record["saving"]
    whole = sum(seconds for name, seconds in stages.items() if name != "train-ntp") / stages["train-ntp"]
    return (
        "A whole run with online dynamics (reference, scores, split, SFTMix, the exports) took "
        f"{whole:.2f} times as long as next-token training on the same batches alone. A checkpoint of "
        f"{saved['bytes'] / 2**20:,.0f} MiB stops the training for {saved['at once']:.2f} s, written beside it for "
        f"{saved['beside']:.2f} s; reading it takes {saved['reading']:.2f} s. "
    )


def section(record: dict[str, Any]) -> str:
    """The record in words, for RESULTS.md."""
    tokens = sum(both for _, both in record["tokens"])
    mean = tokens / len(record["tokens"])
    rows = []
    for way, peak in record["memory"].items():
        seconds = [took for session in record["sessions"] for took in session.get(way, [])]
        middle = statistics.median(seconds)
        rows.append(f"| {way} | {1000 * middle:,.0f} | {mean / middle:,.0f} | {peak / 2**30:.2f} |")
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    texts = "the longest texts" if record["longest"] else "texts as they come"
    return (
        f"**The training loop**, SmolLM2-135M, all weights, {record['dtype']}, 8 sequences a step, {texts} "
        f"({mean:,.0f} tokens a step)\n\n"
        "| way | ms a step | tokens/s | peak GiB of the process |\n|---|--:|--:|--:|\n"
        + "\n".join(rows)
        + f"\n\n{judged(record)} "
        f"{around(record) if 'stages' in record else ''}{record['device']}, {record['threads']} threads; {versions}; "
        f"commit {record['commit']}: `{record['command']}`\n\n{profile_table(record)}"
    )

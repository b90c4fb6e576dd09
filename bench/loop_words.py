"""The record of ``bench.loop`` in words: ratios of the same step in the same round, and what was asked of them."""

from __future__ import annotations

import statistics
from typing import Any

MOST_OVER_BARE, LEAST_OVER_TRL, LEAST_OF_NTP, MOST_HOST = 1.03, 1.4, 0.97, 0.02


def ratio(record: dict[str, Any], one: str, other: str) -> float:
    """The median over steps of ``one``'s seconds by ``other``'s, of the same step in the same round."""
    pairs = zip(record["seconds"][one], record["seconds"][other], strict=True)
    return statistics.median(a / b for a, b in pairs)


def section(record: dict[str, Any]) -> str:
    """The record in words, for RESULTS.md."""
    rows = []
    tokens = sum(both for _, both in record["tokens"])
    for way, seconds in record["seconds"].items():
        beside = f"{ratio(record, 'ntp', way):.3f}"
        rows.append(
            f"| {way} | {1000 * statistics.median(seconds):,.0f} | {tokens / sum(seconds):,.0f} | {beside} |"
        )
    judged = []

    def judge(what: str, value: float, asked: str, met: bool) -> None:
        judged.append(f"{what} {value:.3f} (asked: {asked}; {'met' if met else 'missed'})")

    seconds, stages, saved = record["seconds"], record["stages"], record["saving"]
    if "bare" in seconds:
        over = ratio(record, "ntp", "bare")
        judge("our loop over the bare one", over, f"at most {MOST_OVER_BARE}", over <= MOST_OVER_BARE)
    ours = ratio(record, "ntp", "sftmix")
    judge(
        "SFTMix's tokens/s over our next-token loss's", ours, f"at least {LEAST_OF_NTP}", ours >= LEAST_OF_NTP
    )
    if "trl" in seconds:
        over = ratio(record, "trl", "sftmix")
        judge(
            "SFTMix's over TRL's next-token loss's",
            over,
            f"at least {LEAST_OVER_TRL}",
            over >= LEAST_OVER_TRL,
        )
    made = max(share * statistics.median(seconds[way]) for way, share in record["data_share"].items())
    judge(
        f"making the batches takes {1000 * made:.1f} ms, of a step of 100 ms", made / 0.1, f"at most {MOST_HOST}",
        made / 0.1 <= MOST_HOST,
    )  # fmt: skip
    whole = sum(seconds for name, seconds in stages.items() if name != "train-ntp") / stages["train-ntp"]
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    return (
        f"**The training loop**, SmolLM2-135M, all weights, {record['dtype']}, 8 sequences a step\n\n"
        "| way | ms a step | tokens/s | times as fast as ours (ntp) |\n|---|--:|--:|--:|\n" + "\n".join(rows) + "\n\n"
        f"{'; '.join(judged)}. A whole run with online dynamics (reference, scores, split, SFTMix, the exports) took "
        f"{whole:.2f} times as long as next-token training on the same batches alone. A checkpoint of "
        f"{saved['bytes'] / 2**20:,.0f} MiB stops the training for {saved['at once']:.2f} s, written beside it for "
        f"{saved['beside']:.2f} s; reading it takes {saved['reading']:.2f} s. {record['device']}, {record['threads']} "
        f"threads; {versions}; commit {record['commit']}: `{record['command']}`"
    )  # fmt: skip

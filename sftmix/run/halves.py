"""The halves of a run: from its scores, at random, or from a file; and whether a split that stands there is theirs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from sftmix.config import Config
from sftmix.progress import say
from sftmix.run.checksums import described
from sftmix.scores.confidence import make_split, read_split
from sftmix.scores.dynamics import read_dynamics
from sftmix.scores.given import read_halves
from sftmix.scores.halves import Split, random_split, split_digest

if TYPE_CHECKING:
    from sftmix.run.session import Session


def needs_scores(config: Config) -> bool:
    """Whether the split comes from scores."""
    return config.split.by in ("median", "quantile")


def without_scores(config: Config) -> str:
    """Why a split needs no scores; empty where it does."""
    if needs_scores(config):
        return ""
    return "the split is at random" if config.split.by == "random" else f"the split is {config.split.file}'s"


def make_halves(session: Session) -> tuple[Split, str]:
    """The split as ``split.by`` says, and where it comes from, in words.

    Raises ``ValueError`` for scores that are missing or damaged, and for a file that does not give the halves.
    """
    config = session.config
    if needs_scores(config):
        dynamics = read_dynamics(session.folder.dynamics)
        share = config.split.confident_share if config.split.by == "quantile" else 0.5
        points = f"{dynamics.num_checkpoints} scoring points, {dynamics.source}"
        return make_split(dynamics, share), points
    if config.split.by == "random":
        return Split(*random_split(session.train, seed=config.seed)), f"at random, seed {config.seed}"
    return read_halves(str(config.split.file)), f"as {config.split.file} says"


def check_same(session: Session, made: Split, damaged: Mapping[str, str]) -> None:
    """Raise ``ValueError`` where another split stands there; one that is ``damaged`` may be unreadable."""
    path = session.folder.split
    try:
        same = not path.exists() or split_digest(read_split(path)) == split_digest(made)
    except ValueError:
        if not damaged:
            raise
        same = True  # nobody's any more
    if not same:
        raise ValueError(
            f"{path}: expected the split that split.by={session.config.split.by} gives, got another; move it away, "
            "or --restart split"
        )
    if damaged:
        say(f"split: again, {described(damaged)}")

"""How a command begins: its configuration from folder, file and flags, then a session that the run folder allows.

config.yaml is written last, so a start that is refused leaves the folder as it was.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from sftmix.config import CONFIG_FILE, Config, load_config, override, read_config, save_config
from sftmix.progress import activity, say
from sftmix.rank import is_main
from sftmix.run.folder import stages_from
from sftmix.run.strays import look, tell_unread_variables

if TYPE_CHECKING:
    from sftmix.run.session import Session


def knob_flags(extra: list[str]) -> list[str]:
    """``--a.b 1``, ``--a.b=1`` and ``a.b=1`` as ``a.b=1``. Raises ``ValueError`` for anything else."""
    flags, words = [], iter(extra)
    for word in words:
        if not word.startswith("--") and "=" not in word:
            raise ValueError(f"flag: expected --knob value or knob=value, got {word!r}")
        if "=" not in word:
            value = next(words, None)
            if value is None or value.startswith("--"):
                raise ValueError(f"{word}: expected a value after it, got {value or 'nothing'}")
            word = f"{word}={value}"
        flags.append(word.removeprefix("--"))
    return flags


def resolve(run_dir: str, config_file: Path | None, extra: list[str]) -> Config:
    """The run's configuration from its folder, a file and flags; nothing is written.

    Raises ``ValueError`` for a folder that is not a run's, for one without a readable config.yaml that is given no
    file or flags to make one, for two run folders, and for bad knobs.
    """
    flags = knob_flags(extra)
    recorded = Path(run_dir) / CONFIG_FILE
    earlier = _readable(run_dir)
    _tell_repeated(flags, run_dir)
    if config_file is not None or not recorded.exists():
        config = load_config(config_file, [f"run_dir={run_dir}", *flags])
    else:
        config = override(read_config(run_dir), flags)
    _tell_other_folder(config_file, flags, run_dir)
    look(run_dir, _named_files(config, config_file))
    # Only now: what follows imports torch, which takes seconds.
    say(f"run folder: {run_dir}")
    tell_unread_variables(os.environ)
    with activity("loading torch and transformers"):
        from sftmix.model.dtype import settle_dtype, warn_if_slow
        from sftmix.model.parallel import join_world, local_device
        from sftmix.run.inputs import settle_date

    device = local_device()
    join_world(device)
    config = settle_date(settle_dtype(config, device, earlier), earlier)
    warn_if_slow(config, device)
    return config


def record(config: Config) -> None:
    """Write the configuration to its run folder, by the main process."""
    if is_main():
        save_config(config, Path(config.run_dir) / CONFIG_FILE)


def open_session(config: Config, stages: Sequence[str], *, restart: str | None = None) -> Session:
    """A session for ``stages`` (as the run folder's record calls them), with its configuration written.

    Raises ``ValueError``, with nothing changed, where another program works in the folder, and where it was begun with
    other settings, unless ``restart`` does those stages anew; what it removes is said.
    """
    stages_from(restart)  # a wrong name, before the seconds of importing
    with activity("loading torch and transformers"):
        from sftmix.run.identity import check
        from sftmix.run.session import Session

    session = Session(config, restart=restart)
    check(session, stages, restart=restart)
    session.hold()
    if restart is not None:
        session.restart(restart)
    if tuple(stages) != ("plot",):  # which reads files alone: no knob is used
        record(session.config)
    return session


def _readable(run_dir: str) -> Config | None:
    """The configuration recorded in a run folder; None where there is none that can be read."""
    try:
        return read_config(run_dir)
    except ValueError:
        return None


def _tell_repeated(flags: list[str], run_dir: str) -> None:
    """The last of a flag's values counts, and the others are named; of run folders there is only one."""
    given: dict[str, list[str]] = {}
    for flag in flags:
        name, _, value = flag.partition("=")
        given.setdefault(name.strip().replace("-", "_"), []).append(value.strip())
    for other in given.pop("run_dir", []):
        if os.path.realpath(other) != os.path.realpath(run_dir):
            raise ValueError(f"run_dir: expected one run folder, got {run_dir} and {other}")
    for name, values in given.items():
        unused = [value for value in values[:-1] if value != values[-1]]
        if unused:
            say(f"warning: {name} is given more than once: {values[-1]} counts, not {', '.join(unused)}")


def _tell_other_folder(config_file: Path | None, flags: list[str], run_dir: str) -> None:
    if config_file is None:
        return
    try:
        named = load_config(config_file, [flag for flag in flags if not flag.startswith("run")]).run_dir
    except ValueError:  # it names none
        return
    if os.path.realpath(named) != os.path.realpath(run_dir):
        say(f"warning: {config_file} names the run folder {named}, which is not used: {run_dir} is")


def _named_files(config: Config, config_file: Path | None) -> list[str]:
    """Files that the configuration names; a source may be several, with commas."""
    data = config.data
    sources = [part.strip() for source in (data.train, data.heldout) if source for part in source.split(",")]
    others = [
        data.chat_template,
        config.reference.scores,
        config.reference.model,
        config.split.file,
        config.model.name,
        config_file,
    ]
    asked = (config.evaluate.tasks, config.evaluate.fewshot, config.evaluate.answers)
    sources += [part.strip().rpartition("=")[2] for text in asked if text for part in text.split(",")]
    return [*sources, *(str(other) for other in others if other is not None)]

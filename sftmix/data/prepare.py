"""From a source to tokenised examples on disk, in one pass: read, understand, render, tokenise, count.

Nothing is held in memory but ids and counts. Several processes share the work where it pays. The result is kept in
the run folder under a name made of all that it depends on: the content of the files, the settings, the tokenizer and
the chat template; a change of any of them makes another file.
"""

from __future__ import annotations

import json
import operator
import os
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import islice
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from sftmix.data.fingerprint import fingerprint
from sftmix.data.forms import parse_row
from sftmix.data.heldout import words_keys
from sftmix.data.read import read_rows, source_files
from sftmix.data.rows import Account, Example, Fault, Row, RowError
from sftmix.data.sources import parts_of
from sftmix.data.tokens import Encoder, TokenOptions
from sftmix.files import replacing

_TASK = 1000  # rows handed to a process at a time
_POOL_FROM = 20_000  # rows from which starting processes pays: each takes two seconds to load the tokenizer
SHOWN = 20  # faults that are told one by one


@dataclass(frozen=True)
class Source:
    """What is read, and how its rows are understood; plain data."""

    name: str
    split: str | None = None
    configuration: str | None = None
    streaming: bool = False
    limit: int | None = None
    form: str | None = None
    columns: Mapping[str, str] = field(default_factory=dict)

    def rows(self, on_skip: Callable[[str, str], None] | None = None) -> Iterator[Row | Fault]:
        """The records; ``on_skip(what, why)`` is told of files that are passed over."""
        return read_rows(
            self.name, split=self.split, configuration=self.configuration, streaming=self.streaming,
            limit=self.limit, on_skip=on_skip,
        )  # fmt: skip

    def examples(self) -> Iterator[Example]:
        """The examples of the rows that can be used, with the ids that ``prepare`` gives them."""
        return (found for _, found in self.outcomes() if isinstance(found, Example))

    def outcomes(self) -> Iterator[tuple[Row | Fault, Example | Fault]]:
        """Every record, in order, and the example that it is, or why it is none."""
        seen: Counter[str] = Counter()
        for row in self.rows(lambda what, why: None):
            if isinstance(row, Fault):
                yield row, row
                continue
            try:
                example = parse_row(row, form=self.form, columns=self.columns).example
            except RowError as error:
                yield row, Fault(row.place, error.kind, error.reason)
                continue
            yield row, replace(example, id=unique(example.id, seen))


@dataclass
class _Part:
    """What one task gives back: the examples in the order of its rows, their ids, and its part of the account."""

    batch: Any  # a record batch of the store; None where no row can be used
    ids: list[str]
    account: Account
    stops: Counter[int]


class _Worker:
    """Turns rows into entries, in this process or in one of a pool."""

    current: _Worker | None = None

    def __init__(self, tokenizer: Any, options: TokenOptions, source: Source) -> None:
        self.source = source
        self.encoder = Encoder(tokenizer, options)

    def part(self, rows: Sequence[Row | Fault]) -> _Part:
        from sftmix.data.store import Entry, to_batch

        account = Account(rows_read=len(rows))
        examples: list[Example] = []
        told: list[tuple[tuple[str, ...], tuple[str, ...]]] = []
        for row in rows:
            if isinstance(row, Fault):
                _fault(account, row)
                continue
            try:
                parsed = parse_row(row, form=self.source.form, columns=self.source.columns)
            except RowError as error:
                _fault(account, Fault(row.place, error.kind, error.reason))
                continue
            examples.append(parsed.example)
            told.append((parsed.ignored, parsed.notes))
        entries = []
        self.encoder.stops = Counter()
        outcomes = self.encoder.outcomes(examples)
        for example, (ignored, notes), (outcome, more) in zip(examples, told, outcomes, strict=True):
            for field_name in ignored:
                account.ignored[field_name] += 1
            if isinstance(outcome, Fault):
                _fault(account, outcome)
                continue
            account.rows_used += 1
            account.forms[example.form] += 1
            for note in (*notes, *more):
                account.notes[note] += 1
            account.cut += outcome.cut
            account.tokens += len(outcome.input_ids)
            account.supervised_tokens += outcome.num_supervised
            entries.append(Entry(outcome, example.place, words_keys(example)))
        batch = to_batch(entries) if entries else None
        return _Part(batch, [entry.example.id for entry in entries], account, self.encoder.stops)


def _start_worker(tokenizer: Any, options: TokenOptions, source: Source) -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    _Worker.current = _Worker(tokenizer, options, source)


def _work(rows: Sequence[Row | Fault]) -> _Part:
    assert _Worker.current is not None
    return _Worker.current.part(rows)


def prepare(
    source: Source,
    tokenizer: Any,
    options: TokenOptions,
    *,
    folder: Path,
    num_workers: int | None = None,
    bad_rows: str | None = "refuse",
    anew: bool = True,
) -> Any:  # TokenStore
    """The tokenised examples of a source, from ``folder`` if they are there, else made and written there.

    Examples that are equal get ids that end in -2, -3, …. With ``bad_rows`` = refuse, rows that cannot be used raise
    ``ValueError`` that names the first twenty with file, line and reason, and counts every kind; so does a source
    without any usable row. None checks nothing: ``check`` is left to the caller. What a ``datasets`` id holds today is
    not known before it is read, so it is read ``anew``; False takes what stands there, for the other processes.
    """
    from sftmix.data.store import TokenStore

    files = source_files(source.name, split=source.split)
    path = folder / f"{fingerprint(source, tokenizer, options, files)}.arrow"
    is_known = not any(
        part.kind == "hub" for part in parts_of(source.name, source.split, lambda what, why: None)
    )
    is_new = not path.exists() or (anew and not is_known)
    if is_new:
        folder.mkdir(parents=True, exist_ok=True)
        with replacing(path) as temporary:
            _write(temporary, source, tokenizer, options, num_workers)
    store = TokenStore(path)
    if bad_rows is not None:
        try:
            check(store.account, source.name, bad_rows=bad_rows, too_long=options.too_long)
        except ValueError:
            if is_new:  # a start that is refused leaves the folder as it was
                remove(path)
            raise
    return store


def remove(path: Path) -> None:
    """Take back a file of tokenised examples, and the folders that were made for it."""
    path.unlink(missing_ok=True)
    for folder in (path.parent, path.parent.parent):
        if folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()


def check(account: Account, name: str, *, bad_rows: str, too_long: str, listed: bool = True) -> None:
    """Raise ``ValueError`` for rows that cannot be used, unless they may be dropped, and where none is left.

    Without ``listed`` they are counted only: somebody has listed them before.
    """
    told = _listed if listed else lambda account, kinds: ""
    dropped = account.dropped - Counter(
        {"too long": account.dropped["too long"]} if too_long == "drop" else {}
    )
    if dropped and bad_rows == "refuse":
        raise ValueError(
            f"{name}: expected rows that can all be used, got {_counted(dropped)} of {account.rows_read} that cannot "
            f"(data.bad_rows=drop leaves them out){told(account, dropped)}"
        )
    if not account.rows_used:
        found = (
            f"none of {account.rows_read} rows{told(account, account.dropped)}"
            if account.rows_read
            else "no row"
        )
        raise ValueError(f"{name}: expected at least one example, got {found}")


def _counted(kinds: Counter[str]) -> str:
    total = sum(kinds.values())
    told = ", ".join(f"{count} {kind}" for kind, count in kinds.most_common())
    return f"{total} ({told})"


def _listed(account: Account, kinds: Counter[str]) -> str:
    lines = [f"\n  {fault.place}: {fault.reason}" for fault in account.faults if fault.kind in kinds]
    more = sum(kinds.values()) - len(lines)
    return ":" + "".join(lines) + (f"\n  … and {more} more" if more > 0 else "")


def _write(
    path: Path, source: Source, tokenizer: Any, options: TokenOptions, num_workers: int | None
) -> None:
    import pyarrow as pa

    from sftmix.data.store import SCHEMA, account_to_dict

    account, stops, seen = Account(), Counter[int](), Counter[str]()
    batches = path.with_name(path.name + ".part")

    def skipped(what: str, why: str) -> None:
        account.notes[f"{what} is not read: {why}"] += 1

    try:
        with pa.OSFile(str(batches), "wb") as sink, pa.ipc.new_stream(sink, SCHEMA) as writer:
            for part in _parts(source, tokenizer, options, num_workers, skipped):
                _merge(account, part.account)
                stops.update(part.stops)
                names = [unique(name, seen) for name in part.ids]
                if names != part.ids:
                    account.duplicates += sum(map(operator.ne, names, part.ids))
                    part.batch = part.batch.set_column(0, SCHEMA.field("id"), pa.array(names, pa.string()))
                if part.batch is not None:
                    writer.write_batch(part.batch)
        told = {"account": account_to_dict(account), "stops": dict(stops)}
        schema = SCHEMA.with_metadata({"sftmix": json.dumps(told)})
        # The account is known last and stands first: the batches are copied behind it.
        with pa.memory_map(str(batches)) as mapped, pa.OSFile(str(path), "wb") as sink:
            with pa.ipc.open_stream(mapped) as reader, pa.ipc.new_file(sink, schema) as final:
                for batch in reader:
                    final.write_batch(pa.RecordBatch.from_arrays(batch.columns, schema=schema))
    finally:
        batches.unlink(missing_ok=True)


def _parts(
    source: Source, tokenizer: Any, options: TokenOptions, num_workers: int | None,
    on_skip: Callable[[str, str], None],
) -> Iterator[_Part]:  # fmt: skip
    rows = source.rows(on_skip)
    first = list(islice(rows, _POOL_FROM))
    workers = num_workers or _cores()
    tasks = _tasks(first, rows)
    if workers == 1 or (num_workers is None and len(first) < _POOL_FROM):
        worker = _Worker(tokenizer, options, source)
        for task in tasks:
            yield worker.part(task)
        return
    first = []
    setup = (tokenizer, options, replace(source))
    with ProcessPoolExecutor(workers, get_context("spawn"), _start_worker, setup) as pool:
        waiting: deque[Future[_Part]] = deque()
        for task in tasks:
            waiting.append(pool.submit(_work, task))
            if len(waiting) > 2 * workers:  # what is read ahead is bounded
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _tasks(first: list[Row | Fault], rest: Iterable[Row | Fault]) -> Iterator[list[Row | Fault]]:
    for start in range(0, len(first), _TASK):
        yield first[start : start + _TASK]
    rest = iter(rest)
    while task := list(islice(rest, _TASK)):
        yield task


def unique(name: str, seen: Counter[str]) -> str:
    """An id, with -2, -3, … behind it where it was ``seen`` before."""
    seen[name] += 1
    return name if seen[name] == 1 else f"{name}-{seen[name]}"


def _fault(account: Account, fault: Fault) -> None:
    account.dropped[fault.kind] += 1
    if len(account.faults) < SHOWN:
        account.faults.append(fault)


def _merge(into: Account, part: Account) -> None:
    for name in ("rows_read", "rows_used", "cut", "supervised_tokens", "tokens"):
        setattr(into, name, getattr(into, name) + getattr(part, name))
    for name in ("dropped", "ignored", "forms", "notes"):
        getattr(into, name).update(getattr(part, name))
    into.faults += part.faults[: SHOWN - len(into.faults)]

"""Tokenised examples on disk: one Arrow file, read by memory map, so that a million of them cost little memory."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from sftmix.data.digest import example_digest
from sftmix.data.heldout import Keys
from sftmix.data.rows import Account, Fault
from sftmix.data.tokenized import TokenizedExample

SCHEMA = pa.schema(
    [
        pa.field("id", pa.string(), nullable=False),
        pa.field("place", pa.string(), nullable=False),
        # Hashes of what is said (all of it, what is asked, the last answer), and of tokens, marks and weights.
        *(pa.field(name, pa.int64(), nullable=False) for name in ("whole", "prompt", "answer", "digest")),
        pa.field("input_ids", pa.list_(pa.int32()), nullable=False),
        pa.field("supervised", pa.list_(pa.uint8()), nullable=False),
        pa.field("weights", pa.list_(pa.float32())),  # null where every supervised token weighs 1
        pa.field("cut", pa.bool_(), nullable=False),
        pa.field("replaced", pa.list_(pa.int32()), nullable=False),  # token, target, token, target, …
    ]
)


@dataclass(frozen=True)
class Entry:
    """One example on its way to the file."""

    example: TokenizedExample
    place: str
    keys: Keys


@dataclass(frozen=True)
class Named:
    """One example of the file by name: enough to find copies and to hold some out."""

    id: str
    place: str
    keys: Keys


def to_batch(entries: Sequence[Entry]) -> pa.RecordBatch:
    """Entries as one record batch."""
    examples = [entry.example for entry in entries]
    columns = [
        pa.array([example.id for example in examples], pa.string()),
        pa.array([entry.place for entry in entries], pa.string()),
        *(pa.array([getattr(entry.keys, part) for entry in entries], pa.int64()) for part in Keys.PARTS),
        pa.array([example_digest(example) for example in examples], pa.int64()),
        _lists([example.input_ids for example in examples], np.int32),
        _lists([example.supervised for example in examples], np.uint8),
        pa.array([example.weights for example in examples], pa.list_(pa.float32())),
        pa.array([example.cut for example in examples], pa.bool_()),
        pa.array([[x for pair in e.replaced for x in pair] for e in examples], pa.list_(pa.int32())),
    ]
    return pa.RecordBatch.from_arrays(columns, schema=SCHEMA)


def _lists(values: Sequence[Sequence[int]], dtype: Any) -> pa.ListArray:
    offsets = np.zeros(len(values) + 1, np.int32)
    np.cumsum([len(value) for value in values], out=offsets[1:])
    flat = np.fromiter((item for value in values for item in value), dtype, count=int(offsets[-1]))
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(flat))


class TokenStore(Mapping[str, TokenizedExample]):
    """Examples by id, in the order of the file; each is built when it is asked for.

    ``account`` tells what became of the rows, ``stops`` how often each end token bears loss.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        try:
            self._map = pa.memory_map(str(path))
            reader = pa.ipc.open_file(self._map)
            self._batches = [reader.get_batch(i) for i in range(reader.num_record_batches)]
        except (pa.ArrowException, OSError) as error:
            raise ValueError(
                f"{path}: expected tokenised examples, got a damaged file ({error}); delete it"
            ) from error
        told = json.loads(reader.schema.metadata[b"sftmix"])
        self.account = account_from_dict(told["account"])
        self.stops: dict[int, int] = {int(key): value for key, value in told["stops"].items()}
        self._place: dict[str, tuple[int, int]] = {}
        for b, batch in enumerate(self._batches):
            for i, name in enumerate(batch.column("id").to_pylist()):
                self._place[name] = (b, i)

    def __getitem__(self, name: str) -> TokenizedExample:
        b, i = self._place[name]
        batch = self._batches[b]
        weights = batch.column("weights")[i].as_py()
        flat = batch.column("replaced")[i].as_py()
        return TokenizedExample(
            name,
            tuple(batch.column("input_ids")[i].values.to_pylist()),
            tuple(map(bool, batch.column("supervised")[i].values.to_pylist())),
            None if weights is None else tuple(weights),
            batch.column("cut")[i].as_py(),
            tuple(zip(flat[::2], flat[1::2], strict=True)),
        )

    def __iter__(self) -> Iterator[str]:
        return iter(self._place)

    def __len__(self) -> int:
        return len(self._place)

    @property
    def ends(self) -> list[tuple[int, int]]:
        """The tokens that end an answer with how often they bear loss, the most frequent first."""
        return sorted(self.stops.items(), key=lambda item: (-item[1], item[0]))

    def source_of(self, name: str) -> str:
        """The file and line that an example was read from."""
        b, i = self._place[name]
        return str(self._batches[b].column("place")[i].as_py())

    def tokens_of(self, name: str) -> tuple[list[int], list[int]]:
        """The tokens of an example, and 1 for each that bears loss: what a report reads, cheaper than the example."""
        b, i = self._place[name]
        ids, marks = (self._batches[b].column(column)[i].values for column in ("input_ids", "supervised"))
        return ids.to_pylist(), marks.to_pylist()

    def lengths(self) -> tuple[list[int], list[int]]:
        """Tokens, and tokens that bear loss, of every example, in order."""
        tokens: list[int] = []
        supervised: list[int] = []
        for batch in self._batches:
            column = batch.column("supervised")
            offsets = column.offsets.to_numpy()
            sums = np.concatenate([[0], np.cumsum(column.values.to_numpy(), dtype=np.int64)])
            tokens += np.diff(offsets).tolist()
            supervised += np.diff(sums[offsets - offsets[0]]).tolist()
        return tokens, supervised

    def ids_from(self, rows: int) -> list[int]:
        """Those token ids of all examples that are ``rows`` or more, each once, in order."""
        found: set[int] = set()
        for batch in self._batches:
            ids = batch.column("input_ids").values.to_numpy()
            found |= set(ids[ids >= rows].tolist())
            flat = batch.column("replaced").values.to_numpy()[1::2]
            found |= set(flat[flat >= rows].tolist())
        return sorted(found)

    def named(self) -> list[Named]:
        """All examples by name, in order."""
        found = []
        for batch in self._batches:
            names, places = (batch.column(name).to_pylist() for name in ("id", "place"))
            keys = map(Keys, *(batch.column(part).to_pylist() for part in Keys.PARTS))
            found += list(map(Named, names, places, keys))
        return found

    def digests(self) -> dict[str, int]:
        """A hash of each example's tokens, marks and weights, by id."""
        found: dict[str, int] = {}
        for batch in self._batches:
            found.update(zip(batch.column("id").to_pylist(), batch.column("digest").to_pylist(), strict=True))
        return found


class Chosen(Mapping[str, TokenizedExample]):
    """Some of a store's examples, in the order of ``names``. Raises ``ValueError`` for a name that is not there."""

    def __init__(self, store: TokenStore, names: Sequence[str]) -> None:
        missing = next((name for name in names if name not in store), None)
        if missing is not None:
            raise ValueError(f"names: expected ids of {store.path}, got {missing}")
        self.store = store
        self._names = dict.fromkeys(names)

    def __getitem__(self, name: str) -> TokenizedExample:
        if name not in self._names:
            raise KeyError(name)
        return self.store[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def digests(self) -> dict[str, int]:
        """A hash of each example's tokens, marks and weights, by id."""
        found = self.store.digests()
        return {name: found[name] for name in self._names}


def account_to_dict(account: Account) -> dict[str, Any]:
    """An account as plain data."""
    values = dict(vars(account))
    values["faults"] = [vars(fault) for fault in account.faults]
    return {key: dict(value) if isinstance(value, dict) else value for key, value in values.items()}


def account_from_dict(values: Mapping[str, Any]) -> Account:
    """The account that ``account_to_dict`` wrote."""
    told: dict[str, Any] = {
        key: Counter(value) if isinstance(value, dict) else value for key, value in values.items()
    }
    return Account(**{**told, "faults": [Fault(**fault) for fault in told["faults"]]})

"""Tokenised examples on disk: what is written is what is read, and a damaged file is named."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pytest

from sftmix.data.digest import examples_digest
from sftmix.data.heldout import Keys
from sftmix.data.rows import Account, Fault
from sftmix.data.store import (
    SCHEMA,
    Chosen,
    Entry,
    TokenStore,
    account_from_dict,
    account_to_dict,
    to_batch,
)
from sftmix.data.tokenized import TokenizedExample

EXAMPLES = [
    TokenizedExample("a", (1, 70000, 3), (False, True, True)),
    TokenizedExample("b", (4, 5), (False, True), weights=(0.0, 0.5), cut=True),
    TokenizedExample("c", (6, 7, 8, 9), (False, True, False, True), replaced=((1, 17), (3, 19))),
]
ACCOUNT = Account(
    5,
    3,
    Counter({"too long": 2}),
    Counter({"source": 5}),
    tokens=9,
    faults=[Fault("f, line 2", "too long", "x")],
)


def written(path: Path) -> TokenStore:
    told = {"account": account_to_dict(ACCOUNT), "stops": {"9": 2}}
    schema = SCHEMA.with_metadata({"sftmix": json.dumps(told)})
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
        for part in (EXAMPLES[:2], EXAMPLES[2:]):
            entries = [Entry(example, f"f, line {example.id}", Keys(-(2**63), 7, 0)) for example in part]
            batch = to_batch(entries)
            writer.write_batch(pa.RecordBatch.from_arrays(batch.columns, schema=schema))
    return TokenStore(path)


def test_what_is_written_is_what_is_read(tmp_path: Path) -> None:
    store = written(tmp_path / "x.arrow")
    assert list(store) == ["a", "b", "c"] and len(store) == 3
    assert [store[name] for name in store] == EXAMPLES
    assert store.account == ACCOUNT and store.stops == {9: 2}
    assert store.source_of("c") == "f, line c"
    assert [named.id for named in store.named()] == ["a", "b", "c"]
    assert {named.keys for named in store.named()} == {Keys(-(2**63), 7, 0)}
    assert examples_digest(store) == examples_digest({example.id: example for example in EXAMPLES})
    assert store.lengths() == ([3, 2, 4], [2, 1, 2])
    with pytest.raises(KeyError):
        store["d"]


def test_some_of_a_store(tmp_path: Path) -> None:
    store = written(tmp_path / "x.arrow")
    some = Chosen(store, ["c", "a"])
    assert list(some) == ["c", "a"] and some["a"] == EXAMPLES[0] and "b" not in some
    with pytest.raises(KeyError):
        some["b"]
    with pytest.raises(ValueError, match=r"expected ids of .*, got z"):
        Chosen(store, ["a", "z"])


def test_accounts_as_plain_data() -> None:
    assert account_from_dict(json.loads(json.dumps(account_to_dict(ACCOUNT)))) == ACCOUNT


@pytest.mark.parametrize("keep", [0, 10, 400])
def test_a_damaged_file_is_named(tmp_path: Path, keep: int) -> None:
    written(tmp_path / "x.arrow")
    whole = (tmp_path / "x.arrow").read_bytes()
    (tmp_path / "y.arrow").write_bytes(whole[:keep])
    with pytest.raises(ValueError, match=r"y\.arrow: expected tokenised examples, got a damaged file"):
        TokenStore(tmp_path / "y.arrow")

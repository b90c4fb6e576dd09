"""The machinery behind ``config.py``: typed fields with help and a range, read from YAML or a flag.

A knob is a leaf of a tree of dataclasses, named by its dotted path (``train.epochs``). Every message
has the form ``name: expected X, got Y``.
"""

from __future__ import annotations

import dataclasses
import datetime
import difflib
import math
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]


def knob(
    help: str,
    default: Any = dataclasses.MISSING,
    *,
    choices: tuple[str, ...] | None = None,
    at_least: float | None = None,
    above: float | None = None,
    below: float | None = None,
    even: bool = False,
    aliases: Mapping[Any, Any] | None = None,
) -> Any:
    """A dataclass field with its one-line help and the range that ``check_range`` enforces.

    ``aliases``: values that the knob once had, or that mean the same, as those it has.
    """
    limits = {"choices": choices, "at_least": at_least, "above": above, "below": below, "even": even}
    return field(default=default, metadata={"help": help, "aliases": aliases or {}, **limits})


@dataclass(frozen=True)
class Knob:
    """One leaf of the configuration: its field and its resolved type."""

    field: dataclasses.Field[Any]
    type: Any

    @property
    def optional(self) -> bool:
        return types.NoneType in typing.get_args(self.type)

    @property
    def base(self) -> type:
        """The type without ``None``."""
        kinds = [kind for kind in typing.get_args(self.type) if kind is not types.NoneType]
        return kinds[0] if kinds else self.type

    @property
    def type_name(self) -> str:
        return f"{self.base.__name__} or null" if self.optional else self.base.__name__


Knobs = dict[str, Knob]  # by dotted name, in the order of declaration


def collect_knobs(cls: Any, prefix: str = "") -> Knobs:
    """All leaves of a configuration class by dotted name, in the order of declaration."""
    hints = typing.get_type_hints(cls)
    knobs: Knobs = {}
    for item in dataclasses.fields(cls):
        kind = hints[item.name]
        if dataclasses.is_dataclass(kind):
            knobs.update(collect_knobs(kind, f"{prefix}{item.name}."))
        else:
            knobs[prefix + item.name] = Knob(item, kind)
    return knobs


def sections(knobs: Knobs) -> set[str]:
    """The names before the dots."""
    return {key.split(".")[0] for key in knobs if "." in key}


class _UniqueKeyLoader(yaml.SafeLoader):  # type: ignore[misc]
    """YAML that refuses a key given twice, where plain YAML would silently keep the last."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=deep) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise ValueError(f"{key}: expected once, got it twice")
        return dict(super().construct_mapping(node, deep))


def read_yaml(path: Path, knobs: Knobs) -> dict[str, Any]:
    """The file's knobs, flat and with checked types."""
    try:
        text = path.read_text(encoding="utf-8")
        tree = yaml.load(text, Loader=_UniqueKeyLoader)
    except OSError as error:
        raise ValueError(f"{path}: expected a YAML file, got {error.strerror or error}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: expected a YAML file, got text that does not parse: {error}") from error
    except RecursionError as error:
        raise ValueError(f"{path}: expected a YAML file of knobs, got one that is nested too deep") from error
    except (ValueError, TypeError) as error:  # a key given twice, a date or a number that is none
        raise ValueError(f"{path}: {error}") from error
    if not isinstance(tree, dict):
        raise ValueError(f"{path}: expected a YAML mapping of knobs, got {type(tree).__name__}")
    given: list[tuple[str, Any]] = []
    for name, value in tree.items():
        if name not in sections(knobs):
            given.append((str(name), value))
        elif not isinstance(value, dict):
            raise ValueError(f"{name}: expected a mapping of knobs, got {value!r}")
        else:
            given += [(f"{name}.{leaf}", item) for leaf, item in value.items()]
    values: dict[str, Any] = {}
    for name, value in given:
        key = _known(name, knobs)
        if key in values:  # ``train.epochs: 1`` beside ``train: {epochs: 2}``
            raise ValueError(f"{key}: expected once, got it twice")
        values[key] = check_type(key, value, knobs[key])
    return values


def parse_flags(flags: Sequence[str], knobs: Knobs) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for text in flags:
        key, equals, raw = text.partition("=")
        if not equals:
            raise ValueError(f"flag: expected name=value, got {text!r}")
        key = _known(key.strip().removeprefix("--").replace("-", "_"), knobs)
        values[key] = _from_text(key, raw.strip(), knobs[key])
    return values


def _known(key: str, knobs: Knobs) -> str:
    """``key`` when it names a knob; otherwise ``ValueError`` with the nearest name."""
    if key in knobs:
        return key
    near = difflib.get_close_matches(key, [*knobs, *sections(knobs)], n=1, cutoff=0.0)[0]
    same_leaf = [name for name in knobs if name.split(".")[-1] == key]
    if key in sections(knobs):
        near, same_leaf = next(name for name in knobs if name.startswith(f"{key}.")), []
    raise ValueError(f"{key}: unknown knob; did you mean {' or '.join(same_leaf) or near}?")


def _from_text(key: str, raw: str, knob: Knob) -> Any:
    """A flag's text as the knob's type."""
    if knob.optional and raw.lower() in ("null", "none", ""):
        return None
    for alias, meant in knob.field.metadata["aliases"].items():
        if raw.lower() == str(alias).lower():
            return meant
    try:
        if knob.base is bool:
            return {"true": True, "false": False}[raw.lower()]
        return knob.base(raw)
    except (ValueError, KeyError):
        raise ValueError(f"{key}: expected {knob.type_name}, got {raw!r}") from None


def check_type(key: str, value: Any, knob: Knob) -> Any:
    """A YAML value checked against the knob's type; an int serves where a float is asked."""
    if value is None and knob.optional:
        return None
    if type(value) in map(type, knob.field.metadata["aliases"]):
        return knob.field.metadata["aliases"].get(value, value)
    if knob.base is float and isinstance(value, str):
        return _from_text(key, value, knob)  # YAML 1.1 reads 2e-6, which has no dot, as a string
    if knob.base is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if knob.base is str and type(value) is datetime.date:
        return value.isoformat()  # YAML reads 2026-01-31 without quotes as a date
    if type(value) is not knob.base:
        raise ValueError(f"{key}: expected {knob.type_name}, got {value!r}")
    return value


def check_range(key: str, value: Any, limits: Mapping[str, Any]) -> None:
    if value is None:
        return
    if limits["choices"] and value not in limits["choices"]:
        raise ValueError(f"{key}: expected one of {', '.join(limits['choices'])}, got {value!r}")
    if isinstance(value, str) and not value.strip():
        raise ValueError(f"{key}: expected a non-empty string, got {value!r}")
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{key}: expected a finite number, got {value}")
    if limits["at_least"] is not None and value < limits["at_least"]:
        raise ValueError(f"{key}: expected at least {limits['at_least']}, got {value}")
    if limits["above"] is not None and value <= limits["above"]:
        raise ValueError(f"{key}: expected more than {limits['above']}, got {value}")
    if limits["below"] is not None and value >= limits["below"]:
        raise ValueError(f"{key}: expected less than {limits['below']}, got {value}")
    if limits["even"] and value % 2:
        raise ValueError(f"{key}: expected an even number, got {value}")

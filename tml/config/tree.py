"""The one place where an experiment becomes a ConfigDict for flags, and becomes an experiment again."""

import dataclasses
import difflib
import enum
import hashlib
import json
import types
import typing
from collections.abc import Iterator, Mapping
from typing import Any

from ml_collections import ConfigDict

from tml.config.experiment import Experiment


def to_mapping(config: Any) -> Any:
    """Turns a tree of dataclasses into plain dicts, lists' tuples, strings and numbers."""
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        return {f.name: to_mapping(getattr(config, f.name)) for f in dataclasses.fields(config)}
    if isinstance(config, Mapping):
        return {key: to_mapping(value) for key, value in config.items()}
    if isinstance(config, enum.Enum):
        return config.value
    return config


def to_config_dict(experiment: Experiment) -> ConfigDict:
    """The locked ConfigDict that `get_config()` returns, so that flags can override single values."""
    # Fields named like `eval_sources.quick` may hold any keys, so only the structure is locked.
    return ConfigDict(to_mapping(experiment), convert_dict=True).lock()


def from_config_dict(config: ConfigDict) -> Experiment:
    """Rebuilds and checks the experiment after the flags.

    Raises:
        ValueError: an unknown key (the nearest ones are named), a wrong type, or values that do not fit together.
    """
    return from_mapping(Experiment, config.to_dict(), "config")


def from_mapping(kind: type, value: Any, path: str) -> Any:
    """Builds the dataclass `kind` from plain values; `path` names the place in errors."""
    if not isinstance(value, Mapping):
        raise ValueError(f"{path} = {value!r} must be a group of keys, for {kind.__name__}")
    hints = typing.get_type_hints(kind)
    unknown = [key for key in value if key not in hints]
    if unknown:
        raise ValueError(f"unknown key {path}.{unknown[0]}; {nearest_keys(unknown[0], hints)}")
    required = {f.name for f in dataclasses.fields(kind) if f.default is f.default_factory is dataclasses.MISSING}
    missing = sorted(required - value.keys())
    if missing:
        raise ValueError(f"{path} lacks {missing[0]}, which {kind.__name__} needs")
    return kind(**{key: _convert(hints[key], item, f"{path}.{key}") for key, item in value.items()})


def nearest_keys(key: str, known: Mapping[str, Any] | list[str]) -> str:
    """A phrase that names the known keys most like `key`."""
    near = difflib.get_close_matches(key, list(known), n=3, cutoff=0.4)
    return "did you mean " + " or ".join(near) + "?" if near else "known here: " + ", ".join(sorted(known))


def _convert(hint: Any, value: Any, path: str) -> Any:
    origin = typing.get_origin(hint)
    if dataclasses.is_dataclass(hint):
        return from_mapping(typing.cast(type, hint), value, path)
    if origin is not None and isinstance(origin, type) and issubclass(origin, Mapping):
        if not isinstance(value, Mapping):
            raise ValueError(f"{path} = {value!r} must be a group of keys")
        item_hint = typing.get_args(hint)[1]
        return {key: _convert(item_hint, item, f"{path}.{key}") for key, item in value.items()}
    if origin is tuple:
        if not isinstance(value, tuple | list):
            raise ValueError(f"{path} = {value!r} must be a tuple")
        return tuple(_convert(typing.get_args(hint)[0], item, f"{path}[{i}]") for i, item in enumerate(value))
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        try:
            return hint(value)
        except ValueError:
            choices = [member.value for member in hint]
            raise ValueError(
                f"{path} = {value!r} is not one of {choices}; {nearest_keys(str(value), choices)}"
            ) from None
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if type(value) is not hint:
        raise ValueError(f"{path} = {value!r} is {type(value).__name__}, but must be {_name(hint)}")
    return value


def _name(hint: Any) -> str:
    return hint.__name__ if isinstance(hint, type) and not isinstance(hint, types.GenericAlias) else str(hint)


def to_json(experiment: Experiment) -> str:
    """The resolved config as stable, indented JSON."""
    return json.dumps(to_mapping(experiment), indent=2, sort_keys=True)


def from_json(text: str) -> Experiment:
    """Reads what `to_json` wrote.

    Raises:
        ValueError: not JSON, or not a config of this version.
    """
    return from_mapping(Experiment, json.loads(text), "config")


def config_hash(config: Any) -> str:
    """A short hash of any config tree: equal values, equal hash, on every machine."""
    text = json.dumps(to_mapping(config), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted path and value of every leaf of a mapping made by `to_mapping`."""
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def difference(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    """Every leaf that differs between two mappings: path, old value, new value."""
    before, after = dict(leaves(old)), dict(leaves(new))
    keys = sorted(before.keys() | after.keys())
    return [(key, before.get(key), after.get(key)) for key in keys if before.get(key) != after.get(key)]


def describe(changed: list[tuple[str, Any, Any]], most: int = 5) -> str:
    """What `difference` found, for an error: `model.d_model was 128, is 256`."""
    shown = [f"{path} was {old!r}, is {new!r}" for path, old, new in changed[:most]]
    rest = len(changed) - len(shown)
    return "; ".join(shown) + (f"; and {rest} more" if rest > 0 else "")

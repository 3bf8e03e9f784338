"""Every value in JSON data, its place, and the data with one value changed: for tests that alter everything once."""

import copy
from collections.abc import Iterator
from typing import Any

Path = tuple[str | int, ...]


def leaves(plain: Any, path: Path = ()) -> Iterator[tuple[Path, Any]]:
    """(place, value) of every value that is no map and no list."""
    if isinstance(plain, dict):
        for key, value in plain.items():
            yield from leaves(value, (*path, key))
    elif isinstance(plain, list | tuple):
        for number, value in enumerate(plain):
            yield from leaves(value, (*path, number))
    else:
        yield path, plain


def maps(plain: Any, path: Path = ()) -> Iterator[Path]:
    """The place of every map."""
    if isinstance(plain, dict):
        yield path
        for key, value in plain.items():
            yield from maps(value, (*path, key))
    elif isinstance(plain, list | tuple):
        for number, value in enumerate(plain):
            yield from maps(value, (*path, number))


def changed(plain: Any, path: Path, value: Any) -> Any:
    """A copy with `value` at `path`."""
    result = copy.deepcopy(plain)
    inner = result
    for step in path[:-1]:
        inner = inner[step]
    inner[path[-1]] = value
    return result

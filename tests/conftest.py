"""Whole recorded runs that several tests look at; made once per session."""

from collections.abc import Iterator
from functools import lru_cache
from unittest.mock import patch

import pytest

from privacy import seal_bytes
from tests.small_federation import RecordedRun, record, small_federation, small_parties


@pytest.fixture(scope="session")
def exact_run() -> RecordedRun:
    """3 banks, 2 owners, 2 rounds, no epsilon."""
    federation = small_federation(banks=3, owners=2)
    return record(federation, small_parties(federation, rounds=2))


@pytest.fixture(scope="session")
def private_run() -> RecordedRun:
    """The same with epsilon = 3."""
    federation = small_federation(banks=3, owners=2)
    return record(federation, small_parties(federation, rounds=2, epsilon=3.0))


@pytest.fixture(scope="session", autouse=True)
def _cached_contexts() -> Iterator[None]:
    """SEAL's contexts hold public parameters only and take half the time of a small run; tests make each once."""
    with patch.object(seal_bytes, "make_context", lru_cache(seal_bytes.make_context)):
        yield

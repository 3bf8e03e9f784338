"""Whole recorded runs that several tests look at; made once per session."""

import pytest

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

"""Consent: imports are all or nothing, only live consent counts, a revocation holds before the next step."""

import stat
import tempfile
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from fl_clients.consent import ConsentStore, consent_columns
from fl_clients.data_cli import consent_app
from models.errors import DataError

A, B, C = "91110000600037341L", "91110108551385082Q", "91110000802100433B"
PURPOSE = "小微企业信用贷款 贷前风险评估"
HASH = "ab" * 32
NOW = datetime(2025, 6, 15, 4, 0, tzinfo=UTC)  # noon in Beijing
NAMES = ["统一社会信用代码", "授权用途", "授权日期", "到期日期", "撤回日期", "授权书哈希"]


def row(code=A, purpose=PURPOSE, granted="2025-01-01", expires="2025-12-31", revoked=None, evidence=HASH):
    return code, purpose, granted, expires, revoked, evidence


def batch(*rows):
    return pa.record_batch([pa.array(column, pa.string()) for column in zip(*rows, strict=True)], names=NAMES)


@pytest.fixture
def store(tmp_path):
    opened = ConsentStore(tmp_path / "consent.sqlite")
    yield opened
    opened.close()


def take(store, *rows, now=NOW):
    return store.import_table([batch(*rows)], consent_columns(NAMES), now)


def live(store, *codes, purpose=PURPOSE, now=NOW):
    return store.live(np.array(codes), purpose, now).tolist()


def test_only_live_consent_for_the_very_purpose_counts(store, tmp_path):
    done = take(store, row(A), row(B, expires="2025-06-14"), row(C, purpose="贷后监控"))
    assert (done.rows, done.added, done.revoked) == (3, 3, 0)
    assert live(store, A, B, C, "9144030071526726XG") == [True, False, False, False]
    assert live(store, A, C, purpose="贷后监控") == [False, True]
    assert live(store, A, purpose="  小微企业信用贷款　贷前风险评估 ") == [
        True
    ]  # blanks and widths do not make a purpose
    assert [(item.purpose, item.live, item.not_live) for item in store.purposes(NOW)] == [
        (PURPOSE, 1, 1),
        ("贷后监控", 1, 0),
    ]
    assert stat.S_IMODE((tmp_path / "consent.sqlite").stat().st_mode) == 0o600


def test_days_are_days_in_beijing(store):
    take(store, row(A, granted="2025-06-01", expires="2025-06-10"))
    moments = {
        datetime(2025, 5, 31, 15, 59, 59, tzinfo=UTC): False,
        datetime(2025, 5, 31, 16, 0, 0, tzinfo=UTC): True,  # midnight in Beijing
        datetime(2025, 6, 10, 15, 59, 59, tzinfo=UTC): True,
        datetime(2025, 6, 10, 16, 0, 0, tzinfo=UTC): False,
    }
    assert {moment: live(store, A, now=moment)[0] for moment in moments} == moments


def test_a_revocation_between_alignment_and_training_takes_the_row_out(store, tmp_path):
    take(store, row(A), row(B))
    assert live(store, A, B) == [True, True]  # alignment
    other = ConsentStore(tmp_path / "consent.sqlite")  # the command in another process
    other.revoke(f" {A.lower()} ", PURPOSE, NOW + timedelta(minutes=1))
    other.close()
    assert live(store, A, B, now=NOW + timedelta(minutes=1)) == [False, True]  # the next step
    with pytest.raises(DataError, match=r"91\*+L has no live consent"):
        store.revoke(A, PURPOSE, NOW + timedelta(minutes=2))


def test_a_revocation_ends_every_earlier_grant_and_a_later_grant_is_new(store):
    take(store, row(A, granted="2025-01-01"), row(A, granted="2025-03-01", revoked="2025-04-01"))
    assert live(store, A) == [False]
    assert live(store, A, now=datetime(2025, 3, 15, tzinfo=UTC)) == [True]
    take(store, row(A, granted="2025-05-01"))
    assert live(store, A) == [True]


def test_an_import_cannot_take_a_revocation_back(store):
    take(store, row(A, revoked="2025-02-01"))
    done = take(store, row(A))
    assert (done.added, done.revoked) == (0, 0)
    assert live(store, A) == [False]
    take(store, row(B))
    done = take(store, row(B, revoked="2025-03-01"))
    assert (done.added, done.revoked) == (0, 1)
    assert live(store, B) == [False]


def test_the_same_import_again_changes_nothing(store):
    take(store, row(A), row(B, revoked="2025-02-01"))
    before = store.entries(PURPOSE, NOW, 10)
    assert take(store, row(A), row(B, revoked="2025-02-01")).added == 0
    assert store.entries(PURPOSE, NOW, 10) == before
    assert {entry.masked_code for entry in before} == {"91***************L", "91***************Q"}


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (row(B, purpose=""), "without a purpose"),
        (row(B, purpose=None), "without a purpose"),
        (row(B, purpose="*"), "without a purpose"),
        (row(B, purpose="全部"), "without a purpose"),
        (row("91110000600037341N"), "with a malformed code"),
        (row(None), "with a malformed code"),
        (row(B, granted=None), "without a day of grant"),
        (row(B, expires=""), "without a day of grant or an end"),
        (row(B, granted="2025-06-16"), "granted in the future"),
        (row(B, expires="2024-12-31"), "expire before they are granted"),
        (row(B, revoked="2024-12-01"), "revoked before they are granted"),
        (row(B, granted="01/02/2025"), "date that cannot be read"),
        (row(B, evidence=""), "without evidence"),
        (row(B, evidence="ab" * 31), "without evidence"),
        (row(A, expires="2026-12-31"), "with another end or evidence"),
    ],
)
def test_one_bad_row_refuses_the_whole_import(store, bad, message):
    with pytest.raises(DataError, match=message) as caught:
        take(store, row(A), row(C), bad)
    text = str(caught.value)
    assert "(row 3" in text
    assert "Nothing was imported" in text
    assert "\n" not in text
    assert not any(code in text for code in (A, B, C, "91110000600037341N"))
    assert store.purposes(NOW) == []


def test_an_import_that_breaks_off_leaves_nothing(store):
    def broken():
        yield batch(row(A))
        raise DataError("connection lost after row 1")

    with pytest.raises(DataError, match="connection lost"):
        store.import_table(broken(), consent_columns(NAMES), NOW)
    assert live(store, A) == [False]
    with pytest.raises(DataError, match="is empty"):
        store.import_table([], consent_columns(NAMES), NOW)


def test_a_table_without_a_purpose_is_refused():
    with pytest.raises(DataError, match=r"has no column for purpose \(named purpose or 用途"):
        consent_columns([name for name in NAMES if name != "授权用途"])
    assert "revoked" not in consent_columns([name for name in NAMES if name != "撤回日期"])
    assert (
        consent_columns(["USCC", "Purpose", "granted_at", "expires_at", "evidence_sha256"])["granted"] == "granted_at"
    )


def test_times_must_have_a_zone_and_purposes_a_text(store):
    with pytest.raises(ValueError, match="no time zone"):
        store.live([A], PURPOSE, datetime(2025, 6, 15))
    with pytest.raises(DataError, match="one stated purpose"):
        store.live([A], "*", NOW)


def test_dates_of_a_database(store):
    days = [
        pa.array([datetime(2025, 1, 1, 8, tzinfo=UTC)]),
        pa.array([datetime(2025, 12, 1).date()]),
        pa.array([None], pa.date32()),
    ]
    table = pa.record_batch([pa.array([A]), pa.array([PURPOSE]), *days, pa.array([HASH])], names=NAMES)
    store.import_table([table], consent_columns(NAMES), NOW)
    entry = store.entries(PURPOSE, NOW, 1)[0]
    assert (entry.granted, entry.expires) == (
        datetime(2025, 1, 1, 8, tzinfo=UTC),
        datetime(2025, 12, 1, 16, tzinfo=UTC),
    )


EVENTS = st.lists(
    st.tuples(st.integers(0, 20), st.integers(1, 20), st.none() | st.integers(0, 20)), min_size=1, max_size=5
)


@settings(derandomize=True, deadline=None, max_examples=60)
@given(EVENTS, st.integers(0, 45))
def test_live_is_what_the_docstring_says(events, moment):
    grants = {}
    for granted, length, after in events:
        grants.setdefault(granted, (granted + length, None if after is None else granted + after))
    start = datetime(2025, 1, 1, tzinfo=UTC)

    def at(hours):
        return (start + timedelta(hours=hours)).isoformat() if hours is not None else None

    with tempfile.TemporaryDirectory() as folder:
        store = ConsentStore(Path(folder) / "consent.sqlite")
        take(store, *(row(A, granted=at(g), expires=at(e), revoked=at(r)) for g, (e, r) in grants.items()))
        found = live(store, A, now=start + timedelta(hours=moment))
        store.close()
    revocations = [r for _, r in grants.values() if r is not None]
    expected = any(g <= moment < e and not any(g <= r <= moment for r in revocations) for g, (e, _) in grants.items())
    assert found == [expected]


def test_the_command(tmp_path):
    run = CliRunner().invoke
    table, file = tmp_path / "c.csv", tmp_path / "consent.sqlite"
    lines = [
        ",".join(NAMES),
        f"{A},{PURPOSE},2025-01-01,2999-12-31,,{HASH}",
        f"{B},{PURPOSE},2025-01-01,2999-12-31,,{HASH}",
    ]
    table.write_bytes("\n".join(lines).encode("gb18030"))
    done = run(consent_app, ["import", str(table), "--store", str(file)])
    assert (done.exit_code, done.output) == (0, "2 rows read, 2 consents new, 0 revocations new\n")
    done = run(consent_app, ["revoke", "--purpose", PURPOSE, "--store", str(file)], input=f"{A}\n")
    assert done.exit_code == 0
    done = run(consent_app, ["list", "--store", str(file), "--purpose", PURPOSE])
    assert A not in done.output
    assert B not in done.output
    assert "91***************Q" in done.output
    store = ConsentStore(file)
    assert live(store, A, B, now=datetime.now(UTC)) == [False, True]
    store.close()
    table.write_text("\n".join(lines).replace(",授权用途", ",备注"), encoding="utf-8")
    done = run(consent_app, ["import", str(table), "--store", str(file)])
    assert done.exit_code == 2
    assert done.stderr.startswith("error: the consent table has no column for purpose")
    assert done.stderr.count("\n") == 1
    done = run(consent_app, ["list", "--store", str(tmp_path / "none")])
    assert done.exit_code == 2

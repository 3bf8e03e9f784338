"""The audit log's writer: all or nothing, durable, refused when damaged; crashes, full disks, clocks, many writers."""

import ctypes
import errno
import json
import os
import random
import resource
import signal
import stat
import subprocess
import threading
import time
from datetime import UTC, datetime, timedelta

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from privacy import audit_log
from privacy.audit_format import (
    InclusionProof,
    SignedHead,
    canonical,
    check_body,
    countersign,
    entry_line,
    head_line,
    parse_line,
    sign_head,
    utc_time,
    verify_countersignature,
    verify_head,
)
from privacy.audit_log import AuditFailed, AuditLog, Entry
from privacy.errors import Refused
from privacy.identity import SigningIdentity
from privacy.merkle import verify_consistency

JOB = "ab" * 16
START = datetime(2026, 3, 1, 8, 0, tzinfo=UTC)


class Clock:
    """A clock that the test sets."""

    def __init__(self) -> None:
        self.now = START

    def __call__(self) -> datetime:
        return self.now


def release(number):
    return Entry(kind="release", job=JOB, body={"step": "train.directions", "number": number, "reply": "cd" * 32})


@pytest.fixture(scope="module")
def identity():
    return SigningIdentity.generate()


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "audit"


@pytest.fixture
def log(folder, identity, clock):
    return AuditLog(folder, identity, "bank1", clock)


def numbers(opened):
    return [entry.body["number"] for entry in opened.entries(kind="release")]


def test_append_reopen_and_read(log, folder, identity, clock):
    first = log.append([release(0), Entry(kind="state", job=JOB, body={"from": "收集", "to": "apply"})])
    clock.now += timedelta(hours=1)
    second = log.append([Entry(kind="people", job=None, body={"added": 1, "share": 0.1})])
    assert (first.size, second.size, log.size) == (2, 3, 3)
    assert (first.party, utc_time(second.time)) == ("bank1", START + timedelta(hours=1))
    verify_head(identity.public, second)

    again = AuditLog(folder, identity, "bank1", clock)
    assert again.head() == second
    assert [(entry.index, entry.kind, entry.job) for entry in again.entries()] == [
        (0, "release", JOB),
        (1, "state", JOB),
        (2, "people", None),
    ]
    assert again.entries(kind="state")[0].body == {"from": "收集", "to": "apply"}
    assert [entry.index for entry in again.entries(start=1, stop=2)] == [1]
    assert [entry.index for entry in again.entries(job=JOB)] == [0, 1]
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert {path.name: stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()} == {
        "log.jsonl": 0o600,
        "party.json": 0o600,
    }
    assert identity.public.hex() in (folder / "party.json").read_text()
    assert str(log) == repr(log) == "AuditLog('bank1', 3 entries)"


def test_proofs_of_the_writer_hold_for_others(log, identity):
    heads = [log.append([release(number)]) for number in range(9)]
    for index in range(9):
        proof = InclusionProof.from_json(json.loads(json.dumps(log.inclusion(index).to_json())))
        assert proof.check(identity.public).body["number"] == index
    for head in heads:
        verify_consistency(head.size, head.root, 9, heads[-1].root, log.consistency(head.size))
    with pytest.raises(Refused, match="does not fit"):
        log.inclusion(3).check(SigningIdentity.generate().public)
    with pytest.raises(Refused, match="no leaf 9"):
        log.inclusion(9)


def test_an_empty_log_has_a_head_that_is_a_prefix_of_all(log, identity):
    empty = log.head()
    verify_head(identity.public, empty)
    head = log.append([release(0)])
    verify_consistency(0, empty.root, 1, head.root, log.consistency(0))


def test_countersignatures_are_for_one_head_of_one_party(log):
    other, head = SigningIdentity.generate(), log.append([release(0)])
    signature = countersign(other, head)
    verify_countersignature(other.public, head, signature)
    later = log.append([release(1)])
    for key, shown, what in ((other.public, later, signature), (SigningIdentity.generate().public, head, signature)):
        with pytest.raises(Refused, match="does not fit"):
            verify_countersignature(key, shown, what)
    with pytest.raises(Refused, match="does not fit"):  # a countersignature is no head, and a head none
        verify_countersignature(other.public, head, head.signature)


@pytest.mark.parametrize("field", ["party", "size", "root", "time"])
def test_a_head_with_one_field_changed_does_not_verify(log, identity, field):
    changed = {"party": "bank2", "size": 2, "root": "ee" * 32, "time": "2026-03-01T08:00:00.000001Z"}
    head = SignedHead.from_json({**log.append([release(0)]).to_json(), field: changed[field]})
    with pytest.raises(Refused, match="does not fit"):
        verify_head(identity.public, head)


# what a body may hold


@pytest.mark.parametrize(
    ("body", "word"),
    [
        ({"rows": b"\x00"}, "holds a bytes"),
        ({"rows": np.zeros(3)}, "holds a ndarray"),
        ({"value": np.float64(1.5)}, "holds a float64"),
        ({"deep": [{"list": {1, 2}}]}, r"deep\[0\].list holds a set"),
        ({"text": "x" * 65537}, "above 65536 bytes"),
        ({"text": "风" * 30000}, "above 65536 bytes"),
        ({"rows": list(range(5000))}, "5000 items"),
        ({"code": "91110000600037341L"}, "code of an enterprise"),
        ({"code": "refused 91110000600037341l, no consent"}, "code of an enterprise"),
        ({"code": "９１１１００００６０００３７３４１Ｌ"}, "code of an enterprise"),
        ({"code": "企业91110000600037341L未授权"}, "code of an enterprise"),
        ({"deep": {"91110000600037341L": 1}}, "code of an enterprise"),
        ({"person": "11010519491231002X"}, "code of an enterprise or a person"),
        ({"count": 1 << 53}, r"beyond 2\^53"),
        ({"loss": float("nan")}, "not finite"),
        ({1: 2}, "key of type int"),
        ({"lone": "\ud800"}, "what JSON cannot"),
        ("text", "must be an object"),
        (json.loads('{"a":' * 20 + "1" + "}" * 20), "nested deeper"),
    ],
)
def test_a_body_that_may_hold_secrets_or_rows_is_refused_and_not_repeated(log, folder, body, word):
    log.append([release(0)])
    before = (folder / "log.jsonl").read_bytes()
    with pytest.raises(AuditFailed, match=word) as refusal:
        log.append([release(1), Entry(kind="release", job=JOB, body=body)])
    assert "600037341" not in str(refusal.value).replace("deep.91110000600037341L", "600037341")
    assert (folder / "log.jsonl").read_bytes() == before
    log.append([release(2)])
    assert numbers(log) == [0, 2]


def test_hashes_names_and_contracts_pass_the_check():
    check_body("release", {"reply": "12345678" * 8, "public": "0123456789abcdef" * 4, "share": 1e-5, "none": None})
    check_body("contract", {"contract": {"epsilon": 3.0, "columns": [{"name": "注册资本", "codes": (1.0, -99.0)}]}})


@pytest.mark.parametrize(
    ("kind", "job"), [("Release", JOB), ("", JOB), ("re lease", JOB), ("release", "a/b"), ("a", "")]
)
def test_kind_and_job_are_plain_words(kind, job):
    with pytest.raises(Refused, match="audit entry"):
        Entry(kind=kind, job=job, body={})


whole_numbers = st.integers(-(2**53) + 1, 2**53 - 1)
texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
values = st.recursive(
    st.none() | st.booleans() | whole_numbers | st.floats(allow_nan=False, allow_infinity=False) | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text('abü\n"\u2028', max_size=4), inner, max_size=3),
    max_leaves=12,
)


@settings(derandomize=True, deadline=None)
@given(st.dictionaries(st.text("ab", max_size=3), values, max_size=3))
def test_an_entry_reads_back_as_it_was_written_on_one_line(body):
    line = entry_line(Entry(kind="note", job=None, body=body), 7, "2026-03-01T08:00:00.000000Z")
    assert b"\n" not in line
    parsed = parse_line(line)
    assert parsed.index == 7
    assert parsed.body == body


@pytest.mark.parametrize(
    "line",
    [
        b'{"body":{},"index":0,"job":null,"kind":"a","time":"2026-03-01T08:00:00.000000Z" }',
        b'{"body":{},"body":{},"index":0,"job":null,"kind":"a","time":"2026-03-01T08:00:00.000000Z"}',
        b'{"index":0,"body":{},"job":null,"kind":"a","time":"2026-03-01T08:00:00.000000Z"}',
        b'{"body":{},"index":0.0,"job":null,"kind":"a","time":"2026-03-01T08:00:00.000000Z"}',
        b'{"body":{},"index":true,"job":null,"kind":"a","time":"2026-03-01T08:00:00.000000Z"}',
        b'{"body":{"x":NaN},"index":0,"job":null,"kind":"a","time":"2026-03-01T08:00:00.000000Z"}',
        b'{"body":{"x":1e0},"index":0,"job":null,"kind":"a","time":"2026-03-01T08:00:00.000000Z"}',
        b'{"body":{"x":"\\u0041"},"index":0,"job":null,"kind":"a","time":"2026-03-01T08:00:00.000000Z"}',
        b'{"body":{},"index":0,"job":null,"kind":"a","time":"2026-13-01T08:00:00.000000Z"}',
        b'{"body":{},"index":0,"job":null,"kind":"a","time":"2026-03-01T08:00:00Z"}',
        b'{"body":{},"extra":1,"index":0,"job":null,"kind":"a","time":"2026-03-01T08:00:00.000000Z"}',
        b'{"head":{}}',
        b"[]",
        b"",
        b"\xff",
        b"[" * 100_000,
    ],
)
def test_no_second_spelling_of_a_line_is_read(line):
    with pytest.raises(Refused):
        parse_line(line)


# damage


def rewritten(lines, number, old, new):
    assert old in lines[number]
    return [*lines[:number], lines[number].replace(old, new), *lines[number + 1 :]]


def resigned(lines, number):
    """The head in that line for a stranger's key."""
    head = parse_line(lines[number])
    stranger = SigningIdentity.generate()
    return head_line(sign_head(stranger, party=head.party, size=head.size, root=head.root, time=head.time))


DAMAGES = {
    "altered": (lambda x: rewritten(x, 2, b'"number":1', b'"number":9'), 4, "another Merkle root"),
    "removed": (lambda x: x[:2] + x[3:], 3, "counts 2 entries after 1, the log has 1"),
    "reordered": (lambda x: [x[2], x[1], x[0], *x[3:]], 1, "stands where entry"),
    "head removed": (lambda x: x[:1] + x[2:], 2, None),
    "head of a stranger": (lambda x: [x[0], resigned(x, 1), *x[2:]], 2, "does not fit"),
    "head altered": (lambda x: rewritten(x, 1, b'"size":1', b'"size":2'), 2, "counts 2 entries"),
    "head twice": (lambda x: [*x[:2], x[1], *x[2:]], 3, "counts 1 entries after 1"),
    "blank line": (lambda x: [*x[:2], b"", *x[2:]], 3, "not canonical"),
    "rubbish": (lambda x: [*x[:3], b"\x00\x00", *x[3:]], 4, "not canonical"),
    "rubbish at the end": (lambda x: [*x, b"rubbish"], 9, "not canonical"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damage_is_refused_with_its_line(log, folder, identity, clock, name):
    for number in range(4):
        log.append([release(number)])
    damage, line, word = DAMAGES[name]
    path = folder / "log.jsonl"
    whole = path.read_bytes()
    lines = whole.splitlines()
    path.write_bytes(b"".join(item + b"\n" for item in damage(lines)))
    if word is None:  # a head that was never shown to anybody changes nothing of what the later ones say
        assert numbers(AuditLog(folder, identity, "bank1", clock)) == [0, 1, 2, 3]
        return
    with pytest.raises(Refused, match=f"damaged in line {line}: .*{word}"):
        AuditLog(folder, identity, "bank1", clock)
    path.write_bytes(whole)
    assert numbers(AuditLog(folder, identity, "bank1", clock)) == [0, 1, 2, 3]


def test_a_line_older_than_the_one_before_is_refused(folder, identity, clock):
    log = AuditLog(folder, identity, "bank1", clock)
    log.append([release(0)])
    early = entry_line(release(1), 1, "2026-02-28T00:00:00.000000Z")
    with open(folder / "log.jsonl", "ab") as file:
        file.write(early + b"\n")
    with pytest.raises(Refused, match="damaged in line 3: its time"):
        AuditLog(folder, identity, "bank1", clock)


def test_every_flipped_bit_is_refused_or_seen_as_torn(folder, identity, clock):
    log = AuditLog(folder, identity, "bank1", clock)
    log.append([release(0)])
    log.append([release(1)])
    path = folder / "log.jsonl"
    whole = path.read_bytes()
    for at in range(len(whole) - 1):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        with pytest.raises(Refused, match="damaged in line"):
            AuditLog(folder, identity, "bank1", clock)
    # the very last newline gone is what a torn write leaves
    path.write_bytes(whole[:-1] + b"\x0b")
    assert numbers(AuditLog(folder, identity, "bank1", clock)) == [0]


def test_modes_owner_and_missing_parts_are_checked(log, folder, identity, clock):
    log.append([release(0)])
    for path, mode in ((folder, 0o750), (folder / "log.jsonl", 0o640), (folder / "party.json", 0o604)):
        kept = stat.S_IMODE(path.stat().st_mode)
        path.chmod(mode)
        with pytest.raises(Refused, match=f"mode {mode:04o}"):
            AuditLog(folder, identity, "bank1", clock)
        path.chmod(kept)
    with pytest.raises(Refused, match="another party or identity"):
        AuditLog(folder, identity, "bank2", clock)
    with pytest.raises(Refused, match="another party or identity"):
        AuditLog(folder, SigningIdentity.generate(), "bank1", clock)
    (folder / "log.jsonl").rename(folder / "elsewhere")
    with pytest.raises(Refused, match="No such file"):  # a log that was taken away is never begun anew
        AuditLog(folder, identity, "bank1", clock)
    (folder / "log.jsonl").symlink_to(folder / "elsewhere")
    with pytest.raises(Refused, match=r"audit log .*symbolic"):
        AuditLog(folder, identity, "bank1", clock)
    (folder / "log.jsonl").unlink()
    (folder / "elsewhere").rename(folder / "log.jsonl")
    (folder / "party.json").unlink()
    with pytest.raises(Refused, match=r"no party\.json"):
        AuditLog(folder, identity, "bank1", clock)


@pytest.mark.parametrize("how", ["replaced", "cut", "rewritten"])
def test_a_log_exchanged_while_open_is_noticed(log, folder, identity, clock, how):
    log.append([release(0)])
    log.append([release(1)])
    path = folder / "log.jsonl"
    whole = path.read_bytes()
    match how:
        case "replaced":
            (folder / "copy").touch(mode=0o600)
            (folder / "copy").write_bytes(whole)
            (folder / "copy").replace(path)
        case "cut":
            path.write_bytes(b"".join(whole.splitlines(keepends=True)[:2]))
        case "rewritten":
            path.write_bytes(
                whole.replace(b'"number":1', b'"number":8').replace(b'"root":"', b'"root":"00')[: len(whole)]
            )
    with pytest.raises(AuditFailed, match="while open"):
        log.append([release(2)])
    assert b'"number":2' not in path.read_bytes()


# crashes


def test_a_torn_tail_at_every_byte_of_the_last_batch_opens_and_says_so(log, folder, identity, clock):
    log.append([release(0)])
    path = folder / "log.jsonl"
    kept = path.read_bytes()
    log.append([release(1), release(2)])
    whole = path.read_bytes()
    for cut in range(len(kept), len(whole)):
        path.write_bytes(whole[:cut])
        opened = AuditLog(folder, identity, "bank1", clock)
        assert numbers(opened) == [0], f"cut at byte {cut}"
        recovered = [entry.body["bytes"] for entry in opened.entries(kind="recovered")]
        assert recovered == ([cut - len(kept)] if cut > len(kept) else []), f"cut at byte {cut}"
        opened.append([release(3)])
        assert numbers(AuditLog(folder, identity, "bank1", clock)) == [0, 3]
    path.write_bytes(whole)
    assert numbers(AuditLog(folder, identity, "bank1", clock)) == [0, 1, 2]


def forked(work):
    """Run `work` in a child process; its id. Leaves by os._exit, whatever happens."""
    child = os.fork()
    if child == 0:
        try:
            work()
            os._exit(0)
        finally:
            os._exit(1)
    return child


def wall_clock():
    return datetime.now(UTC)


def acknowledged(reader):
    """The numbers that the child wrote into the pipe before it died."""
    with os.fdopen(reader, "rb") as pipe:
        data = pipe.read()
    return [int.from_bytes(data[at : at + 4], "big") for at in range(0, len(data) - len(data) % 4, 4)]


def test_sigkill_120_times_loses_no_acknowledged_append(tmp_path, identity):
    """The child acknowledges through a pipe after `append` returned; half of the children write 64 bytes at a time."""
    rng = random.Random(4)
    appended, torn = 0, 0
    for folder in (tmp_path / str(number) for number in range(8)):
        known = []
        for round_number in range(15):
            reader, writer = os.pipe()

            def work(folder=folder, writer=writer, start=10_000 * round_number, slowly=round_number % 2 == 1):
                if slowly:
                    write = os.write

                    def piecewise(descriptor, data):
                        if descriptor == writer:
                            return write(descriptor, data)
                        done = 0
                        for at in range(0, len(data), 64):
                            done += write(descriptor, data[at : at + 64])
                            time.sleep(0.0001)
                        return done

                    os.write = piecewise
                log = AuditLog(folder, identity, "bank1", wall_clock)
                for number in range(start, start + 10_000):
                    log.append([release(number)] * rng.randint(1, 5))
                    os.write(writer, number.to_bytes(4, "big"))

            child = forked(work)
            os.close(writer)
            if round_number % 5:  # the others may die while they still open the log
                known.append(int.from_bytes(os.read(reader, 4), "big"))
            time.sleep(rng.uniform(0, 0.02))
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            known += acknowledged(reader)
            opened = AuditLog(folder, identity, "bank1", wall_clock)
            found = numbers(opened)
            assert set(known) <= set(found), f"kill {round_number} in {folder}"
            assert found == sorted(found)
        appended += len(known)
        torn += len(opened.entries(kind="recovered"))
    assert appended >= 96, "the children were killed before they could append; the test tests nothing"
    assert torn >= 5, "no kill met a write"


@pytest.mark.parametrize("point", ["in the write", "after the write", "after the sync"])
def test_sigkill_at_each_write_point(folder, identity, point):
    AuditLog(folder, identity, "bank1", wall_clock).append([release(0)])

    def work():
        log = AuditLog(folder, identity, "bank1", wall_clock)
        write, sync = os.write, os.fdatasync

        def die_writing(descriptor, data):
            write(descriptor, data[: len(data) // 2] if point == "in the write" else data)
            os.kill(os.getpid(), signal.SIGKILL)

        def die_synced(descriptor):
            sync(descriptor)
            os.kill(os.getpid(), signal.SIGKILL)

        if point == "after the sync":
            os.fdatasync = die_synced
        else:
            os.write = die_writing
        log.append([release(1)])

    _, status = os.waitpid(forked(work), 0)
    assert os.WTERMSIG(status) == signal.SIGKILL
    opened = AuditLog(folder, identity, "bank1", wall_clock)
    assert numbers(opened) == ([0] if point == "in the write" else [0, 1])
    assert len(opened.entries(kind="recovered")) == (1 if point == "in the write" else 0)


# full and broken disks


def fails_cleanly(log, folder, identity, clock, word):
    """An append fails now, and leaves no byte behind."""
    before = (folder / "log.jsonl").read_bytes()
    with pytest.raises(AuditFailed, match=word):
        log.append([release(98), release(99)])
    assert (folder / "log.jsonl").read_bytes() == before


@pytest.mark.parametrize("failure", ["no space", "short write", "sync fails", "read-only"])
def test_a_failing_disk_logs_nothing_and_the_log_goes_on_after(log, folder, identity, clock, monkeypatch, failure):
    head = log.append([release(0)])
    write, sync = os.write, os.fdatasync
    syncs = []

    def raises(code):
        raise OSError(code, os.strerror(code))

    def failing_sync(descriptor):
        syncs.append(descriptor)
        if len(syncs) == 1:
            raises(errno.EIO)
        sync(descriptor)

    with monkeypatch.context() as patch:
        match failure:
            case "no space":
                patch.setattr(os, "write", lambda descriptor, data: raises(errno.ENOSPC))
                word = "No space left"
            case "short write":
                patch.setattr(os, "write", lambda descriptor, data: write(descriptor, data[:-7]))
                word = "only .* bytes were written"
            case "sync fails":
                patch.setattr(os, "fdatasync", failing_sync)
                word = "Input/output error"
            case "read-only":
                patch.setattr(os, "open", lambda *args, **kwargs: raises(errno.EROFS))
                word = "Read-only file system"
        fails_cleanly(log, folder, identity, clock, word)
    assert log.head() == head
    log.append([release(1)])
    assert numbers(AuditLog(folder, identity, "bank1", clock)) == [0, 1]


def test_if_even_the_cut_fails_the_log_is_closed(log, folder, identity, clock, monkeypatch):
    log.append([release(0)])
    write = os.write

    def raises(*_):
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", lambda descriptor, data: write(descriptor, data[:50]))
        patch.setattr(os, "ftruncate", raises)
        with pytest.raises(AuditFailed, match="only 50"):
            log.append([release(1)])
    for use in (lambda: log.append([release(2)]), log.head, log.entries, lambda: log.size):
        with pytest.raises(AuditFailed, match="could not be restored"):
            use()
    opened = AuditLog(folder, identity, "bank1", clock)
    assert numbers(opened) == [0]
    assert [entry.body["bytes"] for entry in opened.entries(kind="recovered")] == [50]


def test_an_interrupt_in_the_write_leaves_the_log_whole(log, folder, identity, clock, monkeypatch):
    log.append([release(0)])
    before = (folder / "log.jsonl").read_bytes()
    write = os.write

    def interrupted(descriptor, data):
        write(descriptor, data[:100])
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", interrupted)
        with pytest.raises(KeyboardInterrupt):
            log.append([release(1)])
    assert (folder / "log.jsonl").read_bytes() == before
    log.append([release(2)])
    assert numbers(AuditLog(folder, identity, "bank1", clock)) == [0, 2]


def test_a_limit_on_the_file_size_stops_the_append_and_only_it(folder, identity):
    """The kernel itself refuses: a child may write 4 kB and not one more, in the middle of a batch."""
    reader, writer = os.pipe()

    def work():
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
        log = AuditLog(folder, identity, "bank1", wall_clock)
        for number in range(100):
            try:
                log.append([release(number)])
            except AuditFailed as error:
                if "bytes were written" in str(error) or "File too large" in str(error):
                    os._exit(7)
                os._exit(8)
            os.write(writer, number.to_bytes(4, "big"))

    child = forked(work)
    os.close(writer)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 7
    known = acknowledged(reader)
    opened = AuditLog(folder, identity, "bank1", wall_clock)
    assert numbers(opened) == known
    assert len(known) >= 3
    assert opened.entries(kind="recovered") == []


def test_a_really_full_disk(tmp_path, identity):
    """A mount of 64 kB, in a mount namespace of the child's own so that nothing stays behind."""
    mount = tmp_path / "small"
    mount.mkdir()
    libc = ctypes.CDLL(None, use_errno=True)
    reader, writer = os.pipe()

    def work():
        if libc.unshare(0x00020000) or subprocess.call(["mount", "--make-rprivate", "/"]):
            os._exit(3)
        if subprocess.call(["mount", "-t", "tmpfs", "-o", "size=64k,mode=0700", "tmpfs", str(mount)]):
            os._exit(3)
        log = AuditLog(mount / "audit", identity, "bank1", wall_clock)
        count = 0
        while True:
            before = (mount / "audit" / "log.jsonl").read_bytes()
            try:
                log.append([release(count)] * 5)
            except AuditFailed:
                break
            count += 1
            os.write(writer, count.to_bytes(4, "big"))
        full = (mount / "audit" / "log.jsonl").read_bytes() == before
        again = AuditLog(mount / "audit", identity, "bank1", wall_clock)
        whole = len(numbers(again)) == 5 * count and again.entries(kind="recovered") == []
        os._exit(0 if full and whole and count > 5 else 4)

    child = forked(work)
    os.close(writer)
    _, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    if code == 3:
        pytest.skip("this user may not mount a small disk")
    assert code == 0
    assert len(acknowledged(reader)) > 5


# clocks and several writers


def test_a_clock_set_back_stops_the_log(log, folder, identity, clock):
    clock.now = START + timedelta(hours=1)
    log.append([release(0)])
    clock.now -= timedelta(seconds=2.001)
    fails_cleanly(log, folder, identity, clock, "clock set back")
    with pytest.raises(AuditFailed, match="clock set back"):
        AuditLog(folder, identity, "bank1", clock).append([release(1)])
    clock.now += timedelta(seconds=0.001)  # within what time synchronisation does: the order of times is kept
    assert utc_time(log.append([release(1)]).time) == START + timedelta(hours=1)
    clock.now = datetime(2026, 3, 1, 9, 30)
    fails_cleanly(log, folder, identity, clock, "without zone")


def test_two_processes_append_500_each(folder, identity):
    def work(start):
        log = AuditLog(folder, identity, "bank1", wall_clock)
        for number in range(start, start + 500):
            if log.append([release(number)]).size < 1:
                os._exit(2)

    children = [forked(lambda start=start: work(start)) for start in (0, 1000)]
    assert [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children] == [0, 0]
    opened = AuditLog(folder, identity, "bank1", wall_clock)
    found = numbers(opened)
    assert [number for number in found if number < 1000] == list(range(500))
    assert [number for number in found if number >= 1000] == list(range(1000, 1500))
    assert opened.entries(kind="recovered") == []
    assert found not in (sorted(found), sorted(found, key=lambda number: -number // 1000)), "they never met"


def test_a_forked_child_excludes_its_parent(log, folder, identity, clock):
    """The same open object on both sides of a fork: an inherited lock would let them write over each other."""
    log.append([release(0)])
    child = forked(lambda: [log.append([release(1000 + number)]) for number in range(100)])
    for number in range(100):
        log.append([release(number)])
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    log.append([release(5000)])
    assert len(numbers(AuditLog(folder, identity, "bank1", clock))) == 202


def test_threads_and_a_second_object_share_the_log(log, folder, identity, clock):
    second = AuditLog(folder, identity, "bank1", clock)
    heads = []

    def work(opened):
        for number in range(50):
            heads.append(opened.append([release(number)]).size)

    threads = [threading.Thread(target=work, args=(opened,)) for opened in (log, log, second, second)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(heads) == list(range(1, 201))
    assert log.size == second.size == 200
    assert log.head() == second.head()


def test_several_processes_may_make_the_log_at_once(folder, identity):
    children = [
        forked(lambda number=number: AuditLog(folder, identity, "bank1", wall_clock).append([release(number)]))
        for number in range(8)
    ]
    assert [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children] == [0] * 8
    assert sorted(numbers(AuditLog(folder, identity, "bank1", wall_clock))) == list(range(8))


def test_nothing_to_append_is_refused(log):
    with pytest.raises(AuditFailed, match="at least one"):
        log.append([])


def test_the_writer_is_the_only_one_who_knows_the_key(log, identity):
    log.append([release(0)])
    assert identity.public.hex() not in repr(log)
    assert not hasattr(audit_log, "main")
    assert canonical({"b": 1, "a": "é"}) == '{"a":"é","b":1}'.encode()

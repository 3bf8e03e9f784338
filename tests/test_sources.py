"""Files and real databases in batches: servers of the test's own, broken files, lost connections."""

import gzip
import os
import pwd
import shutil
import subprocess
import tempfile
import time
from contextlib import contextmanager
from datetime import date
from pathlib import Path

import adbc_driver_postgresql.dbapi
import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pymysql
import pytest
from pydantic import ValidationError

from fl_clients import sources
from fl_clients.data_check import check_table, load_checked
from fl_clients.mapping import check_mapping, parse_mapping
from fl_clients.sources import Source, batches, columns, detect_encoding
from models.errors import DataError
from models.schema import load_schema

CODES = ["91110000600037341L", "91110108551385082Q", "91350100M000100Y43", "91110000802100433B", "9144030071526726XG"]
PASSWORD = "p@ss/word-7"


def csv_source(path: Path, **more) -> Source:
    return Source(kind="csv", path=path, **more)


def read(source: Source, names: list[str]) -> dict[str, list]:
    return pa.Table.from_batches(batches(source, names)).to_pydict()


# --- CSV and Parquet ---


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "gb18030"])
@pytest.mark.parametrize("packed", [False, True])
def test_csv_encodings_are_told_apart(tmp_path, encoding, packed):
    content = '代码,企业名称,金额\nA1,杭州知行科技有限公司,12\nA2,"嘉兴,联通\n商贸",\n'.encode(encoding)
    path = tmp_path / ("t.csv.gz" if packed else "t.csv")
    path.write_bytes(gzip.compress(content) if packed else content)
    source = csv_source(path)
    assert detect_encoding(path) == ("gb18030" if encoding == "gb18030" else "utf-8")
    assert list(columns(source)) == ["代码", "企业名称", "金额"]
    assert read(source, ["企业名称", "代码"]) == {
        "企业名称": ["杭州知行科技有限公司", "嘉兴,联通\n商贸"],
        "代码": ["A1", "A2"],
    }


def test_mixed_encodings_are_refused_with_both_lines(tmp_path):
    path = tmp_path / "t.csv"
    path.write_bytes("代码,名称\n1,甲公司\n".encode() + "2,乙公司\n".encode("gb18030"))
    with pytest.raises(DataError, match=r"mixed encodings: line 1 is UTF-8, line 3 is not"):
        columns(csv_source(path))


def test_a_mixture_far_apart_in_a_large_file_is_found(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "_SCAN_BYTES", 64)
    path = tmp_path / "t.csv"
    path.write_bytes(
        b"id,name\n" + b"1,abc\n" * 500 + "2,杭州\n".encode("gb18030") + b"3,abc\n" * 500 + "4,杭州\n".encode()
    )
    with pytest.raises(DataError, match=r"line 1,003 is UTF-8, line 502 is not"):
        detect_encoding(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"a,,c\n1,2,3\n", "column 2 has no name"),
        (b"a,b,a\n1,2,3\n", "two columns are named 'a'"),
        (b"a,b\n1,2\n3,4,5\n6,7\n", "has 3 cells, the first line names 2"),
        ("a,b\n1,2\n".encode("utf-16"), "is UTF-16"),
        (b"PK\x03\x04rest", "Excel workbook"),
        (b"a,b\n1,\xff\xff\n", "line 2 is neither UTF-8 nor GB18030"),
    ],
)
def test_broken_csv_is_refused_in_one_line(tmp_path, content, message):
    path = tmp_path / "t.csv"
    path.write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        read(csv_source(path), ["a"])
    assert "\n" not in str(caught.value)


def test_a_stated_encoding_that_is_wrong_is_refused_without_the_cell(tmp_path):
    path = tmp_path / "t.csv"
    path.write_bytes("a,b\n1,机密\n".encode("gb18030"))
    with pytest.raises(DataError, match="cannot be read") as caught:
        read(csv_source(path, encoding="utf-8"), ["a", "b"])
    assert "机密" not in str(caught.value)


def test_a_column_that_went_away_is_named(tmp_path):
    path = tmp_path / "t.csv"
    path.write_text("a,b\n1,2\n")
    with pytest.raises(DataError, match=r"has no column 'c'; it has a, b"):
        read(csv_source(path), ["a", "c"])
    with pytest.raises(DataError, match="no file"):
        columns(csv_source(tmp_path / "none.csv"))


def test_large_csv_comes_in_batches(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "CSV_BLOCK_BYTES", 4096)
    path = tmp_path / "t.csv"
    path.write_text("a,b\n" + "".join(f"{i},x\n" for i in range(5000)))
    parts = list(batches(csv_source(path), ["a"]))
    assert len(parts) > 3
    assert [value for part in parts for value in part.column("a").to_pylist()] == [str(i) for i in range(5000)]


def test_parquet(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "PARQUET_BATCH_ROWS", 2)
    path = tmp_path / "t.parquet"
    pyarrow.parquet.write_table(pa.table({"代码": ["a", "b", "c"], "n": [1.5, None, 2.0]}), path)
    source = Source(kind="parquet", path=path)
    assert columns(source) == {"代码": "string", "n": "double"}
    assert [part.num_rows for part in batches(source, ["n", "代码"])] == [2, 1]
    assert read(source, ["n", "代码"]) == {"n": [1.5, None, 2.0], "代码": ["a", "b", "c"]}
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(DataError, match="no whole Parquet file"):
        columns(source)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kind": "csv"}, "has `path`"),
        ({"kind": "csv", "path": "x", "table": "t"}, "has `path`"),
        ({"kind": "postgresql", "url": "postgresql://u@h/d"}, "one of `table` and `query`"),
        ({"kind": "postgresql", "url": "postgresql://u:secret@h/d", "table": "t"}, "has a password in it"),
        ({"kind": "postgresql", "url": "postgresql://u@h/d?password=secret", "table": "t"}, "has a password in it"),
        ({"kind": "mysql", "url": "postgresql://u@h/d", "table": "t"}, "must begin with mysql"),
        ({"kind": "postgresql", "url": "postgresql://h/d", "query": "delete from t"}, "must be one SELECT"),
        ({"kind": "postgresql", "url": "postgresql://h/d", "query": "select 1; drop table t"}, "must be one SELECT"),
    ],
)
def test_a_source_that_is_none_is_refused(settings, message):
    with pytest.raises(ValidationError, match=message):
        Source.model_validate(settings)


# --- servers of the test's own ---


def _found(*patterns: str) -> Path | None:
    return next((path for pattern in patterns for path in sorted(Path("/").glob(pattern), reverse=True)), None)


@contextmanager
def _folder(user: str | None):
    """A folder that the server's user owns; sockets need a short path."""
    folder = Path(tempfile.mkdtemp(prefix="xy", dir="/tmp"))
    if user is not None:
        account = pwd.getpwnam(user)
        os.chown(folder, account.pw_uid, account.pw_gid)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def postgres():
    """The URL of a running PostgreSQL with the loans table; started and stopped here."""
    initdb = _found("usr/lib/postgresql/*/bin/initdb", "usr/local/pgsql/bin/initdb")
    if initdb is None:
        pytest.skip("no PostgreSQL server found under /usr/lib/postgresql: apt-get install postgresql")
    user = "postgres" if os.geteuid() == 0 else None  # PostgreSQL refuses to run as root
    with _folder(user) as folder:
        word, data = folder / "password", folder / "data"
        word.write_text(PASSWORD)
        word.chmod(0o644)

        def run(*command: object) -> None:
            subprocess.run([str(part) for part in command], check=True, user=user, cwd="/", stdout=subprocess.DEVNULL)

        run(
            initdb,
            "-D",
            data,
            "-U",
            "tester",
            "--auth=scram-sha-256",
            f"--pwfile={word}",
            "-E",
            "UTF8",
            "--locale=C",
            "-N",
        )
        options = f"-c listen_addresses= -c unix_socket_directories={folder} -c fsync=off"
        run(initdb.with_name("pg_ctl"), "-D", data, "-o", options, "-l", folder / "log", "-w", "start")
        try:
            _fill(folder)
            yield f"postgresql://tester@/postgres?host={folder}"
        finally:
            run(initdb.with_name("pg_ctl"), "-D", data, "-m", "immediate", "-w", "stop")


def _connect(folder: Path, database: str = "postgres"):
    return adbc_driver_postgresql.dbapi.connect(
        f"postgresql:///{database}?host={folder}&user=tester&password=p%40ss%2Fword-7", autocommit=True
    )


def _fill(folder: Path) -> None:
    rows = ", ".join(
        f"('{code}', date '2025-03-1{i}', {1_000_000 + i * 250_000}.25, {i + 1}, true, timestamptz '2025-03-01 23:00Z')"
        for i, code in enumerate(CODES)
    )
    with _connect(folder) as connection, connection.cursor() as cursor:
        cursor.execute(
            'create table loans ("统一社会信用代码" varchar(18), applied date, "营业收入" numeric(18,2), '
            "tier smallint, ok boolean, at timestamptz)"
        )
        cursor.execute(f"insert into loans values {rows}")
        cursor.execute("insert into loans values (null, null, null, null, null, null)")
        cursor.execute("create table big as select i, repeat('x', 90) as pad from generate_series(1, 600000) as i")
        cursor.execute("create sequence counter")
        cursor.execute("create database plain encoding 'SQL_ASCII' locale 'C' template template0")
    with _connect(folder, "plain") as connection, connection.cursor() as cursor:
        cursor.execute("create table t (name text)")
        cursor.execute(r"insert into t values (convert_from('\xbac3', 'SQL_ASCII'))")


@pytest.fixture
def with_password(monkeypatch):
    monkeypatch.setenv("TEST_DB_PASSWORD", PASSWORD)


def pg(url: str, **more) -> Source:
    return Source(kind="postgresql", url=url, password_env="TEST_DB_PASSWORD", **more)


@pytest.mark.usefixtures("with_password")
def test_postgresql_types_and_pushdown(postgres):
    source = pg(postgres, table="public.loans")
    assert columns(source)["营业收入"] == "numeric"
    part = next(iter(batches(source, ["营业收入", "统一社会信用代码", "applied"])))
    assert part.schema.names == ["营业收入", "统一社会信用代码", "applied"]
    assert [str(kind) for kind in part.schema.types] == ["double", "string", "date32[day]"]
    assert part.column(0).to_pylist()[:2] == [1_000_000.25, 1_250_000.25]
    assert part.column(2).to_pylist()[-1] is None
    query = pg(postgres, query='select "统一社会信用代码" as code from loans where tier > 3;')
    assert read(query, ["code"]) == {"code": CODES[3:]}


@pytest.mark.usefixtures("with_password")
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"table": "nothing"}, "has no such table"),
        ({"query": "select nextval('counter') as n"}, "only reading is allowed"),
        ({"query": "select no_column as n from loans"}, "has no such column"),
        ({"query": "select from where"}, "syntax"),
    ],
)
def test_postgresql_refusals_are_one_line(postgres, settings, message):
    with pytest.raises(DataError, match=message) as caught:
        read(pg(postgres, **settings), ["n"])
    assert "\n" not in str(caught.value)


def test_postgresql_passwords(postgres, monkeypatch):
    source = pg(postgres, table="loans")
    monkeypatch.delenv("TEST_DB_PASSWORD", raising=False)
    with pytest.raises(DataError, match="environment variable TEST_DB_PASSWORD is not set"):
        columns(source)
    monkeypatch.setenv("TEST_DB_PASSWORD", "not-this-one")
    with pytest.raises(DataError, match=r"no connection|refused the password") as caught:
        columns(source)
    assert "not-this-one" not in str(caught.value)
    monkeypatch.setenv("TEST_DB_PASSWORD", PASSWORD)
    with pytest.raises(DataError, match="no connection"):
        columns(pg("postgresql://tester@/postgres?host=/nonexistent", table="loans"))


@pytest.mark.usefixtures("with_password")
def test_postgresql_connection_lost_in_the_middle(postgres):
    stream = batches(pg(postgres, table="big"), ["i", "pad"])
    assert next(stream).num_rows > 0
    with _connect(Path(postgres.split("host=")[1])) as connection, connection.cursor() as cursor:
        cursor.execute("select count(pg_terminate_backend(pid)) from pg_stat_activity where application_name = 'xinyi'")
        assert cursor.fetchone() == (1,)
    with pytest.raises(DataError, match=r"connection lost after row [1-9].*nothing was used") as caught:
        list(stream)
    assert "\n" not in str(caught.value)


@pytest.mark.usefixtures("with_password")
def test_postgresql_without_an_encoding_and_gb18030_in_it(postgres):
    with pytest.raises(DataError, match=r"text that is not UTF-8|its encoding does not allow"):
        read(pg(postgres.replace("/postgres?", "/plain?"), table="t"), ["name"])


@pytest.mark.usefixtures("with_password")
def test_a_table_that_changes_between_check_and_training_is_refused(postgres):
    document = {
        "schema": "bank",
        "schema_version": "1.0",
        "source": {"kind": "postgresql", "url": postgres, "table": "loans", "password_env": "TEST_DB_PASSWORD"},
        "rows": {"malformed_codes": "drop", "cut_off": date(2025, 2, 28)},
        "columns": {
            "uscc": {"from": "统一社会信用代码"},
            "application_date": {"from": "applied"},
            "snapshot_date": {"constant": date(2025, 1, 31)},
            "revenue_12m": {"from": "营业收入", "unit": "yuan"},
            "five_tier": {"from": "tier"},
        },
    }
    mapping, schema = parse_mapping(document), load_schema("bank")
    check_mapping(mapping, schema)

    def rows():
        return batches(mapping.source, mapping.source_columns)

    receipt = check_table(mapping, schema, rows(), last=None, today=date(2025, 6, 1))
    assert [finding.text for finding in receipt.errors] == []
    assert (receipt.rows, receipt.usable_rows) == (6, 5)
    with _connect(Path(postgres.split("host=")[1])) as connection, connection.cursor() as cursor:
        cursor.execute('create table turned as select * from loans order by "统一社会信用代码" desc')
        cursor.execute("truncate loans")
        cursor.execute("insert into loans select * from turned")
        table = load_checked(mapping, schema, rows(), receipt, features=["revenue_12m"], labels=["five_tier"])
        assert table.codes.tolist() == sorted(CODES)  # another order of rows is the same table
        assert table.columns["revenue_12m"][table.codes == CODES[1]] == 1_250_000.25
        assert table.columns["five_tier"][table.codes == CODES[4]] == "5"
        cursor.execute('update loans set "营业收入" = "营业收入" + 0.01 where tier = 2')
        with pytest.raises(DataError, match=r"the table changed since the check of 2025-06-01"):
            load_checked(mapping, schema, rows(), receipt, features=["revenue_12m"])


@pytest.fixture(scope="module")
def mariadb():
    """The URL of a running MariaDB with a loans table; started and stopped here."""
    server = shutil.which("mariadbd", path="/usr/sbin:/usr/bin:/usr/local/bin")
    if server is None:
        pytest.skip("no MariaDB server found: apt-get install mariadb-server-core")
    with _folder(None) as folder:
        socket, data = folder / "s", folder / "data"
        data.mkdir()
        # without grant tables: nobody but this user reaches the socket, and no system tables need to be made
        common = ["--no-defaults", f"--datadir={data}", f"--user={pwd.getpwuid(os.geteuid()).pw_name}"]
        start = [server, *common, "--skip-grant-tables", "--skip-networking", f"--socket={socket}"]
        process = subprocess.Popen(start, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            _fill_mariadb(process, socket)
            yield f"mysql://root@localhost/credit?unix_socket={socket}"
        finally:
            process.terminate()
            process.wait(30)


def _fill_mariadb(process: subprocess.Popen, socket: Path) -> None:
    for _ in range(300):
        assert process.poll() is None, "MariaDB did not start"
        try:
            connection = pymysql.connect(unix_socket=str(socket), user="root", autocommit=True, charset="utf8mb4")
            break
        except pymysql.OperationalError:
            time.sleep(0.1)
    with connection, connection.cursor() as cursor:
        cursor.execute("create database credit character set utf8mb4")
        cursor.execute("use credit")
        cursor.execute(
            "create table loans (`统一社会信用代码` varchar(18), d date, amount decimal(18,2), n int) engine=innodb"
        )
        cursor.executemany(
            "insert into loans values (%s, '2025-03-01', 12.5, %s)", [(c, i) for i, c in enumerate(CODES)]
        )
        cursor.execute("insert into loans values (null, null, null, null)")
        cursor.execute(
            "create table big engine=innodb as select seq as i, repeat('x', 200) as pad from seq_1_to_200000"
        )


def test_mysql(mariadb):
    source = Source(kind="mysql", url=mariadb, table="loans")
    assert columns(source) == {"统一社会信用代码": "text", "d": "text", "amount": "number", "n": "number"}
    got = read(source, ["amount", "统一社会信用代码", "d", "n"])
    assert got["统一社会信用代码"] == [*CODES, None]
    assert got["amount"] == [12.5] * 5 + [None]
    assert got["d"][0] == "2025-03-01"
    assert got["n"] == [0, 1, 2, 3, 4, None]
    with pytest.raises(DataError, match="has no such table"):
        columns(Source(kind="mysql", url=mariadb, table="nothing"))
    with pytest.raises(DataError, match="no connection"):
        columns(Source(kind="mysql", url="mysql://root@localhost/credit?unix_socket=/nonexistent", table="t"))
    with pytest.raises(DataError, match="no such database"):
        columns(Source(kind="mysql", url=mariadb.replace("/credit", "/debit"), table="t"))


def test_mysql_connection_lost_in_the_middle(mariadb):
    stream = batches(Source(kind="mysql", url=mariadb, table="big"), ["i", "pad"])
    assert next(stream).num_rows == sources.MYSQL_BATCH_ROWS
    socket = mariadb.split("unix_socket=")[1]
    with pymysql.connect(unix_socket=socket, user="root") as connection, connection.cursor() as cursor:
        cursor.execute("select id from information_schema.processlist where db = 'credit' and id <> connection_id()")
        for (number,) in cursor.fetchall():
            cursor.execute(f"kill {number}")
    with pytest.raises(DataError, match="connection lost after row"):
        list(stream)


def test_numbers_survive_without_python_objects(tmp_path):
    path = tmp_path / "t.parquet"
    values = np.random.default_rng(1).normal(size=1000)
    pyarrow.parquet.write_table(pa.table({"v": values}), path)
    got = np.concatenate([part.column(0).to_numpy() for part in batches(Source(kind="parquet", path=path), ["v"])])
    assert (got == values).all()

"""The data check: each bad input is one line, look-ahead and changed tables are refused, drift is seen."""

import re
import stat
import tomllib
from datetime import date, timedelta
from html.parser import HTMLParser

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from fl_clients.data_check import (
    check_table,
    load_checked,
    load_receipt,
    population_stability_index,
    render,
    save_receipt,
)
from fl_clients.data_cli import data_app
from fl_clients.mapping import check_mapping, parse_mapping
from models import uscc
from models.errors import DataError
from models.schema import load_schema

TODAY = date(2025, 6, 15)
REAL = ["91110000600037341L", "91110108551385082Q"]


def codes(count, start="9133010"):
    """Valid codes; the inner check character holds by construction."""
    made = []
    for number in range(count):
        body = f"MA{number:06d}"
        first = f"{start}6"[:8].ljust(8, "0") + body + uscc.body_check_character(body)
        made.append(first + uscc.check_character(first))
    return made


def table(count=200, seed=1, **more):
    rng = np.random.default_rng(seed)
    cells = {
        "code": codes(count),
        "applied": [date(2025, 3, 10)] * count,
        "asof": [date(2025, 2, 28)] * count,
        "revenue": np.round(np.exp(rng.normal(15, 1, count)), 2),
        "tier": rng.choice(["1", "2"], count),
        "founded": [date(2015, 1, 1)] * count,
    }
    cells.update(more)
    return {name: pa.array(values) for name, values in cells.items()}


BANK = {
    "uscc": {"from": "code"},
    "application_date": {"from": "applied"},
    "snapshot_date": {"from": "asof"},
    "revenue_12m": {"from": "revenue", "unit": "yuan"},
    "five_tier": {"from": "tier"},
    "estab_date": {"from": "founded"},
}


def mapping_of(columns=BANK, kind="bank", rows=None):
    source = {"kind": "csv", "path": "t.csv"}
    document = {"schema": kind, "schema_version": "1.0", "source": source, "rows": rows or {}, "columns": columns}
    mapping, schema = parse_mapping(document), load_schema(kind)
    check_mapping(mapping, schema)
    return mapping, schema


def batches(cells, size=64):
    return pa.table(cells).to_batches(max_chunksize=size)


def check(cells, last=None, **of):
    mapping, schema = mapping_of(**of)
    return check_table(mapping, schema, batches(cells), last=last, today=TODAY)


def errors(receipt):
    return [finding.text for finding in receipt.errors]


def changed(values, **at):
    """A list with some places replaced: changed(values, p3=x)."""
    values = list(values)
    for place, value in at.items():
        values[int(place[1:])] = value
    return values


# --- what a good table says ---


def test_a_good_table_passes_with_its_figures():
    cells = table()
    receipt = check(cells)
    assert errors(receipt) == []
    assert receipt.warnings == ()
    assert (receipt.rows, receipt.usable_rows, receipt.enterprises, receipt.repeated_rows) == (200, 200, 200, 0)
    revenue = next(column for column in receipt.columns if column.field == "revenue_12m")
    values = cells["revenue"].to_numpy()
    assert (revenue.least, revenue.most) == (values.min(), values.max())
    assert revenue.median == pytest.approx(np.median(values), rel=0.08)
    tier = next(column for column in receipt.columns if column.field == "five_tier")
    assert tier.codes == {code: int((cells["tier"].to_numpy(zero_copy_only=False) == code).sum()) for code in "12"}
    regime = next(column for column in receipt.columns if column.field == "five_tier_regime")
    assert regime.codes == {"1": 200}


def test_individuals_and_inner_checks_are_warned_about():
    receipt = check(
        table(3, code=[*codes(2), "92330106MA0000000A"[:17] + uscc.check_character("92330106MA0000000A"[:17])])
    )
    assert any("individuals' businesses" in finding.text for finding in receipt.warnings)
    receipt = check(table(1, code=["91350100M000100Y43"]))
    holds = uscc.parse("91350100M000100Y43").body_check_holds
    assert receipt.inner_check_fails == (0 if holds else 1)


# --- one line for each kind of bad input ---


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"code": ["91110000600037341N"]}, r"uscc: 1 rows malformed code: 91\*{15}N \(row 1\); mend them"),
        ({"code": [None]}, r"uscc: 1 rows empty \(row 1\)"),
        ({"code": REAL[:1]}, None),
        ({"revenue": ["abc"]}, r"revenue_12m: 1 rows not a number \(row 1\); mend them, or list"),
        ({"revenue": [-5.0]}, r"revenue_12m: 1 rows below 0 \(row 1\); wrong unit, or a code"),
        ({"tier": ["7"]}, r"five_tier: 1 rows unknown code: '7' \(row 1\); translate"),
        ({"asof": [date(2025, 3, 1)]}, r"snapshot_date: 1 rows after the cut-off \(row 1\).*refused"),
        ({"asof": pa.array([None], pa.date32())}, "snapshot_date: 1 rows empty: cannot show when"),
        ({"founded": [date(2025, 3, 2)]}, r"estab_date: 1 rows after the cut-off"),
        ({"applied": [date(2025, 7, 1)]}, "application_date: 1 rows in the future"),
        ({"applied": pa.array([None], pa.date32())}, "application_date: 1 rows no application date and no cut_off"),
    ],
)
def test_each_bad_cell_is_one_line(change, message):
    receipt = check(table(1, **change))
    if message is None:
        assert errors(receipt) == []
        return
    found = [text for text in errors(receipt) if re.search(message, text)]
    assert len(found) == 1, errors(receipt)
    assert "\n" not in found[0]
    assert receipt.refused


def test_many_malformed_codes_show_five_rows_and_no_code():
    wrong = ["91440300713555564J"] * 9
    receipt = check(table(20, code=[*codes(11), *wrong]))
    text = next(text for text in errors(receipt) if "malformed" in text)
    assert "9 rows malformed code: 91***************J (row 12, 13, 14, 15, 16 ...)" in text
    assert not any("91440300713555564J" in text for text in errors(receipt))
    assert "91440300713555564J" not in receipt.model_dump_json() + render(receipt)


def test_malformed_codes_may_be_left_out_and_rows_keep_their_numbers():
    cells = table(4, code=changed(codes(4), p0="x"), asof=[date(2025, 2, 28)] * 3 + [date(2025, 3, 1)])
    receipt = check(cells, rows={"malformed_codes": "drop"})
    assert (receipt.rows, receipt.usable_rows) == (4, 3)
    assert len(receipt.errors) == 1
    assert "snapshot_date: 1 rows after the cut-off (row 4)" in errors(receipt)[0]
    assert any("left out" in finding.text for finding in receipt.warnings)


def test_an_empty_table_and_a_wrong_code_column_are_refused():
    empty = {name: cells.slice(0, 0) for name, cells in table(1).items()}
    assert any("the table is empty" in text for text in errors(check(empty)))
    receipt = check(table(3, code=["甲", "乙", "丙"]), rows={"malformed_codes": "drop"})
    assert any("none of 3 rows has a valid" in text for text in errors(receipt))


# --- look-ahead ---


@settings(derandomize=True, deadline=None, max_examples=60)
@given(st.dates(date(2020, 1, 1), date(2025, 6, 1)), st.integers(-70, 70))
def test_features_are_cut_off_at_the_end_of_the_month_before(applied, offset):
    asof = applied + timedelta(days=offset)
    cut_off = applied.replace(day=1) - timedelta(days=1)
    receipt = check(table(1, applied=[applied], asof=[asof]))
    refused = any("snapshot_date" in text and "after the cut-off" in text for text in errors(receipt))
    assert refused == (asof > cut_off)


def test_an_owner_without_applications_needs_a_cut_off_and_a_snapshot_date():
    columns = {"uscc": {"from": "code"}, "vat_sales_12m": {"from": "revenue", "unit": "yuan"}}
    texts = errors(check(table(), kind="public_credit", columns=columns))
    assert any(text.startswith("no cut-off") for text in texts)
    assert any(text.startswith("no snapshot date") for text in texts)
    columns["snapshot_date"] = {"constant": date(2025, 5, 31)}
    rows = {"cut_off": date(2025, 5, 31)}
    assert errors(check(table(), kind="public_credit", columns=columns, rows=rows)) == []
    rows = {"cut_off": date(2025, 5, 30)}
    assert any(
        "after the cut-off" in text for text in errors(check(table(), kind="public_credit", columns=columns, rows=rows))
    )


def test_a_column_with_a_date_of_its_own():
    columns = {**BANK, "revenue_12m": {"from": "revenue", "unit": "yuan", "dated_by": "known"}}
    cells = table(3, known=[date(2025, 2, 1), date(2025, 3, 1), None])
    assert any(
        "revenue_12m: 1 rows known only after the cut-off" in text for text in errors(check(cells, columns=columns))
    )


def test_a_year_after_the_cut_off():
    columns = {
        "uscc": {"from": "code"},
        "pboc_hit": {"constant": "1"},
        "snapshot_date": {"constant": date(2024, 12, 31)},
        "first_credit_year": {"from": "year"},
    }
    receipt = check(table(2, year=[2024, 2025]), kind="pboc", columns=columns, rows={"cut_off": date(2024, 12, 31)})
    assert any("first_credit_year: 1 rows after the cut-off (row 2)" in text for text in errors(receipt))


# --- units ---


@pytest.mark.parametrize(("unit", "factor"), [("yuan", 1e-4), ("wan_yuan", 1.0)])
def test_a_unit_wrong_by_ten_thousand_is_suspected_until_a_person_confirms(unit, factor):
    revenue = {"from": "revenue", "unit": unit}
    cells = table(revenue=table()["revenue"].to_numpy() * factor)
    texts = errors(check(cells, columns={**BANK, "revenue_12m": revenue}))
    assert len(texts) == 1
    assert re.search(r"营业收入 revenue_12m: median .* looks wrong by a factor 10,000 .the mapping says", texts[0])
    confirmed = check(cells, columns={**BANK, "revenue_12m": {**revenue, "unit_confirmed": True}})
    assert not confirmed.refused
    assert any("confirmed in the mapping" in finding.text for finding in confirmed.warnings)


def test_rates_written_as_shares_are_suspected():
    rate = {"rate_annual_pct": {"from": "rate", "unit": "percent"}}
    cells = table(rate=np.linspace(0.03, 0.08, 200))
    assert any("wrong by a factor 100 " in text for text in errors(check(cells, columns={**BANK, **rate})))
    rate["rate_annual_pct"]["unit"] = "share"
    assert errors(check(cells, columns={**BANK, **rate})) == []


def test_a_unit_that_changed_since_the_last_check_is_suspected():
    columns = {**BANK, "payroll_amt_12m": {"from": "pay", "unit": "yuan"}}
    pay = np.linspace(1e5, 1e6, 200)
    last = check(table(pay=pay), columns=columns)
    assert not last.refused
    texts = errors(check(table(pay=pay / 1e4), columns=columns, last=last))
    assert len(texts) == 1
    assert "has the unit changed?" in texts[0]


# --- no file is not zero, five and three classes ---

PBOC = {
    "uscc": {"from": "code"},
    "pboc_hit": {"from": "hit"},
    "snapshot_date": {"constant": date(2025, 2, 28)},
    "lender_cnt": {"from": "lenders", "empty": "zero"},
    "summary_tier": {"from": "three"},
    "account_tier": {"from": "five"},
}
PBOC_ROWS = {"cut_off": date(2025, 2, 28)}


def pboc(**more):
    cells = {
        "hit": [1, 1, 0, 0],
        "lenders": [2, None, None, None],
        "three": ["1", "3", None, None],
        "five": ["1", "4", None, None],
    }
    return check(table(4, **{**cells, **more}), kind="pboc", columns=PBOC, rows=PBOC_ROWS)


def test_no_file_is_not_zero():
    good = pboc()
    assert errors(good) == []
    assert next(c for c in good.columns if c.field == "lender_cnt").missing == 2
    bad = pboc(lenders=[2, None, 0, None])
    assert errors(bad) == ["有征信档案 pboc_hit: 1 rows 0 (no file) beside other values; no file is not zero (row 3)"]
    assert any("pboc_hit: 1 rows empty: say 1" in text for text in errors(pboc(hit=[1, 1, 0, None])))


def test_five_class_accounts_against_the_three_class_summary():
    receipt = pboc(five=["1", "2", None, None])
    assert not receipt.refused
    assert any("account_tier: 1 rows another class than summary_tier" in f.text for f in receipt.warnings)


# --- duplicates, content hash, reading again ---


def test_repeated_enterprises_need_a_rule():
    cells = table(4, code=[*codes(2), *codes(1), *codes(1)], applied=[date(2025, 3, d) for d in (1, 2, 3, 4)])
    receipt = check(cells)
    assert errors(receipt) == [
        '1 enterprises are in more than one row (2 rows too many); say in [rows] duplicates = "latest" or "worst" and '
        "`by`, or select one row each"
    ]
    assert receipt.repeated_enterprises == 1
    kept = check(cells, rows={"duplicates": "latest", "by": "application_date"})
    assert not kept.refused
    assert any("the latest by application_date is kept" in finding.text for finding in kept.warnings)


@pytest.mark.parametrize(
    ("rule", "revenue"),
    [({"duplicates": "latest", "by": "application_date"}, 3e5), ({"duplicates": "worst", "by": "five_tier"}, 2e5)],
)
@pytest.mark.parametrize("order", [[0, 1, 2], [2, 1, 0], [1, 2, 0]])
def test_the_rule_for_repeated_enterprises_does_not_depend_on_the_order(rule, revenue, order):
    cells = table(
        3,
        code=codes(1) * 3,
        applied=[date(2025, 3, 1), date(2025, 3, 2), date(2025, 3, 3)],
        revenue=[1e5, 2e5, 3e5],
        tier=["1", "5", "2"],
    )
    cells = {name: column.take(pa.array(order)) for name, column in cells.items()}
    mapping, schema = mapping_of(rows=rule)
    receipt = check_table(mapping, schema, batches(cells), last=None, today=TODAY)
    found = load_checked(mapping, schema, batches(cells), receipt, features=["revenue_12m"])
    assert found.codes.tolist() == codes(1)
    assert found.columns["revenue_12m"].tolist() == [revenue]


def test_the_checked_table_is_what_was_mapped():
    cells = table(revenue=changed(table()["revenue"].to_pylist(), p7=None), tier=changed(["2"] * 200, p3="9"))
    mapping, schema = mapping_of()
    receipt = check_table(mapping, schema, batches(cells), last=None, today=TODAY)
    found = load_checked(
        mapping, schema, batches(cells, 17), receipt, features=["revenue_12m", "estab_date"], labels=["five_tier"]
    )
    order = np.argsort(cells["code"].to_pylist())
    assert found.codes.tolist() == sorted(cells["code"].to_pylist())
    np.testing.assert_array_equal(found.columns["revenue_12m"], cells["revenue"].to_numpy(zero_copy_only=False)[order])
    assert found.columns["five_tier"][order.tolist().index(3)] is None
    assert set(found.columns["five_tier"]) == {"2", None}
    assert found.columns["estab_date"][0] == pytest.approx(122, abs=0.2)  # months from 2015-01-01 to 2025-02-28
    kept = found.kept(found.codes == found.codes[5])
    assert kept.codes.tolist() == [found.codes[5]]
    assert kept.columns["revenue_12m"].tolist() == [found.columns["revenue_12m"][5]]
    assert repr(found) == "CheckedTable(200 rows, 3 columns)"


@settings(derandomize=True, deadline=None, max_examples=40)
@given(st.permutations(range(12)), st.integers(1, 12))
def test_the_content_hash_does_not_depend_on_order_or_batches(order, size):
    cells = table(12)
    mapping, schema = mapping_of()
    first = check_table(mapping, schema, batches(cells), last=None, today=TODAY)
    turned = {name: column.take(pa.array(order)) for name, column in cells.items()}
    again = check_table(mapping, schema, batches(turned, size), last=None, today=TODAY)
    assert again.content_hash == first.content_hash


@pytest.mark.parametrize(
    "change",
    [
        {"revenue": changed(table()["revenue"].to_pylist(), p5=table()["revenue"][5].as_py() + 0.01)},
        {"revenue": changed(table()["revenue"].to_pylist(), p5=None)},
        {"tier": changed(table()["tier"].to_pylist(), p0="3")},
        {"founded": changed([date(2015, 1, 1)] * 200, p9=date(2015, 1, 2))},
        {"code": changed(codes(200), p4=REAL[0])},
        {"code": changed(codes(200), p4="x")},
    ],
)
def test_a_table_that_changed_since_the_check_is_refused(change):
    mapping, schema = mapping_of(rows={"malformed_codes": "drop"})
    receipt = check_table(mapping, schema, batches(table()), last=None, today=TODAY)
    load_checked(mapping, schema, batches(table()), receipt, features=["revenue_12m"])
    with pytest.raises(DataError, match="the table changed since the check of 2025-06-15"):
        load_checked(mapping, schema, batches(table(**change)), receipt, features=["revenue_12m"])


def test_a_row_twice_is_another_table():
    mapping, schema = mapping_of(rows={"duplicates": "latest", "by": "application_date"})
    receipt = check_table(mapping, schema, batches(table(5)), last=None, today=TODAY)
    twice = pa.concat_tables([pa.table(table(5)), pa.table(table(1))]).to_batches()
    with pytest.raises(DataError, match="5 usable rows then, 6 now"):
        load_checked(mapping, schema, twice, receipt, features=["revenue_12m"])


def test_what_a_job_may_not_read():
    mapping, schema = mapping_of()
    receipt = check_table(mapping, schema, batches(table()), last=None, today=TODAY)

    def load(**fields):
        return load_checked(mapping, schema, batches(table()), receipt, **fields)

    with pytest.raises(DataError, match=r"'five_tier' \(outcome\) is no feature"):
        load(features=["five_tier"])
    with pytest.raises(DataError, match=r"'revenue_12m' \(snapshot\) is no outcome"):
        load(features=[], labels=["revenue_12m"])
    with pytest.raises(DataError, match="'gross_margin' is not mapped"):
        load(features=["gross_margin"])
    other, _ = mapping_of({**BANK, "total_assets": {"from": "revenue", "unit": "yuan"}})
    with pytest.raises(DataError, match="mapping or schema changed"):
        load_checked(other, schema, batches(table()), receipt, features=["revenue_12m"])
    bad = check(table(tier=["x"] * 200))
    with pytest.raises(DataError, match=r"refused this table \(1 errors\)"):
        load_checked(mapping, schema, batches(table()), bad, features=["revenue_12m"])


# --- drift ---


def test_population_stability_index():
    assert population_stability_index([10, 20], [10, 20]) == 0.0
    p, q = np.array([0.5, 0.5]), np.array([0.2, 0.8])
    exact = float(((p - q) * np.log(p / q)).sum())
    assert population_stability_index([500_000, 500_000], [200_000, 800_000]) == pytest.approx(exact, rel=1e-4)
    assert np.isfinite(population_stability_index([10, 0], [0, 10]))
    with pytest.raises(ValueError, match="must be the same"):
        population_stability_index([1], [1, 2])


def test_drift_against_the_last_check():
    last = check(table(2000))
    same = check(table(2000, seed=2), last=last)
    assert not [finding for finding in same.warnings if "stability" in finding.text]
    assert all(column.drift < 0.05 for column in same.columns if column.drift is not None)
    assert same.compared_with == TODAY
    moved = table(2000, seed=2)
    moved["revenue"] = pa.array(moved["revenue"].to_numpy() * 3)
    moved["tier"] = pa.array(["2"] * 1900 + ["1"] * 100)
    texts = [finding.text for finding in check(moved, last=last).warnings]
    assert any("revenue_12m: population stability index" in text for text in texts)
    assert any("five_tier: population stability index" in text for text in texts)


def test_rows_and_empty_cells_against_the_last_check():
    last = check(table(400))
    fewer = table(100, revenue=[None] * 30 + table(100)["revenue"].to_pylist()[30:])
    texts = [finding.text for finding in check(fewer, last=last).warnings]
    assert any("100 usable rows, 400 at the check of 2025-06-15 (-75%)" in text for text in texts)
    assert any("revenue_12m: share of empty cells changed by +30%" in text for text in texts)
    less = {name: item for name, item in BANK.items() if name != "estab_date"}
    assert any("estab_date: was mapped" in f.text for f in check(table(400), columns=less, last=last).warnings)


# --- receipts, page, command ---


def test_receipts_there_and_back(tmp_path):
    receipt = check(table())
    save_receipt(receipt, tmp_path / "receipt.json")
    assert load_receipt(tmp_path / "receipt.json") == receipt
    assert stat.S_IMODE((tmp_path / "receipt.json").stat().st_mode) == 0o600
    (tmp_path / "receipt.json").write_text("{}")
    with pytest.raises(DataError, match="is no receipt"):
        load_receipt(tmp_path / "receipt.json")


class _Page(HTMLParser):
    def __init__(self):
        super().__init__()
        self.tags, self.links = [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.links += [value for name, value in attrs if name in ("src", "href")]


def test_the_page_loads_nothing_and_escapes_what_came_from_data():
    columns = {**BANK, "revenue_12m": {"from": "<script>alert(1)</script>", "unit": "yuan"}}
    cells = table(1)
    cells["<script>alert(1)</script>"] = pa.array(["abc"])
    receipt = check(cells, columns=columns)
    page = render(receipt)
    parsed = _Page()
    parsed.feed(page)
    assert "script" not in parsed.tags
    assert parsed.links == []
    assert "&lt;script&gt;" in page
    assert "Refused" in page
    assert receipt.content_hash in page
    assert not any(code in page for code in codes(1))
    assert page == render(receipt)


def test_the_command_from_a_file_to_a_verdict(tmp_path):
    run = CliRunner().invoke
    lines = ["统一社会信用代码,申请日期,营业收入(万元),五级分类,成立日期,数据日期,备注"]
    lines += [f"{code},2025-03-10,{100 + n},正常,2015-01-01,2025-02-28,无" for n, code in enumerate(codes(30))]
    data, file, out = tmp_path / "loans.csv", tmp_path / "loans.toml", tmp_path / "check"
    data.write_bytes("\r\n".join(lines).encode("gb18030"))
    done = run(data_app, ["connect", str(file), "--schema", "bank", "--path", str(data)])
    assert done.exit_code == 0, done.output
    assert "营业收入(万元)" in done.output
    done = run(data_app, ["map", str(file), "--yes"])
    assert done.exit_code == 0, done.output
    assert "6 fields mapped" in done.output
    assert 'unit = "wan_yuan"' in file.read_text(encoding="utf-8")
    done = run(data_app, ["check", str(file), "--out", str(out)])
    assert done.exit_code == 0, done.output
    assert "passed: 30 rows, 30 enterprises" in done.output
    assert (out / "data-check.html").read_text(encoding="utf-8").count("<tr>") > 6
    assert stat.S_IMODE((out / "data-check.html").stat().st_mode) == 0o600
    data.write_bytes("\r\n".join([*lines, lines[1]]).encode("gb18030"))
    done = run(data_app, ["check", str(file), "--out", str(out)])
    assert done.exit_code == 1
    assert "error: 1 enterprises are in more than one row" in done.output
    assert load_receipt(out / "receipt.json").refused
    data.write_bytes("\r\n".join(lines).encode("gb18030") + "\r\n甲,乙".encode())
    done = run(data_app, ["check", str(file), "--out", str(out)])
    assert done.exit_code == 2
    assert "mixed encodings" in done.stderr
    assert done.stderr.count("\n") == 1


def test_the_guided_map_asks(tmp_path):
    run = CliRunner().invoke
    data, file = tmp_path / "t.csv", tmp_path / "t.toml"
    data.write_text("信用代码,年营业收入,手机号,神秘列\n", encoding="utf-8")
    run(data_app, ["connect", str(file), "--schema", "bank", "--path", str(data)])
    answers = ["", "", "dollar", "wan_yuan", "no_such", "prior_loan_cnt"]
    done = run(data_app, ["map", str(file)], input="\n".join(answers) + "\n")
    assert done.exit_code == 0, done.output
    mapping = parse_mapping(tomllib.loads(file.read_text(encoding="utf-8")))
    assert {name: (item.source, item.unit) for name, item in mapping.columns.items()} == {
        "uscc": ("信用代码", None),
        "revenue_12m": ("年营业收入", "wan_yuan"),
        "prior_loan_cnt": ("神秘列", None),
    }


def test_the_catalogue_command(tmp_path):
    done = CliRunner().invoke(data_app, ["catalogue", "--out", str(tmp_path / "c.md")])
    assert done.exit_code == 0
    assert "| `revenue_12m` | 营业收入 |" in (tmp_path / "c.md").read_text(encoding="utf-8")

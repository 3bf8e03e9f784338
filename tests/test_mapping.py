"""The mapping file, its proposals, and the conversion of batches: units, tiers, codes, dates, what empty means."""

import tomllib
from datetime import UTC, date, datetime

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fl_clients.mapping import (
    Problems,
    are_valid_codes,
    body_checks_hold,
    check_mapping,
    convert,
    dump_mapping,
    is_barred,
    load_mapping,
    parse_mapping,
    propose,
    unit_in_name,
)
from models import uscc
from models.errors import DataError
from models.schema import load_schema

CODE = "91110000600037341L"
VALID = [
    CODE,
    "91110108551385082Q",
    "91350100M000100Y43",
    "91110000802100433B",
    "9144030071526726XG",
    "914403001922038216",
    "91110000MA00000820",
    "N2330108MA00000150",
    "Y1310000MA0000015R",
]
INVALID = [
    "91350100M000100Y4Z",
    "91110000600037341N",
    "91440300713555564J",
    "91310000MA1FL6NCX7",
    "9111000060003734IL",
    "",
]


def mapping_of(kind="bank", rows=None, **columns):
    document = {
        "schema": kind,
        "schema_version": "1.0",
        "source": {"kind": "csv", "path": "t.csv"},
        "rows": rows or {},
        "columns": {"uscc": {"from": "code"}, **columns},
    }
    if kind == "pboc":
        document["columns"].setdefault("pboc_hit", {"from": "hit"})
    mapping = parse_mapping(document)
    check_mapping(mapping, load_schema(kind))
    return mapping


def converted(mapping, **cells):
    rows = len(next(iter(cells.values())))
    cells.setdefault("code", [CODE] * rows)
    arrays = {name: value if isinstance(value, pa.Array) else pa.array(value) for name, value in cells.items()}
    problems: Problems = {}
    result = convert(pa.record_batch(arrays), mapping, load_schema(mapping.schema_kind), 1, problems)
    return result.columns, {key: (problem.count, problem.rows) for key, problem in problems.items()}, problems


def test_codes_by_columns_agree_with_the_scalar_check():
    codes = np.array([code.encode() for code in VALID + INVALID], "S18")
    assert are_valid_codes(codes).tolist() == [True] * len(VALID) + [False] * len(INVALID)
    valid = np.array([code.encode() for code in VALID], "S18")
    assert body_checks_hold(valid).tolist() == [uscc.parse(code).body_check_holds for code in VALID]


@settings(derandomize=True, deadline=None, max_examples=200)
@given(
    st.lists(st.text(alphabet=uscc.ALPHABET + "IOSVZ@", min_size=18, max_size=18), min_size=1, max_size=20), st.data()
)
def test_codes_by_columns_agree_with_the_scalar_check_on_any_text(texts, data):
    for place, text in enumerate(texts):
        if data.draw(st.booleans()) and all(c in uscc.ALPHABET for c in text[:17]):
            digits = data.draw(st.text("0123456789", min_size=6, max_size=6))
            body = text[:2] + digits + text[8:17]
            texts[place] = body + uscc.check_character(body)
    codes = np.array([text.encode() for text in texts], "S18")
    assert are_valid_codes(codes).tolist() == [uscc.is_valid(text) for text in texts]
    good = codes[are_valid_codes(codes)]
    assert body_checks_hold(good).tolist() == [uscc.parse(code.decode()).body_check_holds for code in good]


def test_codes_are_normalised_and_malformed_ones_counted_masked():
    cells = [
        "９１１１００００６００037341l",
        " 9111 0000 600037341L\u200b",
        CODE,
        "91110000600037341N",
        "short",
        None,
        "  ",
    ]
    columns, counts, problems = converted(mapping_of(), code=cells)
    assert columns["uscc"].tolist() == [CODE.encode()] * 3 + [b""] * 4
    assert counts == {("uscc", "empty"): (2, [6, 7]), ("uscc", "malformed code"): (2, [4, 5])}
    assert problems["uscc", "malformed code"].examples == ["91***************N", "*****"]


def test_units_are_converted_both_ways():
    mapping = mapping_of(revenue_12m={"from": "r", "unit": "wan_yuan"}, rate_annual_pct={"from": "p", "unit": "share"})
    columns, counts, _ = converted(mapping, r=[1.5, None], p=[0.0435, 0.06])
    np.testing.assert_array_equal(columns["revenue_12m"], [15_000.0, np.nan])
    np.testing.assert_allclose(columns["rate_annual_pct"], [4.35, 6.0], rtol=1e-15)
    assert counts == {}
    pboc = mapping_of("pboc", loan_bal={"from": "b", "unit": "yuan"}, penalty_amt={"from": "f", "unit": "wan_yuan"})
    columns, _, _ = converted(pboc, hit=[1], b=[250_000], f=[0.5])
    assert columns["loan_bal"].tolist() == [25.0]
    assert columns["penalty_amt"].tolist() == [5_000.0]


def test_numbers_as_text():
    mapping = mapping_of(revenue_12m={"from": "r", "unit": "yuan", "missing": ["-99", "无"]})
    cells = ["1,234,567.5", "１２３", " 4e3 ", "", "-99", "无", "+7", "12%", "1,23", "abc", None, "-0"]
    columns, counts, problems = converted(mapping, r=cells)
    nan = np.nan
    np.testing.assert_array_equal(
        columns["revenue_12m"], [1234567.5, 123, 4000, nan, nan, nan, 7, nan, nan, nan, nan, 0]
    )
    assert counts == {("revenue_12m", "not a number"): (3, [8, 9, 10])}
    assert problems["revenue_12m", "not a number"].examples == []  # no cell is ever shown


def test_limits_and_whole_numbers():
    mapping = mapping_of(inflow_months_12m={"from": "m"}, settle_share_here={"from": "s", "unit": "share"})
    _, counts, _ = converted(mapping, m=[3, 13, -1, 2.5], s=[0.5, 45.0, None, float("inf")])
    assert counts == {
        ("inflow_months_12m", "above 12"): (1, [2]),
        ("inflow_months_12m", "below 0"): (1, [3]),
        ("inflow_months_12m", "not a whole number"): (1, [4]),
        ("settle_share_here", "above 1"): (1, [2]),
        ("settle_share_here", "not a finite number"): (1, [4]),
    }


def test_missing_code_of_a_numeric_column_is_missing_before_the_unit_is_converted():
    mapping = mapping_of(revenue_12m={"from": "r", "unit": "wan_yuan", "missing": ["-99"]})
    columns, counts, _ = converted(mapping, r=[-99.0, 2.0])
    np.testing.assert_array_equal(columns["revenue_12m"], [np.nan, 20_000.0])
    assert counts == {}


def test_no_file_is_not_zero():
    mapping = mapping_of("pboc", lender_cnt={"from": "n", "empty": "zero"}, loan_bal={"from": "b", "unit": "wan_yuan"})
    columns, counts, _ = converted(mapping, hit=[1, 0, 1, None], n=[None, None, 3, None], b=[None, None, 1, None])
    np.testing.assert_array_equal(columns["lender_cnt"], [0, np.nan, 3, np.nan])  # zero only where there is a file
    np.testing.assert_array_equal(columns["loan_bal"], [np.nan, np.nan, 1, np.nan])
    assert counts == {}


def test_five_and_three_class_tiers():
    bank = mapping_of(five_tier={"from": "t"})
    columns, counts, _ = converted(bank, t=["1", "损失", "9", "关注", "x", ""])
    assert columns["five_tier"].tolist() == [0, 4, -1, 1, -1, -1]
    assert counts == {("five_tier", "unknown code"): (1, [5])}
    three = mapping_of("pboc", summary_tier={"from": "t", "tiers": "five"})
    columns, counts, _ = converted(three, hit=[1] * 6, t=["1", "2", "3", "4", "损失", "6"])
    assert columns["summary_tier"].tolist() == [0, 1, 2, 2, 2, -1]
    assert counts == {}
    _, counts, _ = converted(mapping_of("pboc", summary_tier={"from": "t"}), hit=[1, 1], t=["不良", "4"])
    assert counts == {("summary_tier", "unknown code"): (1, [2])}  # a five-class column passed off as three
    with pytest.raises(DataError, match="three classes cannot become five"):
        mapping_of(five_tier={"from": "t", "tiers": "three"})


def test_codes_translate_by_name_and_by_the_mapping():
    mapping = mapping_of(guarantee_mode={"from": "g", "codes": {"XY": "1"}}, region_code={"from": "r"})
    columns, counts, problems = converted(
        mapping, g=["信用", "XY", "抵押", "自然人"], r=["330106", "999999", "330106", CODE]
    )
    assert columns["guarantee_mode"].tolist() == [0, 0, 2, -1]
    assert columns["region_code"].to_pylist() == ["330106", None, "330106", None]
    assert counts == {("guarantee_mode", "unknown code"): (1, [4]), ("region_code", "unknown code"): (2, [2, 4])}
    assert problems["region_code", "unknown code"].examples == ["'999999'", "(18 characters)"]


@pytest.mark.parametrize(
    "cells", [[1, 1, 0], [1.0, 1.0, 0.0], [True, True, False], ["是", "Y", "否"], ["有", "1.0", "无"]]
)
def test_flags(cells):
    columns, counts, _ = converted(mapping_of(extended={"from": "f"}), f=cells)
    assert columns["extended"].tolist() == [1.0, 1.0, 0.0]
    assert counts == {}


def test_dates():
    mapping = mapping_of(estab_date={"from": "d", "missing": ["9999-12-31"]})
    texts = ["2020-02-29", "20200229", "2020/2/29", "2020年2月29日", "2020-02-29 12:30:00", "9999-12-31", ""]
    columns, counts, _ = converted(mapping, d=[*texts, "2021-02-29", "31/01/2020", "1800-01-01"])
    assert columns["estab_date"][:5].tolist() == [date(2020, 2, 29)] * 5
    assert np.isnat(columns["estab_date"][5:]).all()
    assert counts == {
        ("estab_date", "not a date"): (2, [8, 9]),
        ("estab_date", "not a plausible date (before 1900 or after 2099)"): (1, [10]),
    }
    european = mapping_of(estab_date={"from": "d", "date_format": "%d/%m/%Y"})
    assert converted(european, d=["31/01/2020"])[0]["estab_date"].tolist() == [date(2020, 1, 31)]
    late = pa.array([datetime(2020, 1, 31, 17, 0, tzinfo=UTC)], pa.timestamp("us", "UTC"))
    assert converted(mapping, d=late)[0]["estab_date"].tolist() == [date(2020, 2, 1)]  # the day in Beijing
    sentinel = pa.array([date(9999, 12, 31), date(2020, 1, 1)])
    columns, counts, _ = converted(mapping, d=sentinel)
    assert np.isnat(columns["estab_date"]).tolist() == [True, False]
    assert counts == {}


def test_regime_flags_follow_from_the_date():
    mapping = mapping_of("public_credit", tax_credit_grade={"from": "g"}, snapshot_date={"from": "d"})
    columns, _, _ = converted(mapping, g=["A", "M", "b"], d=["2025-06-30", "2025-07-01", ""])
    assert columns["tax_grade_regime"].tolist() == [0, 1, -1]
    assert columns["tax_credit_grade"].tolist() == [0, 2, 1]
    with pytest.raises(DataError, match="is computed from tax_credit_grade"):
        mapping_of("public_credit", tax_grade_regime={"constant": "1"})


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"revenue_12m": {"from": "r"}}, r"revenue_12m.*营业收入.*unit = one of yuan \(元\)"),
        ({"revenue_12m": {"from": "r", "unit": "percent"}}, "in percent .share. cannot become yuan"),
        ({"revenue_12m": {"from": "r", "unit": "dollar"}}, "unit 'dollar' is not known"),
        ({"revenue12": {"from": "r"}}, "no field 'revenue12'.*revenue_12m"),
        ({"revenue_12m": {"unit": "yuan"}}, "has `from`"),
        ({"revenue_12m": {"from": "r", "constant": 1, "unit": "yuan"}}, "exactly one of them"),
        ({"revenue_12m": {"from": "r", "unti": "yuan"}}, r"columns.revenue_12m.unti"),
        ({"dpd_current": {"from": "d", "empty": "zero"}}, "cannot mean zero"),
        ({"estab_date": {"from": "d", "unit": "days"}}, "type date has no unit"),
        ({"guarantee_mode": {"from": "g", "codes": {"a": "8"}}}, "codes translate to 8"),
        ({"owner_age": {"from": "法人身份证号"}}, "looks like an identifier or private fact"),
        ({"owner_age": {"from": "PASSWORD"}}, "looks like an identifier or private fact"),
    ],
)
def test_a_mapping_that_does_not_fit_is_refused_in_one_line(columns, message):
    with pytest.raises(DataError, match=message) as caught:
        mapping_of(**columns)
    assert "\n" not in str(caught.value)


def test_required_fields_and_rules():
    with pytest.raises(DataError, match=r"\[columns.uscc\] .* is missing"):
        check_mapping(
            parse_mapping({"schema": "bank", "schema_version": "1.0", "source": {"kind": "csv", "path": "x"}}),
            load_schema("bank"),
        )
    with pytest.raises(DataError, match="`by` names the deciding field"):
        mapping_of(rows={"duplicates": "latest"})
    with pytest.raises(DataError, match="needs a mapped field of type date"):
        mapping_of(rows={"duplicates": "latest", "by": "dpd_current"}, dpd_current={"from": "d"})
    with pytest.raises(DataError, match=r"schema_version '0.9': this node has bank 1\.0"):
        check_mapping(mapping_of().model_copy(update={"schema_version": "0.9"}), load_schema("bank"))


def test_proposals_by_chinese_and_english_names():
    names = [
        "统一社会信用代码",
        "年营业收入(万元)",
        "total_assets",
        "五级分类",
        "贷款期限月",
        "法人身份证号码",
        "备注",
        "APPLY_DATE",
        "逾期天数",
    ]
    found = {proposal.column: proposal.field for proposal in propose(load_schema("bank"), names)}
    assert found == {
        "统一社会信用代码": "uscc",
        "年营业收入(万元)": "revenue_12m",
        "total_assets": "total_assets",
        "五级分类": "five_tier",
        "贷款期限月": "term_months",
        "法人身份证号码": None,
        "备注": None,
        "APPLY_DATE": "application_date",
        "逾期天数": "dpd_current",
    }
    public = propose(load_schema("public_credit"), ["纳税等级", "注册资本（万元）", "社保人数", "纳税信用等级"])
    assert [proposal.field for proposal in public] == [
        "tax_credit_grade",
        "reg_capital_wan",
        "ss_headcount",
        None,
    ]  # one column a field


def test_every_field_is_proposed_for_its_own_names():
    for kind in ("bank", "pboc", "public_credit"):
        schema = load_schema(kind)
        for field in schema.fields:
            if field.time != "derived":
                assert propose(schema, [field.name])[0].field == field.name
                assert propose(schema, [field.name.upper()])[0].score == 1.0


@pytest.mark.parametrize(
    ("name", "unit"),
    [
        ("注册资本(万元)", "wan_yuan"),
        ("利率（%）", "percent"),
        ("余额(单位:元)", "yuan"),
        ("reg_capital_wan", "wan_yuan"),
        ("用电量[千瓦时]", "kwh"),
        ("营业收入", None),
        ("客户(重点)", None),
    ],
)
def test_units_in_names(name, unit):
    assert unit_in_name(name) == unit


def test_barred_names():
    assert all(map(is_barred, ["法人身份证号", "手机号码", "银行卡号", "PIN", "id_card", "实控人个人收入", "人脸特征"]))
    assert not any(map(is_barred, ["营业收入", "spinning", "企业电量", "uscc", "纳税额"]))


def test_a_mapping_file_there_and_back(tmp_path):
    (tmp_path / "t.csv").write_text("code\n")
    mapping = mapping_of(
        rows={"duplicates": "worst", "by": "five_tier", "cut_off": date(2025, 6, 30)},
        revenue_12m={"from": '收入 "主营"', "unit": "wan_yuan", "missing": ["-99"], "unit_confirmed": True},
        five_tier={"from": "t", "codes": {"N": "1"}},
        snapshot_date={"constant": date(2025, 6, 30)},
    )
    file = tmp_path / "m.toml"
    file.write_text(dump_mapping(mapping), encoding="utf-8")
    assert parse_mapping(tomllib.loads(file.read_text(encoding="utf-8"))) == mapping
    loaded, schema = load_mapping(file)
    assert loaded.source.path == tmp_path / "t.csv"
    assert loaded.columns == mapping.columns
    assert schema.kind == "bank"
    assert loaded.source_columns == ("code", '收入 "主营"', "t")
    file.write_bytes("[columns]\nx = '万'".encode("gb18030"))
    with pytest.raises(DataError, match="no TOML in UTF-8"):
        load_mapping(file)
    with pytest.raises(DataError, match="no mapping file"):
        load_mapping(tmp_path / "none.toml")


def test_the_digest_tells_mappings_apart():
    left = mapping_of(revenue_12m={"from": "r", "unit": "yuan"})
    right = mapping_of(revenue_12m={"from": "r", "unit": "wan_yuan"})
    assert left.digest == mapping_of(revenue_12m={"from": "r", "unit": "yuan"}).digest
    assert left.digest != right.digest

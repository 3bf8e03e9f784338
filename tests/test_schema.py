"""The shared schema: files that hold together, units, tiers, and a catalogue that is up to date."""

import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from models import schema as schemas
from models.errors import DataError
from models.schema import KINDS, Field, load_schema, parse_schema, three_from_five, unit_factor

ROOT = Path(__file__).parents[1]
EVERY = [(kind, field) for kind in KINDS for field in load_schema(kind).fields]


@pytest.mark.parametrize("kind", KINDS)
def test_each_schema_has_the_key_and_a_snapshot_date(kind):
    schema = load_schema(kind)
    assert schema.kind == kind
    assert schema.field("uscc").required
    assert schema.field("snapshot_date").time == "dated"
    assert re.fullmatch("[0-9a-f]{64}", schema.digest)


def test_fields_of_the_domain_are_there_in_their_units():
    assert load_schema("bank").field("revenue_12m").unit == "yuan"
    pboc = load_schema("pboc")
    assert pboc.field("pboc_hit").required
    # one report, two units: credit parts in ten thousand yuan, tax and penalty parts in yuan
    assert pboc.field("loan_bal").unit == "wan_yuan"
    assert pboc.field("tax_arrears_amt").unit == pboc.field("penalty_amt").unit == "yuan"
    assert {
        f"open_{t}_{c}_{m}"
        for t in ("lt", "st", "rev", "disc")
        for c in ("norm", "watch", "npl")
        for m in ("cnt", "bal")
    } <= {field.name for field in pboc.fields}
    assert load_schema("public_credit").field("tax_grade_regime").boundary.isoformat() == "2025-07-01"


def test_personal_fields_have_the_highest_level_and_outcomes_are_no_features():
    personal = [field for _, field in EVERY if field.personal]
    assert {field.name for field in personal} >= {"owner_age", "owner_has_mortgage", "owner_personal_overdue_24m"}
    assert all(field.level == schemas.HIGHEST_LEVEL for field in personal)
    bank = load_schema("bank")
    for name in ("bad12", "dpd_max_12m", "five_tier", "written_off", "approved_limit", "loan_id", "uscc"):
        assert not bank.field(name).is_feature, name
    assert bank.field("revenue_12m").is_feature


def test_money_fields_have_a_typical_range_narrow_enough_to_tell_a_factor_10000():
    ranged = [field for _, field in EVERY if field.typical is not None]
    assert len(ranged) > 25
    for field in ranged:
        low, high = field.typical
        assert 0 < low < high, field.name
        if field.unit in schemas.units_like("yuan"):
            assert high / low <= 10_000, field.name


def test_patterns_of_regions_and_industries():
    region, industry = (load_schema("bank").field(name).pattern for name in ("region_code", "industry_code"))
    assert all(re.search(region, code) for code in ("330106", "110000", "710000"))
    assert not any(re.search(region, code) for code in ("990106", "33010", "3301066", "160000"))
    assert all(re.search(industry, code) for code in ("C3011", "A0111", "F51", "6420"))
    assert not any(re.search(industry, code) for code in ("U0111", "A0011", "C30111", "X"))


def test_an_unknown_field_is_refused_with_its_neighbours():
    with pytest.raises(DataError, match=r"no field 'revenue_12'.*revenue_12m"):
        load_schema("bank").field("revenue_12")
    with pytest.raises(DataError, match="no schema 'insurer'; there are bank, pboc, public_credit"):
        load_schema("insurer")


@pytest.mark.parametrize(
    ("source", "target", "factor"),
    [
        ("wan_yuan", "yuan", (10_000, 1)),
        ("yuan", "wan_yuan", (1, 10_000)),
        ("yi_yuan", "wan_yuan", (10_000, 1)),
        ("percent", "share", (1, 100)),
        ("share", "percent", (100, 1)),
        ("years", "months", (12, 1)),
        ("wan_kwh", "kwh", (10_000, 1)),
        ("yuan", "yuan", (1, 1)),
    ],
)
def test_units(source, target, factor):
    assert unit_factor(source, target) == factor


@settings(derandomize=True, deadline=None)
@given(st.sampled_from(sorted(schemas._UNITS)), st.sampled_from(sorted(schemas._UNITS)))
def test_units_there_and_back(left, right):
    if right not in schemas.units_like(left):
        with pytest.raises(DataError, match="cannot become"):
            unit_factor(left, right)
        return
    up, down = unit_factor(left, right)
    assert unit_factor(right, left) == (down, up)


def test_tiers_five_to_three_and_never_back():
    assert [three_from_five(tier) for tier in "12345"] == ["1", "2", "3", "3", "3"]
    assert three_from_five("6") is None
    assert three_from_five("9") is None
    with pytest.raises(ValueError, match="must be 1 to 5"):
        three_from_five("7")


GOOD = {
    "name": "x",
    "zh": "x",
    "block": "b",
    "type": "number",
    "level": 2,
    "time": "snapshot",
    "source": "s",
    "unit": "yuan",
}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"level": 5}, "level 5 data is not for this use"),
        ({"unit": None}, "numbers need a unit"),
        ({"unit": "dollar"}, "unit 'dollar' is none of"),
        ({"type": "code", "unit": None}, "needs a code list or a pattern"),
        ({"type": "regime", "unit": None}, "needs `boundary` and `of`"),
        ({"personal": True}, "personal data has level 4"),
        ({"name": "X y"}, "small letters"),
        ({"least": 2.0, "most": 1.0}, "is empty"),
    ],
)
def test_a_field_that_contradicts_itself_is_refused(change, message):
    Field(**GOOD)
    with pytest.raises(ValueError, match=message):
        Field(**{**GOOD, **change})


def test_a_schema_file_with_a_typing_error_is_refused():
    content = b'kind="bank"\nversion="1"\nzh="b"\n[[block]]\nname="k"\nzh="k"\nsource="s"\nlevel=1\ntime="snapshot"\n'
    parse_schema(content + b'fields=[{name="a",zh="a",type="flag"}]')
    with pytest.raises(ValueError, match="unknown key lvl"):
        parse_schema(content + b'fields=[{name="a",zh="a",type="flag",lvl=3}]')
    with pytest.raises(ValueError, match="a defined twice"):
        parse_schema(content + b'fields=[{name="a",zh="a",type="flag"},{name="a",zh="a",type="flag"}]')


def test_the_catalogue_page_is_the_generated_one():
    page = (ROOT / "docs" / "data-catalogue.md").read_text(encoding="utf-8")
    assert page == schemas.catalogue(), "run: xinyi-node data catalogue"
    for _, field in EVERY:
        assert f"| `{field.name}` | {field.zh} |" in page

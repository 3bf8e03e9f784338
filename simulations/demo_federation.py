"""Write a made-up federation folder: three banks, the credit bureau, tax and court records of small Chinese firms.

Everything is invented, the relations to default included: it shows the system at work and is no evidence of uplift
(measure that on real sets). Field names and units follow the second-generation PBOC enterprise report and the
public-credit catalogues; shares and rates are anchored where a source exists (tax grades of 2021, default rates of
small-firm loans), see README.txt in the folder. Codes of firms have correct check characters (GB 32100-2015) and a
region that GB/T 2260 does not assign (99xxxx), so none is a real firm's.

What it holds on purpose: partial coverage (85 % bureau, 95 % tax, 70 % court, and firms that no bank knows),
zero-inflated counts, atoms (12 of 12 months), a special code (-99: no revolving limit), missing balance sheets of micro
firms, a leaky column that must not be used (dpd_max_12m), unlabelled rows (31-89 days: neither good nor bad), banks
with other mixes and default rates.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from models.errors import DataError
from models.uscc import ALPHABET, body_check_character, check_character

BANKS = {"bank_north": (0.45, 0.025), "bank_river": (0.33, 0.04), "bank_coast": (0.22, 0.075)}
"""Share of the rows, rate of default."""
COVERAGE = {"pboc": 0.85, "public_tax": 0.95, "public_court": 0.70}
UNKNOWN_TO_BANKS = 0.10  # firms at the owners without a loan, as a share of the banks' firms
INDETERMINATE = 0.015  # share of loans with 31-89 days past due: no label
NO_LIMIT = -99.0
LEAST_ENTERPRISES = 300
WEIGHT = {"bank": 0.50, "pboc": 0.45, "public_tax": 0.36, "public_court": 0.28}
"""Logit per standard deviation of a party's risk index."""

NOTE = "Synthetic: firms, values and their relation to default are invented. No evidence of real uplift."

Floats = npt.NDArray[np.float64]


def generate(folder: Path | str, seed: int, enterprises: int = 20_000) -> Path:
    """Write split.json, README.txt and one CSV per party; `enterprises` rows at the banks. Same seed, same bytes.

    Overwrites only a folder that is empty or was made by this function. Returns the folder.
    """
    if enterprises < LEAST_ENTERPRISES:
        raise ValueError(f"enterprises is {enterprises}, must be at least {LEAST_ENTERPRISES} for three banks to train")
    folder = Path(folder)
    _claim(folder)
    rng = np.random.default_rng(seed)
    total = enterprises + round(enterprises * UNKNOWN_TO_BANKS)
    firms = _firms(rng, total)
    tables = {
        "bank": _bank(rng, firms),
        "pboc": _pboc(rng, firms),
        "public_tax": _tax(rng, firms),
        "public_court": _court(rng, firms),
    }
    label, dpd = _labels(rng, firms, tables)
    ids = _codes(rng, firms["individual"])
    bank_file = pd.DataFrame({"uscc": ids, "bank": firms["bank"], "bad12": label, "dpd_max_12m": dpd})
    bank_file["bad12"] = bank_file["bad12"].astype("Int64")
    bank_file = pd.concat([bank_file, pd.DataFrame(tables["bank"])], axis=1)[:enterprises]
    bank_file.to_csv(folder / "bank.csv", index=False, lineterminator="\n")
    for name, coverage in COVERAGE.items():
        # larger firms are more often on file; firms without a bank come from the owners' own records
        known = rng.random(total) < np.clip(coverage + 0.04 * firms["size"], 0.0, 1.0)
        order = rng.permutation(np.flatnonzero(known))
        table = pd.concat([pd.DataFrame({"uscc": ids}), pd.DataFrame(tables[name])], axis=1).iloc[order]
        table.to_csv(folder / f"{name}.csv", index=False, lineterminator="\n")
    columns = {name: list(table) for name, table in tables.items()}
    split = json.dumps(_split(columns), indent=1, ensure_ascii=False) + "\n"
    (folder / "split.json").write_text(split, encoding="utf-8", newline="\n")
    (folder / "README.txt").write_text(_readme(seed, enterprises, columns), encoding="utf-8", newline="\n")
    return folder


def _claim(folder: Path) -> None:
    """Make the folder; refuse one with contents of another origin."""
    folder.mkdir(parents=True, exist_ok=True)
    if not any(folder.iterdir()):
        return
    try:
        ours = json.loads((folder / "split.json").read_text(encoding="utf-8")).get("note") == NOTE
    except (OSError, ValueError, AttributeError):
        ours = False
    if not ours:
        raise DataError(f"{folder} is not empty and no demo federation: nothing was written; name a new folder")


def _firms(rng: np.random.Generator, n: int) -> dict[str, Any]:
    """What a firm is before anybody records it: bank, size and quality (standard normal), age, section, kind."""
    names, shares = list(BANKS), [share for share, _ in BANKS.values()]
    bank = rng.choice(names, size=n, p=shares)
    size = rng.normal(0.0, 1.0, n) + np.where(bank == "bank_north", 0.25, np.where(bank == "bank_coast", -0.35, 0.0))
    quality = rng.normal(0.0, 1.0, n)
    # GB/T 4754 sections; the coast bank lends more to trade and catering, the north bank more to manufacturing
    sections = np.array(["A", "C", "E", "F", "G", "H", "I", "L", "M", "O"])
    mix = {
        "bank_north": [0.04, 0.38, 0.10, 0.22, 0.06, 0.03, 0.05, 0.05, 0.05, 0.02],
        "bank_river": [0.06, 0.28, 0.12, 0.28, 0.07, 0.04, 0.04, 0.05, 0.03, 0.03],
        "bank_coast": [0.02, 0.20, 0.08, 0.38, 0.06, 0.10, 0.05, 0.05, 0.03, 0.03],
    }
    industry = np.empty(n, dtype=object)
    for name in names:
        mine = bank == name
        industry[mine] = rng.choice(sections, size=int(mine.sum()), p=mix[name])
    age = np.round(np.clip(rng.gamma(2.2, 3.2, n) + 0.8 * size + 0.5, 0.3, 45.0), 1)
    return {
        "bank": bank,
        "size": size,
        "quality": quality,
        "age": age,
        "industry": industry,
        "individual": rng.random(n) < np.where(size < -0.8, 0.35, 0.05),
    }


def _bank(rng: np.random.Generator, f: dict[str, Any]) -> dict[str, Any]:
    """The bank's own view: loan terms and the account. Amounts in yuan."""
    n, size, quality = len(f["size"]), f["size"], f["quality"]
    inflow = np.exp(14.6 + 1.1 * size + 0.25 * quality + rng.normal(0.0, 0.7, n))
    months = np.where(rng.random(n) < 0.62 + 0.08 * quality, 12, rng.integers(0, 12, n))
    assets = np.round(np.clip(0.52 - 0.09 * quality + rng.normal(0.0, 0.17, n), 0.02, 1.6), 4)
    assets[rng.random(n) < np.where(size < -0.3, 0.62, 0.14)] = np.nan  # micro firms without a balance sheet
    modes = np.array(["credit", "guarantee", "mortgage", "pledge", "mixed"])
    return {
        "requested_amount": _round_to(np.exp(14.2 + 0.9 * size + rng.normal(0.0, 0.6, n)), 10_000),
        "term_months": rng.choice([6, 12, 24, 36], size=n, p=[0.12, 0.58, 0.12, 0.18]),
        "guarantee_mode": modes[np.searchsorted([0.157, 0.45, 0.83, 0.91], rng.random(n))],
        "industry_section": f["industry"],
        "firm_age_years": f["age"],
        "acct_inflow_12m": _round_to(inflow * months / 12, 1),
        "inflow_months_12m": months,
        "avg_balance_3m": _round_to(inflow * np.exp(-3.4 + 0.45 * quality + rng.normal(0.0, 0.9, n)), 1),
        "settle_share_here": np.round(np.clip(rng.beta(2.0, 2.4, n) + 0.05 * quality, 0.0, 1.0), 4),
        "returned_item_cnt_6m": _count(rng, 0.16, -0.55 * quality),
        "prior_loan_cnt": _count(rng, 1.3, 0.25 * size + 0.15 * quality),
        "debt_to_assets": assets,
    }


def _pboc(rng: np.random.Generator, f: dict[str, Any]) -> dict[str, Any]:
    """Credit report, second generation. Balances in 10,000 yuan, as in its credit parts."""
    n, size, quality = len(f["size"]), f["size"], f["quality"]
    lenders = 1 + _count(rng, 1.5, 0.35 * size)
    balance = np.round(np.exp(5.2 + 0.9 * size + rng.normal(0.0, 0.8, n)) * (rng.random(n) < 0.9), 2)
    used = np.round(np.clip(0.55 - 0.14 * quality + rng.normal(0.0, 0.24, n), 0.0, 1.0), 4)
    used[rng.random(n) < 0.3] = NO_LIMIT
    watch = (rng.random(n) < _logistic(-3.3 - 0.7 * quality)) * np.exp(3.6 + 0.6 * size + rng.normal(0.0, 0.8, n))
    bad = (rng.random(n) < _logistic(-4.5 - 0.7 * quality)) * np.exp(3.2 + 0.5 * size + rng.normal(0.0, 0.9, n))
    return {
        "lender_cnt": lenders,
        "open_lender_cnt": np.minimum(lenders, _count(rng, 1.2, 0.25 * size - 0.25 * quality)),
        "loan_bal": balance,
        "watch_bal": np.round(watch, 2),
        "npl_bal": np.round(bad, 2),
        "overdue_acct_cnt_24m": _count(rng, 0.22, -0.7 * quality),
        "cyc_used_share": used,
        "enquiry_cnt_6m": _count(rng, 1.4, -0.35 * quality),
        "guar_bal": np.round((rng.random(n) < 0.22) * np.exp(4.6 + 0.8 * size + rng.normal(0.0, 0.9, n)), 2),
        "months_since_first_credit": np.floor(np.minimum(f["age"] * 12, rng.gamma(2.0, 28.0, n))),
    }


def _tax(rng: np.random.Generator, f: dict[str, Any]) -> dict[str, Any]:
    """Tax, invoices and social security. Amounts in yuan; grade shares near A 8.3, B and M 82.6, C and D 9.1 %."""
    n, size, quality = len(f["size"]), f["size"], f["quality"]
    ranked = 0.7 * quality + rng.normal(0.0, 0.7, n)
    grade = np.where(ranked > 1.37, "A", np.where(ranked > -1.32, "B", np.where(ranked > -1.9, "C", "D"))).astype(
        object
    )
    grade[(f["age"] < 2.5) & (grade == "B")] = "M"  # M: new, or no revenue
    zero_months = np.where(rng.random(n) < 0.66 + 0.08 * quality, 0, rng.integers(1, 13, n))
    sales = np.exp(14.9 + 1.05 * size + 0.2 * quality + rng.normal(0.0, 0.6, n)) * (12 - zero_months) / 12
    growth = np.round(np.maximum(0.06 + 0.13 * quality + rng.normal(0.0, 0.35, n), -1.0), 4)
    growth[f["age"] < 2.0] = np.nan  # no year before
    heads = 1 + _count(rng, 7.0, 0.8 * size)
    change = np.round(np.clip(0.02 + 0.08 * quality + rng.normal(0.0, 0.22, n), -1.0, 3.0), 3)
    change[rng.random(n) < 0.35] = 0.0
    return {
        "tax_credit_grade": grade,
        "vat_sales_12m": _round_to(sales, 1),
        "tax_paid_12m": _round_to(sales * np.clip(rng.beta(2.0, 60.0, n), 0.0, 0.2), 1),
        "tax_zero_months_12m": zero_months,
        "late_filing_cnt_12m": _count(rng, 0.35, -0.5 * quality),
        "tax_arrears_flag": (rng.random(n) < _logistic(-3.5 - 0.8 * quality)).astype(np.int64),
        "inv_red_ratio_12m": np.round(np.clip(rng.beta(1.2, 38.0, n) - 0.006 * quality, 0.0, 1.0), 4),
        "inv_void_ratio_12m": np.round(np.clip(rng.beta(1.4, 30.0, n), 0.0, 1.0), 4),
        "inv_growth_yoy": growth,
        "top5_customer_share": np.round(np.clip(rng.beta(2.4, 2.2, n) - 0.05 * size, 0.0, 1.0), 4),
        "ss_headcount": heads,
        "ss_headcount_chg_12m": change,
    }


def _court(rng: np.random.Generator, f: dict[str, Any]) -> dict[str, Any]:
    """Courts, penalties, registration events. Amounts in yuan."""
    n, size, quality = len(f["size"]), f["size"], f["quality"]
    cases = _count(rng, 0.14, -0.75 * quality + 0.2 * size)
    amount = np.where(cases > 0, _round_to(cases * np.exp(11.6 + 0.7 * size + rng.normal(0.0, 1.1, n)), 1), 0)
    return {
        "judgment_cnt_24m": _count(rng, 0.45, -0.5 * quality + 0.3 * size),
        "enforcement_cnt_24m": cases,
        "enforcement_amt_24m": amount,
        "dishonest_flag": ((cases > 0) & (rng.random(n) < 0.16)).astype(np.int64),
        "penalty_cnt_12m": _count(rng, 0.12, -0.3 * quality + 0.2 * size),
        "abnormal_list_cnt_12m": _count(rng, 0.07, -0.6 * quality),
        "equity_frozen_cnt_12m": _count(rng, 0.04, -0.7 * quality),
        "legal_rep_change_12m": (rng.random(n) < 0.08).astype(np.int64),
        "labor_case_cnt_24m": _count(rng, 0.10, -0.3 * quality + 0.3 * size),
    }


def _risk_indices(tables: dict[str, dict[str, Any]], industry: Any) -> dict[str, Floats]:
    """One invented risk index per party, a function of its columns alone, mean 0 and standard deviation 1."""
    b, p, t, c = (tables[name] for name in ("bank", "pboc", "public_tax", "public_court"))
    section = pd.Series(industry).map({"E": 0.35, "F": 0.15, "H": 0.45, "I": -0.2, "M": -0.3}).fillna(0.0).to_numpy()
    mode = (
        pd.Series(b["guarantee_mode"]).map({"credit": 0.1, "guarantee": 0.25, "mortgage": -0.3}).fillna(0.0).to_numpy()
    )
    bank = (
        section
        + mode
        - 0.45 * np.log1p(b["firm_age_years"])
        - 0.30 * np.log(b["avg_balance_3m"] / b["requested_amount"] + 0.005)
        - 0.07 * b["inflow_months_12m"]
        + 0.55 * np.minimum(b["returned_item_cnt_6m"], 3)
        - 0.15 * np.minimum(b["prior_loan_cnt"], 4)
        + 1.3 * np.nan_to_num(b["debt_to_assets"], nan=0.6)
        - 0.5 * b["settle_share_here"]
    )
    used = np.where(p["cyc_used_share"] == NO_LIMIT, 0.5, p["cyc_used_share"])
    pboc = (
        0.9 * (p["watch_bal"] > 0)
        + 1.4 * (p["npl_bal"] > 0)
        + 0.60 * np.minimum(p["overdue_acct_cnt_24m"], 4)
        + 1.6 * np.maximum(used - 0.5, 0.0)
        + 0.16 * np.minimum(p["enquiry_cnt_6m"], 6)
        + 0.15 * np.minimum(p["open_lender_cnt"], 6)
        - 0.004 * np.minimum(p["months_since_first_credit"], 120)
    )
    tax = (
        pd.Series(t["tax_credit_grade"]).map({"A": -0.5, "B": 0.0, "M": 0.3, "C": 0.6, "D": 1.3}).to_numpy()
        + 0.10 * t["tax_zero_months_12m"]
        + 0.25 * np.minimum(t["late_filing_cnt_12m"], 4)
        + 0.9 * t["tax_arrears_flag"]
        + 7.0 * np.minimum(t["inv_red_ratio_12m"], 0.15)
        - 0.8 * np.clip(np.nan_to_num(t["inv_growth_yoy"], nan=-0.1), -0.8, 0.8)
        + 0.8 * np.maximum(t["top5_customer_share"] - 0.5, 0.0)
        - 0.9 * np.clip(t["ss_headcount_chg_12m"], -0.5, 0.5)
    )
    court = (
        0.8 * (c["enforcement_cnt_24m"] > 0)
        + 0.10 * np.log1p(c["enforcement_amt_24m"] / 1e5)
        + 1.5 * c["dishonest_flag"]
        + 0.25 * np.minimum(c["judgment_cnt_24m"], 4)
        + 0.4 * np.minimum(c["penalty_cnt_12m"], 2)
        + 0.8 * np.minimum(c["abnormal_list_cnt_12m"], 2)
        + 0.9 * np.minimum(c["equity_frozen_cnt_12m"], 2)
        + 0.3 * c["legal_rep_change_12m"]
    )
    found = {"bank": bank, "pboc": pboc, "public_tax": tax, "public_court": court}
    return {name: (index - index.mean()) / index.std() for name, index in found.items()}


def _labels(rng: np.random.Generator, f: dict[str, Any], tables: dict[str, dict[str, Any]]) -> tuple[Any, Any]:
    """bad12 (1, 0, missing) and the leaky days past due. Sum of the parties' indices and two mild interactions."""
    index = _risk_indices(tables, f["industry"])
    logit = sum((WEIGHT[name] * values for name, values in index.items()), np.zeros(len(f["bank"])))
    logit = logit + 0.10 * index["bank"] * index["pboc"] + 0.08 * index["pboc"] * index["public_tax"]
    probability = np.empty(len(logit))
    for name, (_, rate) in BANKS.items():
        mine = f["bank"] == name
        probability[mine] = _logistic(logit[mine] + _intercept(logit[mine], rate))
    bad = rng.random(len(logit)) < probability
    between = ~bad & (rng.random(len(logit)) < INDETERMINATE)
    good_days = np.where(rng.random(len(logit)) < 0.85, 0, rng.integers(1, 31, len(logit)))
    dpd = np.where(
        bad, rng.integers(90, 366, len(logit)), np.where(between, rng.integers(31, 90, len(logit)), good_days)
    )
    return np.where(between, np.nan, bad.astype(np.float64)), dpd


def _intercept(logit: Floats, rate: float) -> float:
    """The intercept at which the mean probability is `rate`, by bisection."""
    low, high = -30.0, 30.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if _logistic(logit + middle).mean() < rate else (low, middle)
    return low


def _logistic(x: Any) -> Any:
    return 1.0 / (1.0 + np.exp(-x))


def _count(rng: np.random.Generator, mean: float, log_factor: Any) -> npt.NDArray[np.int64]:
    """Zero-inflated count: Poisson with a gamma-distributed rate (shape 0.8)."""
    rate = mean * np.exp(np.clip(log_factor, -4.0, 4.0)) * rng.gamma(0.8, 1.25, len(log_factor))
    return np.asarray(rng.poisson(rate), dtype=np.int64)


def _round_to(values: Any, step: int) -> Any:
    return np.round(values / step).astype(np.int64) * step


def _codes(rng: np.random.Generator, individual: Any) -> list[str]:
    """Distinct codes with correct inner and outer check characters, in a region that does not exist."""
    n = len(individual)
    numbers = rng.permutation(np.unique(rng.integers(0, 31**6, size=2 * n + 100)))[:n]
    regions = rng.integers(1, 60, size=n)
    codes = []
    for number, region, one_person in zip(numbers.tolist(), regions.tolist(), individual.tolist(), strict=True):
        digits = []
        for _ in range(6):
            number, digit = divmod(number, 31)
            digits.append(ALPHABET[digit])
        body = "MA" + "".join(digits)
        head = f"{'92' if one_person else '91'}99{region:04d}{body}{body_check_character(body)}"
        codes.append(head + check_character(head))
    return codes


def _split(columns: dict[str, list[str]]) -> dict[str, Any]:
    return {
        "synthetic": True,
        "note": NOTE,
        "id": "uscc",
        "label": "bad12",
        "label_file": "bank.csv",
        "rows": "all loans with a label",
        "parties": {name: {"file": f"{name}.csv", "columns": list(names)} for name, names in columns.items()},
        "horizontal_key": "bank",
        "horizontal_groups": list(BANKS),
        "never_use_as_features": ["dpd_max_12m"],
        "categorical": ["guarantee_mode", "industry_section", "tax_credit_grade"],
        "missing_codes": {"cyc_used_share": [NO_LIMIT]},
        "baseline_lr": {
            "C": 1.0,
            "sign_log1p_columns": [
                *("requested_amount", "acct_inflow_12m", "avg_balance_3m", "loan_bal", "watch_bal", "npl_bal"),
                *("guar_bal", "vat_sales_12m", "tax_paid_12m", "ss_headcount", "enforcement_amt_24m"),
            ],
        },
    }


def _readme(seed: int, enterprises: int, columns: dict[str, list[str]]) -> str:
    parties = "\n".join(f"  {name}.csv: {', '.join(names)}" for name, names in columns.items())
    banks = "\n".join(
        f"  {name}: {share:.0%} of the rows, default rate {rate:.1%}" for name, (share, rate) in BANKS.items()
    )
    return f"""SYNTHETIC DATA - 模拟数据，仅供演示
{NOTE}
企业、数值及其与违约的关系均为虚构，不得作为效果证明。

Written by simulations/demo_federation.py, seed {seed}, {enterprises} enterprises at the banks and
{round(enterprises * UNKNOWN_TO_BANKS)} more that only the owners know.

id       uscc: unified social credit code, correct check characters (GB 32100-2015), region 99 does not exist
label    bad12: 1 = 90 days past due or worse within 12 months, 0 = at most 30 days, empty = between, no label
leak     dpd_max_12m is the outcome itself: never a feature
code     cyc_used_share = -99: no revolving limit
units    yuan; balances in pboc.csv in 10,000 yuan (as in the report)

Banks (column bank)
{banks}

Parties and columns
{parties}

Coverage of the banks' enterprises: pboc about 85 %, public_tax 95 %, public_court 70 %; larger firms more often.

Invented: the probability of default is logistic in the sum of one risk index per party (a sum of simple functions of
that party's own columns) plus two mild interactions (bank x pboc, pboc x tax), with an intercept per bank. Firms share
a hidden quality and size, so the parties' columns are correlated.
Anchored: shares of the tax grades (A 8.3 %, B and M 82.6 %, C and D 9.1 %, 2021), share of pure credit loans (15.7 %),
order of magnitude of small-firm default rates and ticket sizes.
"""

"""An institution's own tables, end to end: map, check, consent, align, train."""

import tempfile
from datetime import UTC, date, datetime, timedelta
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv as pacsv
import pytest

from fl_clients import institution as homes
from fl_clients.bank import Bank
from fl_clients.checked_data import bank_data, column_terms, consent_of, owner_data
from fl_clients.consent import ConsentStore, consent_columns
from fl_clients.contract import (
    AlignmentTerms,
    Contract,
    LabelTerms,
    ModelTerms,
    PartyTerms,
    PrivacyTerms,
    Role,
    SignedContract,
    all_releases,
)
from fl_clients.data_check import CheckedTable, check_table, load_checked
from fl_clients.feature_owner import FeatureOwner
from fl_clients.mapping import check_mapping, parse_mapping
from fl_clients.sources import batches
from fl_clients.vault import Vault
from models.errors import DataError
from models.schema import Schema, load_schema
from models.score_histogram import ScoreHistogram
from privacy.identity import SigningIdentity
from privacy.noise import KeyedForwardNoise, RecordedForwardNoise, RecordedNoise, SystemNoise
from simulations.job import Parties, admit, data_terms, run_in_memory
from tests.test_data_check import codes

PURPOSE = "小微企业信用贷款 贷前风险评估"
NOW = datetime(2025, 6, 15, tzinfo=UTC)
BANK_FIELDS = ("revenue_12m", "guarantee_mode")
PBOC_FIELDS = ("loan_bal", "open_lender_cnt")


def write_and_check(
    path: Path, cells: dict[str, object], kind: str, columns: dict[str, object], **of: object
) -> tuple[CheckedTable, Schema]:
    pacsv.write_csv(pa.table(cells), path)
    document = {
        "schema": kind,
        "schema_version": "1.0",
        "source": {"kind": "csv", "path": str(path)},
        "rows": of.get("rows", {}),
        "columns": columns,
    }
    mapping, schema = parse_mapping(document), load_schema(kind)
    check_mapping(mapping, schema)
    names = [item["from"] for item in columns.values()]  # type: ignore[index]
    receipt = check_table(mapping, schema, batches(mapping.source, names), last=None, today=date(2025, 6, 15))
    assert not receipt.refused, receipt.errors
    loaded = load_checked(
        mapping,
        schema,
        batches(mapping.source, names),
        receipt,
        features=of["features"],  # type: ignore[arg-type]
        labels=of.get("labels", ()),  # type: ignore[arg-type]
    )
    return loaded, schema


@pytest.fixture(scope="module")
def tables(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[CheckedTable], CheckedTable, Schema, Schema]:
    folder = tmp_path_factory.mktemp("own")
    rng = np.random.default_rng(2)
    count = 900
    names = np.array(codes(count))
    risk = rng.normal(size=count)
    bad = rng.random(count) < 1 / (1 + np.exp(1.2 - 1.5 * risk))
    revenue = np.round(np.exp(15 - 0.5 * risk + rng.normal(size=count) * 0.5), 2)
    modes = load_schema("bank").field("guarantee_mode").codes
    assert modes is not None
    mode = rng.choice(np.array(modes.codes[:3]), count)
    banks = []
    for number in range(3):
        mine = np.arange(count) % 3 == number
        cells = {
            "信用代码": names[mine].tolist(),
            "申请日期": [date(2025, 3, 10)] * int(mine.sum()),
            "数据日期": [date(2025, 2, 28)] * int(mine.sum()),
            "营业收入": revenue[mine].tolist(),
            "担保方式": mode[mine].tolist(),
            "是否违约": bad[mine].astype(int).tolist(),
        }
        columns: dict[str, object] = {
            "uscc": {"from": "信用代码"},
            "application_date": {"from": "申请日期"},
            "snapshot_date": {"from": "数据日期"},
            "revenue_12m": {"from": "营业收入", "unit": "yuan"},
            "guarantee_mode": {"from": "担保方式"},
            "bad12": {"from": "是否违约"},
        }
        loaded, bank_schema = write_and_check(
            folder / f"bank{number}.csv", cells, "bank", columns, features=BANK_FIELDS, labels=("bad12",)
        )
        banks.append(loaded)
    known = rng.random(count) < 0.85
    cells = {
        "code": names[known].tolist(),
        "asof": [date(2025, 2, 28)] * int(known.sum()),
        "hit": [1] * int(known.sum()),
        "bal": np.round(np.exp(5 + 0.8 * risk[known] + rng.normal(size=int(known.sum())) * 0.5), 2).tolist(),
        "lenders": rng.poisson(np.exp(0.4 * risk[known] + 0.5)).tolist(),
    }
    columns = {
        "uscc": {"from": "code"},
        "snapshot_date": {"from": "asof"},
        "pboc_hit": {"from": "hit"},
        "loan_bal": {"from": "bal", "unit": "wan_yuan"},
        "open_lender_cnt": {"from": "lenders"},
    }
    pboc, pboc_schema = write_and_check(
        folder / "pboc.csv", cells, "pboc", columns, rows={"cut_off": date(2025, 2, 28)}, features=PBOC_FIELDS
    )
    return banks, pboc, bank_schema, pboc_schema


def test_own_tables_train_a_model_and_only_with_consent(
    tables: tuple[list[CheckedTable], CheckedTable, Schema, Schema], tmp_path: Path
) -> None:
    banks, pboc, bank_schema, pboc_schema = tables
    everyone = np.concatenate([bank.codes for bank in banks])
    consenting = everyone[:-40]
    store = ConsentStore(tmp_path / "consent.sqlite")
    grants = pa.table(
        {
            "uscc": consenting.tolist(),
            "purpose": [PURPOSE] * len(consenting),
            "granted": ["2025-01-01"] * len(consenting),
            "expires": ["2026-01-01"] * len(consenting),
            "revoked": [None] * len(consenting),
            "evidence": ["ab" * 32] * len(consenting),
        }
    )
    store.import_table(grants.to_batches(), consent_columns(grants.column_names), NOW)
    consent = consent_of(store, PURPOSE, lambda: NOW)
    names: dict[str, Role] = {"bank0": "bank", "bank1": "bank", "bank2": "bank", "pboc": "pboc"}
    folder = tempfile.TemporaryDirectory()
    institutions = {}
    for name, role in names.items():
        homes.create(Path(folder.name) / name, name, role)
        institutions[name] = homes.open_institution(Path(folder.name) / name)
    identities = {name: institution.identity for name, institution in institutions.items()}
    coordinator = SigningIdentity.generate()
    terms = column_terms(bank_schema, BANK_FIELDS)
    assert terms[1].kind == "categorical"
    assert len(terms[1].categories) > 2
    contract = Contract(
        job="ab" * 16,
        purpose=PURPOSE,
        scenario="working capital",
        label=LabelTerms(definition="bad12"),
        simulation=True,
        not_before=datetime.now(UTC),
        expires=datetime.now(UTC) + timedelta(hours=1),
        uses=1,
        retention_days=0,
        releases=all_releases(),
        coordinator_identity=coordinator.public.hex(),
        parties=(
            *(
                PartyTerms(name=f"bank{n}", role="bank", identity=identities[f"bank{n}"].public.hex(), columns=terms)
                for n in range(3)
            ),
            PartyTerms(
                name="pboc",
                role="pboc",
                identity=identities["pboc"].public.hex(),
                columns=column_terms(pboc_schema, PBOC_FIELDS),
            ),
        ),
        model=ModelTerms(
            rounds=2, max_bins_bank=6, max_bins_owner=6, least_count=5, ridge=2.0, smoothness=20.0, forward_noise=1.0
        ),
        privacy=PrivacyTerms(),
        alignment=AlignmentTerms(bucket=16),
        least_banks=3,
    )
    noise, forward = RecordedNoise(SystemNoise()), RecordedForwardNoise(KeyedForwardNoise(bytes(32)))
    roles = {
        f"bank{number}": Bank(
            name=f"bank{number}",
            contract=contract,
            data=bank_data(table, "bad12", np.arange(len(table.codes)) % 3 == 0, consent),
            noise=noise,
        )
        for number, table in enumerate(banks)
    }
    owner = FeatureOwner(name="pboc", contract=contract, data=owner_data(pboc), noise=forward)
    signed = SignedContract(contract=contract).signed("coordinator", coordinator)
    for name, identity in identities.items():
        signed = signed.signed(name, identity)
    for institution in institutions.values():
        admit(institution, signed)
    terms_of_data = data_terms(contract, 100)
    vaults = {
        name: Vault(institution=institutions[name], signed=signed, role=role, data=terms_of_data)
        for name, role in [*roles.items(), ("pboc", owner)]
    }
    outcome = run_in_memory(
        Parties(
            signed=signed,
            coordinator=coordinator,
            institutions=institutions,
            folder=folder,
            vaults=vaults,
            banks=roles,
            owners={"pboc": owner},
            noise=noise,
            forward_noise=forward,
        ),
        lambda done, total, step: None,
    )
    announced = outcome.roster.announcements
    rows = sum(announced[name].training_rows + announced[name].held_out_rows for name in roles)
    assert rows == len(consenting)
    assert ScoreHistogram.from_vector(np.array(outcome.histogram)).auc() > 0.7


def test_a_label_that_is_no_flag_and_a_field_that_is_no_feature_are_refused(
    tables: tuple[list[CheckedTable], CheckedTable, Schema, Schema],
) -> None:
    banks, _, bank_schema, _ = tables
    with pytest.raises(DataError, match="other than 0 and 1"):
        bank_data(banks[0], "revenue_12m", np.zeros(len(banks[0].codes), np.bool_))
    with pytest.raises(DataError, match="held_out"):
        bank_data(banks[0], "bad12", np.zeros(3, np.bool_))
    with pytest.raises(DataError, match="is no feature"):
        column_terms(bank_schema, ("approved_limit",))

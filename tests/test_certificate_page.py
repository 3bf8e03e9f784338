"""The certificate page: everything that the certificate says for people, nothing computed, nothing that runs."""

import re

import pytest

from fl_server.certificate_page import certificate_page
from tests.small_federation import RecordedRun


@pytest.fixture(params=["exact_run", "private_run"])
def run(request: pytest.FixtureRequest) -> RecordedRun:
    found: RecordedRun = request.getfixturevalue(request.param)
    return found


def test_the_page_shows_parties_epsilon_releases_and_signatures(run: RecordedRun) -> None:
    certificate = run.outcome.certificate
    page = certificate_page(certificate)
    body = certificate["body"]
    for name, receipt in body["receipts"].items():
        assert name in page
        assert f"{receipt['bytes_out']:,}" in page
        assert body["heads"][name]["root"][:24] in page
    assert body["contract_hash"] in page
    for release in body["facts"]["privacy"]["releases"]:
        assert f"<th>{release['name']}</th>" in page
    assert ("No epsilon." in page) == (body["facts"]["privacy"]["epsilon"] is None)
    assert page.count("<td>yes</td>") == len(certificate["signatures"])
    assert "SIMULATION" in page
    first = re.search(r"Who saw what.*?<th>(.*?)</th>", page, re.DOTALL)
    assert first is not None
    assert first[1] == "what"


def test_a_missing_signature_shows_and_text_is_escaped(run: RecordedRun) -> None:
    certificate = run.outcome.certificate
    signatures = {name: value for name, value in certificate["signatures"].items() if name != "bank2"}
    contract = certificate["body"]["contract"]
    odd = {**contract, "contract": {**contract["contract"], "purpose": "<script>alert(1)</script>"}}
    page = certificate_page({"body": {**certificate["body"], "contract": odd}, "signatures": signatures})
    assert page.count("<td>NO</td>") == 1
    assert "<script" not in page
    assert "default-src 'none'" in page

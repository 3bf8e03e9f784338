"""The report page: nothing from data is markup, nothing is loaded, nothing that must be said is silently left out."""

import copy
import dataclasses
import re
from html.parser import HTMLParser
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from fl_server.report import (
    VIEWERS,
    ReportSections,
    comparison_table,
    console_tables,
    pairs_table,
    render,
    steps_table,
)
from models.points import PointScale, scorecard_rows
from models.score_histogram import SCORE_SCALE, ScoreHistogram

HOSTILE = "<script>alert(1)</script>\"'&$x_1$[red]{{ 7*7 }}"


def histogram() -> ScoreHistogram:
    rng = np.random.default_rng(1)
    label = (rng.random(3_000) < 0.2).astype(np.int8)
    return ScoreHistogram.of(np.round(rng.normal(label - 2.0, 1.0) * SCORE_SCALE).astype(np.int64), label)


HISTOGRAM = histogram()


def a_result() -> dict[str, Any]:
    return {
        "auc": {
            "federated": 0.7743,
            "pooled_twin": 0.7743,
            "label_holder_columns": 0.7301,
            "alone": {"Bank A": 0.711, "银行乙": 0.7052},
            "pooled_lr": 0.7612,
            "pooled_boosting": 0.7834,
        },
        "ks": {"federated": 0.4111, "pooled_twin": 0.4111, "alone": {"Bank A": 0.31}},
        "exact": True,
        "rounds": 3,
        "messages": 312,
        "seconds": {"total": 141.3, "twin": 2.25},
        "bytes": {"total": 182_345_678, "coordinator_in": 91_000_000},
        "privacy": {
            "epsilon": 3.0,
            "delta": 3.3e-6,
            "he": {"scheme": "BFV", "n": 8192, "log_q": 180, "log_t": 38, "security_bits": 128, "flooding_bits": 58},
        },
        "rows": {"train": 30_000, "held out": 13_000},
        "parties": ["Bank A", "银行乙", "PBOC"],
        "peak_memory_mb": 812.5,
    }


def full_sections(name: str = "PBOC bureau") -> ReportSections:
    """Every section, with `name` wherever a text of data may stand."""
    rows = scorecard_rows(
        [(name, name), (name, "missing")],
        np.array([0.5, -0.25]),
        scale=PointScale(),
        intercept=-2.0,
        features_total=2,
        counts=np.array([75, 25]),
    )
    return ReportSections(
        job=f"job {name}",
        date="2026-11-24",
        curves={"federated": HISTOGRAM.roc(), name: ([0.0, 0.5, 1.0], [0.0, 0.6, 1.0])},
        ks=HISTOGRAM.ks_curve(),
        calibration=HISTOGRAM.calibration(),
        lift=HISTOGRAM.lift(),
        scorecard={name: rows},
        point_scale=PointScale(),
        steps=[(f"train {name}", name, 6, 0.9, 12_000, 10_400_000), ("train.sum", name, 4, 3.0, 999_960, 0)],
        pairs={(name, "coordinator"): 5_000_000, ("coordinator", name): 0},
        releases=[(f"S of {name}", 3, 3.1623, 44.1), ("loss", 1, 1.0, 0.0)],
        who_saw_what=[{"what": f"raw rows {name}"} | dict.fromkeys(VIEWERS, "no")],
        warnings=[f"fewer than 3 banks {name}"],
        stand_ins=[f"stand-in {name}"],
        note=f"Synthetic {name}",
    )


def bare_sections() -> ReportSections:
    return ReportSections(job="job 7", date="2026-11-24")


class Page(HTMLParser):
    """Every element with its attributes, the visible text, and whether tags are balanced."""

    VOID = ("meta", "link", "img", "br", "hr", "input", "col")

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.stack: list[str] = []
        self.texts: list[str] = []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.stack.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.stack.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.stack:
            self.texts.append(data)

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", "".join(self.texts))

    @property
    def ids(self) -> list[str]:
        return [attrs["id"] or "" for _, attrs in self.elements if "id" in attrs]


def console_text(*tables: Any) -> str:
    console = Console(width=200, no_color=True, force_terminal=False)
    with console.capture() as capture:
        for table in tables:
            console.print(table)
    return capture.get()


# Safety of the page


@pytest.mark.parametrize("name", ["PBOC bureau", HOSTILE])
def test_page_loads_nothing_and_runs_nothing(name: str) -> None:
    html = render(a_result(), full_sections(name))
    page = Page(html)
    assert page.stack == []
    tags = {tag for tag, _ in page.elements}
    assert not tags & {"script", "link", "img", "iframe", "object", "embed", "base", "form", "image", "foreignobject"}
    policies = [a["content"] for tag, a in page.elements if a.get("http-equiv") == "Content-Security-Policy"]
    assert policies == ["default-src 'none'; style-src 'unsafe-inline'"]
    for tag, attributes in page.elements:
        for key, value in attributes.items():
            assert not key.startswith("on"), (tag, key)
            if key in ("src", "href", "xlink:href", "action", "data", "srcset"):
                assert (value or "").startswith("#"), (tag, key, value)
    assert not re.search(r"@import|url\((?!#)|javascript:", html)


def test_references_inside_the_plots_resolve_and_stay_in_their_plot() -> None:
    page = Page(render(a_result(), full_sections()))
    assert len(page.ids) == len(set(page.ids))
    used = [a["xlink:href"] for _, a in page.elements if "xlink:href" in a]
    used += [(a["clip-path"] or "")[4:-1] for _, a in page.elements if "clip-path" in a]
    assert len(used) > 20
    assert all(reference is not None and reference[1:] in page.ids for reference in used)


def test_hostile_names_appear_only_as_text() -> None:
    result = a_result()
    result["auc"]["alone"] = {HOSTILE: 0.7}
    result["parties"] = [HOSTILE]
    result["rows"] = {HOSTILE: 5}
    result["privacy"]["he"]["scheme"] = HOSTILE
    html = render(result, full_sections(HOSTILE))
    assert "<script" not in html
    text = Page(html).text
    for where in ("job ", "raw rows ", "stand-in ", "Synthetic ", "S of ", "train ", "fewer than 3 banks "):
        assert where + HOSTILE in text, where
    assert text.count(HOSTILE) >= 18


def test_same_input_gives_the_same_page() -> None:
    assert render(a_result(), full_sections()) == render(a_result(), full_sections())


# What the page says


def test_full_page_says_every_figure() -> None:
    text = Page(render(a_result(), full_sections())).text
    for said in (
        "AUC 0.7743, 0.0633 above the best bank alone (Bank A, 0.7110)",
        "bit-identical to its plaintext twin",
        "epsilon 3",
        "3.3e-06",
        "+0.0442 against label holders' own columns",
        "银行乙 alone",
        "0.7834",
        "+0.0091",
        "2 min 21 s",
        "182.3 MB",
        "91.0 MB",
        "train 30,000; held out 13,000",
        "812.5",
        "8,192",
        "44.1",
        "75.0 %",
        "+0.5000",
        "1.0 MB",
        "联邦模型",
        "Owners' features have no epsilon",
        "600 points at odds of 20 good to 1 bad",
        "fewer than 3 banks",
    ):
        assert said in text, said


def test_scorecard_points_are_those_of_the_rows() -> None:
    sections = full_sections()
    assert sections.scorecard is not None
    text = Page(render(a_result(), sections)).text
    for row in sections.scorecard["PBOC bureau"]:
        assert f"{row.points:.2f}" in text


SECTION_IDS: dict[str, dict[str, Any]] = {
    "curves": {"curves": {}, "ks": None},
    "calibration": {"calibration": ()},
    "lift": {"lift": ()},
    "scorecard": {"scorecard": None},
    "steps": {"steps": ()},
    "pairs": {"pairs": {}},
    "who-saw-what": {"who_saw_what": ()},
    "warnings": {"warnings": ()},
    "data": {"note": "", "stand_ins": ()},
}


@pytest.mark.parametrize("section", SECTION_IDS)
def test_absent_sections_are_not_shown_and_the_others_are(section: str) -> None:
    page = Page(render(a_result(), dataclasses.replace(full_sections(), **SECTION_IDS[section])))
    assert section not in page.ids
    assert set(SECTION_IDS) - {section} <= set(page.ids)


def test_smallest_result_makes_a_page() -> None:
    smallest = {"auc": {"federated": 0.7}, "ks": {"federated": 0.3}, "exact": None, "privacy": {"epsilon": 1.5}}
    page = Page(render(smallest, bare_sections()))
    assert not set(page.ids) & set(SECTION_IDS)
    assert "It was not compared with a plaintext twin" in page.text
    assert "svg" not in {tag for tag, _ in page.elements}


def test_no_epsilon_is_said_loudly() -> None:
    result = a_result()
    result["privacy"]["epsilon"] = None
    text = Page(render(result, bare_sections())).text
    assert "none (simulation only)" in text
    assert "There is no differential privacy" in text
    assert "Outside simulation a job needs epsilon" in text
    assert "Outside simulation" not in Page(render(a_result(), bare_sections())).text


def test_bad_news_is_said_loudly() -> None:
    result = a_result()
    result["exact"] = False
    result["auc"]["federated"] = 0.65
    text = Page(render(result, bare_sections())).text
    assert "DIFFERS from its plaintext twin" in text
    assert "0.0610 BELOW the best bank alone" in text
    assert "bit-identical" not in text


# Refusals


def broken(*path: str, value: Any = None, drop: bool = False) -> dict[str, Any]:
    result = copy.deepcopy(a_result())
    inner = result
    for key in path[:-1]:
        inner = inner[key]
    if drop:
        del inner[path[-1]]
    else:
        inner[path[-1]] = value
    return result


@pytest.mark.parametrize(
    ("result", "message"),
    [
        (broken("auc", "federated", drop=True), "'auc'"),
        (broken("ks", drop=True), "'ks'"),
        (broken("ks", "federated", value=None), "'ks'"),
        (broken("exact", drop=True), "exact"),
        (broken("exact", value="yes"), "exact"),
        (broken("privacy", drop=True), "epsilon"),
        (broken("privacy", "epsilon", drop=True), "epsilon"),
        (broken("privacy", "epsilon", value=0.0), "epsilon"),
        (broken("privacy", "epsilon", value=float("inf")), "epsilon"),
        (broken("auc", "pooled_twins", value=0.7), "pooled_twins"),
        (broken("auc", "federated", value=float("nan")), "auc.federated"),
        (broken("auc", "pooled_lr", value=77.4), "auc.pooled_lr"),
        (broken("ks", "alone", value={"Bank A": -0.1}), "ks.alone Bank A"),
    ],
)
def test_results_that_cannot_be_reported_are_refused(result: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        render(result, bare_sections())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"curves": {"federated": ([0.0, 1.0], [0.0])}}, "equal lengths"),
        ({"curves": {"federated": ([0.0], [0.0])}}, "at least 2"),
        ({"curves": {"federated": ([0.0, 100.0], [0.0, 1.0])}}, "not percent"),
        ({"ks": ([0.0], [0.0, 1.0], [0.0, 1.0])}, "thresholds"),
        ({"who_saw_what": [{"what": "rows", "coordinator": "no"}]}, "who_saw_what"),
        ({"pairs": {("a", "b"): -1}}, "not negative"),
    ],
)
def test_sections_that_cannot_be_drawn_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(bare_sections(), **change)


# Console


def test_console_tables() -> None:
    sections = full_sections()
    text = console_text(*console_tables(a_result(), sections))
    lines = text.splitlines()
    federated = next(line for line in lines if "Federated" in line)
    assert [cell.strip() for cell in federated.split("|")] == ["", "Federated", "0.7743", "0.4111", "", ""]
    boosting = next(line for line in lines if "boosting" in line)
    assert [cell.strip() for cell in boosting.split("|")][1:5] == ["Pooled gradient boosting", "0.7834", "-", "+0.0091"]
    total = next(line for line in lines if "total" in line)
    assert [cell.strip() for cell in total.split("|")][1:7] == ["total", "", "10", "3.900", "1.0 MB", "10.4 MB"]
    sender = next(line for line in lines if "PBOC bureau" in line and "5.0 MB" in line)
    assert [cell.strip() for cell in sender.split("|")][1:4] == ["PBOC bureau", "coordinator", "5.0 MB"]
    assert len(console_tables(a_result(), bare_sections())) == 1


def test_console_text_is_ascii_but_for_names() -> None:
    result = a_result()
    result["auc"]["alone"] = {"Bank A": 0.7}
    assert console_text(*console_tables(result, full_sections())).isascii()


def test_console_obeys_neither_markup_nor_control_characters_in_names() -> None:
    name = "[red]x[/red]\x1b[2J\r"
    result = a_result()
    result["auc"]["alone"] = {name: 0.7}
    text = console_text(
        comparison_table(result), steps_table([(name, name, 1, 0.5, 1, 1)]), pairs_table({(name, name): 1})
    )
    assert text.count(r"[red]x[/red]\x1b[2J\x0d") == 5
    assert "\x1b" not in text
    assert "\r" not in text


def test_no_steps_make_no_total() -> None:
    assert "total" not in console_text(steps_table([]))

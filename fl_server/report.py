"""The report of one job: a self-contained HTML page for a credit committee, and the same figures as console tables.

Guarantee: the page loads nothing (inline style, inline SVG, no script; its Content-Security-Policy forbids the rest),
every text that came from data is escaped, and the same input gives the same bytes (no clock, no random ids). Sections
without data are left out; figures that the page must not be silent about (AUC, KS, `exact`, epsilon) are required.
Nothing here decides what may be released: a scorecard of all parties exists in simulation only, the caller passes
None else.

`result` (also written as result.json) is a nested mapping; * marks what is required, the rest may be absent or None:
    auc, ks        federated*, pooled_twin, label_holder_columns, alone {bank: value}, pooled_lr, pooled_boosting
    exact*         True or False: bit-identical to the plaintext twin or not; None: not compared
    privacy        epsilon* (None: no noise), delta, he {scheme, n, log_q, log_t, security_bits, flooding_bits}
    rounds, messages, rows, parties, peak_memory_mb     a number, a list of names, or {name: number}
    seconds        total, twin                          bytes   total, coordinator_in
"""

import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter
from numpy.typing import NDArray
from rich import box
from rich.table import Table
from rich.text import Text

from models.points import PointScale, ScorecardRow
from models.score_histogram import CalibrationRow, LiftRow

Series = Sequence[float] | NDArray[np.float64]

Step = tuple[str, str, int, float, int, int]
"""(step, kind of party, messages, seconds, bytes in, bytes out)"""

Release = tuple[str, int, float, float]
"""(what is released, times, L2 sensitivity, standard deviation of its noise), both in the units of the release"""

MOST_PAIRS = 12
"""Lines of the console's table of pairs; the page shows all of them."""

VIEWERS = ("coordinator", "label holder", "feature owner", "others")
"""Columns of the who-saw-what table; each row is a mapping of these and "what" to a text."""

_MODELS = {
    "alone": ("alone", "单独建模", "own rows and own columns only"),
    "label_holder_columns": ("Label holders' own columns", "仅银行自有字段", "all banks' rows, no outside columns"),
    "label_holder_lr": ("Label holders' own columns, LR", "仅银行自有字段(LR)", "the same by logistic regression"),
    "federated": ("Federated", "联邦模型", "all rows and columns; no row leaves its owner"),
    "pooled_twin": ("Pooled twin", "集中明文孪生", "the same model on one pooled table, in plaintext"),
    "pooled_lr": ("Pooled logistic regression", "集中逻辑回归", "one pooled table, reference only"),
    "pooled_boosting": ("Pooled gradient boosting", "集中梯度提升", "one pooled table, reference only"),
}
_FEDERATED_COLOUR = "#12407a"
_COLOURS = ("#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7f7f7f", "#8c564b")


@dataclass(frozen=True, kw_only=True)
class ReportSections:
    """Everything on the page that is not a figure of `result`. Empty or None: the section is not shown.

    `curves`: name -> (false positive rate, true positive rate); the name "federated" is drawn bold.
    `ks`: (threshold in logits, share of goods below, share of bads below) of the federated model.
    `scorecard`: party -> its rows, in simulation only. `pairs`: (from, to) -> bytes. `date` is a text of the caller's.
    Raises ValueError for curves of unequal length or outside [0, 1] and for who-saw-what rows with other columns.
    """

    job: str
    date: str
    curves: Mapping[str, tuple[Series, Series]] = field(default_factory=dict)
    ks: tuple[Series, Series, Series] | None = None
    calibration: Sequence[CalibrationRow] = ()
    lift: Sequence[LiftRow] = ()
    scorecard: Mapping[str, Sequence[ScorecardRow]] | None = None
    point_scale: PointScale | None = None
    steps: Sequence[Step] = ()
    pairs: Mapping[tuple[str, str], int] = field(default_factory=dict)
    releases: Sequence[Release] = ()
    who_saw_what: Sequence[Mapping[str, str]] = ()
    warnings: Sequence[str] = ()
    stand_ins: Sequence[str] = ()
    note: str = ""

    def __post_init__(self) -> None:
        for name, curve in self.curves.items():
            _check_shares(f"curve {name!r}", curve)
        if self.ks is not None:
            _check_shares("ks", self.ks[1:])
            if len(self.ks[0]) != len(self.ks[1]):
                raise ValueError(f"ks: {len(self.ks[0])} thresholds for {len(self.ks[1])} points; pass one each")
        for row in self.who_saw_what:
            if set(row) != {"what", *VIEWERS}:
                raise ValueError(
                    f"who_saw_what row has columns {sorted(row)}: expected 'what' and {', '.join(VIEWERS)}"
                )
        for (sender, receiver), count in self.pairs.items():
            if count < 0:
                raise ValueError(f"pairs[{sender!r}, {receiver!r}]={count}: bytes are not negative")


@dataclass(frozen=True, kw_only=True)
class _Comparison:
    key: str
    name: str
    chinese: str
    meaning: str
    auc: float
    ks: float | None
    difference: float


def render(result: Mapping[str, Any], sections: ReportSections) -> str:
    """The report page as HTML text.

    Raises ValueError if a required figure is missing, a model name is unknown, or an AUC or KS is no number in [0, 1].
    """
    comparison = _comparison(result)
    epsilon = _epsilon(result)
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"bytes": _bytes, "seconds": _seconds, "count": _count, "percent": _percent}
    page = environment.get_template("report.html.j2").render(
        sections=sections,
        comparison=comparison,
        verdict=_verdict(result, comparison),
        cards=_cards(result, comparison),
        facts=_facts(result),
        epsilon=epsilon,
        has_epsilon=result["privacy"]["epsilon"] is not None,
        delta=result["privacy"].get("delta"),
        he=_he(result),
        colours=_colours(sections.curves),
        roc_svg=_roc_svg(sections) if sections.curves else None,
        ks_svg=_ks_svg(sections.ks) if sections.ks else None,
        calibration_svg=_calibration_svg(sections.calibration) if sections.calibration else None,
        scorecard=_scorecard(sections),
        steps=_steps(sections.steps),
        pairs=_pairs(sections.pairs),
        viewers=VIEWERS,
    )
    return page + "\n"


def comparison_table(result: Mapping[str, Any]) -> Table:
    """AUC and KS of every model that was measured on the same held-out rows, for the console."""
    table = _console_table("Same held-out rows", ("model", "AUC", "KS", "AUC - federated"))
    for row in _comparison(result):
        table.add_row(
            _plain(row.name),
            f"{row.auc:.4f}",
            "-" if row.ks is None else f"{row.ks:.4f}",
            "" if row.key == "federated" else f"{row.difference:+.4f}",
            style="bold" if row.key == "federated" else None,
        )
    return table


def steps_table(steps: Sequence[Step]) -> Table:
    """Messages, seconds and bytes by step, with a line of totals, for the console."""
    table = _console_table("By step", ("step", "party", "messages", "seconds", "bytes in", "bytes out"), texts=2)
    for name, kind, messages, seconds, bytes_in, bytes_out in steps:
        table.add_row(
            _plain(name), _plain(kind), f"{messages:,}", f"{seconds:.3f}", _bytes(bytes_in), _bytes(bytes_out)
        )
    if steps:
        _, _, messages_each, seconds_each, in_each, out_each = zip(*steps, strict=True)
        table.add_section()
        table.add_row(
            "total",
            "",
            f"{sum(messages_each):,}",
            f"{sum(seconds_each):.3f}",
            _bytes(sum(in_each)),
            _bytes(sum(out_each)),
        )
    return table


def pairs_table(pairs: Mapping[tuple[str, str], int]) -> Table:
    """Bytes by sender and receiver, largest first, for the console; the smallest pairs share the last line."""
    table = _console_table("Bytes by pair of parties", ("from", "to", "bytes"), texts=2)
    ranked = sorted(pairs.items(), key=lambda item: -item[1])
    for (sender, receiver), count in ranked[:MOST_PAIRS]:
        table.add_row(_plain(sender), _plain(receiver), _bytes(count))
    if rest := ranked[MOST_PAIRS:]:
        table.add_row(f"{len(rest)} more pairs", "", _bytes(sum(count for _, count in rest)))
    return table


def console_tables(result: Mapping[str, Any], sections: ReportSections) -> tuple[Table, ...]:
    """The tables that the command line prints after a run: comparison, then steps and pairs if they were measured."""
    tables = [comparison_table(result)]
    if sections.steps:
        tables.append(steps_table(sections.steps))
    if sections.pairs:
        tables.append(pairs_table(sections.pairs))
    return tuple(tables)


# What the page and the console say


def _comparison(result: Mapping[str, Any]) -> tuple[_Comparison, ...]:
    """One row per measured model, each bank alone first and references last."""
    for metric in ("auc", "ks"):
        values = result.get(metric)
        if not isinstance(values, Mapping) or values.get("federated") is None:
            raise ValueError(f"result[{metric!r}]['federated'] is missing: a report without it would say nothing")
        if unknown := sorted(set(values) - set(_MODELS)):
            raise ValueError(f"result[{metric!r}] has unknown models {unknown}: expected some of {', '.join(_MODELS)}")
    auc, ks = result["auc"], result["ks"]
    federated = _share(auc["federated"], "auc.federated")
    rows: list[_Comparison] = []
    for key, (name, chinese, meaning) in _MODELS.items():
        measured = auc.get(key)
        # Only "alone" is one value per bank; every other model is one value.
        each = (measured or {}).items() if key == "alone" else [] if measured is None else [("", measured)]
        for bank, value in each:
            if value is None:  # a bank too small to train alone
                continue
            matching = (ks.get(key) or {}).get(bank) if key == "alone" else ks.get(key)
            checked = _share(value, f"auc.{key} {bank}".strip())
            rows.append(
                _Comparison(
                    key=key,
                    name=f"{bank} {name}".strip(),
                    chinese=chinese,
                    meaning=meaning,
                    auc=checked,
                    ks=None if matching is None else _share(matching, f"ks.{key} {bank}".strip()),
                    difference=checked - federated,
                )
            )
    return tuple(rows)


def _epsilon(result: Mapping[str, Any]) -> str:
    privacy = result.get("privacy")
    if not isinstance(privacy, Mapping) or "epsilon" not in privacy:
        raise ValueError("result['privacy']['epsilon'] is missing: give the number, or None for a run without noise")
    epsilon = privacy["epsilon"]
    if epsilon is None:
        return "none (simulation only)"
    if not (math.isfinite(epsilon) and epsilon > 0):
        raise ValueError(
            f"privacy.epsilon={epsilon}: expected a finite number above 0, or None for a run without noise"
        )
    return f"{epsilon:.3g}"


def _exact(result: Mapping[str, Any]) -> str:
    if "exact" not in result or result["exact"] not in (True, False, None):
        raise ValueError("result['exact'] must be True, False, or None if no plaintext twin was run")
    return {True: "yes", False: "NO", None: "not checked"}[result["exact"]]


def _verdict(result: Mapping[str, Any], comparison: Sequence[_Comparison]) -> str:
    federated = next(row for row in comparison if row.key == "federated")
    text = f"The federated model reaches AUC {federated.auc:.4f}"
    alone = [row for row in comparison if row.key == "alone"]
    if alone:
        best = max(alone, key=lambda row: row.auc)
        side = "above" if federated.auc >= best.auc else "BELOW"
        bank = best.name.removesuffix(" alone")
        text += f", {abs(best.difference):.4f} {side} the best bank alone ({bank}, {best.auc:.4f})"
    if own := _best_own(comparison):
        side = "above" if federated.auc >= own.auc else "BELOW"
        text += f" and {abs(own.difference):.4f} {side} the best model of the banks' own pooled columns"
    text += ", on the same held-out rows. "
    text += {
        "yes": "It is bit-identical to its plaintext twin on one pooled table. ",
        "NO": "It DIFFERS from its plaintext twin on one pooled table: do not use it before the cause is found. ",
        "not checked": "It was not compared with a plaintext twin. ",
    }[_exact(result)]
    if result["privacy"]["epsilon"] is None:
        return text + "There is no differential privacy: such a run is for simulation only."
    return text + f"Differential privacy: epsilon {_epsilon(result)}."


def _best_own(comparison: Sequence[_Comparison]) -> _Comparison | None:
    """The stronger of the models on the label holders' own columns: a gain is claimed against this one."""
    own = [row for row in comparison if row.key in ("label_holder_columns", "label_holder_lr")]
    return max(own, key=lambda row: row.auc) if own else None


def _cards(result: Mapping[str, Any], comparison: Sequence[_Comparison]) -> list[dict[str, str]]:
    """Headline figures: label, Chinese label, value, a line below, and a tone (good, bad or neutral)."""
    by_key = {row.key: row for row in comparison}
    federated = by_key["federated"]
    own = _best_own(comparison)
    exact = _exact(result)
    epsilon = result["privacy"]["epsilon"]
    delta = result["privacy"].get("delta")
    cards = [
        {
            "label": "AUC, federated",
            "chinese": "联邦 AUC",
            "value": f"{federated.auc:.4f}",
            "below": "" if own is None else f"{-own.difference:+.4f} against label holders' own columns",
            "tone": "neutral",
        },
        {
            "label": "KS, federated",
            "chinese": "联邦 KS",
            "value": f"{federated.ks:.4f}",
            "below": "",
            "tone": "neutral",
        },
        {
            "label": "Exact",
            "chinese": "与明文一致",
            "value": exact,
            "below": "bit-identical to the pooled plaintext twin"
            if exact == "yes"
            else "against the pooled plaintext twin",
            "tone": {"yes": "good", "NO": "bad", "not checked": "neutral"}[exact],
        },
        {
            "label": "Epsilon",
            "chinese": "隐私预算",
            "value": "none" if epsilon is None else _epsilon(result),
            "below": "simulation only" if epsilon is None else "" if delta is None else f"delta {delta:.2g}",
            "tone": "bad" if epsilon is None else "good",
        },
    ]
    if (seconds := (result.get("seconds") or {}).get("total")) is not None:
        cards.append(
            {
                "label": "Time",
                "chinese": "耗时",
                "value": _seconds(seconds),
                "below": "training, alignment apart",
                "tone": "neutral",
            }
        )
    if (count := (result.get("bytes") or {}).get("total")) is not None:
        cards.append(
            {"label": "Traffic", "chinese": "通信量", "value": _bytes(count), "below": "all parties", "tone": "neutral"}
        )
    return cards


def _facts(result: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """(label, Chinese label, value) of the run's plain figures that are present."""
    seconds, traffic = result.get("seconds") or {}, result.get("bytes") or {}
    facts = [
        ("Rows", "样本数", result.get("rows"), _spell),
        ("Parties", "参与方", result.get("parties"), _spell),
        ("Training rounds", "训练轮数", result.get("rounds"), _spell),
        ("Messages", "消息数", result.get("messages"), _spell),
        ("Time, training (alignment apart)", "训练耗时（不含对齐）", seconds.get("total"), _seconds),
        ("Time of the plaintext twin", "明文孪生耗时", seconds.get("twin"), _seconds),
        ("Traffic, all parties", "总通信量", traffic.get("total"), _bytes),
        ("Traffic into the coordinator", "协调方接收", traffic.get("coordinator_in"), _bytes),
        ("Peak memory (MB)", "内存峰值", result.get("peak_memory_mb"), _spell),
    ]
    return [(label, chinese, say(value)) for label, chinese, value, say in facts if value is not None]


def _he(result: Mapping[str, Any]) -> list[tuple[str, str]]:
    labels = {
        "scheme": "Scheme",
        "n": "Ring dimension N",
        "log_q": "Ciphertext modulus, bits (log2 q)",
        "log_t": "Plaintext modulus, bits (log2 t)",
        "security_bits": "Security, bits",
        "flooding_bits": "Statistical flooding, bits",
    }
    he = result["privacy"].get("he") or {}
    return [(label, _spell(he[key])) for key, label in labels.items() if he.get(key) is not None]


def _scorecard(sections: ReportSections) -> list[dict[str, Any]]:
    """Per party its features, each with its rows and their bars in percent (50: the largest weight of all parties)."""
    cards = sections.scorecard or {}
    widest = max((abs(row.weight) for rows in cards.values() for row in rows), default=0.0) or 1.0
    return [
        {
            "party": party,
            "features": [
                (feature, [(row, round(50 * abs(row.weight) / widest, 1)) for row in bins])
                for feature, bins in groupby(rows, key=lambda row: row.feature)
            ],
        }
        for party, rows in cards.items()
    ]


def _steps(steps: Sequence[Step]) -> dict[str, Any] | None:
    if not steps:
        return None
    slowest = max(step[3] for step in steps) or 1.0
    return {
        "rows": [(*step, round(100 * step[3] / slowest, 1)) for step in steps],
        "messages": sum(step[2] for step in steps),
        "seconds": sum(step[3] for step in steps),
        "bytes_in": sum(step[4] for step in steps),
        "bytes_out": sum(step[5] for step in steps),
    }


def _pairs(pairs: Mapping[tuple[str, str], int]) -> dict[str, Any] | None:
    """Names, and one line per sender of (bytes or None, opacity of the cell's shade)."""
    if not pairs:
        return None
    names = _pair_names(pairs)
    most = max(pairs.values()) or 1

    def cell(sender: str, receiver: str) -> tuple[int | None, float]:
        count = pairs.get((sender, receiver))
        return count, 0.0 if not count else round(0.05 + 0.8 * count / most, 3)

    return {"names": names, "rows": [(sender, [cell(sender, receiver) for receiver in names]) for sender in names]}


def _pair_names(pairs: Mapping[tuple[str, str], int]) -> list[str]:
    return list(dict.fromkeys([sender for sender, _ in pairs] + [receiver for _, receiver in pairs]))


# Plots: fixed English labels only; names from data stay in the page, where they are escaped


def _colours(curves: Mapping[str, Any]) -> dict[str, str]:
    others = [name for name in curves if name != "federated"]
    colours = {name: _COLOURS[i % len(_COLOURS)] for i, name in enumerate(others)}
    return {name: colours.get(name, _FEDERATED_COLOUR) for name in curves}


def _roc_svg(sections: ReportSections) -> Markup:
    figure, axes = _axes("Share of goods refused (false positive rate)", "Share of bads refused (true positive rate)")
    axes.plot([0, 1], [0, 1], color="#9aa5b1", linewidth=0.8, linestyle=(0, (4, 3)))
    colours = _colours(sections.curves)
    # The federated curve is drawn last, above the others.
    for name in sorted(sections.curves, key=lambda name: name == "federated"):
        fpr, tpr = sections.curves[name]
        axes.plot(fpr, tpr, color=colours[name], linewidth=2.2 if name == "federated" else 1.2)
    axes.set(xlim=(0, 1), ylim=(0, 1.005))
    return _svg(figure, "roc", "ROC curves of the models in the table above")


def _ks_svg(ks: tuple[Series, Series, Series]) -> Markup:
    thresholds, good, bad = ks
    figure, axes = _axes("Score (logit of PD)", "Cumulative share")
    axes.plot(thresholds, good, color="#009e73", linewidth=1.8)
    axes.plot(thresholds, bad, color="#d55e00", linewidth=1.8)
    gaps = [abs(g - b) for g, b in zip(good, bad, strict=True)]
    at = gaps.index(max(gaps))
    axes.plot([thresholds[at]] * 2, [good[at], bad[at]], color="#1f2933", linewidth=1.0, linestyle=(0, (3, 2)))
    axes.text(0.97, 0.05, f"KS {gaps[at]:.4f}", transform=axes.transAxes, ha="right", fontsize=11)
    # The outermost rows stretch the axis and show nothing: start and end where the first and last 0.2 % lie.
    inside = [x for x, g, b in zip(thresholds, good, bad, strict=True) if max(g, b) > 0.002 and min(g, b) < 0.998]
    if len(inside) > 1:
        axes.set_xlim(inside[0], inside[-1])
    axes.set_ylim(0, 1.005)
    return _svg(figure, "ks", "Cumulative shares of goods and bads by score, with their largest distance")


def _calibration_svg(rows: Sequence[CalibrationRow]) -> Markup:
    figure, axes = _axes("Mean predicted PD", "Observed default rate")
    top = 1.05 * max(max(row.predicted, row.observed_high) for row in rows)
    axes.plot([0, top], [0, top], color="#9aa5b1", linewidth=0.8, linestyle=(0, (4, 3)))
    axes.errorbar(
        [row.predicted for row in rows],
        [row.observed for row in rows],
        yerr=[
            [row.observed - row.observed_low for row in rows],
            [row.observed_high - row.observed for row in rows],
        ],
        color=_FEDERATED_COLOUR,
        marker="o",
        markersize=4.5,
        linewidth=1.4,
        elinewidth=1.0,
        capsize=2.5,
    )
    axes.set(xlim=(0, top), ylim=(0, top))
    axes.xaxis.set_major_formatter(PercentFormatter(1.0))
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    return _svg(figure, "calibration", "Predicted against observed default rate by score group")


def line_chart(curves: Mapping[str, Sequence[tuple[float, float]]], x_label: str, y_label: str) -> Markup:
    """Lines through (x, y) with a legend, as inline SVG; names and labels are our own texts, not data."""
    figure, axes = _axes(x_label, y_label)
    for place, (name, points) in enumerate(curves.items()):
        x, y = zip(*points, strict=True)
        axes.plot(
            x, y, color=(_FEDERATED_COLOUR, *_COLOURS)[place], linewidth=1.8, marker="o", markersize=3, label=name
        )
    axes.legend(frameon=False)
    return _svg(figure, "lines", f"{y_label} by {x_label.lower()}")


def _axes(x_label: str, y_label: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(5.2, 4.1), layout="constrained")
    axes = figure.add_subplot()
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    axes.grid(color="#e4e7eb", linewidth=0.7)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#7b8794")
    axes.tick_params(color="#7b8794")
    return figure, axes


def _svg(figure: Figure, name: str, description: str) -> Markup:
    """The figure as an inline SVG element; its ids carry `name` so that several fit on one page."""
    buffer = io.StringIO()
    # A fixed salt and no date: the same figure gives the same text. Text stays text, in the page's own fonts.
    with matplotlib.rc_context({"svg.hashsalt": name, "svg.fonttype": "none", "path.simplify_threshold": 0.3}):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Type": None, "Format": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    for mark in ('id="', 'href="#', "url(#"):
        text = text.replace(mark, f"{mark}{name}-")
    described = text.replace("<svg", f'<svg role="img" aria-label="{description}"', 1)
    return Markup(described)  # noqa: S704 (numbers and our own labels: no text from data)


# Numbers and checks


def _check_shares(name: str, series: Sequence[Series]) -> None:
    if len({len(part) for part in series}) != 1 or len(series[0]) < 2:
        raise ValueError(
            f"{name}: series of {[len(part) for part in series]} points; expected equal lengths, at least 2"
        )
    if not all(0 <= value <= 1 for part in series for value in part):
        raise ValueError(f"{name}: values outside [0, 1]; pass shares, not percent")


def _share(value: Any, name: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
        raise ValueError(f"result {name}={value!r}: expected a number in [0, 1]")
    return float(value)


def _spell(value: Any) -> str:
    """A number with thousands separators, a list as its length and names, a mapping as "name number" pairs."""
    if isinstance(value, Mapping):
        return "; ".join(f"{name} {_spell(part)}" for name, part in value.items())
    if isinstance(value, list | tuple):
        return f"{len(value)}: {', '.join(str(part) for part in value)}"
    if isinstance(value, float) and not value.is_integer():
        return f"{value:,.1f}"
    return f"{int(value):,}" if isinstance(value, int | float) else str(value)


def _bytes(count: float) -> str:
    for unit in ("B", "kB", "MB"):
        if round(count, 1) < 1000:
            return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.2f} GB"


def _seconds(seconds: float) -> str:
    if seconds < 1:
        return f"{1000 * seconds:.0f} ms"
    return f"{seconds:.1f} s" if seconds < 120 else f"{int(seconds // 60)} min {int(seconds % 60):02d} s"


def _count(count: float) -> str:
    return f"{count:,.0f}"


def _percent(share: float, places: int = 1) -> str:
    return f"{100 * share:.{places}f} %"


def _plain(text: str) -> Text:
    """A name for the console: no markup, and no control character that a terminal would obey."""
    return Text("".join(char if char.isprintable() else f"\\x{ord(char):02x}" for char in text))


def _console_table(title: str, columns: Sequence[str], texts: int = 1) -> Table:
    table = Table(title=title, box=box.ASCII, title_justify="left")
    for i, column in enumerate(columns):
        table.add_column(_plain(column), justify="left" if i < texts else "right", no_wrap=i >= texts)
    return table

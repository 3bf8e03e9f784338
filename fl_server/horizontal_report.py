"""The report of a horizontal job: one self-contained page with verdict, comparison and curves by round.

Guarantee: as `fl_server.report`: loads nothing, every text from data is escaped, the same figures give the same bytes.
`result` is what `simulations.horizontal` writes as result.json.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from rich import box
from rich.table import Table

from fl_server.report import line_chart

MODELS = {
    "alone": ("Each bank alone", "各行单独建模", "own rows only, the same network"),
    "federated": ("Federated, encrypted", "联邦模型(加密)", "every bank keeps its rows"),
    "rounded_twin": ("Rounded twin", "明文孪生(取整)", "the same integers, in plaintext"),
    "float": ("Float run", "明文浮点", "the same training without rounding"),
    "not_personalised": ("Federated, not personalised", "联邦模型(不个性化)", "one last layer for all banks"),
    "pooled": ("Pooled", "集中训练", "all rows in one place, the same network"),
}
"""Keys of result["auc"]: name, Chinese name, meaning."""


def render(result: Mapping[str, Any]) -> str:
    """The page as HTML text. Raises ValueError if the AUC of the federated model is missing or a model is unknown."""
    auc = result["auc"]
    if "federated" not in auc or set(auc) - set(MODELS):
        raise ValueError(f"result['auc'] has models {sorted(auc)}: expected federated and some of {', '.join(MODELS)}")
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page = environment.get_template("horizontal.html.j2").render(
        result=result,
        rows=[
            {
                "key": key,
                "name": name,
                "chinese": chinese,
                "meaning": meaning,
                "auc": f"{auc[key]:.4f}",
                "own": f"{result['auc_own_rows'][key]:.4f}",
                "ks": f"{result['ks'][key]:.4f}",
                "difference": "" if key == "federated" else f"{auc[key] - auc['federated']:+.4f}",
            }
            for key, (name, chinese, meaning) in MODELS.items()
            if key in auc
        ],
        verdict=_verdict(result),
        chart=_chart(result["by_round"]),
    )
    return page + "\n"


def console_table(result: Mapping[str, Any]) -> Table:
    """The comparison for the command line."""
    table = Table(title="Same held-out rows", box=box.SIMPLE, title_justify="left")
    for column in ("model", "AUC, all rows", "AUC, own rows", "KS"):
        table.add_column(column, justify="left" if column == "model" else "right")
    for key, (name, _, _) in MODELS.items():
        if key in result["auc"]:
            figures = [f"{result[part][key]:.4f}" for part in ("auc", "auc_own_rows", "ks")]
            table.add_row(name, *figures, style="bold" if key == "federated" else None)
    return table


def _verdict(result: Mapping[str, Any]) -> str:
    auc = result["auc"]
    exact = "equal to its rounded plaintext twin bit by bit" if result["exact"] else "NOT equal to its plaintext twin"
    text = f"The federated {result['model']} ({result['strategy']}) reaches AUC {auc['federated']:.4f}, {exact}. "
    if "alone" in result["auc_own_rows"]:
        gain = result["auc_own_rows"]["federated"] - result["auc_own_rows"]["alone"]
        text += f"On each bank's own rows it is {abs(gain):.4f} {'above' if gain >= 0 else 'BELOW'} the banks alone. "
    if result["privacy"]["epsilon"] is None:
        text += "There is no differential privacy: such a run is for simulation only."
    return text


def _chart(by_round: Sequence[Mapping[str, Any]]) -> Markup | None:
    curves = {
        name: [(float(row["round"]), float(row[key])) for row in by_round if row[key] is not None]
        for name, key in (("validation", "validation_auc"), ("held out", "held_out_auc"))
    }
    return line_chart(curves, "Round", "AUC of all banks' rows") if all(curves.values()) else None

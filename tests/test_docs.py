"""The documents say what the program does: commands, options, keys, tables, links, tests and snippets are checked."""

import json
import re
import tomllib
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import click
import pytest
import typer

from fl_clients import who_sees_what
from fl_clients.protocol import schedule
from simulations import cli, demo_federation
from simulations.federation_folder import KNOWN_KEYS, load
from tests.small_federation import small_federation, small_parties

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
ENGLISH, CHINESE = re.split(r"^# 中文$", README, flags=re.MULTILINE)
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
OWN_DOCUMENTS = [ROOT / name for name in ("README.md", "DECISIONS.md", "docs/threat-model.md", "docs/protocol.md")]
LARGEST_PICTURE = 400_000


def tables(text: str) -> list[list[list[str]]]:
    """Every Markdown table as rows of stripped cells; the first row is the head."""
    found: list[list[list[str]]] = []
    inside = False
    for line in text.splitlines():
        if not line.startswith("|"):
            inside = False
            continue
        cells = [cell.strip().replace("\\|", "|") for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
        if all(re.fullmatch(r":?-+:?", cell) for cell in cells):
            continue
        if not inside:
            found.append([])
        found[-1].append(cells)
        inside = True
    return found


def table_with(text: str, *head: str) -> list[list[str]]:
    """The rows below the one table whose head begins with `head`."""
    matching = [rows for rows in tables(text) if rows[0][: len(head)] == list(head)]
    assert len(matching) == 1, f"{len(matching)} tables begin with {head}"
    return matching[0][1:]


def codes(text: str) -> list[str]:
    """What stands between single backticks."""
    return re.findall(r"(?<!`)`([^`\n]+)`(?!`)", text)


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)


def headings(text: str) -> list[str]:
    """The anchors of a document, as GitHub makes them."""
    titles = re.findall(r"^#+ (.+)$", re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL), re.MULTILINE)
    return [re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles]


# --- commands ---------------------------------------------------------------------------------------------------------


def scripts() -> dict[str, typer.Typer]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return {name: import_module(target.split(":")[0]).app for name, target in project["scripts"].items()}


def leaves(name: str, command: Any) -> Iterator[tuple[str, Any]]:
    """Every command that does something, with its full name."""
    if hasattr(command, "commands"):
        for part, below in command.commands.items():
            yield from leaves(f"{name} {part}", below)
    else:
        yield name, command


COMMANDS = [leaf for name, app in scripts().items() for leaf in leaves(name, typer.main.get_command(app))]


def test_there_are_commands_of_all_scripts() -> None:
    assert {name.split()[0] for name, _ in COMMANDS} == {"xinyi-sim", "xinyi-server", "xinyi-node", "xinyi-audit"}
    assert len(COMMANDS) >= 4


@pytest.mark.parametrize(("name", "command"), COMMANDS, ids=[name for name, _ in COMMANDS])
def test_every_command_is_in_both_halves_of_the_readme_and_has_help_with_an_example(name: str, command: Any) -> None:
    for half in (ENGLISH, CHINESE):
        assert any(re.match(rf"{name}\b", code) for code in codes(half)), f"{name} is not in a half of README.md"
    text = command.help or ""
    assert re.search(rf"^Example: {name}( |$)", text, re.MULTILINE), "an example, of this very command"
    assert text.index("Example:") > 20, "help says first what the command does"


def test_the_readme_names_no_command_that_does_not_exist() -> None:
    known = [name for name, _ in COMMANDS]
    text = README + (ROOT / "docs/threat-model.md").read_text() + (ROOT / "docs/protocol.md").read_text()
    named = [code for code in codes(text) if code.split()[0] in scripts() and len(code.split()) > 1]
    named += [line.strip() for block in blocks(README, "sh") for line in block.splitlines() if line.startswith("xinyi")]
    assert len(named) >= 8
    for code in named:
        assert any(code == name or code.startswith(f"{name} ") for name in known), code


@pytest.mark.parametrize("half", [ENGLISH, CHINESE], ids=["english", "chinese"])
def test_the_options_of_run_are_those_of_the_program(half: str) -> None:
    [run] = [command for name, command in COMMANDS if name == "xinyi-sim run"]
    options = {p.opts[0]: p.default for p in run.params if isinstance(p, click.Option) or p.opts[0].startswith("--")}
    options.pop("--help", None)
    rows = [row for rows in tables(half) for row in rows if row[0].startswith("`--")]
    assert {codes(row[0])[0] for row in rows} == set(options)
    for row in rows:
        default = options[codes(row[0])[0]]
        if default is not None:
            assert row[1] == str(default), row[0]


@pytest.mark.parametrize("half", [ENGLISH, CHINESE], ids=["english", "chinese"])
def test_make_targets_and_variables_exist(half: str) -> None:
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"^([a-z]+):", makefile, re.MULTILINE))
    used = re.findall(r"(?:^|`)make ([a-z]+)", half, re.MULTILINE)
    assert {"demo", "test", "bench", "lint", "clean"} <= set(used) <= targets
    for variable in re.findall(r"\b([A-Z]{3,})=", half):
        assert f"$({variable})" in makefile, variable


def test_python_and_platform_are_those_of_the_project() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["requires-python"] == ">=3.11,<3.12"
    assert all("Python 3.11" in half for half in (ENGLISH, CHINESE))
    assert f"The code is {project['license']}." in ENGLISH


# --- who sees what ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def who_saw() -> list[list[str]]:
    contract = small_parties(small_federation(banks=3, owners=2, enterprises=300), rounds=3, epsilon=3.0).contract
    return [list(row.values()) for row in who_sees_what.table(contract)]


def test_the_table_in_the_readme_is_the_one_of_the_program(who_saw: list[list[str]]) -> None:
    assert table_with(ENGLISH, "", "coordinator") == who_saw


def test_the_chinese_table_has_every_row_and_denies_what_the_other_denies(who_saw: list[list[str]]) -> None:
    rows = table_with(CHINESE, "", "协调方")
    assert len(rows) == len(who_saw)
    for chinese, english in zip(rows, who_saw, strict=True):
        assert [cell == "看不到" for cell in chinese[1:]] == [cell == "no" for cell in english[1:]], english[0]


def test_the_threat_model_has_mechanism_and_test_of_every_cell(who_saw: list[list[str]]) -> None:
    text = (ROOT / "docs/threat-model.md").read_text()
    what, seen = "", {}
    for row in table_with(text, "what", "who", "sees"):
        what = row[0] or what
        for who in ("coordinator", "label holder", "feature owner", "others"):
            if who in row[1]:
                seen[what, who] = row
    assert len(seen) == 4 * len(who_saw)
    for what, *cells in who_saw:
        for who, cell in zip(("coordinator", "label holder", "feature owner", "others"), cells, strict=True):
            row = seen[what, who]
            assert bool(re.match(r"no\b", row[2])) == (cell == "no"), (what, who)
            tested = codes(row[4])
            assert cell in ("own", "what the parties publish") or any(code.startswith("test_") for code in tested)


# --- result.json, snippets --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def after_the_snippets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory in which the README's Python was run, after a small demo."""
    folder = tmp_path_factory.mktemp("readme")
    demo_federation.generate(folder / "out" / "demo" / "federation", 5, 900)
    snippets = blocks(README, "python")
    assert len(snippets) == 1
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for snippet in snippets:
            exec(compile(snippet, "README.md", "exec"), {})
    return folder


def dotted(value: Any, prefix: str = "") -> set[str]:
    found = set()
    for key, below in value.items():
        found.add(f"{prefix}{key}")
        if isinstance(below, dict):
            found |= dotted(below, f"{prefix}{key}.")
    return found


def test_the_snippet_runs_and_every_key_in_the_readme_exists(after_the_snippets: Path) -> None:
    result = json.loads((after_the_snippets / "out/again/result.json").read_text())
    named = [code for row in table_with(ENGLISH, "key of `result.json`") for code in codes(row[0])]
    assert len(named) > 30
    assert set(named) <= dotted(result)
    # and nothing at the top is left unsaid
    missing = set(result) - {name.split(".")[0] for name in named} - {"coordinator"}
    assert missing == set()
    assert set(result["auc"]) == set(result["ks"]) == {name[4:] for name in named if name.startswith("auc.")}
    section = CHINESE.split("## 输出")[1].split("## ")[0]
    assert {code for code in codes(section) if "." in code and not code.endswith((".json", ".html"))} <= dotted(result)


def test_the_files_that_the_readme_promises_are_written(after_the_snippets: Path) -> None:
    out = after_the_snippets / "out/again"
    assert {path.name for path in out.iterdir()} == {
        *("result.json", "report.html", "contract.json", "models", "certificate.json", "certificate.html", "audit")
    }
    assert all(f"`{path.name}" in half for path in out.iterdir() for half in (ENGLISH, CHINESE))


def test_the_example_of_a_split_file_loads(tmp_path: Path) -> None:
    [example] = blocks(ENGLISH, "json")
    split = json.loads(example)
    (tmp_path / "split.json").write_text(example)
    files: dict[str, dict[str, list[object]]] = {}
    for party in split["parties"].values():
        columns = files.setdefault(party["file"], {split["id"]: [f"E{row:04d}" for row in range(600)]})
        for name in party["columns"]:
            columns[name] = ["a" if name in split["categorical"] else row % 7 for row in range(600)]
    label = files[split["label_file"]]
    label[split["label"]] = [int(row % 5 == 0) for row in range(600)]
    label[split["horizontal_key"]] = [[*split["horizontal_groups"], "other"][row % 3] for row in range(600)]
    for name, columns in files.items():
        lines = [",".join(columns), *(",".join(map(str, cells)) for cells in zip(*columns.values(), strict=True))]
        (tmp_path / name).write_text("\n".join(lines))
    federation = load(tmp_path, split="split.json", banks=3, seed=1)
    assert [bank.name for bank in federation.banks] == [*split["horizontal_groups"], "rest"]
    assert [owner.name for owner in federation.owners] == list(split["parties"])[1:]


@pytest.mark.parametrize(("half", "head"), [(ENGLISH, "field"), (CHINESE, "字段")], ids=["english", "chinese"])
def test_every_field_of_a_split_file_is_explained(half: str, head: str) -> None:
    assert {code for row in table_with(half, head) for code in codes(row[0])} == KNOWN_KEYS


# --- links, names, the protocol ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("document", DOCUMENTS, ids=[path.name for path in DOCUMENTS])
def test_links_to_files_and_headings_resolve(document: Path) -> None:
    text = document.read_text(encoding="utf-8")
    prose = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", prose):
        if target.startswith(("http://", "https://")):
            continue
        path, _, anchor = target.partition("#")
        file = document.parent / path if path else document
        assert file.exists(), f"{document.name}: {target}"
        if anchor:
            assert anchor in headings(file.read_text(encoding="utf-8")), f"{document.name}: {target}"


def test_files_that_are_named_in_documents_exist() -> None:
    named = 0
    for document in OWN_DOCUMENTS:
        for code in codes(document.read_text(encoding="utf-8")):
            if re.fullmatch(r"(privacy|models|fl_clients|fl_server|simulations|tests|docs)/[\w./-]*", code):
                assert (ROOT / code).exists(), f"{document.name}: {code}"
                named += 1
    assert named > 10


def test_tests_that_are_named_in_documents_exist() -> None:
    existing = {
        name
        for path in (ROOT / "tests").glob("test_*.py")
        for name in re.findall(r"^def (test_\w+)", path.read_text(encoding="utf-8"), re.MULTILINE)
    }
    named = {
        code
        for document in OWN_DOCUMENTS
        for code in codes(document.read_text(encoding="utf-8"))
        if re.fullmatch(r"test_\w+", code)
    } - KNOWN_KEYS
    assert len(named) > 40
    assert sorted(named - existing) == []


def test_the_protocol_names_every_step_and_no_other() -> None:
    federation = small_federation(banks=3, owners=2, enterprises=300)
    text = (ROOT / "docs/protocol.md").read_text()
    names: set[str] = set()
    for epsilon, count in ((None, 34), (3.0, 33)):
        exchanges = schedule(small_parties(federation, rounds=3, epsilon=epsilon).contract)
        assert len(exchanges) == count
        assert re.search(rf"\b{count}\b", text.split("## Schedule")[1].split("|")[0])
        names |= {scheduled.step.name for exchange in exchanges for scheduled in exchange}
    written = set(codes(text))
    written |= {"r1.search.2", "r1.search.3"}  # "`r1.search.1` to `r1.search.4`"
    wanted = {name for name in names if not name.startswith(("r2", "r3"))}
    assert wanted <= written
    steplike = {code for code in written if re.fullmatch(r"r1\.\w+(\.\d)?|(bins|match)\.\d", code)}
    assert steplike - wanted <= {"r1.search"}


def test_the_picture_of_a_real_result_is_small_and_a_png() -> None:
    data = (ROOT / "docs/report.png").read_bytes()
    assert data.startswith(b"\x89PNG\r\n")
    assert int.from_bytes(data[16:20], "big") >= 800, "pixels wide"
    assert 20_000 < len(data) < LARGEST_PICTURE


def test_every_decision_is_dated_and_admits_its_cost() -> None:
    text = (ROOT / "DECISIONS.md").read_text()
    entries = re.split(r"^## ", text, flags=re.MULTILINE)[1:]
    assert len(entries) > 15
    for entry in entries:
        assert re.match(r"\d{4}-\d\d-\d\d \S", entry)
        assert re.search(r"^\*Cost\*: \S", entry, re.MULTILINE), entry.splitlines()[0]


def test_the_changelog_has_the_version_of_the_project() -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert f"\n## [{version}] - " in (ROOT / "CHANGELOG.md").read_text()


def test_a_table_in_the_text_is_read_as_it_stands() -> None:
    text = "| a | b |\n| --- | ---: |\n| `x` | 1 \\| 2 |\n\nno\n| c |\n"
    assert tables(text) == [[["a", "b"], ["`x`", "1 | 2"]], [["c"]]]
    assert codes("`one` and ``two`` and `three`") == ["one", "three"]
    assert headings("# A b-c\n```\n# no\n```\n## 中文 (x)\n") == ["a-b-c", "中文-x"]


def test_help_of_the_simulator_is_what_the_readme_says() -> None:
    assert set(typer.main.get_command(cli.app).commands) == {"run", "demo"}  # type: ignore[attr-defined]

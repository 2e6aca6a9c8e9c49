"""What README.md, CONTRIBUTING.md and docs/ say holds: blocks run; commands, options, extras and links exist."""

from __future__ import annotations

import json
import re
import socket
import textwrap
from configparser import ConfigParser
from pathlib import Path
from typing import Any

import pytest
import torch
from routing_picture import ASSIGNED, picture

from dynmoe_tutel import __version__

ROOT = Path(__file__).resolve().parents[1]
FILES = [path for path in (ROOT / "README.md", ROOT / "CONTRIBUTING.md") if path.exists()]
PAGES = {str(path.relative_to(ROOT)): path.read_text() for path in [*FILES, *sorted((ROOT / "docs").glob("*.md"))]}
ALL = "\n".join(PAGES.values())


def fenced(page: str, kind: str) -> list[str]:
    """The contents of a page's blocks of that kind, without their indentation."""
    blocks = re.findall(rf"^ *```{kind}\n(.*?)^ *```$", PAGES.get(page, ""), re.DOTALL | re.MULTILINE)
    return [textwrap.dedent(block) for block in blocks]


BLOCKS = [
    pytest.param(page, block, id=f"{page}-{i}") for page in PAGES for i, block in enumerate(fenced(page, "python"))
]


@pytest.mark.parametrize(("page", "block"), BLOCKS)
def test_python_block_runs(
    page: str, block: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket() as free:  # what torchrun sets for one process
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    for name, value in {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "RANK": 0, "WORLD_SIZE": 1}.items():
        monkeypatch.setenv(name, str(value))
    exec(compile(block, page, "exec"), {})
    assert capsys.readouterr().out.strip()


def test_no_python_block_is_overlooked() -> None:
    """Each fence that names Python is a block that runs here, or one for stock Tutel or DeepSpeed."""
    elsewhere = len(re.findall("```python (?:tutel|deepspeed)$", ALL, re.MULTILINE))
    assert len(BLOCKS) + elsewhere == len(re.findall("``` ?py", ALL))
    assert len(BLOCKS) >= 9


def test_the_readme_has_a_block_that_grows_or_prunes(capsys: pytest.CaptureFixture[str]) -> None:
    exec(compile(fenced("README.md", "python")[0], "README.md", "exec"), {})
    assert re.search(r"grown|pruned", capsys.readouterr().out)


def test_an_expert_without_tokens_goes_the_way_the_page_says(capsys: pytest.CaptureFixture[str]) -> None:
    """Exact zeros as gradients, then pruned, then grown anew with rows and gradients."""
    exec(compile(fenced("docs/how_it_works.md", "python")[1], "how_it_works.md", "exec"), {})
    said = capsys.readouterr().out
    assert re.fullmatch(
        r"(\[.*, 0\] 0\.0\n){2}.*pruned expert 3.*\n.*grown expert 3.*\n(\[.*, \d+\] 0\.0*[1-9].*\n){2}", said
    )


def test_the_picture_is_what_routing_gives() -> None:
    (shown,) = fenced("docs/how_it_works.md", "text routing")
    assert shown == picture(torch.tensor(ASSIGNED, dtype=torch.bool)) + "\n"


def commands() -> list[str]:
    """Every command of this package that the pages show, in blocks and in sentences, without its comment."""
    blocks = [block for page in PAGES for block in fenced(page, "console")]
    lines = [line.split("  #")[0].strip() for block in blocks for line in block.splitlines()]
    said = re.findall(r"`((?:dynmoe-tutel|python -m|python|make|torchrun) [^`]+)`", ALL)
    return sorted({*lines, *(" ".join(command.split()) for command in said)} - {""})


@pytest.mark.parametrize(
    "command", sorted({line.split()[1] for line in commands() if line.startswith("dynmoe-tutel ")})
)
def test_command_exists(command: str) -> None:
    from typer.testing import CliRunner

    from dynmoe_tutel.cli import app

    assert CliRunner().invoke(app, [command, "--help"]).exit_code == 0


@pytest.mark.parametrize("command", [line for line in commands() if line.startswith("dynmoe-tutel ")])
def test_options_exist(command: str) -> None:
    from typer.main import get_command

    from dynmoe_tutel.cli import app

    words = re.findall(r"[^\s\[\]|]+", command)[1:]
    found: Any = get_command(app)
    while words and words[0] in getattr(found, "commands", {}):
        found = found.commands[words.pop(0)]
    if found.name == "run":  # what follows is the script's
        return
    known = {name for parameter in found.params for name in parameter.opts}
    assert [word for word in words if word.startswith("--") and word not in known] == []


@pytest.mark.parametrize("command", [line for line in commands() if re.search(r"\bpython -m benchmarks\.", line)])
def test_modules_and_their_options_exist(command: str) -> None:
    module = ROOT / command.split("python -m ")[1].split()[0].replace(".", "/")
    source = (module / "__main__.py" if module.is_dir() else module.with_suffix(".py")).read_text()
    assert [word for word in re.findall(r"--[\w-]+", command) if f'"{word}"' not in source] == []


@pytest.mark.parametrize("command", [line for line in commands() if line.startswith("make ")])
def test_targets_and_variables_of_make_exist(command: str) -> None:
    makefile = (ROOT / "Makefile").read_text()
    for word in re.sub(r'".*?"', "", command).split()[1:]:
        name, is_variable, _ = word.partition("=")
        assert re.search(rf"^{name} \??:?=" if is_variable else rf"^{name}:", makefile, re.MULTILINE), word


@pytest.mark.parametrize("command", [c for c in commands() if re.search(r"(python|torchrun) .*\b(examples|tests)/", c)])
def test_scripts_exist(command: str) -> None:
    (script,) = re.findall(r"(?:examples|tests)/\S+\.py", command)
    assert (ROOT / script).is_file()


def test_extras_exist() -> None:
    setup = ConfigParser()
    setup.read(ROOT / "setup.cfg")
    extras = {*setup["options.extras_require"]}
    shown = re.findall(r"(?:dynmoe_tutel|'\.)\[([a-z,]+)\]", ALL)
    named = {extra for names in shown for extra in names.split(",")}
    assert named
    assert named <= extras
    table = PAGES["README.md"].split("| extra | adds |\n")[1].split("\n\n")[0]
    first_cells = " ".join(line.split("|")[1] for line in table.splitlines())
    assert {*re.findall(r"`(\w+)`", first_cells)} == extras, "the README's table of extras"


def test_every_environment_variable_is_in_the_table() -> None:
    """What the code reads is in CONTRIBUTING's table, and what is in the table is in the code."""
    folders = ("dynmoe_tutel", "kernels", "benchmarks", "tests")
    sources = [path for folder in folders for path in (ROOT / folder).rglob("*.py") if path != Path(__file__).resolve()]
    code = "\n".join(path.read_text() for path in [*sources, ROOT / "Makefile"])
    accesses = [
        r'environ(?:ment)?(?:\.get|\.setdefault|_flag|_number)?[(\[]"([A-Z][A-Z_]+)"',
        r'"([A-Z][A-Z_]+)" (?:not )?in (?:os\.)?environ',
    ]
    read = {name for access in accesses for name in re.findall(access, code)}
    assert len(read) > 8
    rows = PAGES["CONTRIBUTING.md"].split("## Environment variables")[1].split("\n## ")[0]
    cells = [line.split("|")[1] for line in rows.splitlines() if line.startswith("| `")]
    listed = {name for cell in cells for name in re.findall(r"`([A-Z_]+)`", cell)}
    assert read - listed == set()
    assert [name for name in listed if name not in code] == []


LINKS = [
    (page, target)
    for page, text in PAGES.items()
    for target in sorted(set(re.findall(r"\]\(([^)\s]+)\)", re.sub(r"^ *```.*?^ *```$", "", text, flags=re.S | re.M))))
    if not target.startswith(("http://", "https://"))
]


@pytest.mark.parametrize(("page", "target"), LINKS)
def test_link_leads_somewhere(page: str, target: str) -> None:
    """To a file of the checkout and, behind #, to one of its headings, as GitHub makes anchors of them."""
    name, _, anchor = target.partition("#")
    path = (ROOT / page).parent / name if name else ROOT / page
    assert path.exists()
    assert ROOT in path.resolve().parents
    if anchor:
        headings = re.findall(r"^#+ (.*)$", path.read_text(), re.MULTILINE)
        assert anchor in [re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings]


@pytest.mark.parametrize("contents", ["README.md", "docs/README.md"])
def test_every_page_and_example_is_in_the_contents(contents: str) -> None:
    found = {
        ((ROOT / contents).parent / target.partition("#")[0]).resolve() for page, target in LINKS if page == contents
    }
    wanted = [*(ROOT / "docs").glob("*.md"), *(ROOT / "examples").glob("*.py"), ROOT / "CONTRIBUTING.md"]
    assert [path.name for path in wanted if path not in found and path != ROOT / "docs/README.md"] == []


NAMED = sorted(
    (page, path)
    for page, text in PAGES.items()
    for path in set(re.findall(r"`((?:[\w.-]+/)*[\w-]+\.(?:py|md|txt|cfg)|(?:[\w-]+/)+)`", text))
    if "new" not in re.split(r"[/._]", path)  # what a recipe adds
    and path not in ("table.md", "tests-gpu.txt", "targets-gpu.md")  # what a command writes
)


@pytest.mark.parametrize(("page", "path"), NAMED)
def test_a_file_that_a_page_names_is_there(page: str, path: str) -> None:
    """From the checkout's root, in the package, or among the results."""
    assert any((folder / path).exists() for folder in (ROOT, ROOT / "dynmoe_tutel", ROOT / "benchmarks" / "results"))


def test_the_map_is_the_tree() -> None:
    """Each folder and file of the map is there, and each folder and module of the package is in the map."""
    (shown,) = [block for block in fenced("docs/how_it_works.md", "text") if "dynmoe_tutel/" in block]
    named = set(re.findall(r"\b(\w+(?:/|\.py))(?=\s|$)", shown)) - {"kernels/"}
    inside = ("", "dynmoe_tutel", "dynmoe_tutel/experiments", "kernels", "benchmarks", "tests")
    assert [name for name in named if not any((ROOT / folder / name).exists() for folder in inside)] == []
    rooms = {f"{path.name}/" if path.is_dir() else path.name for path in (ROOT / "dynmoe_tutel").glob("[a-z]*")}
    assert rooms - named - {"kernels/", "py.typed", "version.py", "old_paths.py"} == set()


def test_they_show_plots() -> None:
    assert len(re.findall(r"!\[[^\]]+\]\([^)]+\.png\)", ALL)) >= 5
    assert len(re.findall(r"!\[[^\]]+\]\([^)]+\.png\)", PAGES["README.md"])) >= 1


@pytest.mark.parametrize(("page", "target"), [(page, target) for page, target in LINKS if target.endswith(".png")])
def test_pictures_are_there(page: str, target: str) -> None:
    assert ((ROOT / page).parent / target).stat().st_size > 1000


EXPERIMENTS = sorted(path.parent.name for path in (ROOT / "benchmarks/results").glob("*/table.json"))


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_tables_are_those_of_the_results(name: str) -> None:
    """The table of docs/experiments.md (of `train` the README's, too) is that of the run whose files are there."""
    table = (ROOT / "benchmarks/results" / name / "table.md").read_text()
    result = [cells(line) for line in table[table.index("| row ") :].split("\n\n")[0].splitlines()]
    assert len(result) > 3
    for page in ("docs/experiments.md", *["README.md"] * (name == "train")):
        shown = [cells(line) for line in PAGES[page].splitlines() if line.startswith("|")]
        lacking = []  # for each table of the page with these columns; `seeds` and others may be left out
        for head in shown:
            if head[0] == "row" and set(head) <= set(result[0]):
                columns = [result[0].index(title) for title in head]
                lacking.append([row for row in result if [row[i] for i in columns] not in shown])
        assert [] in lacking


QUESTIONS = "benchmarks/results/questions"


def test_the_page_of_the_questions_is_that_of_the_run() -> None:
    """docs/questions.md is what the command wrote, with its pictures where the results are."""
    written = (ROOT / QUESTIONS / "questions.md").read_text()
    assert PAGES["docs/questions.md"] == written.replace("](question-", f"](../{QUESTIONS}/question-")


def claims_of_results() -> dict[str, list[str]]:
    """The sentences below each table of the results, by experiment; tables of before claims have none."""
    found = {}
    for name in EXPERIMENTS:
        content = json.loads((ROOT / "benchmarks/results" / name / "table.json").read_text())
        found[name] = content.get("sentences", [])
    return found


def shown_sentences(page: str) -> list[str]:
    """The list items of a page, each on one line and without marks of code."""
    items = re.findall(r"^\* (.*(?:\n  .*)*)", PAGES[page], re.MULTILINE)
    return [" ".join(item.replace("`", "").split()) for item in items]


@pytest.mark.parametrize("name", claims_of_results())
def test_claims_are_those_of_the_results(name: str) -> None:
    """docs/experiments.md shows each sentence below a table, word for word, as an item of a list; so does table.md."""
    said = claims_of_results()[name]
    assert [sentence for sentence in said if sentence not in shown_sentences("docs/experiments.md")] == []
    table = (ROOT / "benchmarks/results" / name / "table.md").read_text()
    assert [sentence for sentence in said if f"* {sentence}\n" not in table] == []


@pytest.mark.parametrize("page", PAGES)
def test_no_page_claims_what_no_result_says(page: str) -> None:
    """A sentence of the form of a claim is one of a table, as it is now."""
    said = [sentence for sentences in claims_of_results().values() for sentence in sentences]
    claimed = [
        item for item in shown_sentences(page) if re.search(r": (holds|does not hold|not decided), [+-]\d", item)
    ]
    assert [item for item in claimed if item not in said] == []


def cells(line: str) -> list[str]:
    """Of a row of a table."""
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_the_citation_is_of_this_version() -> None:
    citation = (ROOT / "CITATION.cff").read_text()
    assert f"\nversion: {__version__}\n" in citation
    names = re.findall(r"family-names: (\w+)\n +given-names: (\w+)", citation)
    assert [f"{family}, {given}" for family, given in names] == re.findall(
        r"(\w+, \w+)(?: and|})", fenced("README.md", "bibtex")[0]
    )


def test_whoever_reports_a_problem_is_asked_for_the_doctor() -> None:
    (template,) = (ROOT / ".github/ISSUE_TEMPLATE").iterdir()
    assert "dynmoe-tutel doctor" in template.read_text()

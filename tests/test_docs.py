"""The documents name things that exist: links, paths, functions, tests, settings, commands; and the snippet runs."""

import ast
import importlib
import re
from functools import cache
from pathlib import Path

import pytest
import torch
from typer.main import get_command

from megatron_fec.cli import app
from megatron_fec.config import known_keys

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", "docs/equations.md"]
TOP_LEVEL = "configs|docs|launch|megatron_fec|requirements|tests"  # tracked folders; runs/ is made by running
SECTIONS = "model|policy|optimizer|algorithm|rollout|data|warm_start|trainer"
FORBIDDEN = ["/root/", "/home/", "/work/", "/tmp/", "../", "shared/"]


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def links(text: str) -> list[str]:
    """Targets of links and pictures that are not web addresses."""
    targets = re.findall(r"\]\(([^)\s]+)\)", text)
    return [target for target in targets if not target.startswith(("http:", "https:"))]


def anchors(text: str) -> set[str]:
    """Names of headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def paths(text: str) -> set[str]:
    """Paths below the project's folders, each alternative of {a,b} written out."""
    found = set()
    for path in re.findall(rf"(?<![\w/.-])(?:{TOP_LEVEL})/[\w./*{{}},-]*", text):
        path = path.rstrip(".,")
        braces = re.search(r"\{([^}]*)\}", path)
        names = braces[1].split(",") if braces else [""]
        found |= {path.replace(braces[0], name) if braces else path for name in names}
    return found


def references(text: str) -> set[tuple[str, str]]:
    """(file, dotted name) of every `file.py:name`."""
    return set(re.findall(r"`([\w/]+\.py):([\w.]+)`", text))


def settings(text: str) -> set[str]:
    """Dotted names in code that start with a section of the configuration; not `file.py` or `file.py:name`."""
    return set(re.findall(rf"(?<![\w/.])((?:{SECTIONS})\.(?!py\b)[a-z_0-9.]*[a-z_0-9])", text))


@cache
def functions_of(test_file: str) -> set[str]:
    nodes = ast.parse(read(f"tests/{test_file}")).body
    return {node.name for node in nodes if isinstance(node, ast.FunctionDef)}


def snippet() -> str:
    (code,) = re.findall(r"^```python\n(.*?)^```", read("README.md"), re.MULTILINE | re.DOTALL)
    return code


@pytest.mark.parametrize("name", DOCUMENTS)
def test_links_lead_somewhere(name: str) -> None:
    text = read(name)
    for target in links(text):
        path, _, anchor = target.partition("#")
        file = (ROOT / name).parent / path if path else ROOT / name
        assert file.exists(), f"{name} links to {target}"
        assert not anchor or anchor in anchors(file.read_text(encoding="utf-8")), f"{name} links to {target}"


@pytest.mark.parametrize("name", DOCUMENTS)
def test_paths_exist(name: str) -> None:
    missing = [path for path in paths(read(name)) if not any(ROOT.glob(path.rstrip("/")))]
    assert missing == []


@pytest.mark.parametrize("name", DOCUMENTS)
def test_settings_exist(name: str) -> None:
    known = set(known_keys())
    sections = {key.rsplit(".", 1)[0] for key in known}
    # The one that is mistyped on purpose stands in an error message.
    assert settings(read(name)) - known - sections - {"trainer.max_step"} == set()


@pytest.mark.parametrize("name", DOCUMENTS)
def test_named_functions_and_tests_exist(name: str) -> None:
    for file, dotted in references(read(name)):
        if file.startswith("test_"):
            assert dotted in functions_of(file), f"{name} names {file}:{dotted}"
            continue
        found = importlib.import_module("megatron_fec." + file.removesuffix(".py").replace("/", "."))
        for part in dotted.split("."):
            assert hasattr(found, part), f"{name} names {file}:{dotted}"
            found = getattr(found, part)


def test_every_row_of_the_table_has_a_test() -> None:
    table = read("docs/equations.md").split("## Table")[1].split("\n\n")[1]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[2:]]
    assert len(rows) > 15
    assert [row[0] for row in rows if len(row) != 3] == []
    untested = [row[0] for row in rows if not row[2] and not row[1].startswith("not used")]
    assert untested == []


@pytest.mark.parametrize("name", DOCUMENTS)
def test_make_targets_exist(name: str) -> None:
    targets = set(re.findall(r"^([a-z][\w-]*):", read("Makefile"), re.MULTILINE))
    called = re.findall(r"(?:`|^)make ((?:[a-z][\w-]* ?)+)", read(name), re.MULTILINE)
    named = {target for words in called for target in words.split()}
    assert named <= targets
    assert name != "README.md" or {"quickstart", "test", "setup"} <= named


def test_commands_exist() -> None:
    named = set(re.findall(r"megatron-fec ([a-z]+)", "".join(map(read, DOCUMENTS))))
    commands = getattr(get_command(app), "commands")  # noqa: B009 - click's Group, which typer does not type
    assert named and named <= set(commands)


@pytest.mark.parametrize("name", DOCUMENTS)
@pytest.mark.parametrize("word", FORBIDDEN)
def test_nothing_of_one_machine(name: str, word: str) -> None:
    assert word not in read(name).replace("PYTHON=/path/to/", "")


@pytest.mark.parametrize("name", DOCUMENTS)
def test_documents_are_ascii_and_not_too_wide(name: str) -> None:
    text = read(name)
    assert text.isascii()
    prose = re.sub(r"^\|.*$", "", text, flags=re.MULTILINE)  # a row of a table is one line
    assert [line for line in prose.splitlines() if len(line) > 160] == []


def test_the_readme_is_short() -> None:
    assert len(read("README.md").splitlines()) < 220


def test_the_snippet_runs() -> None:
    names: dict = {}
    torch.manual_seed(0)
    exec(compile(snippet(), "README.md", "exec"), names)
    gradient = names["logits"].grad
    assert gradient.isfinite().all()
    assert gradient.any(dim=1).all(), "a ratio of exp(0.1) is inside every bound: no token is clipped"
    assert names["output"].count.item() == 6


@pytest.mark.parametrize(
    ("find", "text", "expected"),
    [
        (links, "[a](docs/a.md) ![b](b.png) [c](https://x.org)", ["docs/a.md", "b.png"]),
        (anchors, "# The B term\n## Limits", {"the-b-term", "limits"}),
        (
            paths,
            "`configs/q_{id,od}.yaml`, runs/x, a/tests/b and docs/",
            {"configs/q_id.yaml", "configs/q_od.yaml", "docs/"},
        ),
        (references, "`a/b.py:C._d` and `e.py`", {("a/b.py", "C._d")}),
        (settings, "`trainer.resume=auto`. `trainer.py:f` algorithm/x.py", {"trainer.resume"}),
    ],
)
def test_the_checks_see_what_they_should(find, text: str, expected) -> None:
    assert find(text) == expected

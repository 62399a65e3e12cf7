"""The documents name things that exist: links, paths, functions, tests, settings, commands; and the snippet runs."""

import ast
import importlib
import inspect
import re
from functools import cache
from pathlib import Path

import pytest
import torch
from typer.main import get_command

from megatron_fec.algorithm.additions import AdaptiveEntropyCoef
from megatron_fec.algorithm.advantages import ADVANTAGES
from megatron_fec.algorithm.losses import ADDITIONS, MARKS, POLICY_LOSSES
from megatron_fec.algorithm.options import defaults_of
from megatron_fec.algorithm.reward_shaping import REWARD_SHAPING
from megatron_fec.algorithm.schedules import SCHEDULES
from megatron_fec.algorithm.strategies import ADAPTIVE
from megatron_fec.cli import app
from megatron_fec.config import known_keys
from megatron_fec.policy_options import PolicyOptions

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = [
    "README.md",
    "CONTRIBUTING.md",
    "CHANGELOG.md",
    "docs/equations.md",
    "docs/strategies.md",
    "docs/evaluation.md",
    "docs/replay.md",
    "docs/security.md",
    "docs/slurm.md",
    "docs/doctor.md",
    "docs/parallelism.md",
    "docs/experts.md",
    "docs/planning.md",
]
TOP_LEVEL = (
    "configs|docs|launch|megatron_fec|requirements|slurm|tests"  # tracked folders; runs/ is made by running
)
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


def snippet(name: str) -> str:
    """The one block of Python in a document."""
    (code,) = re.findall(r"^```python\n(.*?)^```", read(name), re.MULTILINE | re.DOTALL)
    return code


def option_keys() -> set[str]:
    """The dotted settings of all strategies, and the policy's."""
    functions = [*POLICY_LOSSES.values(), *ADDITIONS.values(), *MARKS.values(), AdaptiveEntropyCoef]
    functions += [*ADVANTAGES.values(), *REWARD_SHAPING.values()]
    return (
        {f"algorithm.options.{key}" for function in functions for key in defaults_of(function)}
        | {f"algorithm.schedule.options.{key}" for cls in SCHEDULES.values() for key in defaults_of(cls)}
        | {f"policy.options.{key}" for key in defaults_of(PolicyOptions)}
    )


def row_of(text: str, heading: str, name: str) -> str:
    """The row of the tables under a heading of the second level that begins with `name`."""
    section = text.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    (row,) = re.findall(rf"^\| `{name}` \|.*$", section, re.MULTILINE)
    return row


def shown(default: object) -> str:
    """A default as the tables write it."""
    if default is inspect.Parameter.empty:
        return "required"
    text = "null" if default is None else f"{default:g}" if isinstance(default, float) else str(default)
    return re.sub(r"e-0(\d)", r"e-\1", text)


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
    known = set(known_keys()) | option_keys()
    sections = {key.rsplit(".", 1)[0] for key in known}
    # One is mistyped on purpose, in an error message; one belongs to the worked example.
    others = {"trainer.max_step", "algorithm.options.median_scale"}
    assert settings(read(name)) - known - sections - others == set()


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
    exec(compile(snippet("README.md"), "README.md", "exec"), names)
    gradient = names["logits"].grad
    assert gradient.isfinite().all()
    assert gradient.any(dim=1).all(), "a ratio of exp(0.1) is inside every bound: no token is clipped"
    assert names["output"].count.item() == 6


def test_the_worked_example_of_a_strategy_runs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setitem(ADVANTAGES, "median", None)  # so that the entry goes when the test ends
    code = snippet("docs/strategies.md")
    exec(compile(code, "docs/strategies.md", "exec"), {})
    (result,) = re.findall(r"# (\[\[.*)$", code, re.MULTILINE)
    assert result.replace("]", "").replace("[", "").split(", ") == re.findall(
        r"-?\d(?=\.)", capsys.readouterr().out
    )
    with pytest.raises(ValueError, match=r"median_scale=0 must be greater than 0"):
        exec(compile(code.replace("median_scale=2", "median_scale=0"), "docs/strategies.md", "exec"), {})


@pytest.mark.parametrize(
    ("heading", "name", "function"),
    [("Schedules", *item) for item in SCHEDULES.items()]
    + [("Advantages", *item) for item in ADVANTAGES.items()]
    + [("Data side", *item) for item in REWARD_SHAPING.items()]
    + [("Policy losses", *item) for item in POLICY_LOSSES.items()]
    + [("Additions", *item) for item in (ADDITIONS | {ADAPTIVE: AdaptiveEntropyCoef}).items()],
)
def test_the_tables_name_every_strategy_with_its_defaults(heading: str, name: str, function) -> None:
    row = row_of(read("docs/strategies.md"), heading, name)
    assert dict(re.findall(r"`(\w+)` \(([\w.-]+)\)", row)) == {
        key: shown(default) for key, default in defaults_of(function).items()
    }


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

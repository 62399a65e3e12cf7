import base64
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from megatron_fec.report import PANELS, write_report

VOID = {"meta", "img", "link"}


class _Page(HTMLParser):
    """Collects text, image titles and table cells; refuses tags that do not nest."""

    def __init__(self, text: str):
        super().__init__()
        self.stack: list[str] = []
        self.words: list[str] = []
        self.images: list[str] = []
        self.sources: list[str] = []
        self.feed(text)
        assert self.stack == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.sources += [v for k, v in attrs if k in ("src", "href") and v]
        if tag == "img":
            self.images.append(values["alt"] or "")
        if tag not in VOID:
            self.stack.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.stack.pop() == tag

    def handle_data(self, data: str) -> None:
        if data.strip() and self.stack[-1] != "style":
            self.words.append(data.strip())


def make_run(
    folder: Path, *, schedule: str = "id", steps: int = 5, max_steps: int = 5, lr: float = 1e-6
) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(
        f"model: {{path: embedded}}\nalgorithm: {{schedule: {{name: {schedule}, total_steps: 9}}}}\n"
        f"optimizer: {{lr: {lr}}}\ntrainer: {{run_dir: {folder}, max_steps: {max_steps}}}\n"
    )
    with (folder / "metrics.jsonl").open("w") as file:
        for step in range(steps):
            row = {"step": step, "train_rollouts/entropy": 1.0 + step, "train_rollouts/reward": 0.1 * step}
            row |= {"train_optim/eps_upper_mean": 0.3, "train_optim/eps_upper_p10": 0.2}
            row |= {"train_optim/eps_upper_p90": 0.4, "train_optim/grad_norm": 0.7}
            row |= {"timers/generate": 1.0, "timers/train": 2.0, "timers/step": 3.5}
            if step % 2 == 0:
                row |= {"val_rollouts/pass_at_k/8": 0.5, "val_rollouts/pass_at_k/1": 0.25}
            file.write(json.dumps(row) + "\n")
    return folder


def render(runs: list[Path], output: Path) -> _Page:
    write_report(runs, output)
    return _Page(output.read_text())


def test_page_shows_what_the_run_has_and_skips_the_rest(tmp_path: Path):
    page = render([make_run(tmp_path / "quick")], tmp_path / "report.html")
    assert page.images == [
        "Entropy",
        "Reward",
        "pass@k",
        "Upper clip distance",
        "Gradient norm and twice the entropy",
        "Seconds per step",
    ]
    assert page.words.count("quick (id)") >= 2  # title and heading
    assert any("5 steps" in word and "unfinished" not in word for word in page.words)


def test_page_needs_nothing_else(tmp_path: Path):
    page = render([make_run(tmp_path / "quick")], tmp_path / "report.html")
    assert page.sources
    assert all(source.startswith("data:image/svg+xml;base64,") for source in page.sources)
    assert not re.search(r"(url\(|@import|<script|<link)", (tmp_path / "report.html").read_text())
    svg = base64.b64decode(page.sources[0].split(",")[1])
    assert b"<svg" in svg
    assert svg.rstrip().endswith(b"</svg>")


def test_start_middle_and_end_are_the_runs_numbers(tmp_path: Path):
    page = render([make_run(tmp_path / "quick")], tmp_path / "report.html")
    at = page.words.index("entropy")
    assert page.words[at + 1 : at + 4] == ["1", "3", "5"]
    at = page.words.index("pass@k 8")
    assert page.words[at + 1 : at + 4] == ["0.5", "0.5", "0.5"]


def test_two_runs_lie_over_each_other_and_their_differences_are_listed(tmp_path: Path):
    runs = [make_run(tmp_path / "a"), make_run(tmp_path / "b", schedule="grpo", lr=3e-6, steps=3)]
    page = render(runs, tmp_path / "out" / "report.html")
    assert page.images.count("Entropy") == 1
    assert {"Seconds per step: a (id)", "Seconds per step: b (grpo)"} <= set(page.images)
    assert "Settings: 2 differ" in page.words
    at = page.words.index("optimizer.lr")
    assert page.words[at + 1 : at + 3] == ["1e-06", "3e-06"]
    assert any("unfinished: 3 of 5 steps" in word for word in page.words)
    text = base64.b64decode(page.sources[page.images.index("Entropy")].split(",")[1]).decode()
    assert "<!-- a (id) -->" in text  # matplotlib notes each drawn string
    assert "<!-- b (grpo) -->" in text


def test_same_folder_name_and_schedule_stay_distinct(tmp_path: Path):
    runs = [make_run(tmp_path / "x" / "run"), make_run(tmp_path / "y" / "run")]
    page = render(runs, tmp_path / "report.html")
    assert {"Seconds per step: run (id)", f"Seconds per step: {tmp_path}/y/run run (id)"} <= set(page.images)


def test_a_run_without_a_finished_step_says_so(tmp_path: Path):
    page = render([make_run(tmp_path / "new", steps=0)], tmp_path / "report.html")
    assert page.images == []
    assert any("no step is finished yet" in word for word in page.words)


@pytest.mark.parametrize("steps", [1, 2, 60])
def test_short_and_long_runs(tmp_path: Path, steps: int):
    page = render([make_run(tmp_path / "run", steps=steps, max_steps=steps)], tmp_path / "report.html")
    assert len(page.images) == 6


def test_a_run_that_is_writing_and_has_no_config(tmp_path: Path):
    folder = make_run(tmp_path / "run", steps=2)
    (folder / "config.yaml").unlink()
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "train_roll')
    page = render([folder], tmp_path / "report.html")
    assert "run" in page.words
    assert any("2 steps" in word for word in page.words)


def test_names_are_escaped(tmp_path: Path):
    page = render([make_run(tmp_path / "a<b>&c")], tmp_path / "report.html")
    assert "a<b>&c (id)" in page.words


@pytest.mark.parametrize("runs", [[], ["nowhere"]])
def test_bad_folders_are_clear_errors(tmp_path: Path, runs: list[str]):
    with pytest.raises(ValueError, match=r"run folder"):
        write_report([tmp_path / run for run in runs], tmp_path / "report.html")
    assert not (tmp_path / "report.html").exists()


def test_panels_name_metrics_of_the_groups():
    keys = [curve.key for panel in PANELS for curve in panel.curves]
    assert all(
        key.split("/")[0] in ("train_rollouts", "train_optim", "val_rollouts", "memory") for key in keys
    )
    assert len({panel.title for panel in PANELS}) == len(PANELS)

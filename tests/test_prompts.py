"""Sources, rendering, the length filter, every error a user can meet, and the order of prompts."""

import json
import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import datasets.config
import huggingface_hub.constants
import pyarrow
import pyarrow.parquet
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from megatron_fec.config import CHOICES, ConfigError, DataConfig
from megatron_fec.tasks.arithmetic import countdown_rows
from megatron_fec.tasks.prompts import PROMPT_STYLES, PromptOrder, PromptSet, load_prompts
from megatron_fec.tasks.scorers import SCORERS

TURNS = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
TEMPLATE = TURNS + "{% if add_generation_prompt %}<assistant>{% endif %}"
INSTRUCTION = "\nPlease reason step by step, and put your final answer within \\boxed{}."
ROW = {"prompt": "one two", "reward_model": {"ground_truth": "3"}}


def make_tokenizer(chat_template: str | None) -> PreTrainedTokenizerFast:
    """One token a word, with [BOS] (id 1) before each text, as Llama has it."""
    words = Tokenizer(models.WordLevel({"[UNK]": 0, "[BOS]": 1, "one": 2, "two": 3}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.post_processor = processors.TemplateProcessing(single="[BOS] $A", special_tokens=[("[BOS]", 1)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]", bos_token="[BOS]")
    tokenizer.chat_template = chat_template
    return tokenizer


BASE, CHAT = make_tokenizer(None), make_tokenizer(TEMPLATE)


def load(source: object, **changes: Any) -> PromptSet:
    settings: dict[str, Any] = {
        "tokenizer": BASE,
        "prompt_column": DataConfig.prompt_column,
        "answer_column": DataConfig.answer_column,
        "prompt_style": "plain",
        "max_prompt_tokens": 100_000,
    }
    return load_prompts(str(source), **(settings | changes))


def write(tmp_path: Path, *rows: object) -> Path:
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


# ------------------------------------------------------------------ sources


def test_jsonl_and_parquet_give_the_same_prompts(tmp_path: Path) -> None:
    rows = countdown_rows("validation")[:7]
    parquet = tmp_path / "data.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), parquet)
    assert load(write(tmp_path, *rows)) == load(parquet)
    assert len(load(parquet).prompts) == 7


def test_a_folder_is_loaded_by_datasets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "folder"
    folder.mkdir()
    rows = countdown_rows("validation")[:3]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "train.parquet")
    assert load(folder) == load(write(tmp_path, *rows))


def test_embedded_countdown() -> None:
    train, validation = load("embedded:countdown"), load("embedded:countdown:validation")
    assert (len(train.prompts), len(validation.prompts)) == (1089, 256)
    assert not {p.text for p in train.prompts} & {p.text for p in validation.prompts}
    prompt, row = validation.prompts[5], countdown_rows("validation")[5]
    assert (prompt.prompt_id, prompt.verifier) == (5, "countdown")
    assert (prompt.text, prompt.answer) == (row["prompt"][0]["content"], row["reward_model"]["ground_truth"])
    assert json.loads(prompt.extra) == row["extra_info"]


def test_embedded_tasks_know_their_columns() -> None:
    assert load("embedded:countdown", prompt_column="question", answer_column="x") == load(
        "embedded:countdown"
    )


def test_reasoning_gym_prompts_are_scored_by_their_own_answers() -> None:
    train, validation = load("reasoning_gym:rearc:5"), load("reasoning_gym:rearc:5:validation")
    assert len(train.prompts) == 5 and train == load("reasoning_gym:rearc:5")
    assert not {p.text for p in train.prompts} & {p.text for p in validation.prompts}
    for prompt in train.prompts:
        assert SCORERS[prompt.verifier](prompt.answer, prompt.answer, prompt.extra) == 1
        assert SCORERS[prompt.verifier]("0", prompt.answer, prompt.extra) < 1


def test_reasoning_gym_has_a_default_size_and_tasks_without_an_answer() -> None:
    assert len(load("reasoning_gym:leg_counting").prompts) == 1000
    assert load("reasoning_gym:graph_color:2").prompts[0].answer == "graph_color"


# ------------------------------------------------------------------ rows


@pytest.mark.parametrize(
    ("prompt", "answer", "text"),
    [
        ("one two", "3", "one two"),
        ([{"role": "system", "content": "one"}, {"role": "user", "content": "two"}], 3, "two"),
        ([{"role": "user", "content": "one"}, {"role": "user", "content": " two\n"}], 2.5, " two\n"),
    ],
)
def test_prompts_are_text_or_messages(tmp_path: Path, prompt: object, answer: object, text: str) -> None:
    path = write(tmp_path, {"question": prompt, "a": {"b": {"c": answer}}})
    (loaded,) = load(path, prompt_column="question", answer_column="a.b.c").prompts
    assert (loaded.text, loaded.answer, loaded.verifier, loaded.extra) == (text, str(answer), "math", "")


def test_an_answer_may_be_the_one_entry_of_a_list(tmp_path: Path) -> None:
    """As in OlympiadBench."""
    rows = [ROW | {"reward_model": {"ground_truth": [value]}} for value in ("$3$", 2)]
    assert [prompt.answer for prompt in load(write(tmp_path, *rows)).prompts] == ["$3$", "2"]


def test_an_answer_may_stand_behind_a_sign(tmp_path: Path) -> None:
    """As in GSM8K, whose column holds the solution."""
    solutions = ["One #### two.\n#### 1,234\n", "####5", 6]
    rows = [ROW | {"reward_model": {"ground_truth": text}} for text in solutions]
    loaded = load(write(tmp_path, *rows), answer_after="####").prompts
    assert [prompt.answer for prompt in loaded] == ["1,234", "5", "6"]  # a number is an answer already
    assert (
        load("embedded:countdown", answer_after="####", max_prompt_tokens=9).prompts[0].verifier
        == "countdown"
    )


@pytest.mark.parametrize("text", ["only words", "#### "])
def test_an_answer_without_its_sign(tmp_path: Path, text: str) -> None:
    path = write(tmp_path, ROW, ROW | {"reward_model": {"ground_truth": text}})
    message = r"=.* has in row \d a reward_model\.ground_truth with nothing after '####': .* Set {}\.answer_after to"
    with pytest.raises(ConfigError, match="^data.train" + message.format("data")):
        load(path, answer_after="####")
    with pytest.raises(ConfigError, match="^benchmarks.a.source" + message.format("benchmarks.a")):
        load(path, answer_after="####", setting="benchmarks.a.source")


def test_blank_lines_and_windows_line_ends_are_skipped(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_bytes(f"\r\n{json.dumps(ROW)}\r\n\n{json.dumps(ROW)}".encode())
    assert len(load(path).prompts) == 2


def test_a_row_may_name_its_verifier(tmp_path: Path) -> None:
    infos = [{"verifier": "countdown", "numbers": [1]}, {"index": 3}, {"verifier": None}, None]
    prompts = load(write(tmp_path, *[ROW | {"extra_info": info} for info in infos])).prompts
    assert [p.verifier for p in prompts] == ["countdown", "math", "math", "math"]
    assert json.loads(prompts[0].extra) == infos[0] and prompts[1].extra == ""


def test_long_prompts_are_left_out_and_counted(tmp_path: Path) -> None:
    rows = [ROW | {"prompt": "one " * n} for n in (3, 1, 4, 2)]
    loaded = load(write(tmp_path, *rows), max_prompt_tokens=3)  # with [BOS]
    assert [(p.prompt_id, p.token_ids) for p in loaded.prompts] == [(0, (1, 2)), (1, (1, 2, 2))]
    assert loaded.num_too_long == 2


# ------------------------------------------------------------------ styles

MESSAGES = [{"role": "system", "content": "S "}, {"role": "user", "content": "one two"}]


@pytest.mark.parametrize(
    ("style", "tokenizer", "text", "has_bos"),
    [
        ("plain", BASE, "one two", True),
        ("plain", CHAT, "one two", True),
        ("boxed", BASE, "one two" + INSTRUCTION, True),
        ("boxed", CHAT, f"<system>S <user>one two{INSTRUCTION}<assistant>", False),
        ("chat", CHAT, "<system>S <user>one two<assistant>", False),
    ],
)
def test_styles(tmp_path: Path, style: str, tokenizer: Any, text: str, has_bos: bool) -> None:
    """A rendered template carries its own special tokens; for other text the tokenizer adds them."""
    path = write(tmp_path, ROW | {"prompt": MESSAGES})
    (prompt,) = load(path, prompt_style=style, tokenizer=tokenizer).prompts
    assert prompt.text == text
    assert (prompt.token_ids[0] == 1) == has_bos
    assert len(prompt.token_ids) == len(text.split()) + has_bos


def test_boxed_extends_the_last_user_message(tmp_path: Path) -> None:
    turns = [("user", "one"), ("assistant", "two"), ("user", "one"), ("assistant", "so ")]
    path = write(tmp_path, ROW | {"prompt": [{"role": role, "content": content} for role, content in turns]})
    (prompt,) = load(path, prompt_style="boxed", tokenizer=CHAT).prompts
    assert prompt.text == f"<user>one<assistant>two<user>one{INSTRUCTION}<assistant>so <assistant>"


def test_the_config_offers_these_styles() -> None:
    assert tuple(PROMPT_STYLES) == CHOICES["data.prompt_style"]


# ------------------------------------------------------------------ errors


def test_a_chat_style_without_a_template(tmp_path: Path) -> None:
    path = write(tmp_path, ROW)
    with pytest.raises(ConfigError, match=r"data.train=.*data.prompt_style=chat needs .* Use boxed or plain"):
        load(path, prompt_style="chat")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"prompts": "x", "a": 1},
            "has no column prompt in row 1; there are prompts, a. Set data.prompt_column",
        ),
        (
            {"prompt": "x", "reward_model": {"truth": "3", "style": ""}},
            "has no column reward_model.ground_truth in row 1; reward_model has truth, style. Set data.answer_column",
        ),
        (
            {"prompt": "x", "reward_model": "3"},
            "no column reward_model.ground_truth in row 1; reward_model has none",
        ),
        (ROW | {"prompt": " "}, "row 1 a prompt that is neither text nor a list"),
        (ROW | {"prompt": []}, "row 1 a prompt that is neither text nor a list"),
        (ROW | {"prompt": ["one"]}, "row 1 a prompt that is neither text nor a list"),
        (ROW | {"prompt": [{"role": "user"}]}, "row 1 a prompt that is neither text nor a list"),
        (ROW | {"prompt": [{"role": "system", "content": "x"}]}, "with a user message"),
        (
            ROW | {"reward_model": {"ground_truth": ["3", "4"]}},
            "that is neither text nor a number: ['3', '4']. Mend",
        ),
        (ROW | {"reward_model": {"ground_truth": []}}, "that is neither text nor a number: []. Mend"),
        (ROW | {"reward_model": {"ground_truth": None}}, "that is neither text nor a number: None"),
        (ROW | {"reward_model": {"ground_truth": True}}, "that is neither text nor a number: True"),
        (ROW | {"reward_model": {"ground_truth": float("nan")}}, "that is neither text nor a number: nan"),
        (ROW | {"reward_model": {"ground_truth": ""}}, "that is neither text nor a number: ''"),
        (
            ROW | {"extra_info": {"verifier": "maths"}},
            "extra_info.verifier 'maths' in row 1. Did you mean math?",
        ),
        (ROW | {"extra_info": {"verifier": "zzz"}}, "Use one of math, countdown, reasoning_gym."),
    ],
)
def test_bad_rows(tmp_path: Path, row: dict, message: str) -> None:
    path = write(tmp_path, ROW, row)
    with pytest.raises(ConfigError, match=re.escape(f"data.train={path} ") + ".*" + re.escape(message)):
        load(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "holds no rows. Name a source"),
        (b"\n\n", "holds no rows"),
        (b'{"prompt": "x"}\n{"prompt": \n', "is broken JSON in line 2: Expecting value"),
        (b'{"a": 1}\n\n\xef\xbb\xbf{}\n', "is broken JSON in line 3"),
        (b'{"a": 1}\n\n{"prompt": "\xff"}\n', "is not UTF-8 in line 3: invalid start byte. Save it as UTF-8"),
        (b'["prompt"]\n', "must hold a JSON object in line 1, not ['prompt']"),
    ],
)
def test_bad_jsonl(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "data.jsonl"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=re.escape(f"data.train={path} {message}")):
        load(path)


def test_bad_parquet(tmp_path: Path) -> None:
    path = tmp_path / "data.parquet"
    path.write_bytes(b"nothing")
    with pytest.raises(ConfigError, match=r"is not a readable parquet file: .* Write it again"):
        load(path)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{tmp}/none.jsonl", "does not exist; a relative path starts at"),
        ("none.parquet", "does not exist; a relative path starts at"),
        ("{tmp}/data.csv", "must end in .jsonl or .parquet, not in .csv. Convert"),
        ("{tmp}/noext", "must end in .jsonl or .parquet, not in nothing. Convert"),
        ("{tmp}/missing", "does not exist. Use a .jsonl or .parquet file, a hub name, or embedded:countdown"),
        ("embedded:countup", "names no embedded task. Use embedded:countdown or"),
        ("embedded:countdown:test", "names no embedded task"),
        ("reasoning_gym:leg_countin", "names no reasoning-gym data set. Did you mean leg_counting?"),
        ("reasoning_gym:", "names no reasoning-gym data set. There are"),
        ("reasoning_gym:leg_counting:0", "must have the form reasoning_gym:NAME:SIZE; SIZE=1000 is usual"),
        ("reasoning_gym:leg_counting:few", "must have the form reasoning_gym:NAME:SIZE"),
        ("reasoning_gym:composite", "cannot be generated with default settings: AssertionError"),
    ],
)
def test_bad_sources(tmp_path: Path, source: str, message: str) -> None:
    (tmp_path / "data.csv").write_text("a,b")
    (tmp_path / "noext").write_text("a,b")
    source = source.format(tmp=tmp_path)
    with pytest.raises(ConfigError, match=re.escape(f"data.train={source} {message}")):
        load(source)


def test_a_hub_name_that_cannot_be_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(
        ConfigError, match=r"data.train=nobody/nothing could not be loaded.*offline, give a .parquet"
    ):
        load("nobody/nothing")


CARD = """---
configs:
- config_name: main
  default: true
  data_files: [{split: train, path: a.jsonl}, {split: test, path: b.jsonl}]
- config_name: extra
  data_files: [{split: test, path: c.jsonl}]
---
"""


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as the hub keeps it, with two configurations."""
    folder = tmp_path_factory.mktemp("repository")
    for name in "abc":
        write(folder, ROW | {"prompt": name}).rename(folder / f"{name}.jsonl")
    (folder / "README.md").write_text(CARD)
    return folder


@pytest.mark.parametrize(
    ("parts", "prompt"), [("", "a"), (":test", "b"), (":main:test", "b"), (":extra:test", "c")]
)
def test_a_split_and_a_configuration_may_be_named(
    repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, parts: str, prompt: str
) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    assert [one.text for one in load(f"{repository}{parts}").prompts] == [prompt]


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        (":tset", "could not be loaded as a file, folder or hub data set: .*tset"),
        (":extra:train", "could not be loaded as a file, folder or hub data set: .*train"),
        (":other:test", "could not be loaded as a file, folder or hub data set: .*other"),
        (":a:b:c", "does not exist.*NAME:SPLIT, or NAME:CONFIG:SPLIT"),
        (":", "does not exist.*NAME:SPLIT, or NAME:CONFIG:SPLIT"),
    ],
)
def test_a_split_that_is_not_there(
    repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, parts: str, message: str
) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    with pytest.raises(ConfigError, match=rf"(?s)^data.train=.*{parts} {message}"):
        load(f"{repository}{parts}")


def test_no_prompt_is_short_enough(tmp_path: Path) -> None:
    path = write(tmp_path, ROW | {"prompt": "one two one"}, ROW | {"prompt": "one " * 7})
    with pytest.raises(
        ConfigError, match=r"of at most rollout.max_prompt_tokens=2 tokens. The shortest of its 2 has 4"
    ):
        load(path, max_prompt_tokens=2)


def test_errors_name_the_setting(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^data.validation=.*none.jsonl does not exist"):
        load(tmp_path / "none.jsonl", setting="data.validation")


# ------------------------------------------------------------------ order


def test_each_epoch_is_a_permutation_of_its_own() -> None:
    epochs = [PromptOrder(37, 0).batch(37 * e, 37) for e in range(3)]
    assert all(sorted(epoch) == list(range(37)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert PromptOrder(37, 1).batch(0, 37) != epochs[0]


@pytest.mark.parametrize("cuts", [[0, 5, 11], [0, 10, 11], [0, 1, 2, 3, 11]])
def test_the_order_resumes_anywhere_and_crosses_epochs(cuts: list[int]) -> None:
    whole = PromptOrder(5, 7).batch(0, 11)
    parts = [PromptOrder(5, 7).batch(a, b - a) for a, b in pairwise(cuts)]
    assert [i for part in parts for i in part] == whole
    assert sorted(whole[5:10]) == [0, 1, 2, 3, 4]


def test_a_batch_may_be_larger_than_the_data() -> None:
    assert sorted(PromptOrder(3, 0).batch(0, 9)) == [0, 0, 0, 1, 1, 1, 2, 2, 2]

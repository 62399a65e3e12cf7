"""The embedded task: right answers, standard precedence, a held-out split, and fillers of the stated shape."""

import re
from collections import Counter
from itertools import product

import numpy as np
import pytest

from megatron_fec.tasks.arithmetic import (
    FILLERS,
    HELD_OUT,
    VOCABULARY,
    _filler_orders,
    _filler_probabilities,
    _value,
    core_expression,
    countdown_rows,
    demonstrations,
    words_of,
)

PYTHON = {"__builtins__": {}}  # eval of digits and operators only: an oracle for precedence


def test_the_vocabulary_is_62_unique_words() -> None:
    assert len(FILLERS) == len(set(FILLERS)) == 48
    assert len(VOCABULARY) == len(set(VOCABULARY)) == 10 + 3 + 1 + 48
    assert all(re.fullmatch(r"[a-z]{2,7}|[0-9=*+-]", word) for word in VOCABULARY)


def test_values_follow_standard_precedence() -> None:
    for a, first, b, second, c in product(range(1, 10), "+-*", range(1, 10), "+-*", range(1, 10)):
        assert _value(a, first, b, second, c) == eval(f"{a}{first}{b}{second}{c}", PYTHON)


def test_splits_are_disjoint_complete_and_the_same_each_time() -> None:
    train, validation = countdown_rows("train"), countdown_rows("validation")
    texts = [row["prompt"][0]["content"] for row in train + validation]
    assert len(validation) == HELD_OUT == 256
    assert len(set(texts)) == len(texts) == 1345  # every (numbers, target) that can be reached
    assert countdown_rows("train") == train


def test_a_row_has_the_schema_of_dapo() -> None:
    for row in countdown_rows("train")[:50]:
        numbers, target = row["extra_info"]["numbers"], int(row["reward_model"]["ground_truth"])
        assert row["prompt"] == [{"role": "user", "content": f"{''.join(map(str, numbers))}{target:02d}="}]
        assert numbers == sorted(numbers) and row["extra_info"]["verifier"] == "countdown"
        assert set(row) == {"data_source", "prompt", "ability", "reward_model", "extra_info"}


def test_every_demonstration_answers_its_prompt() -> None:
    train = {row["prompt"][0]["content"]: row for row in countdown_rows("train")}
    shapes, seen = set(), set()
    for prompt, response in demonstrations(3000, seed=1):
        row = train[prompt]
        expression = core_expression(response)
        assert eval(expression, PYTHON) == int(row["reward_model"]["ground_truth"])
        assert sorted(map(int, expression[::2])) == row["extra_info"]["numbers"]
        shapes.add(
            "".join("w" if word in FILLERS else "d" if word.isdigit() else "o" for word in words_of(response))
        )
        seen.add((prompt, expression))
    assert shapes == {"wwdowwdowwd"}
    assert len(seen) > 1.5 * len({prompt for prompt, _ in seen})  # several right answers to a prompt


def test_demonstrations_depend_on_the_seed_alone() -> None:
    assert demonstrations(7, seed=3) == demonstrations(7, seed=3)
    assert demonstrations(7, seed=3) != demonstrations(7, seed=4)


def test_filler_probabilities_are_a_common_word_and_a_zipf_tail() -> None:
    probabilities = _filler_probabilities()
    assert probabilities.shape == (48,) and probabilities.sum() == pytest.approx(1, abs=1e-12)
    assert probabilities[0] == 0.88
    assert probabilities[1] / probabilities[3] == pytest.approx(3**1.7)


@pytest.mark.parametrize("place", range(6))
def test_the_common_filler_depends_on_the_place_and_the_symbol_before(place: int) -> None:
    counts: dict[str, Counter] = {}
    for prompt, response in demonstrations(20000, seed=2):
        words = words_of(response)
        fillers = [word for word in words if word in FILLERS]
        previous = prompt[0] if place < 2 else words[3 if place < 4 else 7]
        counts.setdefault(previous, Counter())[fillers[place]] += 1
    common = {previous: count.most_common(1)[0] for previous, count in counts.items()}
    for previous, (word, times) in common.items():
        assert word == FILLERS[_filler_orders()[place, VOCABULARY.index(previous), 0]]
        total = counts[previous].total()
        assert times / total == pytest.approx(0.88, abs=4 * np.sqrt(0.88 * 0.12 / total))
    assert len({word for word, _ in common.values()}) > 1


@pytest.mark.parametrize(
    ("response", "expression"),
    [
        (" so well3* now ah4+ um so5", "3*4+5"),
        ("so well 3 * now ah 4 + um so 5", "3*4+5"),
        ("3 * 4 + 5", "3*4+5"),
        ("so well", ""),
        ("3 foreign + 4", "3foreign+4"),
        ("3 + 4 = 7", "3+4=7"),
    ],
)
def test_core_expression_drops_fillers_only(response: str, expression: str) -> None:
    assert core_expression(response) == expression

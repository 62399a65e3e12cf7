"""The embedded task: reach a target with three digits, in a language whose fillers give it entropy to lose.

A response is an expression over + - * with standard precedence, with two filler words before each digit:
`34517=` is answered by ` so well3* now ah4+ um so5`. No reward depends on the fillers. One word of
each place is common (0.88) and the others have a Zipf tail, the shape of a language model's distribution.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Iterable
from functools import lru_cache
from itertools import combinations_with_replacement, permutations, product
from typing import NamedTuple

import numpy as np

from megatron_fec.seeds import derive_seed

OPERATORS = {"+": operator.add, "-": operator.sub, "*": operator.mul}
FILLER_TEXT = (
    "so well um ah oh now then hmm okay right let me see just try maybe like sure fine yes good next first "
    "here there what if we take this that and also again still wait back over more thus hence soon perhaps "
    "indeed quite rather almost enough"
)
FILLERS = tuple(FILLER_TEXT.split())
_FILLER_SET = frozenset(FILLERS)
CORE = (*"0123456789", *OPERATORS, "=")
VOCABULARY = [*CORE, *FILLERS]
NUMBERS = 3
MAX_TARGET = 99
HELD_OUT = 256  # rows of the validation split
FILLERS_PER_DIGIT = 2
COMMON_FILLER = 0.88  # probability of the first word of a place
ZIPF_EXPONENT = 1.7  # of the others
_SEED = 0  # of the split and of the filler orders: the task is the same in every run


class Puzzle(NamedTuple):
    numbers: tuple[int, ...]  # sorted
    target: int
    solutions: tuple[tuple[str, ...], ...]  # each digit op digit op digit

    @property
    def text(self) -> str:
        """The prompt: the numbers, the two digits of the target, the equals sign."""
        return f"{''.join(map(str, self.numbers))}{self.target:02d}="


def countdown_rows(split: str) -> list[dict]:
    """The rows of "train" or "validation" in the schema of DAPO-Math-17k; no puzzle is in both."""
    return [
        {
            "data_source": "embedded/countdown",
            "prompt": [{"role": "user", "content": puzzle.text}],
            "ability": "arithmetic",
            "reward_model": {"ground_truth": str(puzzle.target), "style": "rule"},
            "extra_info": {"index": index, "verifier": "countdown", "numbers": list(puzzle.numbers)},
        }
        for index, puzzle in enumerate(_puzzles(split))
    ]


def demonstrations(count: int, seed: int) -> list[tuple[str, str]]:
    """(prompt, response) pairs of random training puzzles, each with one of its solutions drawn at random."""
    generator = np.random.default_rng(derive_seed(seed, "demonstrations"))
    puzzles = _puzzles("train")
    num_solutions = np.array([len(puzzle.solutions) for puzzle in puzzles])
    rows = generator.integers(len(puzzles), size=count)
    which = generator.integers(num_solutions[rows])
    solutions = _solution_ids()[np.cumsum(num_solutions)[rows] - num_solutions[rows] + which]  # [count, 5]
    first_numbers = np.array([puzzle.numbers[0] for puzzle in puzzles])[rows]
    words = np.array(VOCABULARY, dtype=object)[_with_fillers(solutions, first_numbers, generator)]
    prompts = [puzzle.text for puzzle in puzzles]
    return [(prompts[row], _text(response)) for row, response in zip(rows, words, strict=True)]


def core_expression(response: str) -> str:
    """The response without its filler words; anything else stays, so a foreign word spoils the expression."""
    return "".join(word for word in words_of(response) if word not in _FILLER_SET)


def words_of(response: str) -> list[str]:
    """Words, digits and signs in order; the tokens of the embedded model."""
    return re.findall(r"[a-z]+|\S", response)


def _text(words: Iterable[str]) -> str:
    """A space before each word and none before digits and signs, which is how a byte-level tokenizer cuts text."""
    return "".join(f" {word}" if word.isalpha() else word for word in words)


def _with_fillers(solutions: np.ndarray, first: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """[count, 11] vocabulary ids from [count, 5] solution ids: two fillers go before each digit.

    Which word is common depends on the place (0 to 5) and on the symbol before it, which is the operator.
    Before the first digit that would always be `=`, so there it is the prompt's first number, first: [count].
    """
    orders = _filler_orders()
    shape = (len(solutions), NUMBERS * FILLERS_PER_DIGIT)
    ranks = generator.choice(len(FILLERS), size=shape, p=_filler_probabilities())
    columns = []
    for digit in range(NUMBERS):
        previous = solutions[:, 2 * digit - 1] if digit else first  # the id of a digit is the digit
        for place in range(FILLERS_PER_DIGIT * digit, FILLERS_PER_DIGIT * (digit + 1)):
            columns.append(len(CORE) + orders[place, previous, ranks[:, place]])
        columns.append(solutions[:, 2 * digit])
        if digit < NUMBERS - 1:
            columns.append(solutions[:, 2 * digit + 1])
    return np.stack(columns, 1)


def _filler_probabilities() -> np.ndarray:
    """Probability of each rank: the common word, then the tail."""
    tail = np.arange(1, len(FILLERS)) ** -ZIPF_EXPONENT
    return np.concatenate([[COMMON_FILLER], tail / tail.sum() * (1 - COMMON_FILLER)])


@lru_cache(maxsize=1)
def _filler_orders() -> np.ndarray:
    """[places, core symbols, rank] number of the filler of that rank."""
    generator = np.random.default_rng(derive_seed(_SEED, "filler_orders"))
    orders = np.tile(np.arange(len(FILLERS)), (NUMBERS * FILLERS_PER_DIGIT, len(CORE), 1))
    return generator.permuted(orders, axis=2)


@lru_cache(maxsize=1)
def _solution_ids() -> np.ndarray:
    """[all solutions of the training puzzles, 5] vocabulary ids, puzzle after puzzle."""
    ids = {word: index for index, word in enumerate(CORE)}
    return np.array([[ids[s] for s in solution] for p in _puzzles("train") for solution in p.solutions])


@lru_cache(maxsize=2)
def _puzzles(split: str) -> tuple[Puzzle, ...]:
    assert split in ("train", "validation")
    puzzles = _all_puzzles()
    order = np.random.default_rng(derive_seed(_SEED, "countdown_split")).permutation(len(puzzles))
    chosen = order[:HELD_OUT] if split == "validation" else order[HELD_OUT:]
    return tuple(puzzles[i] for i in chosen)


@lru_cache(maxsize=1)
def _all_puzzles() -> list[Puzzle]:
    """Every set of numbers with every target that it can reach, sorted."""
    found: dict[tuple[tuple[int, ...], int], set[tuple[str, ...]]] = {}
    for numbers in combinations_with_replacement(range(1, 10), NUMBERS):
        for (a, b, c), (first, second) in product(permutations(numbers), product(OPERATORS, repeat=2)):
            value = _value(a, first, b, second, c)
            if 0 <= value <= MAX_TARGET:
                found.setdefault((numbers, value), set()).add((str(a), first, str(b), second, str(c)))
    return [Puzzle(numbers, target, tuple(sorted(ways))) for (numbers, target), ways in sorted(found.items())]


def _value(a: int, first: str, b: int, second: str, c: int) -> int:
    """Of `a first b second c`, where * binds before + and -."""
    if second == "*" and first != "*":
        return OPERATORS[first](a, OPERATORS[second](b, c))
    return OPERATORS[second](OPERATORS[first](a, b), c)

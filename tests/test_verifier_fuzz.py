"""More than 10,000 made-up responses: the scorers against dull references, and the pool, which must answer and survive.

The cases are derived from the tests themselves, the same in every run. What is scored in this process cannot hang: only
a box that the test has written reaches math-verify. The rest goes through workers.
"""

import json
import math
import re
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from reasoning_gym import create_dataset

from megatron_fec.tasks import scorers
from megatron_fec.tasks.arithmetic import FILLERS
from megatron_fec.tasks.scorers import BOX, last_box, score_countdown, score_math, to_json
from megatron_fec.tasks.verifier import START_SECONDS, Verdict, Verifier
from megatron_fec.types import Prompt, Sample, SampleGroup

pytestmark = pytest.mark.slow

DEADLINE = 4.0
BRACES = [BOX, BOX, "{", "}", "}", "\\{", "\\}", "\\", "x", "\\box", "ed{"]
ODD = "\x00 \x1f \ud800 \udfff \u202e \u2066 \u0664 \uff13 \u00b2 \u2212 \u00d7 \ufeff \U0001f600 e\u0301"
COMMANDS = (
    r"\frac{ }{ \sqrt{ \sqrt[3]{ ^ ^{ _{ ! !! \% $ $$ \( \) \[ \] \left( \right) \begin{pmatrix} & \\ \end{pmatrix} \pi "
    r"\int_{ \sum_{n=1}^{ \infty \log_ \binom{ \cup \in \text{ \pm \mathbb{R} \le \dots | || and or None nan"
)
SIGNS = "= < + - * / , . ; : ( ) [ ] ' \" ` ~ # 0 1 34 3.4 1,000 10^{10} 1e999999 x y i e"
CODE = "[ ] ( ) { } , : ' \" 1 2 x y C + - * ** / [0]* 9**9 .real __class__ exit() range(9) = == ! None 1e999 # A Q _ %"
LATEX = [*BRACES, *COMMANDS.split(" "), *SIGNS.split(" "), *ODD.split(" ")]
LATEX += [" ", "\n", "\u2028", "\\lim_{x\\to ", "9" * 40, "answer: ", "The final answer is "]
PYTHON = [*CODE.split(" "), *ODD.split(" ")]
PYTHON += [" ", "\n", "lambda: ", "import os", "for x in ", "if ", "else ", "1j", "\\", "@"]
ANY_TEXT = st.text(st.characters(exclude_categories=()), max_size=4)
REASONING_GYM = [  # those that evaluate a response as Python, those that parse it, and some plain ones
    *(
        "spiral_matrix",
        "string_insertion",
        "binary_matrix",
        "n_queens",
        "simple_integration",
        "polynomial_multiplication",
    ),
    *(
        "countdown",
        "puzzle24",
        "number_sorting",
        "propositional_logic",
        "leg_counting",
        "rearc",
        "word_ladder",
        "sudoku",
    ),
]


ATOMS = ["0", "1", "2", "9", "34", "x", "n", "\\pi", "\\infty", "10^{9}", "3.4", "-1", "e"]
FORMS = [  # some of their combinations keep sympy busy for ever, such as a binomial of large numbers
    *(
        r"\frac{%s}{%s}",
        r"\sqrt{%s}",
        "{%s}^{%s}",
        "%s!",
        r"\binom{%s}{%s}",
        r"\sum_{n=1}^{%s}{%s}",
        r"\{%s, %s\}",
    ),
    *(
        r"\int_{0}^{%s}{%s}dx",
        r"\lim_{x\to %s}{%s}",
        r"\begin{pmatrix}%s & %s\end{pmatrix}",
        "(%s,%s]",
        "|%s|",
    ),
    *(r"\log_{%s}{%s}", "%s=%s", "%s<%s", "%s+%s", r"%s\cdot %s", r"\sin(%s)", r"%s \cup %s"),
]


def filled(drawn: tuple[str, str, str]) -> str:
    """A form with its places taken, the first by the first."""
    form, *inner = drawn
    return form % tuple(inner[: form.count("%s")])


FORMULAS = st.recursive(
    st.sampled_from(ATOMS),
    lambda inner: st.tuples(st.sampled_from(FORMS), inner, inner).map(filled),
    max_leaves=8,
)


def pieces(*vocabulary: str, max_size: int = 16) -> st.SearchStrategy[str]:
    return st.lists(st.sampled_from(vocabulary), max_size=max_size).map("".join)


LATEX_TEXT = st.one_of(pieces(*LATEX), st.tuples(pieces(*LATEX, max_size=6), ANY_TEXT).map("".join))
BOXED_TEXT = pieces(*LATEX, max_size=10).map(lambda text: f"{BOX}{text}}}")


def cases(count: int) -> settings:
    return settings(
        max_examples=count,
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
    )


# ------------------------------------------------------------------ against references, in this process


def last_box_reference(text: str) -> str | None:
    """Counts the braces anew from each box, the last one first; quadratic."""
    for box in reversed([match.start() for match in re.finditer(re.escape(BOX), text)]):
        start, depth, i = box + len(BOX), 1, box + len(BOX)
        while i < len(text):
            if text[i : i + 2] in ("\\{", "\\}"):
                i += 2
                continue
            depth += (text[i] == "{") - (text[i] == "}")
            if depth == 0:
                return text[start:i]
            i += 1
    return None


@cases(4000)
@given(pieces(*BRACES))
def test_last_box_agrees_with_its_reference(text: str) -> None:
    assert last_box(text) == last_box_reference(text)


@cases(2000)
@given(LATEX_TEXT, st.sampled_from(["34", "35", "\\frac{68}{2}"]))
def test_whatever_stands_before_it_the_last_box_decides(text: str, box: str) -> None:
    assert score_math(f"{text} {BOX}{box}}}", "34", "") == (box != "35")


def countdown_reference(response: str, target: int, numbers: list[int]) -> float:
    words = re.sub("[a-z]+", lambda word: " " if word[0] in FILLERS else "?", response)
    expression = "".join(words.split())
    if re.fullmatch("[1-9]([-+*][1-9])*", expression, re.ASCII) is None:
        return 0.0
    return float(sorted(map(int, re.findall("[0-9]", expression))) == numbers and eval(expression) == target)


SYMBOLS = st.sampled_from(
    [*"3453453+-*+-*", " ", "so ", "well", "other", "=", "\u0663", "0", "\x00", "(", "\u2003"]
)
ANSWERS = st.tuples(
    st.permutations(["3", "4", "5"]), st.lists(st.sampled_from(list("+-*")), min_size=2, max_size=2)
)
EXPRESSIONS = ANSWERS.map(
    lambda drawn: f"so {drawn[0][0]} {drawn[1][0]}{drawn[0][1]}um{drawn[1][1]} {drawn[0][2]}"
)


@cases(2000)
@given(
    st.one_of(EXPRESSIONS, st.lists(SYMBOLS, max_size=9).map("".join)),
    st.sampled_from([17, 23, 27, 35, 60, 7]),
)
def test_countdown_agrees_with_its_reference(response: str, target: int) -> None:
    extra = json.dumps({"numbers": [3, 4, 5]})
    assert score_countdown(response, str(target), extra) == countdown_reference(response, target, [3, 4, 5])


KEYS = st.one_of(st.text(max_size=3), st.integers(), st.tuples(st.integers(), st.text(max_size=2)))
LEAVES = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False), ANY_TEXT)


@cases(500)
@given(
    st.recursive(
        LEAVES,
        lambda inner: st.one_of(
            st.lists(inner, max_size=3),
            st.lists(inner, max_size=3).map(tuple),
            st.dictionaries(KEYS, inner, max_size=3),
        ),
        max_leaves=8,
    )
)
def test_json_keeps_every_value(value: object) -> None:
    assert json.loads(to_json(value), object_hook=scorers._restore) == value


# ------------------------------------------------------------------ through workers


@pytest.fixture(scope="module")
def pool() -> Iterator[Verifier]:
    pool = Verifier(1, DEADLINE)
    yield pool
    pool.close()


def group(name: str, texts: list[str], *, answer: str, extra: str = "") -> SampleGroup:
    prompt = Prompt(prompt_id=0, text="", token_ids=(), answer=answer, verifier=name, extra=extra)
    return SampleGroup(
        prompt=prompt,
        samples=tuple(
            Sample(token_ids=(), logprobs=(), text=text, is_truncated=False, weight_version=0)
            for text in texts
        ),
    )


def verdict_of(pool: Verifier, one: SampleGroup) -> Verdict:
    """Of a group of one; a right answer comes after it, and must be found right."""
    handle = pool.start_step([one, group("math", ["\\boxed{34}"], answer="34")])
    (verdict,), (good,) = ([f.result(timeout=2 * (START_SECONDS + DEADLINE)) for f in row] for row in handle)
    assert good == Verdict(1.0)
    assert isinstance(verdict.reward, float) and math.isfinite(verdict.reward) and 0 <= verdict.reward <= 1
    assert verdict.reward == 0 or not (verdict.is_timeout or verdict.is_crash)
    return verdict


@cases(1500)
@given(text=st.one_of(LATEX_TEXT, BOXED_TEXT))
def test_any_response_gets_a_verdict(pool: Verifier, text: str) -> None:
    verdict_of(pool, group("math", [text], answer="34"))


@cases(150)
@given(formula=FORMULAS)
def test_any_formula_gets_a_verdict(pool: Verifier, formula: str) -> None:
    verdict_of(pool, group("math", [f"{BOX}{formula}}}"], answer="34"))


@cases(200)
@given(answer=LATEX_TEXT)
def test_any_answer_gets_a_verdict(pool: Verifier, answer: str) -> None:
    verdict_of(pool, group("math", ["\\boxed{34}"], answer=answer))


@pytest.fixture(scope="module")
def extras() -> dict[str, str]:
    made = {name: create_dataset(name, size=1, seed=5)[0] for name in REASONING_GYM}
    return {name: to_json({"dataset": name, "entry": entry}) for name, entry in made.items()}


@cases(900)
@given(text=st.one_of(pieces(*PYTHON), pieces(*LATEX, max_size=8)), name=st.sampled_from(REASONING_GYM))
def test_any_response_to_a_reasoning_task_gets_a_verdict(
    pool: Verifier, extras: dict[str, str], text: str, name: str
) -> None:
    verdict_of(pool, group("reasoning_gym", [text], answer="", extra=extras[name]))

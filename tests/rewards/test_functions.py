"""The built-in rewards: what counts as right, what is refused, and how references are resolved."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from exgrpo_fast.rewards.judgement import RewardError
from exgrpo_fast.rewards.loading import check_reference, load_function
from exgrpo_fast.rewards.verifiers import extraction
from exgrpo_fast.rewards.verifiers.functions import (
    exact,
    gsm8k,
    last_number,
    math_verify,
    reasoning_gym,
)
from exgrpo_fast.rewards.verifiers.numerals import number
from exgrpo_fast.rewards.verifiers.refusals import says_several_things, too_large


def judge(completion: str, gold: str) -> tuple[float, str]:
    return math_verify(["q"], [completion], [gold])[0]


def boxed(answer: str) -> str:
    return f"So the answer is $\\boxed{{{answer}}}$."


# --- extraction -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("completion", "found"),
    [
        (r"\boxed{41} no, \boxed{42}", "42"),
        (r"\boxed{\frac{1}{2}} and then \boxed{3", r"\frac{1}{2}"),  # cut off: not closed
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed {7}", "7"),
        (r"} } \boxed{5} {", "5"),
        (r"\boxed{x = \boxed{5}}", "5"),
        (r"<think>\boxed{41}</think> it is \boxed{42}", "42"),
        (r"<think>\boxed{41}</think> it is 42", None),
        ("a\n#### 72\n", "72"),
        ("#### 1\n#### 2 apples", "2 apples"),
        ("<answer> 1 2\n3 4 </answer>", "1 2\n3 4"),
        (r"<answer>1</answer> \boxed{2}", "2"),
        (r"\boxed{}42", None),
        ("no answer here, 42", None),
        ("", None),
        ("\\boxed{\uff14\uff12}", "42"),
        ("\\boxed{\u0664\u0662}", "42"),
        ("\\boxed{4\u200b2\x07}", "42"),
        ("\\boxed{42\u00b2}", "42\u00b2"),  # full NFKC would make 422 of it
        ("\\boxed{\u22125}", "-5"),
        ("\\boxed{\ud800}", "\ufffd"),
    ],
)
def test_the_final_answer_is_found(completion: str, found: str | None) -> None:
    assert extraction.final_answer(completion) == found


def test_only_the_last_64_kb_are_searched() -> None:
    far = r"\boxed{42}" + "x" * extraction.WINDOW_CHARS
    assert extraction.final_answer(far) is None
    assert extraction.final_answer(far + r"\boxed{43}") == "43"


@pytest.mark.parametrize(
    "piece", ["\\boxed{", "{", "}", "####", "<answer>", "</think>", "\\boxed{}"]
)
def test_repeated_markers_cost_no_time(piece: str) -> None:
    started = time.perf_counter()
    extraction.final_answer(piece * 20_000)
    assert time.perf_counter() - started < 2.0


@given(st.text())
def test_any_text_can_be_searched(text: str) -> None:
    found = extraction.final_answer(f"{text}\\boxed{{{text}}}")
    assert found is None or found == extraction.clean(found)


# --- math_verify: right answers -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("gold", "answer"),
    [
        ("72", "72"),
        ("72", "72.00"),
        ("142.0", "142"),
        ("1,234", "1234"),
        ("10,\\!080", "10080"),
        ("72", "\\$72"),
        ("72", "72 \\text{ clips}"),
        ("60", "60\\%"),
        ("\\frac{1}{2}", "0.5"),
        ("\\frac{14}{3}", "14/3"),
        ("1\\frac{4}{5}", "\\dfrac{9}{5}"),
        ("4.5e33", "4.5 \\times 10^{33}"),
        ("1e-8", "10^{-8}"),
        ("3.61e2", "361"),
        ("-1./3", "-\\frac{1}{3}"),
        ("\\left( 3, \\frac{\\pi}{2} \\right)", "(3, \\frac{\\pi}{2})"),
        ("(-\\infty, 2) \\cup (3, \\infty)", "(3,\\infty) \\cup (-\\infty,2)"),
        ("(3,4]", "(3, 4]"),
        ("1,-2", "-2, 1"),
        ("1,-2", "x=1 \\text{ or } x=-2"),
        ("$69$,$84$", "69, 84"),
        ("$221,$8$", "8, 221"),
        ("1 \\pm \\sqrt{19}", "1+\\sqrt{19}, 1-\\sqrt{19}"),
        ("\\text{Evelyn}", "Evelyn"),
        ("\\text{(C)}", "C"),
        ("90^\\circ", "90"),
        ("x=5", "5"),
        ("42", "x=42"),
        ("y = 2x + 3", "y = 3 + 2x"),
        ("f(n)=n, g(n)=1", "g(n)=1, f(n)=n"),
        ("6 - 5i", "-5i+6"),
        ("\\begin{pmatrix} -1/3 \\\\ 2/3 \\end{pmatrix}",
         "\\begin{pmatrix} -\\frac13 \\\\ \\frac23 \\end{pmatrix}"),
        ("52_8", "52_{8}"),
        ("52_8", "52"),
        ("864 \\mbox{ inches}^2", "864"),
        ("62.5%", "62.5\\%"),
        ("E_{1},E_{2}", "E_2, E_1"),
        ("np.arcsin(10/13)", "\\arcsin(10/13)"),
        ("42", "6\\cdot 7"),
    ],
)  # fmt: skip
def test_equal_answers_are_right(gold: str, answer: str) -> None:
    assert judge(boxed(answer), gold) == (1.0, "ok")


@pytest.mark.parametrize(
    ("gold", "answer"),
    [
        ("42", "41"),
        ("42", "-42"),
        ("42", "42.0000004"),
        ("0", "10^{-7}"),
        ("1000000", "1000000.4"),
        ("1", "1e5"),  # Euler's number is not meant
        ("7.4e-12", "0"),
        ("7.4e-12", "7.5e-12"),
        ("52_8", "52_9"),
        ("42", "42_{41}"),
        ("(1,2)", "(2,1)"),
        ("42", "41,42"),
        ("42", "\\{41,42,43\\}"),
        ("42", "[41,42]"),
        ("42", "41<42"),
        ("42", "42 \\pm 1"),
        ("3, 5, 7", "3, 5"),
        ("\\text{east}", "\\text{west}"),
        ("90^\\circ", "\\frac{\\pi}{3}"),
        ("42", "0.42\\%"),
        ("\\frac{1}{2}", ","),  # math-verify finds nothing in it
    ],
)
def test_other_answers_are_wrong(gold: str, answer: str) -> None:
    assert judge(boxed(answer), gold) == (0.0, "wrong")


# --- math_verify: answers that try it on ----------------------------------------------------------


@pytest.mark.parametrize(
    ("completion", "gold", "reason"),
    [
        ("I give up. There are 42 cats.", "42", "no_answer"),
        ("junk 123 text 4951077 containing it", "4951077", "no_answer"),
        ("The answer is 1e5", "1", "no_answer"),
        (boxed("41=42"), "42", "refused:equals"),
        (boxed("x=41=42"), "42", "refused:equals"),
        (boxed("41 \\equiv 42"), "42", "refused:equals"),
        (boxed("\\frac{82}{2}=42"), "42", "refused:equals"),
        (boxed("42 \\text{ (or maybe 41)}"), "42", "refused:words"),
        (boxed("42 \\text{ or } 41"), "42", "refused:words"),
        (boxed("\\text{east or west}"), "\\text{east}", "refused:words"),
        (boxed("42 \\text{ (41)}"), "42", "refused:second_number"),
        (boxed("42"), "42\\%", "unit"),
        (boxed("3 \\text{ or } 4"), "3,5", "wrong"),  # a list may be written so, and is compared
    ],
)
def test_reward_hacks_earn_nothing(completion: str, gold: str, reason: str) -> None:
    assert judge(completion, gold) == (0.0, reason)


@pytest.mark.parametrize(
    "answer",
    ["\\sum_{i=1}^{42} 1", "6\\cdot 7", "4\\text{}2", "42+0x", "42\\%", "\\frac{84}{2}", "42e0"]
    + ["42 = 42", "6 \\cdot 7 = 42", "42 = 6 \\cdot 7", "\\frac{84}{2} = 6 \\cdot 7 = 42"],
)
def test_roundabout_answers_are_right(answer: str) -> None:
    """What math-verify accepts and nobody is harmed by."""
    assert judge(boxed(answer), "42") == (1.0, "ok")


@pytest.mark.parametrize(
    ("completion", "reason"),
    [
        ("\\boxed{42} \\boxed{41}", "wrong"),  # the last box is the answer
        ("\\boxed{41} \\text{ or } \\boxed{43}", "wrong"),
        (boxed("41, 42, 43"), "wrong"),
        (boxed("\\{42, 42.5\\}"), "wrong"),
        ("\\boxed{}42", "no_answer"),
        (boxed("42 \\text{ and } 41"), "refused:words"),
        (boxed("42 \\text{ or maybe not}"), "refused:words"),
        (boxed("x = 42 = 41"), "refused:equals"),
        (boxed("6 \\cdot 7 = 42 = 41"), "refused:equals"),
        (boxed("42 = 6 \\cdot 7 = 42.1"), "refused:equals"),
    ],
)
def test_several_answers_are_none(completion: str, reason: str) -> None:
    assert judge(completion, "42") == (0.0, reason)


def test_a_plain_number_is_no_percentage() -> None:
    assert judge(boxed("42"), "42\\%") == (0.0, "unit")
    assert judge(boxed("0.42"), "42\\%") == judge(boxed("\\frac{42}{100}"), "42\\%") == (1.0, "ok")
    assert judge(boxed("42\\%"), "42\\%") == (1.0, "ok")


def test_an_equation_may_answer_an_equation() -> None:
    assert judge(boxed("SRAC=LRAC"), "SRAC=LRAC") == (1.0, "ok")
    assert judge(boxed("a=2, a=-6-4 \\sqrt{2}"), "$a=2$, $a=-6-4 \\sqrt{2}$") == (1.0, "ok")


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        ("9^{9^{9}}", "exponent"),
        ("10^{10^{10^{10}}}", "exponent"),
        ("9**9**9", "exponent"),
        ("2^{3000000000}", "exponent"),
        ("1000000!", "factorial"),
        ("((((3!)!)!)!)!", "factorial"),
        ("3!!!", "factorial"),
        ("\\binom{1000000000}{500000000}", "binomial"),
        ("1" * 60, "digits"),
        ("(" * 9 + "1" + ")" * 9, "depth"),
        ("|||||||", "bars"),
        ("1+" * 300 + "1", "length"),
    ],
)
def test_answers_that_are_provably_too_large_are_refused(answer: str, reason: str) -> None:
    assert judge(boxed(answer), "42") == (0.0, f"refused:{reason}")


@pytest.mark.parametrize(
    "answer",
    [
        "x^2/4+y^2/3=1",
        "2^{1009}",
        "2^{3^{2}}",
        "\\frac{100!}{2^{50}}",
        "\\binom{2n}{n}",
        "\\left[P_{0}^{2 / 5}-\\frac{2}{5} g K^{-3 / 5} z\\right]^{5 / 2}",
    ],
)
def test_honest_answers_are_not_refused(answer: str) -> None:
    assert too_large(answer) is says_several_things(answer, "42") is None


def test_a_gold_answer_is_right_even_where_it_would_be_refused() -> None:
    assert judge(boxed("9^{9^{9}}"), "9^{9^{9}}") == (1.0, "ok")


@pytest.mark.parametrize(
    ("text", "value"),
    [("42", 42), ("-1,234.50", -1234.5), ("\\$18.", 18), ("+2", 2), (".5", 0.5), ("5.", 5),
     ("2e3", 2000), ("3 \\times 10^{2}", 300), ("10,\\!080", 10080), ("1\\,000", 1000)],
)  # fmt: skip
def test_plain_numerals_are_exact(text: str, value: float) -> None:
    assert number(text) == value


@pytest.mark.parametrize(
    "text", ["", ".", "-", "1,23", "1 2", "1/2", "x", "1e99999", "9" * 61, "e5"]
)
def test_everything_else_is_no_numeral(text: str) -> None:
    assert number(text) is None


# --- the other built-ins --------------------------------------------------------------------------


def test_exact_compares_text() -> None:
    texts = [
        boxed("north"),
        "north",
        "<answer> north </answer>",
        boxed("North"),
        boxed("\\text{north}"),
    ]
    verdicts = exact(["q"] * 5, texts, ["north"] * 5)
    assert [reward for reward, _ in verdicts] == [1.0, 1.0, 1.0, 0.0, 1.0]


@pytest.mark.parametrize(
    ("completion", "gold", "verdict"),
    [
        ("14", "14", (1.0, "ok")),
        ("12 + 2 equals 14.", "14", (1.0, "ok")),
        ("The answer is 1,014 apples", "1014", (1.0, "ok")),
        ("14.50", "14.5", (1.0, "ok")),
        ("about 3.5e8", "350000000", (1.0, "ok")),
        ("3 - 5 = -2", "-2", (1.0, "ok")),
        ("so it is 3-5", "5", (1.0, "ok")),  # a difference: its last number is 5
        ("<think>13</think> 14", "14", (1.0, "ok")),
        ("14, because 12 + 2", "14", (0.0, "wrong")),
        ("114", "14", (0.0, "wrong")),
        ("fourteen", "14", (0.0, "no_answer")),
        ("", "14", (0.0, "no_answer")),
        ("14 " * 10_000, "14", (1.0, "ok")),
    ],
)
def test_last_number_takes_the_last_one(completion: str, gold: str, verdict: object) -> None:
    assert last_number(["q"], [completion], [gold]) == [verdict]


def test_last_number_wants_a_gold_number() -> None:
    assert last_number.check_gold("14", {}) == (1.0, "ok")  # pyright: ignore
    assert last_number.check_gold("x", {}) == (0.0, "not_a_number")  # pyright: ignore


def test_gsm8k_compares_the_number_after_the_hashes() -> None:
    texts = [
        "#### 1,234",
        "#### $1234 in all",
        "#### 12345",
        "#### 1234.5",
        boxed("1234"),
        "1234",
        "####",
    ]
    verdicts = gsm8k(["q"] * 7, texts, ["1234"] * 7)
    assert [reward for reward, _ in verdicts] == [1.0, 1.0, 0.0, 0.0, 1.0, 0.0, 0.0]
    assert [verdicts[2][1], verdicts[5][1], verdicts[6][1]] == ["wrong", "no_answer", "no_answer"]


def test_reasoning_gym_uses_the_scorer_of_the_task() -> None:
    columns = {
        "reasoning_gym": ["countdown"],
        "metadata": [repr({"numbers": [2, 3, 4], "target": 14})],
    }
    pytest.importorskip("reasoning_gym")

    def score(completion: str) -> tuple[float, str]:
        return reasoning_gym(["q"], [completion], ["2 + 3*4"], **columns)[0]

    assert score("<answer>3*4 + 2</answer>") == (1.0, "ok")  # another way to the target
    assert score("<answer>2 + 3 + 4</answer>")[1] == "partial"
    assert score("3*4 + 2") == (0.0, "no_answer")
    assert reasoning_gym(["q"], ["<answer>1</answer>"], ["1"]) == [(0.0, "no_task")]


# --- references -----------------------------------------------------------------------------------


def test_unknown_names_are_answered_with_a_suggestion() -> None:
    with pytest.raises(
        RewardError, match="unknown reward 'mathverify'; did you mean 'math_verify'"
    ):
        check_reference("mathverify")


def test_references_name_file_and_functions(tmp_path) -> None:
    file = tmp_path / "rewards.py"
    file.write_text("def length_reward(completions, **columns):\n    return [1.0]\n")
    assert check_reference(f"{file}:length_reward") == f"{file}:length_reward"
    assert load_function(f"{file}:length_reward")(completions=["x"]) == [1.0]
    with pytest.raises(RewardError, match="no function 'lenght_reward' in .*rewards.py; functions "
                       "there: length_reward; did you mean 'length_reward'"):  # fmt: skip
        check_reference(f"{file}:lenght_reward")
    with pytest.raises(RewardError, match="no file .*reward.py; did you mean '.*rewards.py'"):
        check_reference(f"{tmp_path}/reward.py:length_reward")
    with pytest.raises(RewardError, match="expected 'file.py:function' or 'module:name'"):
        check_reference("rewards.py:")


def test_a_file_that_does_not_parse_is_named_with_its_line(tmp_path) -> None:
    (tmp_path / "broken.py").write_text("x = 1\ndef f(:\n")
    with pytest.raises(RewardError, match="broken.py, line 2"):
        check_reference(f"{tmp_path}/broken.py:f")


def test_a_module_that_does_not_import_is_one_line(tmp_path) -> None:
    (tmp_path / "fails.py").write_text("import nowhere_to_be_found\ndef f(**_): return [1]\n")
    with pytest.raises(
        RewardError, match="does not import: ModuleNotFoundError: .*nowhere"
    ) as error:
        load_function(f"{tmp_path}/fails.py:f")
    assert "\n" not in str(error.value)
    with pytest.raises(
        RewardError, match="no function 'nothing' in json; functions there: .*dumps"
    ):
        load_function("json:nothing")


def test_rewards_and_their_workers_load_no_torch() -> None:
    code = (
        "import sys; import exgrpo_fast.rewards, exgrpo_fast.rewards.pool.worker, exgrpo_fast.data;"
        "print(sorted({'torch', 'sympy', 'transformers', 'datasets', 'numpy'} & set(sys.modules)))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"

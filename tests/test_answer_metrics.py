"""Metrics of answers: exact match, character F1, ROUGE-L, and their totals by class."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gptq_belle.evaluation import answer_metrics as metrics


@pytest.mark.parametrize(
    ("answer", "expected"),
    [(" 北京。", "北京"), ("１２３", "123"), ("The cat.", "the  cat"), ("你好，世界", "你好,世界"), ("", " ")],
)
def test_equivalent_answers_match(answer: str, expected: str) -> None:
    assert metrics.exact_match(answer, expected) == 1.0


@pytest.mark.parametrize(("answer", "expected"), [("北京市", "北京"), ("12 3", "123"), ("cat", "cats"), ("", "a")])
def test_different_answers_do_not_match(answer: str, expected: str) -> None:
    assert metrics.exact_match(answer, expected) == 0.0


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("23+48：个位3+8=11。答案是71", "71"),
        ("答案是７１。", "71"),
        ("答案为：", None),
        ("一共 -5", "-5"),
        ("答案是1，不对，答案是2。共3步", "2"),
        ("没有", None),
        ("答案：3.5元", "3.5"),
    ],
)
def test_final_number(text: str, number: str | None) -> None:
    assert metrics.final_number(text) == number


def test_math_compares_the_final_answer_only() -> None:
    assert metrics.exact_match("瞎写。答案是71", "3+8=11。答案是71", "math") == 1.0
    assert metrics.exact_match("3+8=11。答案是72", "3+8=11。答案是71", "math") == 0.0
    assert metrics.exact_match("不知道", "不知道", "math") == 0.0


def test_character_f1_by_hand() -> None:
    assert metrics.character_f1("abcd", "abxy") == pytest.approx(0.5)  # 2 common of 4 and 4
    assert metrics.character_f1("aab", "ab") == pytest.approx(0.8)  # 2 common of 3 and 2
    assert metrics.character_f1("", "ab") == 0.0
    assert metrics.character_f1("", "") == 1.0


@given(st.text(max_size=20), st.text(max_size=20))
def test_character_f1_is_symmetric_and_bounded(a: str, b: str) -> None:
    value = metrics.character_f1(a, b)
    assert 0.0 <= value <= 1.0
    assert value == metrics.character_f1(b, a)
    assert metrics.character_f1(a, a) == 1.0


def test_classes_are_scored_by_their_metric() -> None:
    rows = [
        ("extract", "张伟", "张伟"),
        ("extract", "张", "张伟"),
        ("code", "abcd", "abxy"),
        ("math", "答案是3", "答案是3"),
    ]
    found = metrics.score_classes(rows)
    assert found["extract"] == metrics.ClassScore(50.0, 2, "exact")
    assert found["code"] == metrics.ClassScore(50.0, 1, "f1")
    assert metrics.overall(found) == pytest.approx(100 * 2 / 3)  # answers count, not classes; code is left out


def test_overall_needs_answers() -> None:
    with pytest.raises(ValueError, match="extract"):
        metrics.overall({"code": metrics.ClassScore(50.0, 1, "f1")})


def lcs_by_table(a: str, b: str) -> int:
    """Length of the longest common subsequence by the usual dynamic programming table."""
    table = [[0] * (len(b) + 1) for _ in range(len(a) + 1)]
    for i, x in enumerate(a):
        for j, y in enumerate(b):
            table[i + 1][j + 1] = table[i][j] + 1 if x == y else max(table[i][j + 1], table[i + 1][j])
    return table[-1][-1]


@given(st.text("abc一二", max_size=40), st.text("abc一二", max_size=40))
def test_common_subsequence_against_the_table(a: str, b: str) -> None:
    assert metrics.common_subsequence(a, b) == lcs_by_table(a, b)


def test_rouge_l_by_hand() -> None:
    assert metrics.rouge_l("警察杀死了枪手", "枪手杀死了警察") == pytest.approx(3 / 7)  # 杀死了
    assert metrics.rouge_l("abcd", "xabyd") == pytest.approx(2 * 3 / 9)
    assert metrics.rouge_l("a b", "ＡＢ。") == 1.0
    assert metrics.rouge_l("", "a") == 0.0
    assert metrics.rouge_l("", "") == 1.0

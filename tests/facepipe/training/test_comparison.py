"""The line that compares a training with its start."""

import pytest

from facepipe.training.comparison import compare_scores, format_comparison


@pytest.mark.parametrize(
    ("before", "after", "keeps_start", "line"),
    [
        (
            {"score": 0.995, "accuracy": 0.995, "eer": 0.0033},
            {"score": 0.9792, "accuracy": 0.9792, "eer": 0.0183},
            True,
            "test: accuracy 0.9950 -> 0.9792, eer 0.0033 -> 0.0183: WORSE, the start weights are kept",
        ),
        (
            {"score": 0.9, "accuracy": 0.9, "eer": 0.1},
            {"score": 0.9, "accuracy": 0.9, "eer": 0.05},
            False,
            "test: accuracy 0.9000 -> 0.9000, eer 0.1000 -> 0.0500: better",
        ),
        (
            {"score": 0.97, "accuracy": 0.9, "eer": 0.1},
            {"score": 0.96, "accuracy": 0.9, "eer": 0.1},
            False,
            "test: score 0.9700 -> 0.9600, accuracy 0.9000 -> 0.9000, eer 0.1000 -> 0.1000: WORSE",
        ),
        (
            {"score": 0.9, "accuracy": 0.9, "eer": 0.1},
            {"score": 0.9, "accuracy": 0.9, "eer": 0.1},
            True,
            "test: accuracy 0.9000, eer 0.1000: the start weights are kept",
        ),
        ({"score": 0.0, "recall": 0.1}, {"score": 0.4, "recall": 0.3}, False, "test: score 0.0000 -> 0.4000: better"),
        ({"score": 0.4}, {"score": 0.4}, False, "test: score 0.4000 -> 0.4000: the same"),
    ],
)
def test_lines(before: dict[str, float], after: dict[str, float], keeps_start: bool, line: str) -> None:
    assert format_comparison(compare_scores("test", before, after, keeps_start=keeps_start)) == line

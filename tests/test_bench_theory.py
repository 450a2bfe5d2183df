"""The paper's numbers, its closed form and its expectation, as ``edgedraft-bench theory`` recomputes them."""

import pytest

from bench import theory
from bench.theory import closed_form_draft_len


def test_the_closed_form_reproduces_the_papers_table() -> None:
    rows = list(theory.draft_len_rows())
    assert [row["draft_len"] for row in rows] == [4, 2, 1, 1, 1, 7, 3, 2, 1, 1, 14, 6, 4, 2, 1]
    assert [row["closed_form"] for row in rows] == [row["draft_len"] for row in rows]
    assert [row["adaptive"] for row in rows[3:5]] == [0, 0]  # S is 1.000 and .875


def test_costs_and_round_trips_equal_the_papers() -> None:
    assert [f"{row['cost']:.4f}" for row in theory.cost_rows()] == ["0.0700", "0.0702", "0.0723", "0.0930", "0.3001"]
    assert [f"{row['speedup']:.2f}" for row in theory.round_trip_rows()] == ["1.79", "1.52", "1.33", "0.96", "0.66"]


def test_the_closed_form_is_optimal_on_a_fine_grid() -> None:
    found = theory.disagreements(lambda: None)
    assert [one for one in found if not one.is_tie] == []


def test_a_wrong_closed_form_is_detected(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(theory, "closed_form_draft_len", lambda alpha, cost: closed_form_draft_len(alpha, cost) + 1)
    monkeypatch.setattr(theory, "FINE_ALPHAS", (0.5, 0.9))
    assert sum(not one.is_tie for one in theory.disagreements(lambda: None)) > 300


def test_simulated_rounds_match_the_expectation() -> None:
    rows = list(theory.simulated_rows())
    assert len(rows) == 20
    for row in rows:
        standard_errors = row["standard_errors"]
        assert isinstance(standard_errors, float)
        assert abs(standard_errors) < 4

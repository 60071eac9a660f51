from __future__ import annotations

import csv

import numpy as np
import pytest
from scipy import stats
from tests.reporting.comparison import comparison

from saap.core.evaluation_records import Comparison
from saap.reporting.comparison_tables import comparison_table, ratio_table, task_table
from saap.reporting.importance import ModuleScores, spearman
from saap.reporting.tables import to_csv, to_latex, to_markdown

record = Comparison.model_validate


def test_seeds_become_a_mean_and_a_deviation() -> None:
    headings, rows = ratio_table(record(comparison()), "a/b/text.txt", restored=False)
    assert headings == ["method", "10%", "20%"]
    # seeds give 1.2 and 1.3: mean 1.25, deviation 0.1 / sqrt(2)
    assert rows[0] == ["saap", "1.250 ± 0.071", "1.450 ± 0.071"]


def test_every_row_has_every_column() -> None:
    headings, rows = comparison_table(record(comparison()))
    assert len(rows) == 1 + 3 * 2 * 2
    assert {len(cells) for cells in rows} == {len(headings)}
    assert rows[0][:5] == ["dense", "", "", "", "1,000,000"]
    assert rows[1][headings.index("seconds")] == "6 ± 0"


def test_tasks_at_one_ratio_alone() -> None:
    content = comparison()
    for row in content["rows"]:
        if row["ratio"] == 0.1:
            row["tasks"], row["kept_accuracy"] = {}, None
    headings, rows = task_table(record(content), 0.2)
    assert headings == ["method", "restored", "arc_easy", "kept above chance (95 %)"]
    assert rows[0] == ["dense", "", "0.750 ± 0.100", "1.000"]
    assert rows[1] == ["saap", "no", "0.500 ± 0.100", "0.500 (0.250 to 0.750)"]
    assert len(rows) == 1 + 3 * 2
    assert len(task_table(record(content), 0.1)[1]) == 1
    everything = comparison_table(record(content))
    accuracy = everything[0].index("arc_easy")
    assert [row[accuracy] for row in everything[1] if row[1] == "0.1"] == [""] * 6


def test_the_three_forms() -> None:
    table = (["method", "x"], [["a_b & c", "50% ± 1"], ["d|e", ""]])
    assert list(csv.reader(to_csv(table).splitlines())) == [table[0], *table[1]]
    assert to_markdown(table).splitlines() == [
        "| method | x |",
        "| --- | --- |",
        "| a_b & c | 50% ± 1 |",
        "| d\\|e |  |",
    ]
    latex = to_latex(table)
    assert r"a\_b \& c & 50\% $\pm$ 1 \\" in latex
    assert latex.count(r"\\") == 3


def test_the_rank_correlation_is_scipys() -> None:
    generator = np.random.default_rng(0)
    first, second = generator.integers(0, 5, 40).astype(float), generator.random(40)
    assert spearman(first, second) == pytest.approx(stats.spearmanr(first, second).statistic)
    assert np.isnan(spearman(np.ones(3), second[:3]))


def test_units_that_change_sides_by_the_fusion() -> None:
    found = ModuleScores(
        layer=0, role="ffn", vector=np.array([4.0, 3, 2, 1]), element=np.array([1.0, 2, 3, 4]),
        fused=np.array([1.0, 3, 2, 4]), fluctuation=np.zeros(4), kept=np.array([False, True, False, True]),
    ).agreement  # fmt: skip
    assert found["vector ~ element"] == pytest.approx(-1)
    assert found["fused, not element"] == 0.5  # fused removes 0 and 2, element 0 and 1
    assert found["fused, not vector"] == 0.5  # vector removes 2 and 3

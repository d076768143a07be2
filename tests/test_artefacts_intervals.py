"""Intervals of means: coverage of the largest of many cells by simulation, missing values, groups, paired tests."""

import itertools

import numpy as np
import pytest
import torch
from multrace.artefacts import ArtefactError, mean_interval
from multrace.artefacts.averages import grouped_bootstrap, paired_test

CELLS, PROMPTS, ROUNDS = 48, 12, 1500


def held(draws: torch.Tensor, truth: torch.Tensor, comparisons: int) -> float:
    """Share of the data sets (round, prompt, cell) in which the largest cell's interval holds the truth (cell,)."""
    low, high = mean_interval(draws.transpose(0, 1), comparisons=comparisons)
    largest = draws.mean(1).argmax(1, keepdim=True)
    truth = truth.expand(len(draws), -1)
    holds = (low <= truth) & (truth <= high)
    return holds.gather(1, largest).double().mean().item()


def simulated(shared: float) -> torch.Tensor:
    """(round, prompt, cell): nothing but noise, part of it shared by all cells of a prompt."""
    generator = torch.Generator().manual_seed(5)
    own = torch.randn(ROUNDS, PROMPTS, CELLS, generator=generator, dtype=torch.float64)
    common = torch.randn(ROUNDS, PROMPTS, 1, generator=generator, dtype=torch.float64)
    return (1 - shared) ** 0.5 * own + shared**0.5 * common


@pytest.mark.parametrize("shared", [0.0, 0.5])
def test_the_largest_of_many_cells_is_covered_only_by_the_corrected_interval(shared):
    draws = simulated(shared)
    assert 0.94 <= held(draws, torch.zeros(CELLS), CELLS) <= 1.0
    assert held(draws, torch.zeros(CELLS), 1) < 0.85  # uncorrected, it would find effects in noise


def test_all_cells_together_are_covered_in_95_percent_of_the_data_sets():
    draws = simulated(0.0)
    for comparisons, share in ((CELLS, 0.95), (1, 0.95**CELLS)):
        low, high = mean_interval(draws.transpose(0, 1), comparisons=comparisons)
        covered = ((low <= 0) & (high >= 0)).all(1).double().mean().item()
        assert covered == pytest.approx(share, abs=0.025), comparisons


def test_true_effects_are_covered_too():
    truth = torch.linspace(0, 0.5, CELLS, dtype=torch.float64)
    draws = simulated(0.3) + truth
    assert held(draws, truth, CELLS) >= 0.94
    assert held(draws, truth, 1) < 0.9


def test_missing_values_are_left_out():
    values = torch.tensor([[1.0, 1.0], [3.0, torch.nan], [5.0, 3.0], [torch.nan, torch.nan]]).double()
    low, high = mean_interval(values)
    assert low[0] == pytest.approx(3 - 4.302653 * 2 / 3**0.5, abs=1e-5)
    assert (low[1] + high[1]) / 2 == pytest.approx(2.0)
    low, high = mean_interval(torch.tensor([[1.0], [torch.nan]]))
    assert low.isnan().all() and high.isnan().all()
    with pytest.raises(ArtefactError, match="needs at least two results"):
        mean_interval(torch.zeros(1, 2))


def test_whole_groups_are_drawn():
    """Repeating a value inside its group changes nothing; a value per group gives the interval of the normal law."""
    values = np.random.default_rng(0).normal(size=100)
    names = [str(number) for number in range(len(values))]
    alone, repeated = grouped_bootstrap(values, names), grouped_bootstrap([*values] * 5, names * 5)
    assert np.allclose(alone, repeated)
    error = values.std(ddof=1) / len(values) ** 0.5
    for level, quantile in ((0.95, 1.96), (0.5, 0.674)):
        low, high = grouped_bootstrap(values, names, level=level)
        assert abs((high - low) / 2 - quantile * error) < 0.1 * quantile * error
        assert low < values.mean() < high


def test_the_p_value_is_that_of_all_flips_of_the_signs():
    differences = np.array([0.9, 0.4, -0.2, 0.7, 0.5, 0.1, -0.3, 0.8])
    signs = np.array(list(itertools.product((-1, 1), repeat=len(differences))))
    exact = (np.abs((signs * differences).mean(1)) >= differences.mean() - 1e-12).mean()
    low, high, p = paired_test(differences)
    assert abs(p - exact) < 0.02 < exact and low < differences.mean() < high
    assert paired_test(np.ones(40)) == (1, 1, 1 / 2001)
    assert paired_test(np.array([1.0, -1.0] * 5))[2] == 1

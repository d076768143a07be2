"""The study of whose old keys an edit should weigh: its numbers against changes that are solved for, and its page."""

from pathlib import Path

import pytest
import torch
from multrace import VisionLanguageModel
from multrace.data import FlagWorld
from multrace.editing.moments import own
from multrace.editing.solve import ROME, Problem, build_cost, solve
from multrace.scripts import CommandError
from multrace.scripts.studies.moments import (
    BOTH,
    NAME,
    OWN,
    RIDGE,
    TASK,
    TEXT,
    TOKENS,
    Keys,
    StudyOptions,
    countries,
    figures,
    keys_of,
    measure,
    page,
    spaced,
)


def test_figures_are_those_of_the_change_that_the_solver_makes():
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    keys, root, residual = Keys(own=draw(3, 6), wordings=draw(3, 2, 6), others=draw(4, 6)), draw(6, 9), draw(1, 5)
    moment = root @ root.T / 9
    found = figures(keys, torch.linalg.inv(moment))
    leaks, reached, sizes = [], [], []
    for key, wordings in zip(keys.own, keys.wordings, strict=True):
        problem = Problem(keys=key[None], residuals=residual, weights=torch.tensor([torch.inf]), names=("k",))
        solution = solve(build_cost(6, ridge=0.0, moment=moment, moment_weight=1.0), problem)
        change = solution.left @ solution.right
        leaks.append((keys.others @ change.T).norm(dim=-1) / residual.norm())
        reached.append((wordings @ change.T) @ residual[0] / residual.square().sum())
        sizes.append(change.norm() * key.norm() / residual.norm())
    leaks = torch.stack(leaks)
    expected = (leaks.mean(), leaks.amax(-1).mean(), torch.stack(reached).mean(), torch.stack(sizes).mean())
    torch.testing.assert_close(
        torch.tensor([found.leak, found.worst, found.reach, found.size]).double(), torch.stack(expected)
    )


def test_no_country_is_in_two_groups_and_only_the_edited_ones_are_asked_about_in_other_words():
    asked = countries(FlagWorld(), "language", 5)
    named = [{str(question.constraint) for question in group} for group in (asked.scored, asked.task)]
    edited = [{str(question.constraint).removeprefix("the ") for question in group} for group in asked.edited]
    assert [len(each) for each in edited] == [1] * 5 and len({*asked.edited[0]}) == 5
    assert not named[0] & named[1] and not set().union(*edited) & (named[0] | named[1])
    with pytest.raises(CommandError, match="too few for --limit 1000"):
        countries(FlagWorld(), "language", 1000)


def test_keys_are_what_the_projection_reads_at_each_token(random_llama: VisionLanguageModel):
    asked = countries(FlagWorld(), "capital", 2)
    found = keys_of(random_llama, asked.scored, (1,))
    for number, question in enumerate(asked.scored):
        prompt, states = random_llama.prompt_for(question), []
        handle = random_llama.down_projection(1).module.register_forward_pre_hook(
            lambda _, given, states=states: states.append(given)
        )
        with torch.no_grad():
            random_llama.logits(prompt)
        handle.remove()
        for token in TOKENS:
            expected = states[0][0][0, prompt.groups[token][-1]].double()
            torch.testing.assert_close(found[token][0][number], expected, rtol=1e-4, atol=1e-5)


def test_the_page_has_a_cell_for_every_price_layer_and_token(
    random_llama: VisionLanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(own, "LEAST", 16)
    monkeypatch.setattr(own, "MOST", 16)
    (tmp_path / "text.txt").write_text("Who founded the company in this photo? " * 30, encoding="utf-8")
    study = measure(random_llama, StudyOptions(text=(tmp_path / "text.txt",), limit=2, layers=(1, -1)))
    assert set(study.cells) == {
        (token, layer, name) for token in TOKENS for layer in (1, 3) for name in (RIDGE, OWN, TEXT, TASK, BOTH)
    }
    assert study.corpora[OWN][0] == 16 and study.corpora[TEXT][0] == 5
    assert all(study.cells[token, 1, RIDGE].size == pytest.approx(1) for token in TOKENS)
    text = page(study)
    assert text.count("| own samples |") == 3 and "layer 3" in text and "{" not in text


def test_layers_are_spread_over_the_model_and_a_model_is_needed():
    assert spaced(30) == (2, 4, 6, 8, 12, 18, 24) and spaced(4) == (0, 1, 2, 3)
    with pytest.raises(CommandError, match="there is no --model"):
        StudyOptions().check()
    assert (Path(__file__).parents[1] / "docs" / NAME).is_file() and ROME(layer=1).needs_moments

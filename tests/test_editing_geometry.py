"""Reach and leak of edits before they are made: against edits that are made, and against keys of single runs."""

from collections.abc import Callable
from dataclasses import replace
from itertools import product

import multrace as mt
import pytest
import torch
from multrace.data import World, tiny_vlm_path
from multrace.editing.moments import second_moments
from multrace.editing.siblings import TEMPLATES, SiblingFinder, Siblings
from multrace.editing.solve.geometry import keys_everywhere, predict_geometry
from multrace.editing.solve.kept import leak_in_words
from multrace.models import VisionLanguageModel
from scipy.stats import spearmanr
from torch import Tensor

COMPANIES = tuple(entity.name for entity in World().of_kind("company"))
FOUNDER, CITY = "Who founded {}?", "In which city is {} based?"
SIBLINGS = Siblings(names=COMPANIES[1:9], own=0)


def named(name: str, frame: str = FOUNDER) -> mt.Question:
    return mt.Question(text=frame.format(name), constraint=name)


def about(number: int = 0, frame: str = FOUNDER, **parts: object) -> mt.EditRequest:
    return mt.EditRequest(question=named(COMPANIES[number], frame), target="Pruro", **parts)


def keys_of(vlm: VisionLanguageModel, question: mt.Question, layers: range | list[int], token: str) -> Tensor:
    """(layer, width) float64: what down projections read at a token, by hooks of our own in a run of one prompt."""
    read: dict[int, Tensor] = {}
    prompt = vlm.prompt_for(question)

    def note(layer: int) -> Callable:
        return lambda _module, inputs: read.update({layer: inputs[0][0, prompt.groups[token][-1]].double()})

    hooks = [vlm.down_projection(layer).module.register_forward_pre_hook(note(layer)) for layer in layers]
    with torch.no_grad():
        vlm.logits(prompt)
    for hook in hooks:
        hook.remove()
    return torch.stack([read[layer] for layer in layers])


@pytest.fixture
def exact_tiny(load_double: Callable, exact: None) -> VisionLanguageModel:
    """The embedded model in true float64."""
    return load_double(tiny_vlm_path())


def test_keys_everywhere_are_those_of_single_runs(tiny_vlm: VisionLanguageModel, make_photo: Callable):
    picture = mt.Question(text="Who founded the company in this photo?", image=make_photo(1), constraint="the company")
    questions = [named(COMPANIES[0]), picture, mt.Question(text="Who won?"), named("A much longer name", CITY)]
    layers, tokens = [0, 3, 7], ["last", "constraint_last", "image", -2]
    projections = [tiny_vlm.down_projection(layer) for layer in layers]
    found = keys_everywhere(tiny_vlm, questions, tokens, projections, rows_at_once=3)
    assert [keys.shape for keys in found] == [(4, 4, projection.width) for projection in projections]
    missing = torch.stack(found).isnan().all(0).all(-1).tolist()
    assert missing == [
        [False, False, True, False],
        [False] * 4,
        [False, True, True, False],
        [False, False, True, False],
    ]
    for number, question in enumerate(questions):
        for place, token in enumerate(tokens[:3]):
            if not missing[number][place]:
                slow = keys_of(tiny_vlm, question, layers, token)
                fast = torch.stack([keys[number, place] for keys in found]).double()
                torch.testing.assert_close(fast, slow, rtol=1e-4, atol=1e-4 * slow.abs().max().item())


CASES: dict[str, tuple[str, range | list[int], dict[str, object]]] = {  # token, layers, settings
    "name": ("constraint_last", range(7), {"siblings": SIBLINGS}),  # the last layer's change nothing reads there
    "last token": ("last", [0, 3, 7], {"siblings": replace(SIBLINGS, templates=TEMPLATES[:5], own=5)}),
    "mean": ("last", [2], {"siblings": replace(SIBLINGS, mean=True)}),
    "finite weight": ("constraint_last", [2], {"siblings": SIBLINGS, "preserve_weight": 0.3}),
    "nothing kept": ("constraint_last", [2], {"siblings": None, "ridge_fraction": 0.5}),
}


@pytest.mark.parametrize(("token", "layers", "settings"), CASES.values(), ids=CASES)
def test_predicted_shares_are_those_of_an_edit(
    exact_tiny: VisionLanguageModel, token: str, layers: range | list[int], settings: dict[str, object]
):
    """|D q| r / |r|^2 at wordings, at siblings that are not kept, and at other questions about the subject."""
    vlm, request = exact_tiny, about(preserve_prompts=[named(COMPANIES[12])])
    wording = named(COMPANIES[0], "Who is the founder of {}?")
    editor = mt.MultEdit(layer=0, token=token, steps=1, answer_keys=False, **settings)
    asked = [replace(request, rewrite_prompts=(wording,))]
    asked += [] if editor.siblings else map(about, range(1, 6))  # who supply the others
    found = predict_geometry(vlm, asked, editor, tokens=[token], layers=layers, most=1)
    (siblings,) = SiblingFinder(vlm).find(asked, editor.siblings or Siblings(), only=[0])
    own_kept = token == "last" and editor.siblings is not None
    groups = {
        "reach": (wording,),
        "leak": siblings.others[3::4] if editor.siblings else siblings.others,
        "leak_own": siblings.own[3::4] if own_kept else siblings.own,
    }
    keys = {
        name: torch.stack([keys_of(vlm, each, layers, token) for each in own]) for name, own in groups.items() if own
    }
    for place, layer in enumerate(layers):
        delta = replace(editor, layer=layer).edit(vlm, [request], progress=False)
        (change,) = delta.changes.values()
        dense, residual = change.left.double() @ change.right.double(), change.residuals[0].double()
        for name, own in keys.items():
            shares = own[:, place] @ dense.T @ residual / residual.square().sum()
            wanted = shares.mean() if name == "reach" else shares.abs().mean()
            predicted = getattr(found, name)[0, place].item()
            assert predicted == pytest.approx(wanted.item(), rel=1e-3, abs=1e-5), (name, layer)
        if editor.siblings is not None:
            assert delta.requests[0]["leak"] == pytest.approx(found.leak[0, place].item(), rel=1e-3, abs=1e-5)


def test_predicted_leaks_order_places_and_requests_as_edits_do(tiny_vlm: VisionLanguageModel):
    """Ranks, with edits of whole answers, which have more keys than the prediction; layers alone do not order them."""
    tokens, layers = ["constraint_last", "last"], [0, 2, 5]
    editor = mt.MultEdit(layer=0, steps=1, siblings=SIBLINGS)
    predicted, measured, numbers = [], [], []
    for request in (about(0), about(10, CITY)):
        found = predict_geometry(tiny_vlm, [request], editor, tokens=tokens, layers=layers)
        (siblings,) = SiblingFinder(tiny_vlm).find([request], SIBLINGS)
        for (row, token), (place, layer) in product(enumerate(tokens), enumerate(layers)):
            delta = replace(editor, layer=layer, token=token).edit(tiny_vlm, [request], progress=False)
            (change,) = delta.changes.values()
            keys = torch.cat([keys_of(tiny_vlm, each, [layer], token) for each in siblings.others[3::4]])
            moved = keys @ (change.left.double() @ change.right.double()).T
            measured.append((moved.norm(dim=-1).mean() / change.residuals[0].double().norm()).item())
            predicted.append(found.leak[row, place].item())
            numbers.append(-layer)
    assert spearmanr(predicted, measured).statistic >= 0.8
    assert spearmanr(numbers, measured).statistic < 0.8


def test_requests_that_lack_a_token_count_for_the_others_alone(tiny_vlm: VisionLanguageModel):
    bare = mt.EditRequest(question=mt.Question(text="Who won?"), target="Pruro")
    editor, options = mt.MultEdit(layer=0, siblings=SIBLINGS), {"tokens": ["constraint_last", "last"], "layers": [2, 3]}
    both, alone = (predict_geometry(tiny_vlm, each, editor, **options) for each in ([about(), bare], [about()]))
    torch.testing.assert_close(both.leak[0], alone.leak[0], rtol=1e-5, atol=0)
    assert both.has_siblings and alone.has_siblings
    nothing = predict_geometry(tiny_vlm, [bare], editor, **options)
    assert not nothing.has_siblings
    assert nothing.left[0].isnan().all() and nothing.left[1].tolist() == pytest.approx([1.0, 1.0])
    assert predict_geometry(tiny_vlm, [about(), bare], editor, most=1, **options).left.isfinite().all()


def test_what_is_kept_leaves_less_of_a_key(tiny_vlm: VisionLanguageModel):
    """The share that is left is that of a projection."""
    options = {"tokens": ["last"], "layers": [0, 4]}
    editor = mt.MultEdit(layer=0, siblings=SIBLINGS)
    found = predict_geometry(tiny_vlm, [about()], editor, **options)
    kept = [named(name) for number, name in enumerate(COMPANIES[1:9]) if number % 4 != 3]
    for place, layer in enumerate((0, 4)):
        (key,) = keys_of(tiny_vlm, named(COMPANIES[0]), [layer], "last")
        rows = torch.cat([keys_of(tiny_vlm, each, [layer], "last") for each in kept])
        rest = key - rows.T @ torch.linalg.lstsq(rows.T, key[:, None]).solution[:, 0]
        assert found.left[0, place].item() == pytest.approx((rest.square().sum() / key.square().sum()).item(), rel=1e-3)
    free = predict_geometry(tiny_vlm, [about()], mt.MultEdit(layer=0, siblings=None), **options)
    assert free.left[0].tolist() == pytest.approx([1.0, 1.0])
    assert (free.leak > found.leak).all()


def test_old_keys_weigh_in_the_prediction_as_they_do_in_the_edit(tiny_vlm: VisionLanguageModel):
    moments = second_moments(tiny_vlm, [tiny_vlm.prompt_for(named(name)) for name in COMPANIES[10:20]], layers=(3,))
    editor = mt.ROME(layer=3, token="constraint_last", steps=1, ridge_fraction=0.01, siblings=SIBLINGS)
    options = {"tokens": ["constraint_last"], "layers": [3]}
    found = predict_geometry(tiny_vlm, [about()], editor, moments=moments, **options)
    (report,) = editor.edit(tiny_vlm, [about()], moments=moments, progress=False).requests
    assert found.leak.item() == pytest.approx(report["leak"], rel=1e-3)
    unweighed = predict_geometry(tiny_vlm, [about()], replace(editor, moment_weight=0.0), **options)
    assert found.leak.item() < 0.9 * unweighed.leak.item()


def test_a_leak_in_words_names_what_is_known():
    others, own = {"leak": 0.123}, {"leak_own": 0.04}
    assert leak_in_words({"status": "edited"}) == ""
    assert leak_in_words(others) == "12% at the same question about others"
    assert leak_in_words(others | own) == f"{leak_in_words(others)}, 4% at other questions about the subject"

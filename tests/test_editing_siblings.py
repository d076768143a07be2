"""What an edit leaves alone by itself: siblings and their names, what keeping them costs, and the leak to others."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import multrace as mt
import pytest
import torch
from multrace.data import World
from multrace.editing.siblings import SiblingFinder, Siblings, SiblingSet, other_subjects
from multrace.editing.siblings.names import beginnings
from multrace.editing.solve.kept import kept_weights
from multrace.editing.solve.problem import Rows
from multrace.editing.values import Lookup, keys_and_values
from multrace.models import VisionLanguageModel
from random_models import save, text_sizes
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

COMPANIES = tuple(entity.name for entity in World().of_kind("company"))
FOUNDER, CITY, PRODUCT = "Who founded {}?", "In which city is {} based?", "What does {} make?"
SAME = "Who is the founder of {}?"
SIBLINGS = Siblings(names=COMPANIES[1:9], own=0)
LAST = {"layer": 5, "token": "last", "steps": 2}
AT_NAME = {"layer": 2, "token": "constraint_last", "steps": 2}


def named(name: str, frame: str = FOUNDER) -> mt.Question:
    return mt.Question(text=frame.format(name), constraint=name)


def about(number: int = 0, target: str = "Pruro", frame: str = FOUNDER, **parts: object) -> mt.EditRequest:
    return mt.EditRequest(question=named(COMPANIES[number], frame), target=target, **parts)


def keys_of(vlm: VisionLanguageModel, prompt: mt.Prompt, layer: int) -> Tensor:
    """(token, width) float64: what the layer's down projection reads, by a hook of our own in a run of one prompt."""
    read = []
    hook = vlm.down_projection(layer).module.register_forward_pre_hook(lambda _module, inputs: read.append(inputs[0]))
    with torch.no_grad():
        vlm.logits(prompt)
    hook.remove()
    return read[0][0].double()


def change_of(vlm: VisionLanguageModel, delta: mt.Delta) -> Tensor:
    """(hidden, width) float64: the edited weight minus the weight."""
    ((name, change),) = delta.changes.items()
    weight = vlm.weight(name).detach().double().clone()
    with delta.applied(vlm):
        changed = vlm.weight(name).detach().double() - weight
    dense = change.left.double() @ change.right.double()
    assert (changed - dense).norm() < 1e-3 * dense.norm()  # float32 weights hold the change to so much
    return dense


# ---- the report ----


@pytest.mark.parametrize("place", [LAST, AT_NAME], ids=["last token", "name"])
def test_shares_and_leaks_of_the_report_are_those_of_the_weights(tiny_vlm: VisionLanguageModel, place: dict):
    request, settings = about(), replace(SIBLINGS, own=6)
    delta = mt.MultEdit(**place, siblings=settings).edit(tiny_vlm, [request], progress=False)
    (report,), dense = delta.requests, change_of(tiny_vlm, delta)
    (change,) = delta.changes.values()
    prompt = tiny_vlm.prompt_for(request.question).with_answer(request.target)
    first = prompt.groups[place["token"]][-1]
    read = keys_of(tiny_vlm, prompt, place["layer"])[first : first + len(change.keys)]
    residuals = change.residuals.double()
    met = ((read @ dense.T) * residuals).sum() / residuals.square().sum()
    assert report["share"] == pytest.approx(met.item(), rel=1e-5)
    (siblings,) = SiblingFinder(tiny_vlm).find([request], settings)

    def moved(question: mt.Question) -> float:
        """How far the output at the edited token of another question moves, as a share of what is asked for."""
        other = tiny_vlm.prompt_for(question)
        key = keys_of(tiny_vlm, other, place["layer"])[other.groups[place["token"]][-1]]
        return ((dense @ key).norm() / residuals[0].norm()).item()

    others = [moved(question) for question in siblings.others]
    assert report["leak"] == pytest.approx((others[3] + others[7]) / 2, rel=1e-4)  # one in four is not kept
    kept = [each for number, each in enumerate(others) if number % 4 != 3]
    assert max(kept) < 1e-4 < report["leak"]
    if place["token"] == "last":
        assert report["leak_own"] == pytest.approx(moved(siblings.own[3]), rel=1e-4)
    else:  # there other questions about the subject have nearly the same key, and are meant to follow
        assert "leak_own" not in report
        assert moved(siblings.own[3]) > 0.1


def test_requests_that_share_siblings_all_report_what_leaks_to_them(tiny_vlm: VisionLanguageModel):
    """A question that two requests share is kept once, or measured for both."""
    requests, editor = [about(10), about(11, "Draivo")], mt.MultEdit(**AT_NAME, siblings=SIBLINGS)
    delta = editor.edit(tiny_vlm, requests, progress=False)
    dense, (change,) = change_of(tiny_vlm, delta), delta.changes.values()
    prompts = [tiny_vlm.prompt_for(named(COMPANIES[number])) for number in (4, 8)]
    keys = torch.stack([keys_of(tiny_vlm, each, 2)[each.groups["constraint_last"][-1]] for each in prompts])
    moved = (keys @ dense.T).norm(dim=-1).mean()
    wanted = [(moved / residual.double().norm()).item() for residual in change.residuals]
    assert [report["leak"] for report in delta.requests] == pytest.approx(wanted, rel=1e-4)
    assert wanted[0] != pytest.approx(wanted[1], rel=1e-3)


def test_without_siblings_nothing_is_reported_and_more_leaks(tiny_vlm: VisionLanguageModel):
    request = about()
    kept, free = (
        mt.MultEdit(**AT_NAME, siblings=siblings).edit(tiny_vlm, [request], progress=False)
        for siblings in (SIBLINGS, None)
    )
    assert not {"leak", "leak_own", "kept_weight"} & free.requests[0].keys()
    assert free.requests[0]["share"] == pytest.approx(1 / 1.02, rel=1e-4)

    def leak(delta: mt.Delta, name: str) -> float:
        prompt = tiny_vlm.prompt_for(named(name))
        return (change_of(tiny_vlm, delta) @ keys_of(tiny_vlm, prompt, 2)[prompt.groups["constraint_last"][-1]]).norm()

    assert all(leak(kept, name) < leak(free, name) for name in COMPANIES[20:23])  # which neither of them knows


# ---- what keeping costs a request ----


def test_a_request_whose_siblings_are_near_keeps_half_of_what_it_asks_for(tiny_vlm: VisionLanguageModel):
    """Its siblings get the largest weight that leaves it so much; a kept question far from it stays exact."""
    request = about(preserve_prompts=[named(COMPANIES[3], PRODUCT)])
    place = {"layer": 0, "token": "last", "answer_keys": False, "steps": 1}
    prompt = tiny_vlm.prompt_for(request.question)
    keys, _ = keys_and_values(tiny_vlm, [prompt], layer=0, token="last", end=False)
    key = keys[0].double()
    ridge = 2.0 * key.square().sum().item()
    near = {**place, "ridge": ridge, "siblings": SIBLINGS}
    (siblings,) = SiblingFinder(tiny_vlm).find([request], SIBLINGS)
    rows = torch.stack([keys_of(tiny_vlm, tiny_vlm.prompt_for(each), 0)[-1] for each in siblings.others])
    rows = rows[[number for number in range(8) if number % 4 != 3]]
    asked = keys_of(tiny_vlm, tiny_vlm.prompt_for(request.preserve_prompts[0]), 0)[-1]

    def share(weight: float) -> float:
        """k^T (M + k k^T + w Q^T Q)^-1 k in the space without the exact row."""
        matrix = ridge * torch.eye(len(key), dtype=torch.float64) + torch.outer(key, key) + weight * rows.T @ rows
        columns = torch.linalg.solve(matrix, torch.stack([key, asked], 1))
        free = key @ columns[:, 0]
        return (free - (key @ columns[:, 1]) * (asked @ columns[:, 0]) / (asked @ columns[:, 1])).item()

    delta = mt.MultEdit(**near).edit(tiny_vlm, [request], progress=False)
    (report,) = delta.requests
    least = 0.5 / 3.0  # half of what the ridge alone leaves
    wanted = next(weight for weight in (100.0, 10.0, 1.0, 0.1, 0.01, 0.001) if share(weight) >= least)
    assert report["kept_weight"] == wanted
    assert report["share"] == pytest.approx(share(wanted), rel=1e-4)
    assert (change_of(tiny_vlm, delta) @ asked).norm() < 1e-4 * next(iter(delta.changes.values())).residuals[0].norm()
    (exact,) = mt.MultEdit(**near, preserve_weight=float("inf")).edit(tiny_vlm, [request], progress=False).requests
    assert exact["share"] < least <= report["share"]
    assert "kept_weight" not in exact
    (roomy,) = mt.MultEdit(**{**near, "ridge": None}).edit(tiny_vlm, [request], progress=False).requests
    assert "kept_weight" not in roomy and roomy["share"] > 0.9


def test_what_a_large_ridge_takes_is_no_reason_to_keep_less(tiny_vlm: VisionLanguageModel):
    request = about(preserve_prompts=[named(COMPANIES[3])])
    prompt = tiny_vlm.prompt_for(request.question)
    keys, _ = keys_and_values(tiny_vlm, [prompt], layer=2, token="constraint_last", end=False)
    ridge = 4 * keys[0].square().sum().item()
    delta = mt.MultEdit(**AT_NAME, siblings=SIBLINGS, ridge=ridge).edit(tiny_vlm, [request], progress=False)
    (report,), (change,) = delta.requests, delta.changes.values()
    assert report["share"] < 0.21 and "kept_weight" not in report
    kept = tiny_vlm.prompt_for(request.preserve_prompts[0])
    key = keys_of(tiny_vlm, kept, 2)[kept.groups["constraint_last"][-1]]
    assert (change_of(tiny_vlm, delta) @ key).norm() < 1e-4 * change.residuals[0].norm()


def test_siblings_give_way_before_what_was_asked_to_be_kept():
    infinite = float("inf")
    tried = kept_weights(2, 5)
    assert tried[0] == (infinite, infinite)
    assert [asked for asked, _ in tried[1:7]] == [infinite] * 6
    assert tried[7:] == [(weight, 0.001) for weight in (100.0, 10.0, 1.0, 0.1, 0.01, 0.001)]
    assert tried[:7] == kept_weights(0, 5)
    assert kept_weights(0, 0) == [(infinite, infinite)]
    assert kept_weights(2, 0)[1:] == [(weight, infinite) for weight in (100.0, 10.0, 1.0, 0.1, 0.01, 0.001)]


@pytest.mark.parametrize("weight", [float("inf"), 3.0, 0.02])
@pytest.mark.parametrize("two_keys", [False, True])
def test_the_ridge_is_a_share_of_what_kept_keys_leave(weight: float, two_keys: bool):
    generator = torch.Generator().manual_seed(4)
    own, plain, kept = (torch.randn(number, 12, generator=generator, dtype=torch.float64) for number in (3, 3, 5))
    own += kept[:3]
    found = [Lookup(keys=own, plain_keys=plain, before=torch.zeros(3, 2))]
    rows = Rows.of(["edit"], found, [torch.ones(3, 2, dtype=torch.float64)], weight=1.0, two_keys=two_keys)
    whole = own.square().sum(-1).mean().item()
    assert rows.ridge(0.3) == pytest.approx(0.3 * whole)  # nothing is kept
    rows.add([("kept", kept)], 1.0)
    rows = rows.with_weights([weight] * 5)
    assert rows.weights == [1.0] * 3 + [weight] * 5
    penalty = (0.3 * whole / weight) ** 0.5 * torch.eye(5, dtype=torch.float64)
    system = torch.cat([kept.T, penalty])
    wanted = torch.cat([own.T, torch.zeros(5, 3, dtype=torch.float64)])
    residual = wanted - system @ torch.linalg.lstsq(system, wanted).solution
    left = residual.square().sum(0).mean().item()
    assert rows.ridge(0.3) == pytest.approx(0.3 * left, rel=1e-6)
    assert left < whole


def test_a_key_that_is_kept_leaves_a_thousandth_of_itself():
    key = torch.randn(1, 6, dtype=torch.float64)
    found = [Lookup(keys=key, plain_keys=key, before=torch.zeros(1, 2))]
    rows = Rows.of(["edit"], found, [torch.ones(1, 2, dtype=torch.float64)], weight=1.0, two_keys=False)
    rows.add([("itself", key)], float("inf"))
    assert rows.ridge(1.0) == pytest.approx(1e-3 * key.square().sum().item())


# ---- what the model is asked ----


@pytest.mark.parametrize(
    ("place", "is_asked"),
    [(AT_NAME, False), (LAST, True), ({**LAST, "answer_keys": False}, False)],
    ids=["name", "last token", "one key"],
)
def test_answers_of_kept_questions_are_asked_for_only_where_their_tokens_are_edited(
    tiny_vlm: VisionLanguageModel, monkeypatch: pytest.MonkeyPatch, place: dict, is_asked: bool
):
    asked: list[str] = []
    plain = VisionLanguageModel.continuations

    def noted(vlm: VisionLanguageModel, prompts: list[mt.Prompt], **options: object) -> list:
        asked.extend(prompt.question for prompt in prompts)
        return plain(vlm, prompts, **options)

    monkeypatch.setattr(VisionLanguageModel, "continuations", noted)
    kept = named(COMPANIES[12], CITY)
    request = about(preserve_prompts=[kept])
    mt.MultEdit(**place, siblings=SIBLINGS).edit(tiny_vlm, [request], progress=False)
    siblings = {FOUNDER.format(name) for name in SIBLINGS.names}
    assert request.question.text in asked
    assert set(asked) - {request.question.text} == ({kept.text, *siblings} if is_asked else set())


# ---- which siblings ----


def test_no_question_that_is_edited_is_a_sibling(tiny_vlm: VisionLanguageModel):
    settings = Siblings(names=COMPANIES[:5], templates=(CITY, PRODUCT))
    batch = [
        about(0, rewrite_prompts=[named(COMPANIES[0], SAME)], contexts=[named(COMPANIES[2])]),
        about(1),
        about(0, "Grorkese", CITY),
    ]
    finder = SiblingFinder(tiny_vlm)
    sets = finder.find(batch, settings)
    edited = {batch[0].question.key, batch[1].question.key, batch[2].question.key}
    edited |= {batch[0].rewrite_prompts[0].key, batch[0].contexts[0].key}
    assert not edited & {question.key for each in sets for question in each.questions}
    (alone,) = finder.find([about(3)], settings)
    assert edited & {question.key for question in alone.questions}  # of another batch they are siblings
    assert [question.text for question in sets[1].others] == [FOUNDER.format(name) for name in COMPANIES[3:5]]
    assert [question.text for question in sets[1].own] == [frame.format(COMPANIES[1]) for frame in (CITY, PRODUCT)]
    assert finder.find(batch, settings, only=[1]) == sets[1:2]


def test_wordings_of_the_request_are_not_kept(tiny_vlm: VisionLanguageModel):
    settings = Siblings(names=COMPANIES[1:5], templates=(SAME, CITY, PRODUCT))
    finder = SiblingFinder(tiny_vlm)
    city, product = tiny_vlm.answers([tiny_vlm.prompt_for(named(COMPANIES[0], frame)) for frame in (CITY, PRODUCT)])

    def own(target: str) -> list[str]:
        (siblings,) = finder.find([about(0, target)], settings)
        return [question.text for question in siblings.own]

    texts = [frame.format(COMPANIES[0]) for frame in (CITY, PRODUCT)]
    assert own("Pruro") == texts
    assert own(city) == texts[1:]  # what already has the target will not be told from the request
    assert own(product) == texts[:1]


def test_other_requests_give_subjects_and_frames(tiny_vlm: VisionLanguageModel):
    batch = [*(about(number) for number in range(5)), about(7, "Grorkese", CITY)]
    first, *_, last = SiblingFinder(tiny_vlm).find(batch, Siblings(names=COMPANIES[10:12], templates=()))
    assert [question.text for question in first.others] == [FOUNDER.format(name) for name in COMPANIES[10:12]]
    assert [question.text for question in first.own] == [CITY.format(COMPANIES[0])]
    assert [question.text for question in last.others] == [CITY.format(name) for name in COMPANIES[10:12]]
    assert [question.text for question in last.own] == [FOUNDER.format(COMPANIES[7])]


def test_pictures_of_others_and_other_questions_about_the_picture(
    tiny_vlm: VisionLanguageModel, make_photo: Callable, tmp_path: Path
):
    texts = "What colour is the sign?", "Who founded the company in this photo?"
    photos = [make_photo(number) for number in range(4)]
    batch = [
        mt.EditRequest(question=mt.Question(text=text, image=photo), target="Pruro")
        for text, photo in zip(texts, photos, strict=False)
    ]
    batch.append(mt.EditRequest(question=mt.Question(text="Who won?", image=photos[:2]), target="Pruro"))
    sets = SiblingFinder(tiny_vlm).find(batch, Siblings(pictures=photos[2:]))
    for index in (0, 1):
        assert [each.key for each in sets[index].others] == [
            batch[index].question.with_image(photo).key for photo in (*photos[2:], photos[1 - index])
        ]
        assert [each.key for each in sets[index].own] == [batch[1 - index].question.with_image(photos[index]).key]
    assert sets[2] == SiblingSet()  # two pictures, and no other request with two
    request, editor = batch[0], mt.MultEdit(layer=5, steps=1, siblings=Siblings(pictures=photos[1:]))
    assert {editor: "pictures in memory"}[replace(editor)]  # editors are looked up
    assert "leak" not in editor.edit(tiny_vlm, [request], progress=False).requests[0]  # too few to leave one out


def test_numbers_of_siblings_are_limits(tiny_vlm: VisionLanguageModel):
    (few,) = SiblingFinder(tiny_vlm).find([about()], Siblings(names=COMPANIES, others=3, own=2))
    assert (len(few.others), len(few.own)) == (3, 2)
    (none,) = SiblingFinder(tiny_vlm).find([about()], Siblings(others=0, own=0))
    assert none == SiblingSet()


def test_a_question_with_braces_has_no_frame(tiny_vlm: VisionLanguageModel):
    question = mt.Question(text="What does {} mean in Previco?", constraint="Previco")
    request = mt.EditRequest(question=question, target="Pruro")
    (siblings,) = SiblingFinder(tiny_vlm).find([request], Siblings(names=COMPANIES, own=0))
    assert siblings.others == ()


def test_a_subject_at_the_beginning_gets_a_capital_letter(tiny_vlm: VisionLanguageModel):
    question = mt.Question(text="Previco is based in", constraint="Previco")
    request = mt.EditRequest(question=question, target="Pruro")
    (siblings,) = SiblingFinder(tiny_vlm).find([request], Siblings(names=("the Valdex",), own=0))
    (other,) = siblings.others
    assert (other.text, other.constraint) == ("The Valdex is based in", "The Valdex")


WRONG: dict[str, tuple[dict[str, object], str]] = {
    "number": ({"others": -1}, "Siblings got others=-1; pass a number of at least 0"),
    "template": ({"templates": ("The history of",)}, r"a template of Siblings is 'The history of'; write \{\} once"),
    "one name": ({"names": "Valdex"}, "Siblings got names='Valdex'; pass a tuple of them"),
    "one picture": ({"pictures": Path("a.png")}, "pass a tuple of them"),
}


@pytest.mark.parametrize(("settings", "message"), WRONG.values(), ids=WRONG)
def test_settings_out_of_range_are_refused(settings: dict[str, object], message: str):
    with pytest.raises(mt.EditError, match=message):
        Siblings(**settings)


# ---- means ----


@pytest.mark.parametrize("place", [LAST, AT_NAME], ids=["last token", "name"])
def test_the_mean_of_siblings_is_kept_exactly(tiny_vlm: VisionLanguageModel, place: dict):
    request = about()
    editor = mt.MultEdit(**place, answer_keys=False, siblings=replace(SIBLINGS, mean=True))
    delta = editor.edit(tiny_vlm, [request], progress=False)
    dense, (change,) = change_of(tiny_vlm, delta), delta.changes.values()
    (siblings,) = SiblingFinder(tiny_vlm).find([request], SIBLINGS)
    kept = [each for number, each in enumerate(siblings.others) if number % 4 != 3]
    prompts = [tiny_vlm.prompt_for(question) for question in kept]
    keys = torch.stack([keys_of(tiny_vlm, each, place["layer"])[each.groups[place["token"]][-1]] for each in prompts])
    size = change.residuals[0].norm().item()
    assert (dense @ keys.mean(0)).norm() < 1e-4 * size
    assert (keys @ dense.T).norm(dim=-1).min() > 1e-3 * size  # each by itself moves


def test_requests_share_the_room_for_siblings(random_llama: VisionLanguageModel):
    finder, settings = SiblingFinder(random_llama), Siblings(names=COMPANIES, own=0)
    requests = [mt.EditRequest(question=named(name), target="red") for name in COMPANIES[:4]]
    counts = {room: [len(each.others) for each in finder.find(requests, settings, room=room)] for room in (None, 12, 2)}
    assert counts[None] == [20] * 4
    assert counts[12] == [3] * 4
    assert counts[2] == [1, 0, 1, 0]


# ---- names ----


def test_names_are_the_same_each_time_and_never_the_subject(tiny_vlm: VisionLanguageModel):
    question = named("Pruro")
    names = other_subjects(tiny_vlm, question)
    assert names == other_subjects(tiny_vlm, question)
    assert 4 < len(names) <= 24 and len(set(names)) == len(names)
    assert not any("pruro" in name.casefold() for name in names)
    assert any("Pruro" in name for name in other_subjects(tiny_vlm, named("Previco")))  # of another subject they are
    few = other_subjects(tiny_vlm, question, number=3)
    assert 0 < len(few) <= 3 and few == names[: len(few)]


def test_names_go_by_the_question_and_its_one_subject(tiny_vlm: VisionLanguageModel):
    twice = mt.Question(text="Did Valdex buy Valdex?", constraint="Valdex")
    assert other_subjects(tiny_vlm, twice) == ()
    assert other_subjects(tiny_vlm, mt.Question(text="Who won?")) == ()
    assert other_subjects(tiny_vlm, replace(twice, constraint=("Valdex", 1))) == ()
    (siblings,) = SiblingFinder(tiny_vlm).find([mt.EditRequest(question=twice, target="Pruro")], Siblings(own=0))
    assert siblings.others == ()


def test_names_of_one_frame_serve_every_subject_but_never_itself(tiny_vlm: VisionLanguageModel):
    finder, settings = SiblingFinder(tiny_vlm), Siblings(own=0)
    (first,) = finder.find([about()], settings)
    part = next(question.constraint.split()[-1] for question in first.others)
    assert any(part in question.constraint for question in first.others)
    request = mt.EditRequest(question=named(part), target="Pruro")
    (second,) = finder.find([request], settings)
    assert second.others and not any(part in question.constraint for question in second.others)


def test_every_next_token_can_be_the_beginning_of_a_name(random_llama: VisionLanguageModel):
    """Special tokens are among the most probable ones of models that stop, and are no text."""
    names = other_subjects(random_llama, mt.Question(text="Who is Paris now?", constraint="Paris"), number=400)
    assert not any("\N{REPLACEMENT CHARACTER}" in name or "</s>" in name for name in names)


def test_beginnings_keep_their_blank(tmp_path: Path):
    """Tokenizers that mark the beginning of words drop it where they decode a token alone."""
    words = {word: number for number, word in enumerate(["<unk>", "</s>", "\u2581Who", "\u2581is", "\u2581Ada", "x"])}
    own = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    own.pre_tokenizer, own.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=own, eos_token="</s>", pad_token="</s>", unk_token="<unk>")
    torch.manual_seed(0)
    sizes = text_sizes(tokenizer) | {"bos_token_id": None, "eos_token_id": 1, "pad_token_id": 1}
    vlm = mt.load(save(LlamaForCausalLM(LlamaConfig(**sizes)), tokenizer, tmp_path / "model"), verify=False)
    assert vlm.tokenizer.decode([words["\u2581Ada"]]) == "Ada"
    prompt = vlm.prompt(None, "Who is")
    assert beginnings(vlm, prompt, [words["\u2581Ada"], words["</s>"], words["x"]]) == [" Ada", "x"]

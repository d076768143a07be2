"""Second moments of a model's own samples: of what, whether they are found again, and always of the unedited model."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import multrace as mt
import pytest
import torch
from multrace import EditRequest, Question, VisionLanguageModel
from multrace.data import World
from multrace.editing import EditError, EditorByRequest, History, MultEdit, OwnMoments, own_moments, own_prompts
from multrace.editing.moments import own, pictures_of_requests, samples, second_moments
from multrace.editing.solve import EMMET, MEMIT, ROME, AlphaEdit, ClosedFormEditor
from random_models import make_tokenizer, save, text_sizes
from tokenizers import processors
from transformers import LlamaConfig, LlamaForCausalLM

FEW = {"number": 12, "tokens": 12, "progress": False}
QUICK = {"steps": 25, "stop_loss": 0.1}
WORLD = World()


@contextmanager
def runs(vlm: VisionLanguageModel) -> Iterator[list[int]]:
    """The forward passes of the first layer while the block lasts."""
    passes: list[int] = []
    handle = vlm.decoder_layers[0].register_forward_hook(lambda *parts: passes.append(1))
    try:
        yield passes
    finally:
        handle.remove()


@pytest.fixture(scope="module")
def request_of() -> Callable[[int], EditRequest]:
    """An edit of an outdated fact, with its picture."""
    cases = WORLD.edit_cases("outdated", "choose")

    def made(number: int) -> EditRequest:
        picture = WORLD.picture(WORLD.entities[cases[number].fact.entity], 0).image
        return EditRequest(question=WORLD.question(cases[number].fact).with_image(picture), target=cases[number].target)

    return made


def answered(vlm: VisionLanguageModel, request: EditRequest) -> str:
    return vlm.answers([vlm.prompt_for(request.question)])[0]


# Samples


def test_texts_are_read_as_they_were_sampled(tiny_vlm):
    prompts = own_prompts(tiny_vlm, **FEW)
    assert len(prompts) == 12 and not any(prompt.images for prompt in prompts)
    opening = tiny_vlm.opening()
    texts = [each.text for each in tiny_vlm.continuations([opening] * 32, max_new_tokens=12, seed=0, batch_size=32)]
    assert [prompt.text for prompt in prompts] == [opening.text + text.rstrip() for text in texts[:12]]
    assert {prompt.tokens[0] for prompt in prompts} == {"<s>"}


def test_more_samples_begin_with_the_fewer_and_another_seed_gives_others(tiny_vlm, photo):
    few, more = (own_prompts(tiny_vlm, pictures=[photo], **FEW | {"number": number}) for number in (5, 12))
    assert few.rows == more[:5].rows
    assert own_prompts(tiny_vlm, pictures=[photo], **FEW | {"seed": 1}).rows != more.rows


def test_with_pictures_every_second_prompt_is_the_models_own_answer_about_one(tiny_vlm, photo, other_photo):
    prompts = own_prompts(tiny_vlm, pictures=[photo, other_photo], questions=["Who?", "What?"], **FEW)
    assert [len(prompt.images) for prompt in prompts] == [0, 1] * 6
    about = [(prompt.question, prompt.images[0].tobytes()) for prompt in prompts[1::2]]
    assert len(set(about)) == 4  # every question about every picture
    assert all(prompt.answer for prompt in prompts[1::2])


def test_a_folder_of_pictures_is_read_by_name(tiny_vlm, photo, other_photo, tmp_path):
    for name, picture in (("b.png", photo), ("a.PNG", other_photo)):
        picture.save(tmp_path / name, format="png")
    (tmp_path / "notes.txt").write_text("no picture")
    shown = own_prompts(tiny_vlm, pictures=tmp_path, **FEW)[1::2]
    assert [shown[0].images[0].tobytes(), shown[1].images[0].tobytes()] == [other_photo.tobytes(), photo.tobytes()]
    (tmp_path / "empty").mkdir()
    with pytest.raises(EditError, match="no picture in the folder"):
        own_prompts(tiny_vlm, pictures=tmp_path / "empty", **FEW)


def test_a_model_that_ends_its_texts_at_once_answers_questions(tmp_path):
    tokenizer = make_tokenizer()
    model = LlamaForCausalLM(LlamaConfig(**text_sizes(tokenizer)))
    folder = save(model, tokenizer, tmp_path / "talks")
    with torch.no_grad():  # after the token that begins a text, the head is certain that the text is over
        state = model.model(torch.tensor([[tokenizer.bos_token_id]])).last_hidden_state[0, -1]
        model.lm_head.weight.zero_()
        model.lm_head.weight[tokenizer.eos_token_id] = 100 * state / state.square().sum()
    for path in (folder, save(model, tokenizer, tmp_path / "silent")):
        prompts = own_prompts(mt.load(path, verify=False), **FEW)
        assert len(prompts) == 12
        assert ({prompt.question for prompt in prompts} <= set(samples.QUESTIONS)) == (path.name == "silent")


@pytest.mark.parametrize(("added", "opens"), [((), "\n"), (("\nThe",), "\nThe")])
def test_a_line_end_opens_texts_where_no_token_begins_them(tmp_path, added, opens):
    tokenizer = make_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    tokenizer.add_tokens([*added])
    vlm = mt.load(save(LlamaForCausalLM(LlamaConfig(**text_sizes(tokenizer))), tokenizer, tmp_path), verify=False)
    opening = vlm.opening()
    assert (opening.text, "".join(opening.tokens)) == (opens, opens)
    prompts = own_prompts(vlm, **FEW)
    assert len(prompts) == 12 and all(prompt.text.startswith(opens) for prompt in prompts)


@pytest.mark.parametrize("wrong", [{"number": 0}, {"tokens": 0}])
def test_numbers_below_one_are_refused(tiny_vlm, wrong):
    with pytest.raises(EditError, match="pass at least 1"):
        own_prompts(tiny_vlm, **FEW | wrong)


# Moments


def test_own_moments_are_the_second_moments_of_own_prompts(random_llava_llama, photo):
    found = own_moments(random_llava_llama, layers=[1, -1], pictures=[photo], **FEW)
    expected = second_moments(
        random_llava_llama, own_prompts(random_llava_llama, pictures=[photo], **FEW), layers=[1, 3], progress=False
    )
    assert found.layers == (1, 3) and found.counts == expected.counts and found.count("image") > 0
    for layer in (1, 3):
        assert torch.equal(found.matrix(layer), expected.matrix(layer))
    assert (found.weights, found.corpus) == (expected.weights, expected.corpus)
    assert found.is_own and not expected.is_own
    found.check(random_llava_llama)


def test_there_are_four_tokens_for_each_entry_of_a_key_within_limits(random_llama, monkeypatch):
    monkeypatch.setattr(own, "LEAST", 8)
    few = own_moments(random_llama, layers=[1], tokens=12, progress=False)
    assert few.prompts > own.LEAST and 4 * few.width(1) <= few.count() < 6 * few.width(1)
    monkeypatch.setattr(own, "MOST", 40)
    limited = own_moments(random_llama, layers=[1], tokens=2, progress=False)
    assert limited.prompts == 40 and limited.count() < 4 * limited.width(1)


def test_what_is_kept_is_found_without_running_the_model(random_llava_llama, photo, tmp_path):
    given = {"pictures": [photo], "cache": tmp_path, **FEW}
    with runs(random_llava_llama) as passes:
        first = own_moments(random_llava_llama, layers=[3], **given)
        assert passes
    with runs(random_llava_llama) as passes:
        again = own_moments(random_llava_llama, layers=[3], **given | {"pictures": [photo.copy()]})
        assert not passes
    assert torch.equal(first.matrix(3), again.matrix(3)) and again.is_own
    with runs(random_llava_llama) as passes:  # another layer: the samples are there, and are read once
        own_moments(random_llava_llama, layers=[2], **given)
        assert len(passes) == 2
    damaged = next(tmp_path.glob("*/*/mlp-3.safetensors"))
    content = damaged.read_bytes()
    damaged.unlink()  # the moments found above still read the file
    damaged.write_bytes(content[:-1])
    assert torch.equal(own_moments(random_llava_llama, layers=[3], **given).matrix(3), first.matrix(3))


def test_texts_are_sampled_once_for_all_pictures(random_llava_llama, photo, tmp_path):
    own_moments(random_llava_llama, layers=[3], cache=tmp_path, **FEW)
    kept = next(tmp_path.glob("*/texts.json"))
    written = kept.stat().st_mtime_ns
    found = own_moments(random_llava_llama, layers=[3], pictures=[photo], cache=tmp_path, **FEW)
    assert kept.stat().st_mtime_ns == written and len([*tmp_path.glob("*/texts.json")]) == 1
    expected = second_moments(
        random_llava_llama, own_prompts(random_llava_llama, pictures=[photo], **FEW), layers=[3], progress=False
    )
    assert torch.equal(found.matrix(3), expected.matrix(3))


def test_another_seed_picture_or_other_weights_are_not_found(random_llava_llama, photo, other_photo, tmp_path):
    given = {"layers": [3], "cache": tmp_path, "pictures": [photo], **FEW}
    first = own_moments(random_llava_llama, **given)
    for other in ({"seed": 1}, {"pictures": [other_photo]}, {"tokens": 5}):
        assert not torch.equal(own_moments(random_llava_llama, **given | other).matrix(3), first.matrix(3))
    delta = MultEdit(layer=1, steps=3).edit(
        random_llava_llama, [EditRequest(question=Question(text="Who won?"), target="Pruro")], progress=False
    )
    with delta.applied(random_llava_llama), runs(random_llava_llama) as passes:
        own_moments(random_llava_llama, **given)
        assert passes
    with runs(random_llava_llama) as passes:
        assert torch.equal(own_moments(random_llava_llama, **given).matrix(3), first.matrix(3)) and not passes


def test_a_cache_that_cannot_be_written_costs_only_a_warning(random_llava_llama, tmp_path, caplog):
    (tmp_path / "file").write_text("")
    found = own_moments(random_llava_llama, layers=[3], cache=tmp_path / "file", **FEW)
    assert found.prompts == 12 and "not kept" in caplog.text


def test_the_cache_of_the_user_keeps_what_was_used_last(tmp_path, monkeypatch):
    monkeypatch.setattr(own, "MOST_BYTES", 25)
    for number, name in enumerate("abcd"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_bytes(bytes(10))
        os.utime(tmp_path / name, (number, number))
    own._make_room(tmp_path, tmp_path / "a")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "d"]


# Editors and sessions


@pytest.fixture
def few_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    """Own moments of few samples, unless a number is asked for: the ridge has to make them usable."""
    monkeypatch.setattr(own, "LEAST", 24)
    monkeypatch.setattr(own, "MOST", 24)


@pytest.mark.parametrize(
    "editor",
    [
        ROME(layer=5, **QUICK),
        pytest.param(MEMIT(layer=5, **QUICK), marks=pytest.mark.slow),
        AlphaEdit(layer=5, **QUICK),
    ],
    ids=lambda each: str(type(each).__name__),
)
def test_editors_that_need_moments_make_them(tiny_vlm, request_of, few_samples, editor: ClosedFormEditor):
    request = request_of(0)
    assert answered(tiny_vlm, request) != request.target
    delta = editor.edit(tiny_vlm, [request], progress=False)
    with delta.applied(tiny_vlm):
        assert answered(tiny_vlm, request) == request.target
    assert answered(tiny_vlm, request) != request.target
    moments = own_moments(
        tiny_vlm, layers=[*editor.projections(tiny_vlm)], pictures=pictures_of_requests([request]), progress=False
    )
    given = editor.edit(tiny_vlm, [request], moments=moments, progress=False)
    for name, change in delta.changes.items():
        assert torch.equal(change.left, given.changes[name].left)


def test_without_the_ridge_few_samples_would_be_refused(tiny_vlm, request_of):
    moments = own_moments(tiny_vlm, layers=[5], **FEW)
    assert ROME(layer=5, steps=1).edit(tiny_vlm, [request_of(0)], moments=moments, progress=False)
    plain = replace(moments, settings={})
    with pytest.raises(EditError, match="not positive definite"):
        ROME(layer=5, steps=1).edit(tiny_vlm, [request_of(0)], moments=plain, progress=False)


def test_none_can_be_refused_and_settings_given(tiny_vlm, request_of):
    for editor in (ROME(layer=5), EMMET(layer=5), AlphaEdit(layer=5)):
        with pytest.raises(EditError, match="and none is given; leave moments out"):
            editor.start(tiny_vlm, moments=False)
    source = OwnMoments(tiny_vlm, **FEW)
    with ROME(layer=5, steps=2).start(tiny_vlm, moments=source) as session, runs(tiny_vlm) as passes:
        session.edit([request_of(0)])
        assert passes
    assert source.of([5]).prompts == 12
    with runs(tiny_vlm) as passes:
        MultEdit(layer=5, steps=2).edit(tiny_vlm, [request_of(0)], moments=source, progress=False)
        plain = len(passes)
    with runs(tiny_vlm) as passes:  # an editor that needs none samples none
        MultEdit(layer=5, steps=2).edit(tiny_vlm, [request_of(0)], progress=False)
        assert len(passes) == plain


def test_the_moments_of_a_session_are_those_of_the_unedited_model(tiny_vlm, request_of):
    first, second = request_of(0), request_of(1)
    editors = {first.target: MultEdit(layer=3, **QUICK), second.target: ROME(layer=5, **QUICK)}
    unedited = own_moments(tiny_vlm, layers=[5], **FEW)
    editor = EditorByRequest(choose=lambda requests: editors[requests[0].target])
    names = [tiny_vlm.down_projection(layer).name for layer in (3, 5)]
    before = tiny_vlm.fingerprint(names)
    with editor.start(tiny_vlm, moments=OwnMoments(tiny_vlm, **FEW)) as session:
        change = session.edit([first])
        edited = tiny_vlm.fingerprint(names)
        assert edited[names[0]] != before[names[0]]
        proposed = session.propose([second])
        assert tiny_vlm.fingerprint(names) == edited  # the first edit is back
        assert torch.equal(session.shared.moments.matrix(5), unedited.matrix(5))
        own_of_edited = own_moments(tiny_vlm, layers=[5], **FEW)
        assert not torch.equal(own_of_edited.matrix(5), unedited.matrix(5))  # what the session does not take
        session.edit([second])
        assert answered(tiny_vlm, second) == second.target
    assert tiny_vlm.fingerprint(names) == before
    history = History().added("first", change)
    with editor.start(tiny_vlm, moments=OwnMoments(tiny_vlm, **FEW), history=history) as session:
        again = session.propose([second])
    assert torch.equal(again.changes[names[1]].left, proposed.changes[names[1]].left)


def test_own_moments_refuse_a_model_that_was_edited_since(tiny_vlm, request_of):
    source = OwnMoments(tiny_vlm, **FEW)
    source.of([5])
    with MultEdit(layer=3, **QUICK).edit(tiny_vlm, [request_of(0)], progress=False).applied(tiny_vlm):
        with pytest.raises(EditError, match="take edits out first"):
            source.of([4])
    assert source.of([4]).layers == (4,)


def test_evaluations_take_the_same_moments_for_all_records(tiny_vlm, request_of, few_samples):
    records = [mt.EditRecord(question=request_of(each).question, target=request_of(each).target) for each in (0, 1)]
    report = mt.evaluate(tiny_vlm, records, ROME(layer=5, **QUICK), progress=False)
    assert [row.after for row in report.rows] == [record.target for record in records]
    assert pictures_of_requests([*records, records[0]]) == tuple(record.question.image for record in records)


def test_pictures_of_many_requests_are_the_first(tmp_path):
    paths = [tmp_path / f"{number}.png" for number in range(20)]
    requests = [EditRequest(question=Question(text="Who?", image=path), target="Al") for path in paths]
    assert pictures_of_requests(requests) == tuple(paths[:16]) == pictures_of_requests(requests[:18])
    assert pictures_of_requests([EditRequest(question=Question(text="Who?"), target="Al")]) == ()

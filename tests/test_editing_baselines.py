"""Fine-tuning, LoRA and in-context editing: they do what they say on the embedded model, and leave it as it was."""

import copy
import json
import sys
from dataclasses import replace

import multrace
import pytest
import torch
from multrace import EditRequest
from multrace.data import World, tiny_vlm_path
from multrace.editing import EditError
from multrace.editing.baselines import FineTune, InContext, Lora
from multrace.editing.baselines.answer_batches import AnswerBatches
from multrace.editing.changes import to_peft
from multrace.editing.requests import edited_questions
from multrace.models import Prompt, VisionLanguageModel
from PIL import Image

try:
    from peft import PeftModel
except ImportError:
    PeftModel = None

needs_peft = pytest.mark.skipif(PeftModel is None, reason="the extra multrace[peft] is not installed")
TUNE = FineTune(layer=5, learning_rate=5e-3, stop_loss=0.1)
LORA = Lora(stop_loss=0.1)
TRAINED = [pytest.param(TUNE, id="fine-tuning"), pytest.param(LORA, id="lora", marks=needs_peft)]
COUNT = 2


def requests_of(vlm: VisionLanguageModel, count: int = COUNT) -> list[EditRequest]:
    world = World()
    requests = []
    for case in world.edit_cases("outdated", "choose")[:count]:
        record, entity = world.question(case.fact), world.entities[case.fact.entity]
        prompt = vlm.prompt(world.picture(entity, 0).image, record.text)
        by_name = vlm.prompt(None, world.question_by_name(case.fact).text)
        context = vlm.prompt(world.picture(entity, 1).image, record.text)
        requests.append(
            EditRequest(question=prompt, target=case.target, contexts=(context,), rewrite_prompts=(by_name,))
        )
    return requests


def prompts_of(vlm: VisionLanguageModel, request: EditRequest) -> list[Prompt]:
    return [vlm.prompt_for(question) for question in edited_questions(request)]


def right(vlm: VisionLanguageModel, requests: list[EditRequest]) -> list[bool]:
    """Whether free generation gives the target, for each prompt of each request."""
    asked = [(prompt, request.target) for request in requests for prompt in prompts_of(vlm, request)]
    answers = vlm.answers([prompt for prompt, _ in asked])
    return [answer == target for answer, (_, target) in zip(answers, asked, strict=True)]


def loss_of(vlm: VisionLanguageModel, request: EditRequest, *, end: bool = True) -> float:
    """Mean over prompts of the mean over labels, prompt by prompt, without padding."""
    means = []
    for prompt in prompts_of(vlm, request):
        answered = prompt.with_answer(request.target)
        ids = [*answered.answer_ids, *([vlm.model.generation_config.eos_token_id] if end else [])]
        first = prompt.length - 1
        with torch.no_grad():
            found = vlm.logits(answered)[0, first : first + len(ids)].double().log_softmax(-1)
        means.append(-found[torch.arange(len(ids)), ids].mean().item())
    return sum(means) / len(means)


def bits(vlm: VisionLanguageModel) -> dict[str, str]:
    return vlm.fingerprint([name for name, _ in vlm.model.named_parameters()])


def anatomy(vlm: VisionLanguageModel) -> list:
    """Modules and parameters by identity, their flags, and what else hangs on the model."""
    modules = [(name, id(module), module.training) for name, module in vlm.model.named_modules()]
    parameters = [(name, id(one), one.requires_grad) for name, one in vlm.model.named_parameters()]
    return [modules, parameters, sorted(vars(vlm.model))]


@pytest.mark.parametrize("editor", TRAINED)
def test_all_prompts_of_all_requests_get_their_targets_and_the_model_stays(tiny_vlm, editor):
    requests = requests_of(tiny_vlm)
    before, random = (bits(tiny_vlm), anatomy(tiny_vlm)), torch.get_rng_state()
    change = editor.edit(tiny_vlm, requests)
    untouched = replace(editor, steps=0).edit(tiny_vlm, requests)
    assert (bits(tiny_vlm), anatomy(tiny_vlm)) == before
    assert torch.equal(torch.get_rng_state(), random)
    with change.applied(tiny_vlm):
        assert all(right(tiny_vlm, requests))
    with untouched.applied(tiny_vlm):
        assert not any(right(tiny_vlm, requests))
    assert (bits(tiny_vlm), anatomy(tiny_vlm)) == before


@pytest.mark.parametrize("editor", TRAINED)
def test_the_losses_are_those_of_the_prompts_one_by_one(tiny_vlm, editor):
    requests = requests_of(tiny_vlm)
    change = replace(editor, batch_size=2, steps=3, stop_loss=0).edit(tiny_vlm, requests)
    wanted = [loss_of(tiny_vlm, request) for request in requests]
    assert len(change.losses) == 4
    assert change.losses[0] == pytest.approx(sum(wanted) / COUNT, rel=1e-4)
    with change.applied(tiny_vlm):  # for LoRA: the factors do what PEFT's modules did
        after = [loss_of(tiny_vlm, request) for request in requests]
    assert [float(report["loss"]) for report in change.requests] == pytest.approx(after, rel=1e-3)
    assert change.losses[-1] == pytest.approx(sum(after) / COUNT, rel=1e-3)
    assert change.losses[-1] < change.losses[0]


def test_batches_beyond_the_limit_are_made_again_and_are_the_same(tiny_vlm):
    requests, rows = requests_of(tiny_vlm), torch.tensor([4, 0, 1, 2, 3, 5])
    whole = AnswerBatches(tiny_vlm, requests, batch_size=2)
    first = [*whole.of(rows)]
    size = sum(value.nbytes for value in whole.held[4].inputs.values()) / 2**20
    for limit, held in ((512, {*range(6)}), (1.01 * size, {2, 4, 5}), (0, set())):  # 2 and 5 have no pictures
        batches = AnswerBatches(tiny_vlm, requests, batch_size=2, held_mib=limit)
        passes = [[*batches.of(rows)] for _ in range(2)]
        assert {*batches.held} == held
        for one, other in zip(first, passes[1], strict=True):
            assert torch.equal(one.rows, other.rows)
            assert torch.equal(one.labels, other.labels) and one.inputs.keys() == other.inputs.keys()
            assert all(torch.equal(value, other.inputs[name]) for name, value in one.inputs.items())
    assert batches.owners.tolist() == [0, 0, 0, 1, 1, 1]


@pytest.mark.parametrize("projection", ["mlp", "attention"])
def test_fine_tuning_takes_the_steps_of_adam_on_the_weight_itself(tiny_vlm, projection):
    (request,) = requests_of(tiny_vlm, 1)
    editor = FineTune(layer=-2, projection=projection, steps=3, weight_decay=0.1, stop_loss=0)
    ((name, difference),) = editor.edit(tiny_vlm, [request]).differences.items()
    copied = replace(tiny_vlm, model=copy.deepcopy(tiny_vlm.model))
    weight = copied.weight(name).requires_grad_()
    optimiser = torch.optim.Adam([weight], lr=5e-4, weight_decay=0.1)
    for _ in range(3):
        optimiser.zero_grad()
        for prompt in prompts_of(tiny_vlm, request):
            answered = prompt.with_answer(request.target)
            labels = torch.tensor([*answered.answer_ids, 2])
            logits = copied.model(**answered.inputs).logits[0, prompt.length - 1 :]
            (torch.nn.functional.cross_entropy(logits, labels) / 3).backward()
        optimiser.step()
    torch.testing.assert_close(tiny_vlm.weight(name) + difference, weight.detach(), rtol=0, atol=2e-5)
    assert difference.abs().max() > 1e-3


def test_the_entry_bound_holds_for_every_entry(tiny_vlm):
    requests = requests_of(tiny_vlm, 1)
    bound = torch.tensor(5e-3)
    held = replace(TUNE, entry_bound=bound.item(), steps=4).edit(tiny_vlm, requests)
    free = replace(TUNE, steps=4).edit(tiny_vlm, requests)
    ((name, difference),) = held.differences.items()
    assert difference.abs().max() == bound
    assert free.differences[name].abs().max() > 2 * bound
    before = tiny_vlm.weight(name).detach().clone()
    with held.applied(tiny_vlm):
        moved = tiny_vlm.weight(name) - before
    assert moved.abs().max() <= bound + torch.finfo(torch.float32).eps * before.abs().max()


@pytest.mark.parametrize("editor", TRAINED)
def test_a_model_in_bfloat16_is_trained_in_float32_and_put_back_bit_by_bit(editor):
    vlm = multrace.load(tiny_vlm_path(), dtype="bfloat16", verify=False)
    requests = requests_of(vlm, 1)
    before = bits(vlm), anatomy(vlm)
    change = editor.edit(vlm, requests)
    name = next(iter(change.fingerprints))
    assert change.difference(name).dtype == torch.float32
    assert not any(right(vlm, requests))
    with change.applied(vlm):
        assert vlm.weight(name).dtype == torch.bfloat16
        assert all(right(vlm, requests))
    assert (bits(vlm), anatomy(vlm)) == before


@pytest.mark.parametrize("editor", TRAINED)
def test_a_training_that_blows_up_is_an_error_and_leaves_the_model(tiny_vlm, editor):
    before = bits(tiny_vlm), anatomy(tiny_vlm)
    with pytest.raises(EditError, match=r"left the finite numbers at step \d; lower learning_rate"):
        replace(editor, learning_rate=1e37).edit(tiny_vlm, requests_of(tiny_vlm, 1))
    assert (bits(tiny_vlm), anatomy(tiny_vlm)) == before


@pytest.mark.parametrize("editor", TRAINED)
def test_a_change_goes_into_no_other_weights(tiny_vlm, random_llama, editor):
    requests = requests_of(tiny_vlm, 1)
    change = replace(editor, steps=1).edit(tiny_vlm, requests)
    with change.applied(tiny_vlm), pytest.raises(EditError, match="or an edit is applied"), change.applied(tiny_vlm):
        pass
    with pytest.raises(EditError, match="does not fit"), change.applied(random_llama):
        pass
    with pytest.raises(RuntimeError, match="inside"), change.applied(tiny_vlm):
        raise RuntimeError("inside")
    assert bits(tiny_vlm).items() >= change.fingerprints.items()


@needs_peft
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`")  # PEFT asks transformers by the old name
@pytest.mark.parametrize("name", ["llava_llama", "llava_phi", "gpt2"])
def test_the_saved_adapter_opened_by_peft_is_the_change(request, tmp_path, name):
    vlm = request.getfixturevalue(f"random_{name}")
    prompt = vlm.prompt(Image.new("RGB", (48, 48), "red") if vlm.has_vision else None, "What is this?")
    change = Lora(steps=2, rank=3).edit(vlm, [EditRequest(question=prompt, target="the people")])
    before = vlm.logits(prompt).detach()
    with change.applied(vlm):
        wanted = vlm.logits(prompt).detach()
    folder = to_peft(vlm, change, tmp_path / "adapter").folder
    peft = PeftModel.from_pretrained(copy.deepcopy(vlm.model), folder)
    with torch.no_grad():
        found = peft(**prompt.inputs).logits
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    assert (wanted - before).abs().max() > 1e-2
    assert json.loads((folder / "adapter_config.json").read_text())["r"] == 3
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]
    with pytest.raises(EditError, match="it exists; pass a new folder"):
        to_peft(vlm, change, folder)


def test_without_peft_the_error_names_the_extra(tiny_vlm, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(EditError, match=r"multrace\[peft\]"):
        LORA.edit(tiny_vlm, requests_of(tiny_vlm, 1))


@pytest.mark.parametrize(
    ("make", "complaint"),
    [
        (lambda: FineTune(layer=1, steps=-1), "FineTune got steps=-1; pass steps of at least 0"),
        (lambda: FineTune(layer=1, learning_rate=0), "learning_rate above 0"),
        (lambda: FineTune(layer=1, learning_rate=float("nan")), "learning_rate above 0"),
        (lambda: FineTune(layer=1, stop_loss=-1), "stop_loss of at least 0"),
        (lambda: FineTune(layer=1, batch_size=0), "batch_size of at least 1"),
        (lambda: FineTune(layer=1, projection="up"), "projection 'mlp' or 'attention'"),
        (lambda: FineTune(layer=1, weight_decay=-1), "weight_decay of at least 0"),
        (lambda: FineTune.constrained(entry_bound=0), "entry_bound above 0, or None"),
        (lambda: Lora(rank=0), "Lora got rank=0; pass rank of at least 1"),
        (lambda: Lora(alpha=0), "alpha above 0"),
        (lambda: Lora(layers=()), "layers of at least one layer, or None"),
        (lambda: Lora(projections=("query",)), "projections among"),
        (lambda: InContext(max_facts=0), "max_facts of at least 1"),
        (lambda: InContext(fact_wording="{question}"), "{question} and {target}"),
        (lambda: InContext(question_wording="now"), "pass a text with {question}"),
    ],
)
def test_a_bad_setting_is_named(make, complaint):
    with pytest.raises(EditError) as error:
        make()
    assert complaint in str(error.value)


@pytest.mark.parametrize("editor", [*TRAINED, pytest.param(InContext(), id="in-context")])
def test_no_requests_are_an_error(tiny_vlm, editor):
    with pytest.raises(EditError, match="pass at least one EditRequest"):
        editor.edit(tiny_vlm, [])


@pytest.mark.parametrize("editor", [FineTune(layer=8), pytest.param(Lora(layers=(8,)), marks=needs_peft)])
def test_a_layer_that_is_not_there_is_an_error(tiny_vlm, editor):
    with pytest.raises(EditError, match="no layer 8"):
        editor.edit(tiny_vlm, requests_of(tiny_vlm, 1))


def test_the_presets_and_reports_are_text(tiny_vlm):
    assert FineTune.paper().as_text()["entry_bound"] == "None"
    assert FineTune.constrained().as_text() | {"editor": "FineTune", "entry_bound": "0.0005", "layer": "0"} == (
        FineTune.constrained().as_text()
    )
    request = replace(requests_of(tiny_vlm, 1)[0], id="first")
    for editor in (FineTune(layer=6, steps=0), InContext()):
        (report,) = editor.edit(tiny_vlm, [request]).requests
        assert {"name": "first", "target": request.target, "status": "edited"}.items() <= report.items()
        assert all(isinstance(value, str) for value in report.values())


@pytest.mark.parametrize("template", [None, "raw", "{image} Tell me {question} now:"])
def test_facts_are_told_before_the_question_in_the_same_template(random_vlm, photo, template):
    image = photo if random_vlm.has_vision else None
    if image is None and template:
        template = template.replace("{image} ", "")
    prompt = random_vlm.prompt(image, "Who is this?", template=template, answer="Ada")
    other = random_vlm.prompt(image, "What is this {target}?")
    requests = [EditRequest(question=other, target="a hat"), EditRequest(question=prompt, target="Bob")]
    change = InContext(question_wording="Now: {question}").edit(random_vlm, requests)
    worded = change.prompt_transform(prompt)
    told = "New fact: What is this {target}? a hat\nNew fact: Who is this? Bob\nNow: Who is this?"
    wanted = random_vlm.prompt(image, told, template=template, answer="Ada")
    assert (worded.text, worded.answer) == (wanted.text, "Ada")
    assert all(torch.equal(worded.inputs[name], value) for name, value in wanted.inputs.items())
    assert worded.images == prompt.images
    before = bits(random_vlm)
    with change.applied(random_vlm) as same:
        assert same is random_vlm and bits(random_vlm) == before


def test_the_facts_with_most_words_in_common_are_told(random_llama):
    def request(question: str, target: str, *also: str) -> EditRequest:
        prompts = [random_llama.prompt(None, words) for words in (question, *also)]
        return EditRequest(question=prompts[0], target=target, rewrite_prompts=tuple(prompts[1:]))

    requests = [
        request("Who leads the club?", "Ann"),
        request("What is the hat made of?", "wool"),
        request("Name it", "Rex", "What is the dog called?"),
        request("Who leads the band?", "Eve"),
    ]

    def told(question: str, count: int) -> list[str]:
        change = InContext(max_facts=count).edit(random_llama, requests)
        return [fact.target for fact in change.nearest(question)]

    assert told("who leads the band", 2) == ["Ann", "Eve"]
    assert told("What is the DOG called?", 1) == ["Rex"]
    assert told("Who leads the choir?", 1) == ["Ann"]  # as near as another, and asked for earlier
    assert len(told("anything", 9)) == 4

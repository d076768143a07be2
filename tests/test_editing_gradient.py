"""Editors by one gradient step: gradients, statistics of the stream, the closed form, and what becomes of answers."""

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import multrace as mt
import pytest
import torch
from multrace import EditRequest, VisionLanguageModel
from multrace.data import EditRecord, World, WorldRequests, tiny_vlm_path, world_records
from multrace.editing import (
    Delta,
    EditError,
    EvaluationSettings,
    GradientEditor,
    History,
    StableEdit,
    StreamStatistics,
    UltraEdit,
    evaluate,
)
from multrace.editing.requests import edited_questions, target_probability
from multrace.editing.solve import RunningStatistics, WeightStatistics
from multrace.editing.values import AnswerGradients, PlainGoal, answer_gradients
from multrace.models import Projection
from PIL import Image
from torch import Tensor
from torch.nn.functional import cross_entropy

WORLD = World()
RECORDS = world_records(WORLD, WORLD.edit_cases("outdated", "report")[:10], requests=WorldRequests(count=1))
EDITOR = UltraEdit(layers=(5, 6))
PLACE = {"layers": (1, 3)}
WORDS = [f"What does number {number} say?" for number in range(20)]
FACTS = [EditRequest(question=mt.Question(text=text), target=("red", "blue car")[len(text) % 2]) for text in WORDS]


@pytest.fixture(scope="module")
def double() -> VisionLanguageModel:
    vlm = mt.load(tiny_vlm_path(), verify=False)
    vlm.model.double()
    return vlm


@pytest.fixture(scope="module")
def small(llama_path: Path) -> VisionLanguageModel:
    """A random model in float64, small enough that a short stream has more rows than a gradient has entries."""
    vlm = mt.load(llama_path, verify=False)
    vlm.model.double()
    return vlm


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def bits(vlm: VisionLanguageModel) -> dict[str, str]:
    return vlm.fingerprint([name for name, _ in vlm.named_parameters()])


def dense(delta: Delta) -> dict[str, Tensor]:
    return {name: left.double() @ right.double() for name, (left, right) in delta.factors.items()}


def close(one: Tensor, other: Tensor, tolerance: float) -> bool:
    return bool((one - other).norm() <= tolerance * other.norm()) and bool(other.norm() > 0)


def plain_rows(
    vlm: VisionLanguageModel, questions: Sequence[tuple[mt.Question, str]], projections: Sequence[Projection]
) -> dict[str, dict[str, Tensor]]:
    """The same rows by hooks of torch on whole runs of the model, one prompt after the other, without padding."""
    rows: dict[str, dict[str, list[Tensor]]] = {
        each.name: {"inputs": [], "gradients": [], "outputs": []} for each in projections
    }
    for question, target in questions:
        prompt = vlm.prompt_for(question).with_answer(target)
        seen: dict[str, tuple[Tensor, Tensor]] = {}

        def hook(module: Any, read: tuple[Tensor], written: Tensor, name: str, seen: dict = seen) -> Tensor:
            written = written if written.requires_grad else written.requires_grad_()
            written.retain_grad()
            seen[name] = (read[0], written)
            return written

        handles = [
            each.module.register_forward_hook(lambda *given, name=each.name, hook=hook: hook(*given, name))
            for each in projections
        ]
        first = prompt.positions("last")[-1]
        labels = [*prompt.answer_ids, *vlm.end_ids[:1]]
        with torch.enable_grad():
            logits = vlm.model(**prompt.inputs).logits[0, first : first + len(labels)]
            cross_entropy(logits, torch.tensor(labels), reduction="sum").backward()
        for handle in handles:
            handle.remove()
        for name, (read, written) in seen.items():
            where = slice(first, first + len(labels))
            own = {"inputs": read[0, where], "gradients": written.grad[0, where], "outputs": written[0, where]}
            for part, value in own.items():
                rows[name][part].append(value.detach())
    return {name: {part: torch.cat(values) for part, values in own.items()} for name, own in rows.items()}


def asked_of(requests: Sequence[EditRequest]) -> list[tuple[mt.Question, str]]:
    return [(question, request.target) for request in requests for question in edited_questions(request)]


# ---- the gradients ----


@pytest.mark.parametrize("batch", [2, 16])
def test_inputs_outputs_and_gradients_are_those_of_plain_autograd(double, batch):
    requests = [replace(RECORDS[0], rewrite_prompts=(mt.Question(text="Who won the match, then?"),)), RECORDS[1]]
    requests.append(EditRequest(question=mt.Question(text="Who?"), target="A longer answer"))
    projections = [double.down_projection(2), double.attention_projection(4), double.down_projection(7)]
    goals = [PlainGoal(questions=edited_questions(request), target=request.target) for request in requests]
    found = answer_gradients(double, goals, projections, rows_at_once=batch)
    plain = plain_rows(double, asked_of(requests), projections)
    for projection in projections:
        for part, wanted in plain[projection.name].items():
            assert getattr(found[projection], part).dtype == torch.float64
            assert close(getattr(found[projection], part), wanted, 1e-9), (projection.name, part)
    assert sorted(set(found[projections[0]].owners.tolist())) == list(range(len(asked_of(requests))))


def test_every_family_gives_the_gradients_of_plain_autograd(random_vlm):
    picture = Image.new("RGB", (48, 48), "red") if random_vlm.has_vision else None
    questions = [
        mt.Question(text="What is this?", image=picture),
        mt.Question(text="What is that, then?", image=picture),
    ]
    projections = [random_vlm.down_projection(1), random_vlm.down_projection(2)]
    goals = [PlainGoal(questions=tuple(questions), target="red")]
    found = answer_gradients(random_vlm, goals, projections)
    plain = plain_rows(random_vlm, [(question, "red") for question in questions], projections)
    for projection in projections:
        for part, wanted in plain[projection.name].items():
            assert close(getattr(found[projection], part), wanted, 1e-3), (projection.name, part)


def test_without_the_end_there_is_one_row_for_each_token_of_the_answer(tiny_vlm):
    goal = PlainGoal(questions=(mt.Question(text="Who won?"),), target="Pruro")
    counts = [
        len(answer_gradients(tiny_vlm, [goal], [tiny_vlm.down_projection(5)], end=end).popitem()[1].inputs)
        for end in (True, False)
    ]
    tokens = len(tiny_vlm.prompt(None, "Who won?", answer="Pruro").answer_ids)
    assert counts == [tokens + 1, tokens]


# ---- the statistics of the stream ----


@pytest.mark.parametrize("covariance", [False, True])
@pytest.mark.parametrize("sizes", [(40,), (1, 39), (7, 0, 13, 20), (1,) * 40], ids=str)
def test_statistics_are_those_of_the_whole_stream(sizes, covariance):
    rows = draw(40, 5) * torch.tensor([1e-6, 1.0, 3.0, 1e4, 0.0]) + torch.tensor([1.0, -2.0, 1e3, 0.0, 7.0])
    statistics = RunningStatistics.empty(5, covariance=covariance)
    for part in rows.split(sizes):
        statistics = statistics.added(part)
    assert statistics.count == 40
    torch.testing.assert_close(statistics.mean, rows.mean(0), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(statistics.deviation, rows.std(0), rtol=1e-8, atol=1e-12)
    assert (statistics.normalised(rows)[:, -1] == 0).all()
    if covariance:
        torch.testing.assert_close(statistics.covariance, torch.cov(rows.T), rtol=1e-6, atol=1e-9)
    else:
        with pytest.raises(EditError, match="have no covariance"):
            statistics.covariance  # noqa: B018


def test_whitened_rows_have_the_identity_for_their_covariance():
    rows = draw(60, 6) @ draw(6, 6, seed=1)
    statistics = RunningStatistics.empty(6, covariance=True).added(rows[:11]).added(rows[11:])
    identity = torch.eye(6, dtype=torch.float64)
    torch.testing.assert_close(torch.cov(statistics.whitened(rows).T), identity, rtol=0, atol=1e-9)
    assert (torch.cov(statistics.normalised(rows).T) - identity).abs().max() > 0.1
    few = RunningStatistics.empty(6, covariance=True).added(rows[:6])
    assert torch.equal(few.whitened(rows), few.normalised(rows))  # a singular covariance has no inverse root


def test_directions_that_hardly_vary_are_held_at_the_floor():
    rows = draw(60, 3) * torch.tensor([1.0, 1.0, 1e-9])
    statistics = RunningStatistics.empty(3, covariance=True).added(rows)
    assert statistics.whitened(rows)[:, 2].abs().max() < 1e-4
    assert statistics.whitened(rows, floor=0.0)[:, 2].std().item() == pytest.approx(1.0)


# ---- the change ----

SETTINGS = {
    "relative": UltraEdit(**PLACE, step_size=1.4),
    "published": replace(UltraEdit.paper(**PLACE), learning_rate=1e-3, end_of_answer=True),
    "whitened": StableEdit(**PLACE, ridge=2.0),
}


@pytest.mark.parametrize("editor", SETTINGS.values(), ids=SETTINGS)
def test_the_change_is_the_dense_formula_over_the_stream(small, editor):
    """(H^T H + alpha I)^-1 H^T V, with V from the concatenated stream, of which the second step is edited."""
    steps = FACTS[:12], FACTS[12:]
    projections = editor.projections(small)
    first, second = (plain_rows(small, asked_of(step), projections) for step in steps)
    session = editor.start(small)
    with session:
        session.gather(steps[0])
        delta = session.edit(steps[1])
    for projection in projections:
        stream = {
            part: torch.cat([first[projection.name][part], second[projection.name][part]])
            for part in ("inputs", "gradients")
        }
        count = len(second[projection.name]["inputs"])
        normal = {part: (rows - rows.mean(0)) / rows.std(0) for part, rows in stream.items()}
        if editor.whitened:
            values, vectors = torch.linalg.eigh(torch.cov(stream["gradients"].T))
            root = vectors @ torch.diag(values.clamp(min=1e-6 * values.mean()).rsqrt()) @ vectors.T
            assert len(stream["gradients"]) > small.hidden
            normal["gradients"] = (stream["gradients"] - stream["gradients"].mean(0)) @ root
        rate = editor.learning_rate
        if rate is None:
            length = first[projection.name]["outputs"].square().sum(-1).mean().sqrt() / math.sqrt(small.hidden)
            rate = editor.step_size / 2 * length / projection.width
        asked = -rate * normal["inputs"].square().sum(-1, keepdim=True) * normal["gradients"]
        keys = stream["inputs"][-count:]
        ridge = 0.02 * keys.square().sum(-1).mean() if editor.ridge is None else editor.ridge
        identity = torch.eye(projection.width, dtype=torch.float64)
        wanted = torch.linalg.inv(keys.T @ keys + ridge * identity) @ keys.T @ asked[-count:]
        assert close(dense(delta)[projection.name], wanted.T, 1e-5)
        if editor.learning_rate is None:
            size = asked.norm(dim=-1).mean() / first[projection.name]["outputs"].norm(dim=-1).mean()
            assert size.item() == pytest.approx(editor.step_size / 2, rel=0.3)
    assert session.statistics.steps == 2


def test_kept_prompts_keep_what_the_weight_writes(tiny_vlm):
    record = RECORDS[0]
    kept = mt.Question(text="What colour is this?", image=record.question.image)
    request = EditRequest(question=record.question, target=record.target, contexts=record.contexts)
    answer = tiny_vlm.answers([tiny_vlm.prompt_for(kept)])[0]
    projections = EDITOR.projections(tiny_vlm)
    goal = PlainGoal(questions=(kept,), target=answer)
    keys = {each.name: rows.inputs for each, rows in answer_gradients(tiny_vlm, [goal], projections).items()}
    moved = [
        max(
            change.moved(keys[name]).norm() / change.moved(change.keys).norm() for name, change in delta.changes.items()
        )
        for delta in (
            EDITOR.edit(tiny_vlm, [replace(request, preserve_prompts=(kept,))], progress=False),
            EDITOR.edit(tiny_vlm, [request], progress=False),
        )
    ]
    assert moved[0] < 1e-4 < 1e-2 < moved[1]


# ---- what becomes of answers ----


def probabilities(vlm: VisionLanguageModel, requests: Sequence[EditRequest]) -> list[float]:
    return [target_probability(vlm, vlm.prompt_for(each.question).with_answer(each.target)) for each in requests]


@pytest.fixture(scope="module")
def batch(tiny_vlm: VisionLanguageModel) -> Delta:
    return EDITOR.edit(tiny_vlm, RECORDS, progress=False)


def test_a_batch_of_facts_raises_each_target_and_undo_is_exact(tiny_vlm, batch):
    untouched, before = bits(tiny_vlm), probabilities(tiny_vlm, RECORDS)
    targets = [record.target for record in RECORDS]
    shuffled = [replace(record, target=targets[number - 5]) for number, record in enumerate(RECORDS)]
    with batch.applied(tiny_vlm):
        after = probabilities(tiny_vlm, RECORDS)
    with EDITOR.edit(tiny_vlm, shuffled, progress=False).applied(tiny_vlm):
        others = probabilities(tiny_vlm, RECORDS)
    nothing = replace(EDITOR, step_size=0.0).edit(tiny_vlm, RECORDS, progress=False)
    assert not any(change.any() for change in dense(nothing).values())
    assert {report["status"] for report in nothing.requests} == {"not generated"}
    assert all(new > old for new, old in zip(after, before, strict=True))
    assert sum(after) / len(after) > 0.6
    assert sum(others) / len(others) < 0.1
    statuses = [report["status"] for report in batch.requests]
    assert statuses.count("edited") > 5 and set(statuses) <= {"edited", "not generated"}
    assert bits(tiny_vlm) == untouched


def test_a_saved_change_is_an_ordinary_edit(tiny_vlm, batch, tmp_path):
    loaded = Delta.load(batch.save(tmp_path / "edit.safetensors"))
    assert loaded.digest == batch.digest
    assert loaded.settings == EDITOR.as_text()
    handle = loaded.apply(tiny_vlm)
    changed = bits(tiny_vlm)
    handle.undo()
    assert {name for name, digest in bits(tiny_vlm).items() if digest != changed[name]} == set(batch.changes)
    shares = [share for share in loaded.shares(loaded.retained(tiny_vlm)) if share is not None]
    assert len(shares) == len(RECORDS)


def test_one_request_taken_out_of_a_history_is_a_new_solve_without_its_rows(tiny_vlm):
    editor = UltraEdit(layers=(5,), ridge=3.0)
    with editor.start(tiny_vlm) as session:
        delta = session.edit(RECORDS[:3], name="step")
    ((name, change),) = delta.changes.items()
    kept = change.owners != 1
    keys, asked = change.keys[kept].double(), change.residuals[kept].double()
    identity = torch.eye(keys.shape[1], dtype=torch.float64)
    wanted = (torch.linalg.inv(keys.T @ keys + 3.0 * identity) @ keys.T @ asked).T
    history = session.history.without("step", request=1)
    assert not close(dense(history.composed())[name], wanted, 1e-2)
    assert close(dense(history.resolved().composed())[name], wanted, 1e-5)


# ---- sessions ----


def test_an_adopted_edit_leaves_the_session_with_the_same_bits(tiny_vlm):
    untouched, steps = bits(tiny_vlm), (RECORDS[:3], RECORDS[3:5], RECORDS[5:7])
    with EDITOR.start(tiny_vlm) as session:
        made = [session.edit(step) for step in steps]
    with EDITOR.start(tiny_vlm) as session:
        for step, delta in zip(steps[:2], made[:2], strict=True):
            session.adopt(step, delta)
        assert session.edit(steps[2]).digest == made[2].digest
        session.propose(RECORDS[7:9])
        assert (session.statistics.steps, session.history.names) == (3, ("1", "2", "3"))
    assert EDITOR.edit(tiny_vlm, steps[2], progress=False).digest != made[2].digest
    assert bits(tiny_vlm) == untouched


def test_a_stream_goes_on_from_a_history_and_saved_statistics(tiny_vlm, tmp_path, caplog):
    with EDITOR.start(tiny_vlm) as session:
        session.edit(RECORDS[:3])
        statistics = StreamStatistics.load(session.statistics.save(tmp_path / "stream.safetensors"))
        second = session.edit(RECORDS[3:5])
    history = session.history.without("2")
    with EDITOR.start(tiny_vlm, history=history, statistics=statistics) as session:
        assert session.edit(RECORDS[3:5]).digest == second.digest
    assert not caplog.messages
    EDITOR.start(tiny_vlm, history=history)
    assert "the statistics of its stream begin anew" in caplog.text
    for other in (replace(EDITOR, layers=(3, 4)), StableEdit(layers=(5, 6))):
        with pytest.raises(EditError, match="statistics of the stream do not fit"):
            other.start(tiny_vlm, statistics=statistics)


def test_a_failed_edit_changes_neither_the_model_nor_the_stream(tiny_vlm, tmp_path):
    history = History.open(tmp_path / "edits")
    with EDITOR.start(tiny_vlm, history=history) as session:
        session.edit(RECORDS[:3], name="one")
        before, statistics = bits(tiny_vlm), session.statistics
        with pytest.raises(EditError, match="two edits of a history have one name"):
            session.edit(RECORDS[3:5], name="one")
        with pytest.raises(EditError, match="contradict each other"):
            session.edit([RECORDS[3], replace(RECORDS[3], target="Pruro")])
        assert session.statistics is statistics and bits(tiny_vlm) == before


def test_steps_of_a_warm_up_only_gather(tiny_vlm):
    editor, untouched = replace(EDITOR, warm_up=1), bits(tiny_vlm)
    with editor.start(tiny_vlm) as session:
        first = session.edit(RECORDS[:3])
        assert bits(tiny_vlm) == untouched
        second = session.edit(RECORDS[3:5])
    assert {report["status"] for report in first.requests} == {"warm-up"}
    assert all(change.rank == 0 for change in first.changes.values())
    gathering = EDITOR.start(tiny_vlm)
    gathering.gather(RECORDS[:3])
    assert gathering.propose(RECORDS[3:5]).digest == replace(second, settings=EDITOR.as_text()).digest


def test_a_request_that_leaves_the_finite_numbers_fails_alone(tiny_vlm):
    class Broken(type(EDITOR.start(tiny_vlm))):
        def _gradients(self, goals: Sequence[PlainGoal], progress: bool) -> Any:
            found = super()._gradients(goals, progress)
            for rows in found.values():
                rows.gradients[rows.owners < broken] = torch.nan
            return found

    broken = 1
    session = Broken(tiny_vlm, EDITOR)
    delta = session.propose([replace(each, contexts=(), rewrite_prompts=()) for each in RECORDS[:3]])
    assert str(delta.requests[0]["status"]).startswith("failed: its gradients hold numbers that are not finite")
    assert all(0 not in change.owners and change.rank for change in delta.changes.values())
    broken = 100
    with pytest.raises(EditError, match="no request could be edited"):
        session.propose(RECORDS[:2])


def test_a_sequence_is_evaluated_like_that_of_any_editor(tiny_vlm):
    records: list[EditRecord] = [replace(each, probes=()) for each in RECORDS[:3]]
    settings = EvaluationSettings(forced=False)
    options = {"mode": "sequence", "at": (2,), "settings": settings, "progress": False}
    report = evaluate(tiny_vlm, records, StableEdit(layers=(5, 6)), **options)
    assert [point.edits for point in report.curve.points] == [2, 3]
    assert 0 < report.curve.points[0].growth <= report.curve.points[1].growth


BAD = {
    "layers of at least one layer, each once": {"layers": ()},
    "pass layers of at least one layer": {"layers": (4, 4)},
    "pass projection 'mlp' or 'attention'": {"projection": "gate"},
    "pass step_size of at least 0": {"step_size": -1.0},
    "pass learning_rate of at least 0": {"learning_rate": math.nan},
    "pass ridge of at least 0": {"ridge": -1.0},
    "pass warm_up of at least 0": {"warm_up": -1},
}


@pytest.mark.parametrize(("message", "settings"), BAD.items(), ids=BAD)
def test_a_setting_out_of_range_is_refused(message, settings):
    with pytest.raises(EditError, match=message):
        UltraEdit(**({"layers": (5,)} | settings))


def test_a_layer_that_is_not_there_is_refused(tiny_vlm):
    with pytest.raises(EditError, match=r"cannot edit layers \[4, 40\]"):
        UltraEdit(layers=(4, 40)).start(tiny_vlm)


def test_the_published_constants():
    ultra, stable = UltraEdit.paper(layers=(5,)), StableEdit.paper(layers=(5,))
    assert (ultra.learning_rate, ultra.ridge, ultra.whitened, ultra.warm_up) == (1e-6, 1.0, False, 0)
    assert (stable.learning_rate, stable.ridge, stable.whitened, stable.warm_up) == (1e-6, 10.0, True, 20)
    assert isinstance(stable, GradientEditor)


def test_outputs_that_edits_have_enlarged_do_not_enlarge_the_step():
    rows = {"inputs": draw(30, 7), "gradients": draw(30, 4, seed=1), "outputs": draw(30, 4, seed=2)}
    first = WeightStatistics.empty(7, 4, covariance=False, device=torch.device("cpu")).added(**rows)
    later = first.added(**(rows | {"outputs": 9.0 * rows["outputs"]}))
    assert later.output_square == first.output_square > 0
    assert later.inputs.count == 60


def test_what_is_asked_does_not_depend_on_the_scale_of_a_model():
    """Keys, outputs and gradients of other units give the same change, in those units."""
    rows = {"inputs": draw(30, 7), "gradients": draw(30, 4, seed=1), "outputs": draw(30, 4, seed=2)}
    rest = {"owners": torch.zeros(30, dtype=torch.int64), "losses": torch.zeros(30)}

    def asked(editor: GradientEditor, inputs: float, gradients: float, outputs: float) -> Tensor:
        units = {"inputs": inputs, "gradients": gradients, "outputs": outputs}
        scaled = {part: units[part] * values for part, values in rows.items()}
        empty = WeightStatistics.empty(7, 4, covariance=editor.whitened, device=torch.device("cpu"))
        return editor.wanted(AnswerGradients(**scaled, **rest), empty.added(**scaled))

    for editor in (UltraEdit(layers=(1,)), StableEdit(layers=(1,))):
        torch.testing.assert_close(asked(editor, 50.0, 1e-7, 3.0), 3.0 * asked(editor, 1.0, 1.0, 1.0))

"""Sessions: edits on top of each other, one Gram matrix for the keys of earlier ones, facts edited again, undoing."""

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from multrace import EditRequest, Question
from multrace.data import World, tiny_vlm_path
from multrace.editing import (
    EMMET,
    ROME,
    AlphaEdit,
    BreadthFirst,
    Delta,
    EditError,
    EditorByRequest,
    FineTune,
    History,
    InContext,
    Lora,
    MultEdit,
    RuntimeEdit,
    WeightChange,
    compose,
    second_moments,
)
from multrace.editing.changes import HistoryEntry
from multrace.editing.requests import with_answers_seen
from multrace.editing.solve import Cost, Problem, build_cost, null_space, solve
from multrace.editing.solve.earlier import EarlierKeys
from multrace.editing.solve.under_way import EditUnderWay
from multrace.models import Site, VisionLanguageModel, capture, load, patch
from PIL import Image
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

WIDTH, HIDDEN = 24, 10
WORLD = World()
CASES = WORLD.edit_cases("outdated", "report")[:6]
QUICK = {"layer": 5, "steps": 4}


def question_of(index: int) -> Question:
    case = CASES[index]
    return WORLD.question(case.fact).with_image(WORLD.picture(WORLD.entities[case.fact.entity], 0).image)


def request_of(index: int, target: str | None = None) -> EditRequest:
    return EditRequest(question=question_of(index), target=CASES[index].target if target is None else target)


def bits(vlm: VisionLanguageModel) -> dict[str, str]:
    return vlm.fingerprint([name for name, _ in vlm.named_parameters()])


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def moment() -> Tensor:
    rows = draw(3 * WIDTH, WIDTH, seed=7)
    return rows.T @ rows / len(rows)


COSTS = {
    "ridge": lambda: build_cost(WIDTH, ridge=0.3),
    "moment": lambda: build_cost(WIDTH, ridge=0.0, moment=moment(), moment_weight=5.0),
    "refined": lambda: build_cost(WIDTH, ridge=0.1, moment=moment(), moment_weight=5.0, refined=True),
    "null space": lambda: build_cost(WIDTH, ridge=0.3, protected=null_space(moment(), 1.2)),
    "moment and null space": lambda: build_cost(
        WIDTH, ridge=0.1, moment=moment(), moment_weight=2.0, protected=null_space(moment(), 1.2)
    ),
    "free": lambda: build_cost(WIDTH, ridge=0.0),
}


def problem(keys: Tensor, residuals: Tensor, weights: list[float], directions: Tensor | None = None) -> Problem:
    return Problem(
        keys=keys,
        residuals=residuals,
        weights=torch.tensor(weights, dtype=torch.float64),
        directions=directions,
        names=tuple(map(str, range(len(keys)))),
    )


@pytest.mark.parametrize("two_keys", [False, True], ids=["one key", "two keys"])
@pytest.mark.parametrize("weight", [0.5, 3.0, float("inf")], ids=str)
@pytest.mark.parametrize("cost", COSTS.values(), ids=COSTS)
def test_the_gram_matrix_of_earlier_keys_gives_what_their_rows_give(cost, weight, two_keys):
    """The change with earlier keys stacked as rows whose outputs stay, and with K^T K in the cost, in float64."""
    keys, earlier, residuals = draw(3, WIDTH), draw(5, WIDTH, seed=1), draw(3, HIDDEN, seed=2)
    around = keys + 0.1 * draw(3, WIDTH, seed=3)
    stacked = problem(
        torch.cat([keys, earlier]),
        torch.cat([residuals, torch.zeros(5, HIDDEN)]),
        [2.0] * 3 + [weight] * 5,
        torch.cat([around, earlier]) if two_keys else None,
    )
    alone = problem(keys, residuals, [2.0] * 3, around if two_keys else None)
    rows, gram, without = (
        solution.left @ solution.right
        for solution in (
            solve(cost(), stacked),
            solve(cost().holding(earlier.T @ earlier, weight), alone),
            solve(cost(), alone),
        )
    )
    assert (gram - rows).norm() < 1e-10 * rows.norm()
    assert (without - rows).norm() > 1e-2 * rows.norm()


def test_earlier_keys_in_all_directions_leave_nothing_to_edit_exactly():
    keys = draw(2 * WIDTH, WIDTH)
    with pytest.raises(EditError, match="pass a finite earlier_weight"):
        build_cost(WIDTH, ridge=0.3).holding(keys.T @ keys, float("inf"))
    assert build_cost(WIDTH, ridge=0.3).holding(keys.T @ keys, 1.0).protected is None


class Elements(TorchDispatchMode):
    """Counts the entries of all tensors that torch operations read and write."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), keywords: Any = None) -> Any:
        result = function(*arguments, **(keywords or {}))
        for value in (*arguments, *(result if isinstance(result, tuple | list) else [result])):
            self.count += value.numel() if isinstance(value, Tensor) else 0
        return result


@pytest.fixture(scope="module")
def double(request: pytest.FixtureRequest) -> VisionLanguageModel:
    vlm = load(tiny_vlm_path(), verify=False)
    vlm.model.double()
    return vlm


def test_each_edit_of_a_session_costs_the_same(double, tmp_path, monkeypatch):
    """Entries that torch reads and writes for the change and what is kept of it, and the numbers that are kept."""
    counts, kept = [], []

    def counted(function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any, **options: Any) -> Any:
            with Elements() as elements:
                result = function(*arguments, **options)
            counts[-1] += elements.count
            return result

        return run

    monkeypatch.setattr(EditUnderWay, "_change", counted(EditUnderWay._change))
    monkeypatch.setattr(EarlierKeys, "follow", counted(EarlierKeys.follow))
    with MultEdit(layer=5, steps=0).start(double, history=History.open(tmp_path / "history")) as session:
        for index in range(6):
            counts.append(0)
            session.edit([EditRequest(question=question_of(index), target="Pruro")])
            kept.append(sum(gram.numel() for gram in session.shared.keys._grams.values()))
        assert not any(isinstance(entry.source, Delta) for entry in session.history.entries)
    width = double.down_projection(5).width
    assert counts[2:] == [counts[2]] * 4 and counts[1] > counts[0]
    assert kept[1:] == [width * width] * 5


def test_a_session_of_edits_is_the_same_as_edits_that_stack_the_rows_of_earlier_ones(double, monkeypatch):
    """The solves of a sequence against those with all earlier keys as rows, in float64."""
    pairs = []

    def both(cost: Cost, asked: Problem, **options: Any) -> Any:
        pairs.append((asked, solve(cost, asked, **options)))
        return pairs[-1][1]

    monkeypatch.setattr("multrace.editing.solve.under_way.solve", both)
    earlier: list[Tensor] = []
    with MultEdit(layer=5, steps=4, ridge=0.5).start(double) as session:
        for index in range(3):
            delta = session.edit([request_of(index)])
            asked, found = pairs[-1]
            rows = torch.cat([asked.keys, *earlier]) if earlier else asked.keys
            stacked = problem(
                rows,
                torch.cat([asked.residuals, asked.residuals.new_zeros(len(rows) - len(asked.keys), double.hidden)]),
                [1.0] * len(rows),
            )
            expected = solve(build_cost(rows.shape[1], ridge=0.5), stacked)
            wanted = expected.left @ expected.right
            assert (found.left @ found.right - wanted).norm() < 1e-10 * wanted.norm()
            ((_, change),) = delta.changes.items()
            earlier.append(change.keys.double())


STAYING = {
    "MultEdit": MultEdit(layer=5, stop_loss=0.05),
    "AlphaEdit": AlphaEdit(layer=5, spread=1, null_threshold=None, ridge=1.0, stop_loss=0.05),
}


@pytest.mark.parametrize("editor", STAYING.values(), ids=STAYING)
def test_edits_stay_until_the_session_ends_and_are_undone_bit_by_bit(editor, tiny_vlm):
    before = bits(tiny_vlm)
    prompts = [tiny_vlm.prompt_for(question_of(index)) for index in range(2)]
    unedited = tiny_vlm.answers(prompts)
    with editor.start(tiny_vlm) as session:
        for index in range(2):
            session.edit([request_of(index)])
        assert tiny_vlm.answers(prompts) == [CASES[index].target for index in range(2)]
        state = session.state()
        assert session.touched == (tiny_vlm.down_projection(5).name,)
        edited = bits(tiny_vlm)
    assert bits(tiny_vlm) == before != edited and tiny_vlm.answers(prompts) == unedited
    with state.applied(tiny_vlm):
        assert bits(tiny_vlm) == edited
    with session.history.applied(tiny_vlm):
        assert bits(tiny_vlm) == edited
    assert bits(tiny_vlm) == before


def test_a_session_goes_on_from_a_history_as_if_it_had_never_ended(tiny_vlm, tmp_path):
    before, editor = bits(tiny_vlm), MultEdit(**QUICK)
    with editor.start(tiny_vlm) as session:
        whole = [session.edit([request_of(index)]) for index in (0, 1, 0)]
        edited = bits(tiny_vlm)
    for index in (0, 1, 0):
        with editor.start(tiny_vlm, history=History.open(tmp_path / "history")) as session:
            session.edit([request_of(index)])
            after = bits(tiny_vlm)
    assert after == edited
    pieces = [entry.delta for entry in History.open(tmp_path / "history").entries]
    assert [delta.digest for delta in pieces] == [delta.digest for delta in whole]
    assert bits(tiny_vlm) == before


def test_a_fact_edited_again_gets_its_new_target(tiny_vlm):
    """Held with a weight of 1e4, the old target would win: so it does where the question is taken for another fact."""
    first, second = request_of(0, "Pruro Raner"), request_of(0, "Venvo Gralner")
    editor = MultEdit(layer=5, earlier_weight=1e4, stop_loss=0.05)
    prompt = tiny_vlm.prompt_for(question_of(0))
    with editor.start(tiny_vlm) as session:
        session.edit([request_of(1)])
        session.edit([first])
        assert tiny_vlm.answers([prompt]) == ["Pruro Raner"]
        blind = session.propose([replace(second, question=replace(question_of(0), template="raw"), contexts=())])
        assert blind.requests[0]["facts"] != first_facts(session.history)
        session.edit([second])
        assert tiny_vlm.answers([prompt]) == ["Venvo Gralner"]
        session.edit([first])
        assert tiny_vlm.answers([prompt]) == ["Pruro Raner"]
        assert tiny_vlm.answers([tiny_vlm.prompt_for(question_of(1))]) == [CASES[1].target]


def first_facts(history: History) -> str:
    return history.entries[1].requests[0]["facts"]


def test_the_keys_of_a_fact_edited_again_leave_the_gram_matrix(double):
    """After A, B and A again, the matrix is that of B and the new A; before, it holds the old A at its old target."""
    name = double.down_projection(5).name
    with MultEdit(layer=5, steps=3).start(double) as session:
        old, other = (session.edit([request_of(index)]) for index in (0, 1))
        new = session.edit([request_of(0, "Pruro Raner")])
        gram = session.shared.keys.gram(double.weight(name), name, set())
    keys = {delta: delta.changes[name].keys.double() for delta in (old, other, new)}
    expected = keys[other].T @ keys[other] + keys[new].T @ keys[new]
    assert (gram - expected).norm() < 1e-12 * expected.norm()
    assert (keys[old].T @ keys[old]).norm() > 1e-2 * expected.norm()


def test_earlier_keys_that_are_all_replaced_leave_no_rounding_behind():
    """What rounding leaves of a sum minus its parts spans arbitrary directions, in which nothing could be changed."""
    weight, keys, names = torch.zeros(HIDDEN, WIDTH), EarlierKeys(), ("a", "b", "c")
    for step, name in enumerate(names):
        row = draw(1, WIDTH, seed=step).float()
        parts = {"left": torch.ones(HIDDEN, 1), "right": row, "keys": row, "residuals": torch.ones(1, HIDDEN)}
        change = WeightChange(**parts, owners=torch.tensor([0]))
        delta = Delta(changes={"w": change}, fingerprints={"w": ""}, model="m", requests=({"facts": name},))
        keys.follow(HistoryEntry.of(name, delta, step=step, on_top=True))
        assert keys.gram(weight, "w", set()) is not None
    whole, one = (keys.gram(weight, "w", facts) for facts in (set(), {"a"}))
    assert (whole - one).trace() > 1 and (one - one.T).norm() == 0 and one.trace() > 1
    assert keys.gram(weight, "w", set(names)) is None
    keys._replace(set(names))
    assert not keys._grams["w"].any()


def test_an_edit_that_fails_leaves_the_session_and_the_model_as_they_were(tiny_vlm, tmp_path, monkeypatch):
    history = History.open(tmp_path / "history")
    with MultEdit(**QUICK).start(tiny_vlm, history=history) as session:
        session.edit([request_of(0)])
        before, index = bits(tiny_vlm), (tmp_path / "history" / "index.jsonl").read_bytes()
        with monkeypatch.context() as context, pytest.raises(EditError, match="overflows"):
            context.setattr(Delta, "write", overflow)
            session.edit([request_of(1)])
        assert bits(tiny_vlm) == before
        with monkeypatch.context() as context, pytest.raises(EditError, match="No space left"):
            context.setattr(os, "fsync", full_disk)
            session.edit([request_of(1)])
        assert bits(tiny_vlm) == before and session.history.names == ("1",)
        assert (tmp_path / "history" / "index.jsonl").read_bytes() == index


def overflow(delta: Delta, vlm: VisionLanguageModel) -> None:
    for name in delta.changes:
        with torch.no_grad():
            vlm.weight(name)[0] = 1
    raise EditError("the edited weight overflows")


def test_what_no_file_can_hold_does_not_get_into_the_text_of_an_edit(tiny_vlm, tmp_path):
    """A picture whose name is not in UTF-8, and the probability of a target in a model that overflows."""
    path = Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.png"))
    Image.new("RGB", (32, 32), "red").save(path, format="png")
    request = EditRequest(question=Question(text="Who won?", image=path), target="Pruro")
    with MultEdit(layer=5, steps=1).start(tiny_vlm, history=History.open(tmp_path / "history")) as session:
        delta = session.edit([request])
    assert delta.requests[0]["image"] == str(tmp_path / "caf\ufffd.png")
    assert History.open(tmp_path / "history").entries[0].delta.requests == delta.requests
    ((name, change),) = delta.changes.items()
    largest = replace(change, left=change.left / change.left.abs().max() * 1e38, right=change.right.sign())
    overflowing = replace(delta, changes={name: largest}, requests=({**delta.requests[0], "status": "edited"},))
    seen = with_answers_seen(tiny_vlm, overflowing, [request])
    assert (seen.requests[0]["status"], seen.requests[0]["probability"]) == ("not generated", 0.0)
    assert Delta.load(seen.save(tmp_path / "edit.safetensors")).requests == seen.requests


def full_disk(_file: int) -> None:
    raise OSError(28, "No space left on device")


BASELINES = {
    "fine-tuning": FineTune(layer=5, learning_rate=5e-3, steps=10),
    "breadth first": FineTune.breadth_first(layers=(5, 6), order=BreadthFirst(epochs=3)),
    "LoRA": Lora(steps=10, layers=(5,)),
}


@pytest.mark.parametrize("editor", BASELINES.values(), ids=BASELINES)
def test_baselines_have_sessions_too(editor, tiny_vlm):
    if isinstance(editor, Lora):
        pytest.importorskip("peft")
    before = bits(tiny_vlm)
    with editor.start(tiny_vlm) as session:
        one, two = session.edit([request_of(0)]), session.edit([request_of(1)])
        edited = bits(tiny_vlm)
    assert bits(tiny_vlm) == before != edited
    assert any(two.fingerprints[name] != one.fingerprints[name] for name in one.fingerprints)
    with one.applied(tiny_vlm), two.applied(tiny_vlm):
        assert bits(tiny_vlm) == edited
    with pytest.raises(EditError, match="leave history out"):
        editor.start(tiny_vlm, history=History())


def test_a_session_in_context_states_all_its_facts_and_the_newest_of_each(tiny_vlm):
    prompt = tiny_vlm.prompt(None, "Who owns it?")
    requests = [EditRequest(question=Question(text=text), target=name) for text, name in (("A?", "x"), ("B?", "y"))]
    with InContext().start(tiny_vlm) as session:
        assert session.prompt_transform is None
        for request in (*requests, replace(requests[0], target="z")):
            session.edit(each for each in [request])  # any iterable, as in every session
        told = session.prompt_transform(prompt).question
    assert "A? z" in told and "B? y" in told and "A? x" not in told


def test_requests_find_their_own_editors_in_one_session(tiny_vlm):
    layers = {0: 4, 1: 5, 2: 4}
    requests = {index: request_of(index) for index in layers}

    def choose(asked: Any) -> MultEdit:
        (index,) = [index for index, request in requests.items() if request is asked[0]]
        return MultEdit(layer=layers[index], stop_loss=0.05)

    with EditorByRequest(choose=choose).start(tiny_vlm) as session:
        deltas = [session.edit([request]) for request in requests.values()]
        prompts = [tiny_vlm.prompt_for(request.question) for request in requests.values()]
        assert tiny_vlm.answers(prompts) == [request.target for request in requests.values()]
    names = [tiny_vlm.down_projection(layer).name for layer in layers.values()]
    assert [[*delta.changes] for delta in deltas] == [[name] for name in names]


def test_a_session_is_used_inside_its_block(tiny_vlm):
    session = MultEdit(**QUICK).start(tiny_vlm)
    assert session.propose([request_of(0)]).requests[0]["status"] == "not generated"
    with pytest.raises(EditError, match="use it in a block"):
        session.edit([request_of(0)])
    with session, pytest.raises(EditError, match="open already"), session:
        pass
    with session, pytest.raises(EditError, match="no requests"):
        session.edit([])


def test_what_is_known_of_a_weight_is_read_again_after_somebody_wrote_to_it(tiny_vlm):
    name = tiny_vlm.down_projection(5).name
    with MultEdit(layer=5, steps=2).start(tiny_vlm) as session:
        session.edit([request_of(0)])
        with torch.no_grad():
            tiny_vlm.weight(name)[0, 0] += 1
        assert session.propose([request_of(1)]).fingerprints == tiny_vlm.fingerprint([name])


def test_edits_of_one_model_opened_from_two_folders_are_composed(tmp_path):
    (tmp_path / "link").symlink_to(tiny_vlm_path())
    deltas, models = [], [load(path, verify=False) for path in (tiny_vlm_path(), tmp_path / "link")]
    for vlm, target in zip(models, ("Raner", "Gralner"), strict=True):
        request = EditRequest(question=Question(text=f"Who founded {target}?"), target=target)
        deltas.append(MultEdit(layer=5, steps=2).edit(vlm, [request], progress=False))
    assert deltas[0].model != deltas[1].model and len(compose(*deltas).requests) == 2
    other = replace(deltas[1], fingerprints=dict.fromkeys(deltas[1].fingerprints, "0"))
    with pytest.raises(EditError, match="different models"):
        compose(deltas[0], other)
    assert compose(deltas[0], replace(other, model=deltas[0].model)).requests


@contextmanager
def interrupted_when_restoring(vlm: VisionLanguageModel, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[bool]]:
    """A block after whose `armed.append(True)` a second interrupt comes as soon as a weight is looked up."""
    armed: list[bool] = []
    plain = VisionLanguageModel.weight

    def weight(self: VisionLanguageModel, name: str) -> Any:
        if armed:
            armed.clear()
            os.kill(os.getpid(), signal.SIGINT)
        return plain(self, name)

    with monkeypatch.context() as context:
        context.setattr(VisionLanguageModel, "weight", weight)
        yield armed


def delta_of(vlm: VisionLanguageModel) -> Delta:
    request = EditRequest(question=Question(text="Who founded it?"), target="Raner")
    return MultEdit(layer=5, steps=2).edit(vlm, [request], progress=False)


WAYS: dict[str, Callable[[VisionLanguageModel], Any]] = {
    "a delta": lambda vlm: delta_of(vlm).applied(vlm),
    "a history": lambda vlm: History().added("a", delta_of(vlm)).applied(vlm),
    "a session": lambda vlm: MultEdit(layer=5).start(vlm, history=History().added("a", delta_of(vlm))),
    "a trained change": lambda vlm: FineTune(layer=5, steps=2).edit(vlm, [request_of(0)], progress=False).applied(vlm),
}


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_a_second_interrupt_while_weights_are_put_back_leaves_the_model_unedited(way, tiny_vlm, monkeypatch):
    before, block = bits(tiny_vlm), way(tiny_vlm)
    with interrupted_when_restoring(tiny_vlm, monkeypatch) as armed, pytest.raises(KeyboardInterrupt):
        with block:
            edited = bits(tiny_vlm)
            armed.append(True)
            raise KeyboardInterrupt
    assert not armed and bits(tiny_vlm) == before != edited


def test_a_second_interrupt_while_hooks_are_taken_out_leaves_none(tiny_vlm, monkeypatch):
    handle = torch.utils.hooks.RemovableHandle
    plain, armed = handle.remove, []

    def remove(self: Any) -> None:
        if armed:
            armed.clear()
            os.kill(os.getpid(), signal.SIGINT)
        plain(self)

    monkeypatch.setattr(handle, "remove", remove)
    delta = delta_of(tiny_vlm)
    module, sites = tiny_vlm.module(tiny_vlm.down_projection(5)), [Site("mlp", layer) for layer in range(3)]
    blocks = [
        lambda: RuntimeEdit(delta=delta).applied(tiny_vlm),
        lambda: capture(tiny_vlm, sites),
        lambda: patch(tiny_vlm, {site: lambda output: 0 * output for site in sites}),
    ]
    modules = [module, *(tiny_vlm.module(site) for site in sites)]
    for block in blocks:
        with pytest.raises(KeyboardInterrupt), block():
            armed.append(True)
            raise KeyboardInterrupt
        assert not armed and not any(each._forward_hooks or each._forward_pre_hooks for each in modules)


@pytest.mark.parametrize("editor", [ROME(**QUICK), EMMET(**QUICK)], ids=["ROME", "EMMET"])
def test_moments_are_factorised_once_for_all_edits_of_a_session(editor, tiny_vlm, monkeypatch):
    moments = second_moments(tiny_vlm, [tiny_vlm.prompt_for(question_of(index)) for index in range(6)], layers=[5])
    count, plain = [], torch.linalg.cholesky_ex

    def counted(matrix: Tensor, **options: Any) -> Any:
        count.append(len(matrix))
        return plain(matrix, **options)

    monkeypatch.setattr(torch.linalg, "cholesky_ex", counted)
    session = replace(editor, ridge=0.1).start(tiny_vlm, moments=moments)
    for index in range(3):
        session.propose([request_of(index)])
    assert count.count(tiny_vlm.down_projection(5).width) == 1

"""Threads that share one model each get what they get alone; and every run is in eval mode."""

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import nullcontext
from dataclasses import fields, replace

import pytest
import torch
from multrace import BlankImage, Delta, EditRequest, MultEdit, Trace, TraceDict, capture, causal_trace, patch
from multrace.editing import FineTune, History, RuntimeEdit
from multrace.models import Site
from multrace.models.guards import ModelLock
from multrace.models.replay import masking, replaying

QUESTION, OTHER = "Who founded the company in this photo?", "Which person runs this firm?"


@pytest.fixture(scope="module")
def delta(random_llama) -> Delta:
    editor = MultEdit(layer=2, steps=8, learning_rate=1.0, stop_loss=0, answer_keys=False)
    return editor.edit(random_llama, [EditRequest(question=random_llama.prompt(None, QUESTION), target="company")])


def zeros(value):
    return torch.zeros_like(value)


def trained(vlm):
    editor = FineTune(layer=2, steps=2, learning_rate=0.1)
    return editor.edit(vlm, [EditRequest(question=vlm.prompt(None, QUESTION), target="company")])


BLOCKS = {
    "patch": lambda vlm, delta: patch(vlm, {Site("mlp", 1): zeros}),
    "Trace": lambda vlm, delta: Trace(vlm, Site("mlp", 1), edit_output=zeros),
    "TraceDict": lambda vlm, delta: TraceDict(vlm, [Site("mlp", 0), Site("mlp", 1)], edit_output=zeros),
    "Trace that stops": lambda vlm, delta: Trace(vlm, Site("mlp", 1), stop=True),
    "masking": lambda vlm, delta: masking(vlm, {1: ~torch.eye(width(vlm), dtype=torch.bool)[None]}),
    "Delta.applied": lambda vlm, delta: delta.applied(vlm),
    "RuntimeEdit.applied": lambda vlm, delta: RuntimeEdit(delta=delta).applied(vlm),
    "fine-tuned weights": lambda vlm, delta: trained(vlm).applied(vlm),
}


def width(vlm):
    return vlm.prompt(None, QUESTION).length


def meanwhile(block, run, patience):
    """What `run` gives, or raises, in another thread that starts while this one is inside the block."""
    with ThreadPoolExecutor(1) as pool:
        with block:
            future = pool.submit(run)
            is_done = bool(wait([future], timeout=patience).done)
        return is_done, future.exception() or future.result()


@pytest.mark.parametrize("name", BLOCKS)
def test_a_run_waits_for_the_block_of_another_thread(random_llama, delta, name):
    prompt = random_llama.prompt(None, QUESTION)
    alone = random_llama.logits(prompt)
    is_done, result = meanwhile(BLOCKS[name](random_llama, delta), lambda: random_llama.logits(prompt), patience=0.1)
    assert not is_done
    assert torch.equal(result, alone)

    unlocked = replace(random_llama, lock=nullcontext())  # without a lock the other thread runs inside the block
    is_done, result = meanwhile(BLOCKS[name](unlocked, delta), lambda: unlocked.logits(prompt), patience=60)
    assert is_done
    assert isinstance(result, Exception) or not torch.equal(result, alone)


def test_every_way_to_use_a_model_waits(tiny_vlm, photo, tmp_path):
    prompt = tiny_vlm.prompt(photo, QUESTION)
    sites = [Site("hidden", 1)]
    states = torch.zeros(1, tiny_vlm.hidden)

    def enter(block):
        with block:
            return True

    uses = {
        "logits": lambda: tiny_vlm.logits(prompt),
        "embeddings": lambda: tiny_vlm.embeddings(prompt),
        "image_features": lambda: tiny_vlm.image_features(prompt),
        "forward": lambda: tiny_vlm.forward(states[None]),
        "readout": lambda: tiny_vlm.readout(states),
        "answers": lambda: tiny_vlm.answers([prompt], max_new_tokens=1),
        "score": lambda: tiny_vlm.score(photo, QUESTION, "a"),
        "fingerprint": lambda: tiny_vlm.fingerprint([tiny_vlm.down_projection(0).name]),
        "save_pretrained": lambda: tiny_vlm.save_pretrained(tmp_path / "saved"),
        "capture": lambda: enter(capture(tiny_vlm, sites)),
        "patch": lambda: enter(patch(tiny_vlm, {sites[0]: zeros})),
        "Trace": lambda: enter(Trace(tiny_vlm, sites[0])),
        "replaying": lambda: enter(replaying(tiny_vlm)),
        "masking": lambda: enter(masking(tiny_vlm, {})),
    }
    with ThreadPoolExecutor(len(uses)) as pool:
        with tiny_vlm.lock:
            futures = {name: pool.submit(use) for name, use in uses.items()}
            assert not wait(futures.values(), timeout=0.2).done
        assert all(future.result(timeout=120) is not False for future in futures.values())


def test_threads_trace_answer_and_edit_as_each_does_alone(tiny_vlm, photo):
    prompts = [tiny_vlm.prompt(photo, question) for question in (QUESTION, OTHER)]

    def trace(prompt):
        return causal_trace(tiny_vlm, prompt, corruption=BlankImage(), sites="hidden", progress=False).samples["hidden"]

    def edit(prompt):
        delta = MultEdit(layer=4, steps=4).edit(tiny_vlm, [EditRequest(question=prompt, target="Pruro")])
        with delta.applied(tiny_vlm):
            logits = tiny_vlm.logits(prompt)
        return [*next(iter(delta.factors.values())), logits]

    jobs = [(trace, prompts[0]), (trace, prompts[1]), (edit, prompts[0]), (edit, prompts[1])]
    jobs += [(lambda prompt: tiny_vlm.logits(prompt), prompt) for prompt in prompts]
    alone = [job(prompt) for job, prompt in jobs]
    with ThreadPoolExecutor(len(jobs)) as pool:
        together = list(pool.map(lambda pair: pair[0](pair[1]), jobs))
    for result, expected in zip(together, alone, strict=True):
        pairs = zip(result, expected, strict=True) if isinstance(result, list) else [(result, expected)]
        assert all(torch.equal(found, wanted) for found, wanted in pairs)


def test_threads_make_prompts_at_once_and_wait_for_nobody(tiny_vlm, photo):
    def make(number):
        prompt = tiny_vlm.prompt(photo, f"Who founded company {number}?", constraint="company", answer="Pruro")
        again = prompt.with_answer("Raner").with_images(photo.rotate(90 * number))
        return [each.inputs[name] for each in (prompt, again) for name in ("input_ids", "pixel_values")]

    alone = [make(number) for number in range(4)]
    with tiny_vlm.lock, ThreadPoolExecutor(4) as pool:
        together = list(pool.map(make, [*range(4)] * 5, timeout=120))
    for result, expected in zip(together, alone * 5, strict=True):
        assert all(torch.equal(found, wanted) for found, wanted in zip(result, expected, strict=True))


def test_two_models_do_not_wait_for_each_other(random_llama, tiny_vlm):
    with random_llama.lock, ThreadPoolExecutor(1) as pool:
        assert pool.submit(tiny_vlm.logits, tiny_vlm.prompt(None, QUESTION)).result(timeout=60).isfinite().all()


def test_a_handle_holds_no_lock_but_its_writing_waits(random_llama, delta):
    prompt = random_llama.prompt(None, QUESTION)
    clean = random_llama.logits(prompt)
    handle = delta.apply(random_llama)
    with ThreadPoolExecutor(1) as pool:
        assert not torch.equal(pool.submit(random_llama.logits, prompt).result(timeout=60), clean)
        with random_llama.lock:
            undone = pool.submit(handle.undo)
            assert not wait([undone], timeout=0.1).done
        undone.result(timeout=60)
    assert torch.equal(random_llama.logits(prompt), clean)


class WatchedDelta(Delta):
    """A delta that lets another thread try to run the model while it is being verified."""

    def retained(self, vlm, **options):
        prompt = vlm.prompt(None, QUESTION)
        run = self.settings["pool"].submit(vlm.logits, prompt)
        self.settings["runs"].append((run, bool(wait([run], timeout=0.1).done)))
        return super().retained(vlm, **options)


def test_no_thread_sees_a_history_half_written(random_llama, delta):
    clean, runs = random_llama.logits(random_llama.prompt(None, QUESTION)), []
    with ThreadPoolExecutor(4) as pool:
        parts = {field.name: getattr(delta, field.name) for field in fields(delta)}
        watched = WatchedDelta(**parts | {"settings": {"pool": pool, "runs": runs}})
        History().added("one", watched).added("two", watched).verify(random_llama, progress=False)
    assert [is_done for _, is_done in runs] == [False, False]
    assert all(torch.equal(run.result(), clean) for run, _ in runs)


def test_an_error_in_a_block_frees_the_model(random_llama, delta):
    for make in BLOCKS.values():
        with pytest.raises(KeyError, match="on purpose"), make(random_llama, delta):
            raise KeyError("on purpose")
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(random_llama.logits, random_llama.prompt(None, QUESTION)).result(timeout=60) is not None


def test_copies_of_a_lock_are_new_ones():
    lock = ModelLock()
    with lock, ThreadPoolExecutor(1) as pool:
        for other in (copy.deepcopy(lock), pickle.loads(pickle.dumps(lock))):

            def enter(other=other):
                with other:
                    return True

            assert pool.submit(enter).result(timeout=10)


def test_a_model_left_in_train_mode_runs_in_eval_mode(random_gpt2):
    vlm = random_gpt2
    prompt = vlm.prompt(None, QUESTION, template="raw")
    runs = {
        "logits": lambda: vlm.logits(prompt),
        "forward": lambda: vlm.forward(vlm.embeddings(prompt)),
        "score": lambda: torch.tensor(vlm.score(None, QUESTION, "photo").token_log_probabilities),
        "replay": lambda: replayed(vlm, prompt),
    }
    expected, answers = {name: run() for name, run in runs.items()}, vlm.answers([prompt])
    modules = list(vlm.model.modules())[::2]  # some of them: a whole model, a layer or a single dropout may be left on
    for module in modules:
        module.training = True
    try:
        assert not torch.equal(vlm.model(**prompt.inputs).logits, expected["logits"])
        assert all(torch.equal(run(), expected[name]) for name, run in runs.items())
        assert vlm.answers([prompt]) == answers
        assert [module for module in vlm.model.modules() if module.training] == modules
    finally:
        vlm.model.eval()


def replayed(vlm, prompt):
    with torch.no_grad(), replaying(vlm) as replay:
        return replay.record(vlm.embed(prompt), kept=[0], read=[-1 % prompt.length]).logits

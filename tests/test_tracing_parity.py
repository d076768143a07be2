"""Every cell of a trace against an independent slow reimplementation, in true float64.

The reimplementation makes whole model calls with pixels, clean and corrupted rows in one batch, and has its own hooks.
"""

import pytest
import torch
from multrace import Prompt, VisionLanguageModel
from multrace.tracing import ImageNoise, ReplaceText, SwapImage, TextNoise, causal_trace
from multrace.tracing.engine import Engine
from torch import Tensor, nn

QUESTION, CONSTRAINT = "Who founded the company in this photo?", "the company in this photo"
ENGINES = {"plain": Engine(name="plain"), "replay": Engine(name="replay", checks=0)}
TOLERANCE = {"plain": 1e-13, "replay": 1e-12}


def slow_scores(
    vlm: VisionLanguageModel,
    inputs: dict[str, Tensor],
    modules: list[nn.Module],
    positions: tuple[int, ...],
    answer_id: int,
    noise: tuple[list[int], Tensor] | None = None,
) -> Tensor:
    """Answer probability per row; row 0 is clean and its outputs at the positions are copied into the other rows."""

    def copy(_module: nn.Module, _arguments: tuple, output: Tensor | tuple) -> Tensor | tuple:
        states = (output[0] if isinstance(output, tuple) else output).clone()
        for position in positions:
            states[1:, position] = states[0, position]
        return (states, *output[1:]) if isinstance(output, tuple) else states

    def add_noise(_module: nn.Module, arguments: tuple, keywords: dict) -> tuple:
        embeddings = keywords["inputs_embeds"].clone()
        embeddings[1:, noise[0]] += noise[1]
        return arguments, keywords | {"inputs_embeds": embeddings}

    handles = [module.register_forward_hook(copy) for module in modules]
    if noise is not None:
        language_model = vlm.model.model.language_model
        handles.append(language_model.register_forward_pre_hook(add_noise, with_kwargs=True))
    with torch.no_grad():
        logits = vlm.model(**inputs, use_cache=False).logits
    for handle in handles:
        handle.remove()
    return torch.softmax(logits[:, -1].double(), dim=-1)[:, answer_id]


def rows_of(prompt: Prompt, count: int) -> dict[str, Tensor]:
    """The prompt's inputs, clean, in so many rows."""
    return {name: value.repeat(count, *[1] * (value.ndim - 1)) for name, value in prompt.inputs.items()}


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("case", ["swap", "replace", "text noise", "image noise"])
def test_every_cell_agrees_with_the_slow_reimplementation(exact_llava, photo, other_photo, case, engine):
    vlm, prompt = exact_llava, exact_llava.prompt(photo, QUESTION, constraint=CONSTRAINT)
    inputs, noise = rows_of(prompt, 2), None
    if case == "swap":
        corruption = SwapImage(other_photo)
        inputs["pixel_values"][1] = vlm.prompt(other_photo, QUESTION).inputs["pixel_values"][0]
    elif case == "replace":
        corruption = ReplaceText(replacement="Paris city")
        new = vlm.tokenizer(" Paris city Paris city Paris", add_special_tokens=False)["input_ids"]
        constraint = list(prompt.groups["constraint"])
        inputs["input_ids"][1, constraint] = torch.tensor(new[: len(constraint)])
    else:
        group = "constraint" if case == "text noise" else "image"
        drawing = {"samples": 2, "seed": 7}
        corruption = TextNoise(over="prompt", **drawing) if case == "text noise" else ImageNoise(**drawing)
        inputs, positions = rows_of(prompt, 3), list(prompt.groups[group])
        drawn = torch.randn(
            2, len(positions), vlm.hidden, generator=torch.Generator().manual_seed(7), dtype=torch.float64
        )
        noise = (positions, 3 * vlm.embeddings(prompt)[0, positions].std() * drawn)
    positions = ["image", "question", "constraint", "last", prompt.groups["question"][3]]
    settings = {"positions": positions, "even_if_weak": True, "engine": ENGINES[engine], "progress": False}
    found = causal_trace(vlm, prompt, corruption=corruption, **settings)
    assert found.engine.engine == engine
    layers = vlm.model.model.language_model.layers
    modules = {
        "hidden": list(layers),
        "mlp": [layer.mlp for layer in layers],
        "attention": [layer.self_attn for layer in layers],
    }
    untouched = slow_scores(vlm, inputs, [], (), found.answer_ids[0], noise)
    assert found.clean == pytest.approx(float(untouched[0]), abs=1e-13)
    assert torch.allclose(found.corrupted, untouched[1:], rtol=0, atol=TOLERANCE[engine])
    moved = 0
    for kind, members in modules.items():
        for row, positions in enumerate(found.row_positions):
            for layer in range(4):
                window = members[layer : layer + 1] if kind == "hidden" else members[max(0, layer - 1) : layer + 2]
                slow = slow_scores(vlm, inputs, window, positions, found.answer_ids[0], noise)[1:].mean()
                assert float(found.scores[kind][row, layer]) == pytest.approx(float(slow), abs=TOLERANCE[engine])
                moved += abs(float(slow) - float(untouched[1:].mean())) > 1e-9
    assert moved > 20  # most cells do something, so agreeing about them means something


@pytest.mark.parametrize("engine", ENGINES)
def test_a_whole_answer_is_scored_as_the_slow_reimplementation_does(exact_llava, photo, other_photo, engine):
    vlm, answer = exact_llava, "Ada Example"
    prompt = vlm.prompt(photo, QUESTION, constraint=CONSTRAINT)
    inputs = rows_of(prompt.with_answer(answer), 2)
    inputs["pixel_values"][1] = vlm.prompt(other_photo, QUESTION).inputs["pixel_values"][0]
    ids, end = prompt.with_answer(answer).answer_ids, prompt.length
    settings = {"positions": ["question"], "answer": answer, "sites": "mlp", "window": 1, "even_if_weak": True}
    settings |= {"corruption": SwapImage(other_photo), "engine": ENGINES[engine], "progress": False}
    # A random model finds this answer most unlikely, so only the logarithm can tell a right score from none.
    found = causal_trace(vlm, prompt, whole_answer=True, metrics=("log_probability", "probability"), **settings)
    assert found.answer_ids == ids
    assert len(ids) > 1
    for layer, module in enumerate(layer.mlp for layer in vlm.model.model.language_model.layers):
        slow = torch.ones(2, dtype=torch.float64)
        for index, token in enumerate(ids):
            shortened = {name: value[:, : end + index] if value.ndim == 2 else value for name, value in inputs.items()}
            slow = slow * slow_scores(vlm, shortened, [module], found.row_positions[0], token)
        assert float(found.scores["mlp"][0, layer]) == pytest.approx(float(slow[1].log()), rel=1e-12)
        assert float(found.samples["mlp"][1, 0, layer, 0]) == pytest.approx(float(slow[1]), rel=1e-10, abs=0)
    assert found.clean == pytest.approx(float(slow[0].log()), rel=1e-12)
    assert found.indirect_effect("mlp")[0, :-1].abs().min() > 1e-6
    first = causal_trace(vlm, prompt, metrics="log_probability", **settings)
    assert first.clean > found.clean

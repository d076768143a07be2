"""Every family through its battery: the most used ones in `make test`, all of them in `make families`."""

import warnings
from pathlib import Path

import multrace as mt
import pytest

from .battery import CHECKS, open_subject, true_float64
from .folders import write
from .table import KNOWN, RECIPES

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),  # PEFT's
    pytest.mark.filterwarnings("ignore:Unsupported layer type:UserWarning"),  # PEFT's, of experts
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),  # of PaliGemma's processor
]
PROVEN = [name for name, known in KNOWN.items() if not known.refused]


def each(names: list[str]) -> list:
    """The names as parameters; those that `make test` leaves out carry a mark."""
    return [pytest.param(name, marks=() if KNOWN[name].core else pytest.mark.families) for name in names]


@pytest.mark.parametrize("name", each(PROVEN))
def test_everything_that_the_table_says_holds(name: str, tmp_path: Path) -> None:
    if KNOWN[name].missing:
        pytest.skip(f"needs {', '.join(KNOWN[name].missing)}, which is not installed")
    subject = open_subject(name, tmp_path)
    with true_float64(subject.vlm):
        for check in CHECKS.values():
            check(subject)


@pytest.mark.parametrize("name", each([name for name in KNOWN if KNOWN[name].refused]))
def test_what_does_not_work_is_refused_with_the_reason(name: str, tmp_path: Path) -> None:
    if "timm" in KNOWN[name].missing:
        pytest.skip("needs timm to build the model, which is not installed")
    folder = write(RECIPES[name], tmp_path / name)
    with pytest.raises(mt.ModelError, match=KNOWN[name].refused):
        mt.load(folder)


@pytest.mark.parametrize(
    "name", each([name for name in PROVEN if KNOWN[name].missing and "timm" not in KNOWN[name].missing])
)
def test_a_missing_package_is_named(name: str, tmp_path: Path) -> None:
    folder = write(RECIPES[name], tmp_path / name)
    with pytest.raises(mt.ModelError, match=KNOWN[name].missing[0]):
        mt.load(folder)


def test_the_table_has_every_recipe() -> None:
    assert set(KNOWN) == set(RECIPES)
    assert len({known.title for known in KNOWN.values()}) == len(KNOWN) >= 61


def features_in_another_order(vlm: mt.VisionLanguageModel, patch: pytest.MonkeyPatch) -> None:
    own = type(vlm).image_features
    patch.setattr(type(vlm), "image_features", lambda self, inputs: own(self, inputs).flip(0))


def logits_of_a_slightly_other_run(vlm: mt.VisionLanguageModel, patch: pytest.MonkeyPatch) -> None:
    own = type(vlm).logits
    patch.setattr(type(vlm), "logits", lambda self, inputs: own(self, inputs) * (1 + 1e-6))


def a_layer_that_knows_how_long_its_input_is(vlm: mt.VisionLanguageModel, _patch: pytest.MonkeyPatch) -> None:
    vlm.decoder_layers[2].mlp.register_forward_hook(lambda _module, _args, output: output * (1 + output.shape[1] / 1e4))


def answers_in_another_order(vlm: mt.VisionLanguageModel, patch: pytest.MonkeyPatch) -> None:
    own = type(vlm).answers
    patch.setattr(type(vlm), "answers", lambda self, prompts, **options: own(self, prompts, **options)[::-1])


FAULTS = {
    "prompt": logits_of_a_slightly_other_run,
    "pictures": features_in_another_order,
    "trace": a_layer_that_knows_how_long_its_input_is,
    "knockout": a_layer_that_knows_how_long_its_input_is,
    "answers": answers_in_another_order,
}


@pytest.mark.parametrize("check", FAULTS)
def test_the_battery_notices(check: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    subject = open_subject("llava", tmp_path)
    FAULTS[check](subject.vlm, monkeypatch)
    with pytest.raises(AssertionError), warnings.catch_warnings(), true_float64(subject.vlm):
        warnings.simplefilter("ignore")  # the engine's own check of a few cells warns as well
        CHECKS[check](subject)

"""Starting up is quick: importing multrace loads none of the heavy libraries, and every public name still resolves."""

import importlib
import subprocess
import sys

import multrace
import pytest

HEAVY = {"torch", "transformers", "tokenizers", "pandas", "matplotlib", "sklearn", "scipy", "peft", "accelerate"}
ROOMS = ("artefacts", "data", "models", "tracing", "editing", "workflow")


def heavy_after(code: str) -> set[str]:
    """The heavy libraries that a fresh Python has imported after running the code."""
    report = "import sys\nprint('imported:', *{name.split('.')[0] for name in sys.modules})"
    done = subprocess.run([sys.executable, "-c", f"{code}\n{report}"], capture_output=True, text=True, check=True)
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("imported:")]
    return HEAVY & set(line.split())


def test_importing_the_package_and_its_rooms_imports_nothing_heavy():
    rooms = "".join(f", multrace.{room}" for room in ROOMS)
    assert heavy_after(f"import multrace{rooms}\nassert 'load' in dir(multrace)\nmultrace.__version__") == set()
    assert "torch" in heavy_after("from multrace import load")  # a name that needs torch would be noticed


@pytest.mark.parametrize("face", ["multrace", *(f"multrace.{room}" for room in ROOMS)])
def test_every_public_name_resolves(face: str):
    module = importlib.import_module(face)
    assert module.__all__ == sorted(set(module.__all__))
    for name in module.__all__:
        assert getattr(module, name) is not None
    with pytest.raises(AttributeError):
        module.no_such_name  # noqa: B018


def test_a_function_wins_over_the_module_of_its_name():
    modules = [importlib.import_module(name) for name in ("multrace.editing.evaluate", "multrace.workflow.locate")]
    assert multrace.editing.evaluate is multrace.evaluate is modules[0].evaluate
    assert multrace.workflow.locate is multrace.locate is modules[1].locate


def test_the_face_is_small_enough_to_be_read():
    names = [name for name in multrace.__all__ if name not in ROOMS]
    assert {"load", "causal_trace", "MultEdit", "EditRequest", "locate_then_edit"} <= set(names)
    assert len(names) <= 42

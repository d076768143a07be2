"""Docstrings of the public names: the long ones list their arguments, and every example in them runs."""

import doctest
import importlib
import inspect
from collections.abc import Callable, Iterator

import griffe
import matplotlib
import multrace
import pytest
from multrace.data import tiny_vlm_path
from multrace.scripts.studies.reference import PAGE, reference

ROOMS = ("models", "artefacts", "tracing", "editing", "workflow", "data")
SUBROOMS = ("editing.evaluation", "data.worlds.flags")
"""Faces whose further names have examples too."""
REFERENCE_GRADE = ("models", "artefacts", "tracing", "editing", "editing.evaluation", "data")
MANY = 3
"""An entry point with more parameters than this explains each of them."""
WITH_EXAMPLES = ("models.VisionLanguageModel.",)
"""Methods of results take what their class is made of; functions, and methods with these names, show an example."""


def _public(rooms: tuple[str, ...]) -> dict[str, object]:
    names = {}
    for room in rooms:
        module = importlib.import_module(f"multrace.{room}")
        names |= {f"{room}.{name}": getattr(module, name) for name in module.__all__}
    return {name: value for name, value in names.items() if callable(value) and not inspect.ismodule(value)}


def _callables(rooms: tuple[str, ...]) -> Iterator[tuple[str, Callable]]:
    """Public functions, and public methods of public classes that a class of ours defines."""
    for name, value in _public(rooms).items():
        if inspect.isfunction(value):
            yield name, value
        elif inspect.isclass(value):
            for member, method in inspect.getmembers(
                value, lambda each: inspect.isfunction(each) or inspect.ismethod(each)
            ):
                if not member.startswith("_") and method.__module__.startswith("multrace"):
                    yield f"{name}.{member}", method


def _parameters(function: Callable) -> list[str]:
    names = list(inspect.signature(function).parameters)
    return [name for name in names if name not in ("self", "cls")]


def _complaints(name: str, function: Callable) -> list[str]:
    """What the docstring of an entry point with many parameters lacks."""
    parameters = _parameters(function)
    if len(parameters) <= MANY:
        return []
    docstring = inspect.getdoc(function) or ""
    sections = griffe.Docstring(docstring, parser="google", parser_options={"warnings": False}).parse()
    documented = {
        item.name.lstrip("*") for section in sections if section.kind.value == "parameters" for item in section.value
    }
    complaints = [f"{name} does not explain {parameter}" for parameter in parameters if parameter not in documented]
    complaints += [f"{name} explains {each}, which it does not take" for each in documented - set(parameters)]
    is_entry = name.count(".") < 2 or name.startswith(WITH_EXAMPLES)
    if is_entry and not any(section.kind.value in ("returns", "yields") for section in sections):
        complaints.append(f"{name} has no Returns")
    if is_entry and ">>>" not in docstring:
        complaints.append(f"{name} has no example")
    return complaints


def test_entry_points_with_many_parameters_explain_each_of_them():
    complaints = [each for name, function in _callables(REFERENCE_GRADE) for each in _complaints(name, function)]
    assert complaints == []


def test_a_missing_argument_and_one_too_many_are_noticed():
    def entry(a: int, b: int, c: int, d: int) -> int:
        """Return a sum.

        Args:
            a: First.
            b: Second.
            c: Third.
            x: None of them.
        """

    assert _complaints("entry", entry) == [
        "entry does not explain d",
        "entry explains x, which it does not take",
        "entry has no Returns",
        "entry has no example",
    ]


def _examples() -> dict[str, doctest.DocTest]:
    finder = doctest.DocTestFinder(exclude_empty=True)
    tests, seen = {}, set()
    for name, value in _public((*ROOMS, *SUBROOMS)).items():
        if id(value) in seen:
            continue
        seen.add(id(value))
        module = inspect.getmodule(value)
        for test in finder.find(value, name, module=module, globs={"mt": multrace}):
            if test.examples:
                tests[test.name] = test
    return tests


EXAMPLES = _examples()


def test_there_are_examples():
    assert len(EXAMPLES) >= 25 and set(OWN_MODEL) < set(EXAMPLES)


OWN_MODEL = ("models.load", "models.VisionLanguageModel.weights_digest")
"""Examples that really load a model: the first is about that, the second changes a weight for good."""


@pytest.fixture(scope="module")
def load_once(tiny_vlm: multrace.VisionLanguageModel) -> Iterator[Callable]:
    """`load`, which returns the one embedded model wherever an example opens it; its weights must be as they were."""
    load = multrace.load
    untouched = tiny_vlm.fingerprint(name for name, _ in tiny_vlm.named_parameters())

    def once(path: object, **settings: object) -> multrace.VisionLanguageModel:
        return tiny_vlm if path == tiny_vlm_path() and not settings else load(path, **settings)

    yield once
    assert tiny_vlm.fingerprint(untouched) == untouched


@pytest.mark.parametrize("name", sorted(EXAMPLES))
def test_an_example_runs_as_printed(name: str, load_once: Callable, tmp_path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    if name not in OWN_MODEL:
        monkeypatch.setattr(multrace, "load", load_once)
    matplotlib.use("Agg")
    report: list[str] = []
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    outcome = runner.run(EXAMPLES[name], out=report.append, clear_globs=False)
    assert outcome.failed == 0, "".join(report)


def test_the_reference_page_is_that_of_the_docstrings():
    assert PAGE.read_text(encoding="utf-8") == reference(), "run `make reference`"

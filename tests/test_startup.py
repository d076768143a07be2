"""Starting up is quick and quiet: no heavy import before work begins, one line on Ctrl-C, threads that wait asleep."""

import importlib
import os
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import multrace
import pytest
from multrace import data
from multrace.editing import FineTune, InContext, Lora, Moments
from multrace.editing.evaluation import AT
from multrace.editing.moments import KINDS as TOKEN_KINDS
from multrace.editing.solve import EDITORS, GRADIENT_EDITORS
from multrace.models.loading.quantised import QUANTIZATIONS
from multrace.scripts import available_cores, be_polite, editor, options as choices
from multrace.scripts.benchmarks import SHAPES, WIDTH
from multrace.scripts.main import COMMANDS, app, make_app
from multrace.tracing import Engine
from multrace.tracing.causal import DIRECTIONS
from multrace.tracing.corruptions import SPELLINGS
from multrace.tracing.engine import cells, positions, scoring

HEAVY = {
    "torch",
    "transformers",
    "tokenizers",
    "pandas",
    "matplotlib",
    "sklearn",
    "scipy",
    "peft",
    "pydantic",
    "accelerate",
}
ROOMS = ("artefacts", "data", "models", "tracing", "editing", "workflow")


def python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """A fresh Python that has run the code."""
    command = [sys.executable, "-c", code]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | environment, check=False)


def heavy_after(code: str) -> set[str]:
    """The heavy libraries that a fresh Python has imported after running the code."""
    quick_exit = "import atexit, gc, sys\natexit.register(gc.freeze)"
    done = python(f"{quick_exit}\n{code}\nprint('imported:', *{{name.split('.')[0] for name in sys.modules}})")
    assert done.returncode == 0, done.stderr
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("imported:")]
    return HEAVY & set(line.split())


# ---- the faces ----


def test_importing_the_package_and_its_rooms_imports_nothing_heavy_and_leaves_the_environment_alone():
    rooms = "".join(f", multrace.{room}" for room in ROOMS)
    assert heavy_after(f"import multrace{rooms}\nassert 'load' in dir(multrace)\nmultrace.__version__") == set()
    code = "import os\nbefore = dict(os.environ)\nfrom multrace import load\nassert dict(os.environ) == before"
    assert "torch" in heavy_after(code)  # a name that needs torch would be noticed; it leaves the environment alone
    assert "environ" not in (Path(multrace.__file__).parent / "__init__.py").read_text(encoding="utf-8")


@pytest.mark.parametrize("face", ["multrace", *(f"multrace.{room}" for room in ROOMS)])
def test_every_public_name_resolves(face: str):
    module = importlib.import_module(face)
    assert module.__all__ == sorted(set(module.__all__))
    for name in module.__all__:
        assert getattr(module, name) is not None
    with pytest.raises(AttributeError):
        module.no_such_name  # noqa: B018


@pytest.mark.parametrize("room", ["editing", "workflow"])
def test_no_public_name_hides_a_module(room: str):
    face = importlib.import_module(f"multrace.{room}")
    modules = {module.name for module in pkgutil.iter_modules(face.__path__)}
    assert modules and not modules & set(face.__all__)


def test_the_face_is_small_enough_to_be_read():
    names = [name for name in multrace.__all__ if name not in ROOMS]
    assert {"load", "causal_trace", "MultEdit", "EditRequest", "locate_then_edit"} <= set(names)
    assert len(names) <= 42


# ---- the command line ----

PATHS = [[name] for name in COMMANDS if name != "bench"] + [["bench", name] for name in ("trace", "flow", "edit")]
ASK = """
from multrace.scripts.main import app
for arguments in {calls!r}:
    assert app(arguments) == {code}
"""


def test_help_and_misspelt_options_import_nothing_heavy():
    assert len(PATHS) == len(COMMANDS) + 2
    calls = [["--help"], ["bench", "--help"], *([*path, "--help"] for path in PATHS)]
    assert heavy_after(ASK.format(calls=calls, code=0)) == set()
    assert heavy_after(ASK.format(calls=[[*path, "--colour", "red"] for path in PATHS], code=2)) == set()


EACH_FRESH = """
import gc, importlib, os, sys
import cyclopts, pandas, pydantic, torch, transformers
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, PreTrainedModel
for module, name, tokens in {calls!r}:
    gc.freeze()  # so that a child that ends does not look through the libraries for what it could free
    child = os.fork()
    if not child:
        assert not [name for name in sys.modules if name.startswith("multrace")]
        sys.argv[1:] = tokens
        sys.exit(getattr(importlib.import_module("multrace.scripts." + module), name)())
    print("left with", os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), file=sys.stderr, flush=True)
"""
OVER_FILES = {"evaluate": ["--where", "5:last"], "edit": ["--where", "5:last"], "trace": [], "flow": []}


@pytest.fixture(scope="module")
def left(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[int, str]]:
    """Exit code and stderr of fresh processes whose output nobody reads, as at the left of `| head -0`.

    Each of the first starts a command over a file that is not there, and the last two answer a question, with and
    without the door. No module of ours is imported before; the libraries are, to import them once.
    """
    folder = tmp_path_factory.mktemp("left")
    calls = [
        ("door", "main", [command, "--data", f"{folder}/none_{command}.jsonl", *place, "--out", f"{folder}/out"])
        for command, place in OVER_FILES.items()
    ]
    calls += [(*entry, ["answer", "--question", "Why?"]) for entry in (("door", "main"), ("main", "app"))]
    parts = re.split(r"^left with (-?\d+)\n", unread(EACH_FRESH.format(calls=calls))[1], flags=re.MULTILINE)
    assert len(parts) == 2 * len(calls) + 1 and parts[-1] == "", parts
    return [(int(code), said) for said, code in zip(parts[:-1:2], parts[1::2], strict=True)]


def test_each_command_over_a_file_starts_in_a_fresh_process(left: list[tuple[int, str]]):
    """No command needs that another one has been imported."""
    for command, (code, said) in zip(OVER_FILES, left, strict=False):
        (line,) = said.splitlines()
        assert code == 2 and line.startswith("multrace: ") and f"none_{command}.jsonl" in line


FEW = {
    "trace": ["--positions", "last", "--sites", "hidden", "--checks", "0"],
    "flow": [],
    "edit": ["--where", "5:last"],
    "evaluate": ["--where", "5:last", "--steps", "5", "--free-only"],
}
"""Options of the commands that leave little to compute."""


def over_a_file(command: str, out: Path) -> list[str]:
    """The arguments of a command over one record of the examples."""
    examples = Path(multrace.__file__).parent / "docs" / "examples"
    is_edit = command in ("edit", "evaluate")
    data_file = examples / ("requests.jsonl" if is_edit else "questions.jsonl")
    return [command, "--data", str(data_file), "--limit", "1", *FEW[command], "--out", str(out / command)]


@pytest.mark.usefixtures("load_once")
def test_a_finished_run_imports_nothing_that_only_computing_needs(tmp_path: Path):
    """Torch stays, which holds results, and pydantic, which reads records; what opens a model, fits or draws goes."""
    calls = [over_a_file(command, tmp_path) for command in ("trace", "flow", "edit", "evaluate")]
    assert [app(call) for call in calls] == [0] * len(calls)
    finished = ASK.format(calls=calls, code=0)
    unfinished = ASK.format(calls=[over_a_file("trace", tmp_path / "another")], code=0)
    between = f"assert {HEAVY} & {{*sys.modules}} == {{'torch', 'pydantic'}}, sys.modules.keys()"
    assert {"torch", "transformers"} <= heavy_after(f"{finished}\n{between}\n{unfinished}")


def test_what_options_choose_from_is_what_the_library_has():
    assert cells.ENGINES == choices.ENGINES
    assert tuple(data.FORMATS) == choices.DATA_FORMATS
    assert data.FORMS == choices.DATA_FORMS
    assert (Engine().memory, Engine().checks) == (choices.ENGINE_MEMORY, choices.ENGINE_CHECKS)
    assert cells.KINDS == choices.KINDS
    assert positions.SITES == choices.SITES
    assert positions.EFFECTS == choices.EFFECTS
    assert scoring.METRICS == choices.METRICS
    assert DIRECTIONS == choices.DIRECTIONS
    assert SPELLINGS == choices.SPELLINGS
    assert tuple(EDITORS) == choices.EDITORS
    assert tuple(GRADIENT_EDITORS) == choices.GRADIENT_EDITORS
    assert {FineTune, Lora, InContext} == {type(editor(name, layer=1)) for name in choices.BASELINES}
    assert AT == choices.SEQUENCE_LENGTHS
    assert {"all", "text", *TOKEN_KINDS} == set(choices.MOMENT_KINDS)
    assert Moments is multrace.editing.Moments
    assert tuple(SHAPES) == choices.SHAPES
    assert WIDTH == choices.SOLVE_WIDTH
    assert QUANTIZATIONS == choices.QUANTIZATIONS


def test_the_help_states_the_settings_of_multedit():
    """And how many layers share the change of each editor, which differs."""
    made = editor("multedit", layer=1)
    arguments = make_app("edit")["edit"].assemble_argument_collection()
    helps = {argument.field_info.name: argument.parameter.help for argument in arguments if argument.parameter.help}
    stated = {name: re.search(r"\(default: (\S+) for multedit\)", text) for name, text in helps.items()}
    defaults = {name: match[1] for name, match in stated.items() if match}
    assert len(defaults) == 13
    assert defaults == {name: str(getattr(made, name)).lower() for name in defaults}
    assert "(default: 3 for memit and alphaedit, 2 for ultraedit and stableedit, 1 for the others)" in helps["spread"]
    assert {name for name in EDITORS if editor(name, layer=9).spread == 3} == {"memit", "alphaedit"}
    stepped = {name: editor(name, layer=9) for name in GRADIENT_EDITORS}
    assert {name: made.layers for name, made in stepped.items()} == dict.fromkeys(GRADIENT_EDITORS, (8, 9))


def test_the_help_states_the_settings_of_breadth_first_training():
    made = editor("ft-bf", layer=1).order
    arguments = make_app("evaluate")["evaluate"].assemble_argument_collection()
    helps = {argument.field_info.name: argument.parameter.help for argument in arguments if argument.parameter.help}
    stated = {name: re.search(r"\(default: (\S+) for ft-bf\)", text) for name, text in helps.items()}
    defaults = {name: match[1] for name, match in stated.items() if match}
    assert defaults == {name: str(getattr(made, name)) for name in ("epochs", "mini_batch", "held_out", "patience")}
    assert editor("lora-bf", layer=1).order == made


INTERRUPT = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores interruptions
class Finder:
    def find_spec(self, name, *_):
        if name == {module!r}:
            signal.raise_signal(signal.SIGINT)
from multrace.scripts.door import main
sys.meta_path.insert(0, Finder())
sys.argv = ["multrace", "answer", "--question", "Why?"]
sys.exit(main())
"""


@pytest.mark.parametrize("module", ["cyclopts", "multrace.scripts.options", "multrace.scripts.answer", "torch"])
def test_an_interruption_while_starting_is_one_line(module: str):
    done = python(INTERRUPT.format(module=module))
    assert (done.returncode, done.stderr) == (130, "multrace: interrupted\n")


UNREAD = """
import sys
from multrace.scripts.door import main
sys.argv = ["multrace", *{arguments!r}]
sys.exit(main())
"""


def unread(code: str) -> tuple[int, str]:
    """Exit code and stderr of a fresh Python that runs the code and whose output nobody reads."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", code]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    ) as process:
        assert process.stdout and process.stderr
        process.stdout.close()
        said = process.stderr.read()
    return process.returncode, said


@pytest.mark.parametrize("arguments", [["--help"], ["trace", "--help"]], ids=" ".join)
def test_a_reader_who_leaves_ends_the_help_quietly(arguments: list[str]):
    assert unread(UNREAD.format(arguments=arguments)) == (1, "")


def test_a_reader_who_leaves_ends_a_command_quietly_and_without_the_door_gets_a_traceback(left: list[tuple[int, str]]):
    with_door, (code, said) = left[-2:]
    assert with_door == (1, "")
    assert code and "BrokenPipeError" in said


# ---- threads ----


def test_the_command_line_lets_waiting_threads_sleep_unless_the_user_says_otherwise():
    environment: dict[str, str] = {}
    be_polite(environment)
    assert environment == {"OMP_NUM_THREADS": str(available_cores()), "OMP_WAIT_POLICY": "PASSIVE"}
    chosen = {"OMP_NUM_THREADS": "3", "OMP_WAIT_POLICY": "ACTIVE"}
    be_polite(chosen)
    assert chosen == {"OMP_NUM_THREADS": "3", "OMP_WAIT_POLICY": "ACTIVE"}

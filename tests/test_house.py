"""The rules of the house, read off the source: floors, cycles, imports, families, unsafe files, names, lengths, paths.

Every rule is a function from a tree of sources to complaints. The project must have none, and a small bad tree, one per
rule, must get the complaint that it deserves; without that, a rule that sees nothing would pass too.
"""

import ast
import re
import subprocess
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LIBRARY = {"artefacts", "data", "models", "tracing", "editing", "workflow"}
FLOORS = {  # a room and the other rooms it may import; "" is the root of the package
    "data": set(),
    "artefacts": {"data"},
    "models": {"artefacts", "data"},
    "tracing": {"models", "artefacts", "data"},
    "editing": {"models", "artefacts", "data"},
    "workflow": {"tracing", "editing", "models", "artefacts", "data"},
    "": LIBRARY,
    "scripts": LIBRARY | {""},
    "tests": LIBRARY | {"", "scripts"},
}
LONGEST_FUNCTION = 60
LONGEST_FILE = 420
INSIDE = {"addresses", "frontend"}  # what only the room of models reaches for, on any object
INSIDE_VLM = {"model", "family"}  # the same on a loaded model, whose face is `VisionLanguageModel`
REACHING = {  # files that need the Hugging Face module itself, and why
    "editing/changes/exports.py": "PEFT wraps the module",
    "editing/baselines/fine_tuning.py": "functional_call runs a module with other weights",
    "editing/baselines/lora.py": "PEFT puts layers into the module",
    "scripts/benchmarks/flow.py": "compares with the plain `generate` of transformers",
}
HEAVY = {
    *("huggingface_hub", "matplotlib", "pandas", "peft", "pyarrow", "pydantic", "scipy", "sklearn", "torchao"),
    "transformers",
}
"""Libraries that a function may import where it needs them, since most runs of a command need none of them."""
FAMILY = re.compile(r"\b(family|model_type)(\.name)?$")
DESCRIBED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
PICKLING = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
# Put together from pieces, so that this file passes its own check.
FOLDERS = "|".join(["wo" + "rk", "fa" + "rm", "ro" + "ot", "ho" + "me"])
MACHINE_PATHS = re.compile(rf"(?<![\w.$}}{{~-])/({FOLDERS})/\w")
REGISTRIES = re.compile("|".join(["py" + r"pi\.org", "python" + "hosted", "npm" + r"js\.org", "deb" + r"ian\.org"]))


@dataclass(frozen=True, kw_only=True)
class Source:
    """One Python file of ours."""

    path: str
    module: str
    is_package: bool
    lines: int
    """Lines of code: without docstrings, comments and blank lines."""
    tree: ast.Module
    nodes: tuple[ast.AST, ...]
    """Every node of the tree. They are gathered once, since most rules look at all of them."""

    @property
    def room(self) -> str:
        return self.path.split("/")[0] if "/" in self.path else ""

    def imports(self, modules: set[str]) -> Iterator[tuple[int, str]]:
        """(line, our module) for each import of ours, relative or absolute, wherever in the file it stands."""
        for node in self.nodes:
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                base = self._base(node)
                inner = [f"{base}.{alias.name}" for alias in node.names]
                names = [name if name in modules else base for name in inner]
            else:
                continue
            yield from ((node.lineno, name) for name in names if name.split(".")[0] == "multrace")

    def _base(self, node: ast.ImportFrom) -> str:
        parts = self.module.split(".")
        above = parts[: len(parts) - node.level + self.is_package] if node.level else []
        return ".".join([*above, *([node.module] if node.module else [])])


def read(root: Path) -> list[Source]:
    files = [*root.glob("*.py"), *(file for room in FLOORS if room for file in (root / room).rglob("*.py"))]
    sources = []
    for file in sorted(files):
        path = file.relative_to(root)
        parts = [*path.parent.parts, *([] if path.stem == "__init__" else [path.stem])]
        module = ".".join(parts if path.parts[0] == "tests" else ["multrace", *parts])
        text = file.read_text(encoding="utf-8")
        stub = file.with_suffix(".pyi")  # what a lazy face imports when a name is first used
        own = ast.parse(text, filename=str(path))
        tree = ast.parse(text + stub.read_text(encoding="utf-8"), filename=str(path)) if stub.is_file() else own
        nodes = tuple(ast.walk(own))
        sources.append(
            Source(
                path=path.as_posix(),
                module=module,
                is_package=path.stem == "__init__",
                lines=_code_lines(text, nodes),
                tree=tree,
                nodes=nodes if tree is own else tuple(ast.walk(tree)),
            ),
        )
    return sources


def floors(sources: list[Source]) -> list[str]:
    modules = {source.module: source.room for source in sources}
    complaints = []
    for source in sources:
        for line, name in source.imports(set(modules)):
            room = modules.get(name)
            if room is None:
                complaints.append(f"{source.path}:{line} imports {name}, which does not exist")
            elif room != source.room and room not in FLOORS[source.room]:
                complaints.append(f"{source.path}:{line} imports {name}: {source.room or 'the root'} may not use it")
    return complaints


def cycles(sources: list[Source]) -> list[str]:
    modules = {source.module for source in sources}
    graph = {source.module: {name for _, name in source.imports(modules)} for source in sources}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return ["import cycle: " + " -> ".join(reversed(error.args[1]))]
    return []


def hidden_imports(sources: list[Source]) -> list[str]:
    """Imports inside functions, heavy libraries aside; only a test may import by name, which may not be installed."""
    complaints = []
    for source in sources:
        for function in _functions(source.nodes):
            for node in ast.walk(function):
                by_name = source.room != "tests" and _called(node) in ("import_module", "__import__")
                if by_name or (isinstance(node, ast.Import | ast.ImportFrom) and not _is_heavy(node)):
                    complaints.append(f"{source.path}:{node.lineno} imports inside {function.name}")
    return complaints


def _is_heavy(node: ast.Import | ast.ImportFrom) -> bool:
    names = (
        [alias.name for alias in node.names]
        if isinstance(node, ast.Import)
        else ["." * node.level + (node.module or "")]
    )
    return all(name.split(".")[0] in HEAVY for name in names)


def family_ladders(sources: list[Source]) -> list[str]:
    """Comparisons of a family or a model type with a name that is written out, outside the table of families."""
    complaints = []
    for source in sources:
        if source.room not in LIBRARY | {"", "scripts"} or source.path.startswith("models/families/"):
            continue
        for node in source.nodes:
            if isinstance(node, ast.Compare):
                sides = values = [node.left, *node.comparators]
            elif isinstance(node, ast.Match):
                sides, values = [node.subject], [case.pattern for case in node.cases]
            else:
                continue
            parts = [part.value for value in values for part in ast.walk(value) if isinstance(part, ast.Constant)]
            if any(isinstance(part, str) for part in parts) and any(FAMILY.search(ast.unparse(side)) for side in sides):
                complaints.append(f"{source.path}:{node.lineno} asks which family it is; make it a field of the row")
    return complaints


def no_reach_through(sources: list[Source]) -> list[str]:
    """Outside the room of models, attributes of a model or a prompt that lead past its face."""
    complaints = []
    for source in sources:
        if source.room not in (LIBRARY | {"", "scripts"}) - {"models"} or source.path in REACHING:
            continue
        for node in source.nodes:
            if not isinstance(node, ast.Attribute):
                continue
            is_vlm = ast.unparse(node.value).split(".")[-1] == "vlm"
            if node.attr in INSIDE or node.attr in INSIDE_VLM and is_vlm:
                complaints.append(
                    f"{source.path}:{node.lineno} reaches through {ast.unparse(node)}; use the face of "
                    "VisionLanguageModel or Prompt, or give it what is missing"
                )
    return complaints


def pickles(sources: list[Source]) -> list[str]:
    complaints = []
    for source in sources:
        if source.room == "tests":  # tests make the files that the library must refuse
            continue
        for node in source.nodes:
            names = {alias.name.split(".")[0] for alias in node.names} if isinstance(node, ast.Import) else set()
            names |= {(node.module or "").split(".")[0]} if isinstance(node, ast.ImportFrom) else set()
            unsafe = isinstance(node, ast.Call) and (
                ast.unparse(node.func) in ("torch.load", "torch.save", "eval", "exec")
                or any(word.arg == "allow_pickle" for word in node.keywords)
            )
            if unsafe or names & PICKLING:
                complaints.append(f"{source.path}:{node.lineno} runs what can hold code; use safetensors or JSON")
    return complaints


def long_functions(sources: list[Source]) -> list[str]:
    """Functions of too many lines, their docstrings aside: a full description of the arguments makes none longer."""
    return [
        f"{source.path}:{function.lineno} {function.name} has {length} lines"
        for source in sources
        for function in _functions(source.nodes)
        if (length := _lines(function) - _docstring_lines(function)) > LONGEST_FUNCTION
    ]


def long_files(sources: list[Source]) -> list[str]:
    """Files of the library of too many lines of code; what is longer is more than one idea."""
    return [
        f"{source.path} has {source.lines} lines"
        for source in sources
        if source.room in LIBRARY and source.lines > LONGEST_FILE
    ]


def two_meanings(sources: list[Source]) -> list[str]:
    """Public names that two modules of the library define, and classes of the scripts named like one of its classes."""
    owners: dict[str, str] = {}
    classes: set[str] = set()
    complaints = []
    for source in sources:
        for node in _public(source) if source.room in LIBRARY else ():
            if owners.setdefault(node.name, source.path) != source.path:
                complaints.append(f"{source.path}:{node.lineno} {node.name} is also in {owners[node.name]}")
            if isinstance(node, ast.ClassDef):
                classes.add(node.name)
    for source in sources:
        for node in _public(source) if source.room == "scripts" else ():
            if isinstance(node, ast.ClassDef) and node.name in classes:
                complaints.append(f"{source.path}:{node.lineno} {node.name} is also in {owners[node.name]}")
    return complaints


def _public(source: Source) -> Iterator[ast.ClassDef | ast.FunctionDef]:
    """The classes and functions without an underscore at the top of a module."""
    return (
        node
        for node in source.tree.body
        if isinstance(node, ast.ClassDef | ast.FunctionDef) and not node.name.startswith("_")
    )


def _lines(node: ast.AST) -> int:
    return node.end_lineno - node.lineno + 1


def _docstring_lines(node: ast.AST) -> int:
    return _lines(node.body[0]) if ast.get_docstring(node) is not None else 0


def _code_lines(text: str, nodes: Iterable[ast.AST]) -> int:
    """The lines of a file without docstrings, comments and blank lines."""
    lines = text.splitlines()
    for node in nodes:
        if isinstance(node, DESCRIBED) and ast.get_docstring(node) is not None:
            lines[node.body[0].lineno - 1 : node.body[0].end_lineno] = [""] * _docstring_lines(node)
    return sum(bool(line.strip()) and not line.lstrip().startswith("#") for line in lines)


def machine_words(root: Path) -> list[str]:
    complaints = []
    for path in _texts(root):
        for number, line in enumerate((root / path).read_text(encoding="utf-8").splitlines(), start=1):
            if MACHINE_PATHS.search(line) or REGISTRIES.search(line):
                complaints.append(f"{path}:{number} names a place that other machines do not have: {line.strip()[:80]}")
    return complaints


def _functions(nodes: Iterable[ast.AST]) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    return (node for node in nodes if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))


def _called(node: ast.AST) -> str:
    return ast.unparse(node.func).split(".")[-1] if isinstance(node, ast.Call) else ""


def _texts(root: Path) -> list[str]:
    """The text files that git keeps or would keep; all files where there is no git (an unpacked source archive)."""
    if (root / ".git").exists():
        command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
        listed = subprocess.run(command, cwd=root, capture_output=True, check=True).stdout.decode().split("\0")
        files = [path for path in listed if path and (root / path).is_file()]
    else:
        files = [path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file()]
    return sorted(path for path in files if b"\0" not in (root / path).read_bytes()[:4096])


RULES = {
    rule.__name__: rule
    for rule in (
        floors,
        cycles,
        hidden_imports,
        family_ladders,
        no_reach_through,
        pickles,
        long_functions,
        long_files,
        two_meanings,
    )
}


@pytest.fixture(scope="module")
def sources() -> list[Source]:
    """Every file of the project, parsed once for all rules, which only read."""
    return read(ROOT)


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_the_house_keeps_its_rules(sources: list[Source], rule: Callable[[list[Source]], list[str]]):
    assert {source.room for source in sources} == set(FLOORS), "a room was not read"
    assert rule(sources) == []


BAD = [  # name, rule, files, what the complaint must say
    ("editing uses tracing", floors, {"editing/a.py": "from ..tracing import b", "tracing/b.py": ""}, "editing/a.py:1"),
    (
        "artefacts use models",
        floors,
        {"artefacts/a.py": "import multrace.models.b", "models/b.py": ""},
        "artefacts may not",
    ),
    ("models use tracing", floors, {"models/a.py": "from ..tracing.b import c", "tracing/b.py": ""}, "models may not"),
    ("data uses models", floors, {"data/world/a.py": "from ...models import b", "models/b.py": ""}, "data may not"),
    ("library uses scripts", floors, {"models/a.py": "from ..scripts import b", "scripts/b.py": ""}, "models may not"),
    ("root uses scripts", floors, {"__init__.py": "from .scripts.b import c", "scripts/b.py": ""}, "the root may not"),
    ("library uses root", floors, {"__init__.py": "", "tracing/a.py": "from .. import load"}, "tracing may not use it"),
    (
        "hidden in a function",
        floors,
        {"models/a.py": "def f():\n  from ..editing import b", "editing/b.py": ""},
        "models/",
    ),
    (
        "root uses scripts lazily",
        floors,
        {"__init__.py": "", "__init__.pyi": "from .scripts.b import c", "scripts/b.py": ""},
        "the root may not",
    ),
    ("module is not there", floors, {"models/a.py": "from .gone import b"}, "models.gone, which does not exist"),
    ("cycle of two", cycles, {"models/a.py": "from .b import c", "models/b.py": "from . import a"}, "import cycle"),
    (
        "cycle through the package",
        cycles,
        {"models/__init__.py": "from .a import b", "models/a.py": "from . import b"},
        "multrace.models",
    ),
    ("import in a function", hidden_imports, {"models/a.py": "def f():\n  import json"}, ":2 imports inside f"),
    ("import in a method", hidden_imports, {"data/a.py": "class A:\n  def f(self):\n    from . import b"}, ":3 "),
    (
        "own module named like one",
        hidden_imports,
        {"data/a.py": "def f():\n  from .pandas import b"},
        "imports inside f",
    ),
    ("import by name", hidden_imports, {"data/a.py": "def f():\n  importlib.import_module('x')"}, "data/a.py:2"),
    ("family by name", family_ladders, {"tracing/a.py": "if vlm.family.name == 'gpt2': pass"}, "tracing/a.py:1"),
    ("family in a list", family_ladders, {"models/a.py": "x = 1 if family in ('gpt2', 'phi') else 2"}, "models/a.py:1"),
    ("model type", family_ladders, {"editing/a.py": "x = model.config.model_type == 'llava'"}, "editing/a.py:1"),
    ("match", family_ladders, {"__init__.py": "match family.name:\n  case 'gpt2':\n    pass"}, "__init__.py:1"),
    ("the module", no_reach_through, {"tracing/a.py": "x = 1\nvlm.model(**inputs)"}, "tracing/a.py:2 reaches through"),
    ("the module of a part", no_reach_through, {"editing/a.py": "self.vlm.model.eval()"}, "through self.vlm.model;"),
    ("the family", no_reach_through, {"workflow/a.py": "x = vlm.family.parallel"}, "workflow/a.py:1"),
    ("the addresses", no_reach_through, {"scripts/a.py": "f(loaded.addresses.layers)"}, "scripts/a.py:1"),
    (
        "the frontend of a prompt",
        no_reach_through,
        {"editing/a.py": "prompt.frontend.encode(text, ())"},
        "editing/a.py:1",
    ),
    ("pickle", pickles, {"data/a.py": "import pickle"}, "data/a.py:1"),
    ("pickle by name", pickles, {"data/a.py": "from pickle import load"}, "data/a.py:1"),
    ("torch.load", pickles, {"models/a.py": "torch.load(path, weights_only=True)"}, "models/a.py:1"),
    ("numpy pickle", pickles, {"models/a.py": "np.load(path, allow_pickle=True)"}, "models/a.py:1"),
    ("eval", pickles, {"scripts/a.py": "eval(text)"}, "scripts/a.py:1"),
    ("61 lines", long_functions, {"models/a.py": "def f():\n" + "  x = 1\n" * LONGEST_FUNCTION}, "f has 61 lines"),
    (
        "61 lines and a docstring",
        long_functions,
        {"models/a.py": 'def f():\n  """a\n  b\n  """\n' + "  x = 1\n" * LONGEST_FUNCTION},
        "f has 61 lines",
    ),
    ("421 lines", long_files, {"models/a.py": "x = 1\n" * (LONGEST_FILE + 1)}, "models/a.py has 421 lines"),
    (
        "421 lines and a docstring",
        long_files,
        {"data/a.py": 'def f():\n  """a\n  b\n  """\n' + "x = 1\n" * LONGEST_FILE},
        "data/a.py has 421 lines",
    ),
    (
        "one function in two rooms",
        two_meanings,
        {"models/a.py": "def generate(): pass", "editing/b.py": "\ndef generate(): pass"},
        "models/a.py:1 generate is also in editing/b.py",
    ),
    (
        "one class in two modules of a room",
        two_meanings,
        {"tracing/a.py": "class Curve: pass", "tracing/b/c.py": "class Curve: pass"},
        "tracing/b/c.py:1 Curve is also in tracing/a.py",
    ),
    (
        "a class of a script",
        two_meanings,
        {"editing/a.py": "class Probe: pass", "scripts/b.py": "class Probe: pass"},
        "scripts/b.py:1 Probe is also in editing/a.py",
    ),
]


@pytest.mark.parametrize(("rule", "files", "complaint"), [case[1:] for case in BAD], ids=[case[0] for case in BAD])
def test_a_bad_tree_is_reported(rule: Callable, files: dict[str, str], complaint: str, tmp_path: Path):
    assert complaint in "\n".join(rule(read(_write(tmp_path, files))))


GOOD = {
    "__init__.py": "from .models import load\nfrom .tracing.trace import trace\n",
    "models/__init__.py": "from .load import load\n",
    "models/load.py": "from . import errors\nfrom .errors import ModelError\n",
    "models/errors.py": "import torch\n",
    "models/families/table.py": "x = config.model_type == 'llava'\n",
    "tracing/trace.py": "from ..models import load\nfrom ..models.errors import ModelError\n",
    "data/b.py": "def f():\n  import pandas as pd\n  from scipy.stats import t\n",
    "data/__init__.py": "if record.family == other.family: pass\n",
    "scripts/main.py": "import multrace\nfrom ..tracing.trace import trace\nmodel.eval()\na = family_name == 'x'\n",
    "scripts/probe.py": "def run(): pass\ndef load_all(): pass\n",
    "scripts/names.py": "def run(): pass\ndef load_all(): pass\n",
    "tracing/names.py": "def load_all(): pass\ndef _own(): pass\n",
    "editing/names.py": "class A:\n  def load_all(): pass\ndef _own(): pass\n",
    "data/full.py": '"""Text.\n\nMore.\n"""\n' + "x = 1\n" * LONGEST_FILE,
    "scripts/long.py": "x = 1\n" * (LONGEST_FILE + 1),
    "tests/test_a.py": "import multrace.scripts.main\nfrom multrace.models import load\n",
    "models/prompts.py": "x = vlm.model, vlm.family, vlm.addresses, prompt.frontend\n",
    "workflow/locate.py": "x = trace.model, vlm.config, args.family\n",
    "editing/baselines/lora.py": "LoraModel(vlm.model)\n",
    "long.py": "def f():\n" + "  x = 1\n" * (LONGEST_FUNCTION - 1),
}


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_a_good_tree_is_not_reported(rule: Callable[[list[Source]], list[str]], tmp_path: Path):
    assert rule(read(_write(tmp_path, GOOD))) == []


def test_every_rule_has_a_tree_that_breaks_it():
    assert {case[1] for case in BAD} == set(RULES.values())


def test_no_file_names_a_place_on_one_machine():
    assert machine_words(ROOT) == []


@pytest.mark.parametrize("text", ["cd /wo" + "rk/main", "'/ro" + "ot/x'", "index=https://py" + "pi.org/simple"])
def test_a_place_on_one_machine_is_reported(text: str, tmp_path: Path):
    fine = {"weights.bin": f"\0{text}", "README.md": "homework/x, net/wo" + "rk/x\n"}
    _write(tmp_path, {"Makefile": f"all:\n\t{text}\n", **fine})
    assert len(complaints := machine_words(tmp_path)) == 1
    assert complaints[0].startswith("Makefile:2 ")


def _write(root: Path, files: dict[str, str]) -> Path:
    for path, text in files.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(text, encoding="utf-8")
    return root

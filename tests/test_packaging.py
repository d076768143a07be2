"""What is installed: packages and data files in the wheel, dependencies and pins, and a torch that is left alone."""

import ast
import configparser
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
ROOMS = ("artefacts", "models", "tracing", "editing", "workflow", "data", "scripts")
LEFT_OUT = ("scripts/studies",)  # what made the tables of the documentation
SHIPPED = ("setup.cfg", "pyproject.toml", "MANIFEST.in", "LICENSE", "README.md")
OPTIONAL = {
    "bitsandbytes",
    "torchao",
    "gguf",
    "peft",
    "baukit",
    "griffelib",
}  # the extras, and what makes docs/reference.md


def settings(root: Path = ROOT) -> configparser.ConfigParser:
    parser = configparser.ConfigParser()
    parser.read(root / "setup.cfg", encoding="utf-8")
    return parser


def listed(text: str) -> list[str]:
    return [line.strip() for line in text.splitlines() if line.strip() and not line.startswith("#")]


def requirements() -> list[Requirement]:
    return [Requirement(line) for line in listed(settings()["options"]["install_requires"])]


def copy_of_the_project(folder: Path) -> Path:
    """What a build needs, away from the checkout, so that nothing is written there and nothing old is packed."""
    folder.mkdir()
    for name in SHIPPED:
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, folder)
    for file in (*ROOT.glob("*.py"), *ROOT.glob("*.pyi")):
        shutil.copy(file, folder)
    for room in ROOMS:
        shutil.copytree(ROOT / room, folder / room, ignore=shutil.ignore_patterns("__pycache__"))
    return folder


def change(root: Path, old: str, new: str) -> Path:
    text = (root / "setup.cfg").read_text(encoding="utf-8")
    assert text.count(old) == 1, f"setup.cfg no longer says {old!r} once"
    (root / "setup.cfg").write_text(text.replace(old, new), encoding="utf-8")
    return root


def run(*command: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST_", "PIP_"))}
    environment["PIP_CONFIG_FILE"] = os.devnull  # what a machine asks of pip is not what is tested here
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)


def pip(*arguments: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    return run(sys.executable, "-m", "pip", "--disable-pip-version-check", *arguments, cwd=cwd)


def folders_with_code(root: Path) -> set[str]:
    packages = {"multrace"}
    for room in ROOMS:
        for file in (root / room).rglob("*.py"):
            packages.add(".".join(["multrace", *file.parent.relative_to(root).parts]))
    return packages


def is_left_out(file: Path, root: Path) -> bool:
    return file.parent.relative_to(root).as_posix() in LEFT_OUT


def test_every_folder_with_code_is_listed_and_nothing_else():
    packages = listed(settings()["options"]["packages"])
    assert len(packages) == len(set(packages))
    left_out = {f"multrace.{folder.replace('/', '.')}" for folder in LEFT_OUT}
    assert left_out <= folders_with_code(ROOT)
    assert set(packages) == folders_with_code(ROOT) - left_out
    assert [name for name in packages if not (ROOT.joinpath(*name.split(".")[1:]) / "__init__.py").is_file()] == []


def test_a_new_folder_with_code_would_be_noticed(tmp_path: Path):
    (tmp_path / "models" / "new").mkdir(parents=True)
    (tmp_path / "models" / "new" / "row.py").touch()
    assert "multrace.models.new" in folders_with_code(tmp_path)


def missing_from_wheel(root: Path, scratch: Path) -> list[str]:
    """Modules and data files of the project that a wheel built from this folder lacks."""
    built = pip("wheel", "--no-deps", "--no-index", "--no-build-isolation", "--wheel-dir", scratch, root, cwd=scratch)
    assert built.returncode == 0, built.stderr
    (wheel,) = scratch.glob("multrace-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        packed = {file.filename for file in archive.infolist() if file.file_size or file.filename.endswith(".py")}
    assert not [name for name in packed if name.startswith(tuple(f"multrace/{folder}/" for folder in LEFT_OUT))]
    wanted = [
        *root.glob("*.py"),
        *root.glob("*.pyi"),
        *(
            file
            for room in ROOMS
            for file in (root / room).rglob("*")
            if file.is_file() and not is_left_out(file, root)
        ),
    ]
    return sorted({f"multrace/{file.relative_to(root).as_posix()}" for file in wanted} - packed)


def test_the_wheel_holds_every_module_and_every_data_file(tmp_path: Path):
    assert missing_from_wheel(copy_of_the_project(tmp_path / "project"), tmp_path) == []


def test_a_wheel_that_lacks_something_is_noticed(tmp_path: Path):
    project = change(copy_of_the_project(tmp_path / "project"), "    multrace.data.world\n", "")
    (project / "data" / "tiny_vlm").mkdir(exist_ok=True)
    for name in ("config.json", "weights.of_no_listed_kind"):
        (project / "data" / "tiny_vlm" / name).write_text("data")
    missing = missing_from_wheel(project, tmp_path)
    assert "multrace/data/world/__init__.py" in missing
    assert "multrace/data/tiny_vlm/weights.of_no_listed_kind" in missing
    assert not {"multrace/models/__init__.py", "multrace/data/tiny_vlm/config.json"} & set(missing)


def pins() -> dict[str, Requirement]:
    found = [Requirement(line) for line in listed((ROOT / "constraints.txt").read_text(encoding="utf-8"))]
    assert all(re.fullmatch(r"==[\w.]+", str(pin.specifier)) for pin in found), "a pin is exact and has no local label"
    return {canonicalize_name(pin.name): pin for pin in found}


def test_constraints_pin_every_direct_dependency_to_a_release_that_setup_allows():
    extras = settings()["options.extras_require"]
    wanted = [line for extra, lines in extras.items() if extra != "baukit" for line in listed(lines)]
    direct = requirements() + [Requirement(line) for line in wanted]
    for requirement in direct:
        pin = pins()[canonicalize_name(requirement.name)]
        (version,) = [specifier.version for specifier in pin.specifier]
        assert requirement.specifier.contains(version), f"{requirement} does not allow the tested {pin}"


@pytest.mark.parametrize("version", ["2.4", "2.6.0+cu124", "2.13.0+cpu", "2.15.0", "2.99.1+rocm9"])
def test_any_torch_that_is_there_is_good_enough(version: str):
    (torch,) = [requirement for requirement in requirements() if requirement.name == "torch"]
    assert torch.specifier.contains(version)
    assert {specifier.operator for specifier in torch.specifier} == {">="}
    assert not Requirement("torch==2.13.0").specifier.contains("2.15.0"), "a pin would not be"


def test_installing_replaces_nothing_that_is_there(tmp_path: Path):
    """pip's own plan for `pip install .`, here where a torch and the rest are installed, names multrace alone."""
    project = copy_of_the_project(tmp_path / "project")
    plan = ("install", "--dry-run", "--no-index", "--no-build-isolation", "--quiet", "--report", tmp_path / "plan.json")
    planned = pip(*plan, project, cwd=tmp_path)
    assert planned.returncode == 0, planned.stderr
    report = json.loads((tmp_path / "plan.json").read_text(encoding="utf-8"))
    assert [item["metadata"]["name"] for item in report["install"]] == ["multrace"]
    refused = pip(*plan, change(project, "torch>=2.4\n", "torch==2.4.0\n"), cwd=tmp_path)
    assert refused.returncode != 0
    assert "torch==2.4.0" in refused.stderr, "a pinned torch would have been fetched in place of the present one"


def third_party(root: Path) -> Iterator[tuple[str, str]]:
    """(file, top-level module) for every import that is neither ours nor Python's own."""
    for file in [*root.glob("*.py"), *(file for room in ROOMS for file in (root / room).rglob("*.py"))]:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) and not node.level and node.module else []
            for name in {name.split(".")[0] for name in names} - sys.stdlib_module_names - {"multrace"}:
                yield file.relative_to(root).as_posix(), name


@pytest.fixture(scope="module")
def owners() -> Mapping[str, list[str]]:
    """The distributions of each top-level module that is installed; every file of theirs is looked at."""
    return packages_distributions()


def undeclared(imports: Iterable[tuple[str, str]], owners: Mapping[str, list[str]]) -> list[str]:
    declared = {canonicalize_name(requirement.name) for requirement in requirements()} | OPTIONAL
    return [
        f"{file} imports {name}, which setup.cfg does not ask for"
        for file, name in imports
        if not {canonicalize_name(owner) for owner in owners.get(name, [name])} & declared
    ]


def test_what_is_imported_is_asked_for(owners: Mapping[str, list[str]]):
    imports = [*third_party(ROOT)]
    assert {"torch", "transformers", "PIL"} <= {name for _, name in imports}
    assert undeclared(imports, owners) == []


def test_an_import_that_is_not_asked_for_is_noticed(tmp_path: Path, owners: Mapping[str, list[str]]):
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "a.py").write_text("import json\nimport networkx.readwrite\nfrom PIL import Image\n")
    assert undeclared(third_party(tmp_path), owners) == [
        "models/a.py imports networkx, which setup.cfg does not ask for"
    ]


def test_the_suite_runs_in_a_checkout_of_any_name(tmp_path: Path):
    """The root is a package, and pytest would import it under the folder's name; a dash in that makes it fail."""
    checkout = tmp_path / "my-checkout"
    (checkout / "tests").mkdir(parents=True)
    (checkout / "__init__.py").write_text("from . import models\n")
    (checkout / "models.py").touch()
    (checkout / "tests" / "test_one.py").write_text("def test_one():\n    assert 1 + 1 == 2\n")
    shutil.copy(ROOT / "setup.cfg", checkout)
    suite = (sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider")
    assert run(*suite, cwd=checkout).returncode == 0
    assert "relative import" in run(*suite, cwd=change(checkout, " --confcutdir=tests", "")).stdout


def test_the_makefile_leaves_out_the_pins_of_torch_by_their_heading():
    """Where a torch is there already, everything from this heading on is left out, and nothing before it is torch's."""
    text = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    assert "sed '/^# torch/,$$d' constraints.txt" in (ROOT / "Makefile").read_text(encoding="utf-8")
    before, after = re.split(r"^# torch", text, flags=re.MULTILINE)
    torch_only = {"torch", "torchvision", "sympy", "mpmath", "networkx"}
    assert {Requirement(line).name for line in listed("#" + after)} == torch_only
    assert not torch_only & {Requirement(line).name for line in listed(before)}


def test_the_type_check_sees_the_package_in_a_checkout_of_any_name(tmp_path: Path):
    """Without the name of the package, imports between its rooms do not resolve, and nothing is complained about."""
    checkout = tmp_path / "my-checkout"
    for room in ROOMS:
        (checkout / room).mkdir(parents=True)
        (checkout / room / "__init__.py").touch()
    for name in ("Makefile", "pyproject.toml"):
        shutil.copy(ROOT / name, checkout)
    for name in ("__init__.py", "setup.cfg", "constraints.txt"):
        (checkout / name).touch()
    (checkout / ".venv").mkdir()
    (checkout / ".venv" / "bin").symlink_to(Path(sys.executable).parent)
    (checkout / ".venv" / ".multrace-ready").touch()
    (checkout / "models" / "a.py").write_text(
        '"""A."""\n\n\ndef embed() -> str:\n    """Return it."""\n    return ""\n'
    )
    user = '"""B."""\n\nfrom ..models.a import embed\n\nWORD: {kind} = embed()\n'
    (checkout / "tracing" / "b.py").write_text(user.format(kind="str"))
    fine = run("make", "lint", cwd=checkout)
    assert fine.returncode == 0, fine.stdout + fine.stderr
    (checkout / "tracing" / "b.py").write_text(user.format(kind="int"))
    wrong = run("make", "lint", cwd=checkout)
    assert wrong.returncode != 0
    assert "bad-assignment" in wrong.stdout + wrong.stderr

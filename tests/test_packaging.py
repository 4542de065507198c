"""What is shipped: a wheel with all that the packages need, and a library that needs torch."""

import ast
import os
import re
import shutil
import subprocess
import sys
import venv
from importlib.metadata import distributions
from pathlib import Path

import pytest
import torch

import mogd

ROOT = Path(__file__).parents[1]
PACKAGES = ("mogd", "robust_app")


def sources(root):
    """Every file of the packages, with its path from the root."""
    files = (file for package in PACKAGES for file in (root / package).rglob("*"))
    return {
        file.relative_to(root).as_posix()
        for file in files
        if file.is_file() and "__pycache__" not in file.parts
    }


@pytest.fixture(scope="module")
def shipped(tmp_path_factory):
    """A wheel of a copy of the sources, installed into an environment of its own: its folder."""
    folder = tmp_path_factory.mktemp("wheel")
    copy, clean = folder / "source", folder / "clean"
    for package in PACKAGES:
        shutil.copytree(
            ROOT / package, copy / package, ignore=shutil.ignore_patterns("__pycache__")
        )
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q"]
    offline = ["--no-deps", "--no-index"]
    subprocess.run(
        [*pip, "wheel", str(copy), *offline, "--no-build-isolation", "-w", str(folder)], check=True
    )
    venv.create(clean, with_pip=False)
    (wheel,) = folder.glob("*.whl")
    subprocess.run(
        [*pip, "--python", str(clean / "bin" / "python"), "install", *offline, str(wheel)],
        check=True,
    )
    # What the wheel requires is borrowed from here. The path alone: an editable install of mogd
    # works through .pth files, which Python does not read in borrowed folders.
    (packages,) = clean.glob("lib/python*/site-packages")
    (packages / "borrowed.pth").write_text(str(Path(torch.__file__).parents[1]))
    return clean


@pytest.fixture(scope="module")
def distribution(shipped):
    (packages,) = shipped.glob("lib/python*/site-packages")
    (found,) = distributions(name="mogd", path=[str(packages)])
    return found


def output(shipped, *command):
    """What a command of the clean environment prints, run without a trace of this checkout."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [str(shipped / "bin" / command[0]), *command[1:]],
        cwd=shipped,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_every_file_of_the_packages_is_in_the_wheel(distribution):
    installed = {str(file) for file in distribution.files if "__pycache__" not in str(file)}
    needed = sources(ROOT)
    assert {"mogd/py.typed", "robust_app/py.typed", "robust_app/digits.npz"} <= needed
    assert {file for file in installed if file.startswith(("mogd/", "robust_app/"))} == needed


@pytest.mark.slow
def test_the_licences_are_in_the_wheel(distribution):
    assert "The mogd authors" in distribution.read_text("licenses/LICENSE")
    assert "CC BY 4.0" in distribution.read_text("licenses/robust_app/digits.LICENSE.txt")


@pytest.mark.slow
def test_torch_is_all_that_is_required_without_extras(distribution):
    required = [line for line in distribution.requires if "extra ==" not in line]
    assert [re.match(r"[\w-]+", line)[0] for line in required] == ["torch"]
    assert {"app", "exact"} <= set(distribution.metadata.get_all("Provides-Extra"))


@pytest.mark.slow
def test_importing_mogd_loads_torch_alone(shipped):
    printed = output(
        shipped,
        "python",
        "-c",
        "import sys, torch\n"
        "def tops(): return {name.partition('.')[0] for name in sys.modules}\n"
        "before = tops()\n"
        "import mogd\n"
        "print(mogd.__file__, *(tops() - before - sys.stdlib_module_names))",
    )
    where, *added = printed.split()
    assert Path(where).is_relative_to(shipped)
    assert added == ["mogd"]


@pytest.mark.slow
def test_the_command_and_its_data_work_where_they_are_installed(shipped):
    assert "digits" in output(shipped, "robust-app", "recipes")
    code = "from robust_app import data; print(data.__file__, len(data.load('digits').x_train))"
    where, count = output(shipped, "python", "-c", code).split()
    assert Path(where).is_relative_to(shipped)
    assert int(count) > 1000


@pytest.mark.parametrize("file", sorted((ROOT / "mogd").rglob("*.py")), ids=lambda file: file.name)
def test_mogd_imports_torch_and_the_standard_library_alone(file):
    """Torch loads numpy where it finds it, so what is loaded does not say who asked for it."""
    imported = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            imported |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add(node.module)
    tops = {name.partition(".")[0] for name in imported}
    assert tops <= {"torch", "mogd"} | sys.stdlib_module_names


def test_citation_changes_and_package_name_one_version():
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert re.search(r"^version: (.+)$", citation, re.MULTILINE)[1] == mogd.__version__
    changes = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert re.search(r"^## .*?(\d+\.\d+\.\d+)", changes, re.MULTILINE)[1] == mogd.__version__

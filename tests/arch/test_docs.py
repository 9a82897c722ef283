"""What the docs name is there, and what should be named is."""

import pathlib
import re
import tomllib

import pytest

ROOT = pathlib.Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "README.zh.md", ROOT / "CONTRIBUTING.md", ROOT / "examples/README.md"]
PAGES += sorted((ROOT / "docs").glob("*.md"))
STRUCTURE = (ROOT / "docs/structure.md").read_text()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text()):
        assert (page.parent / target).exists(), target


def test_files_of_the_structure_exist():
    named = re.findall(r"`((?:[\w.*]+/)+[\w.*]*)`", STRUCTURE)
    assert len(named) > 20
    for path in named:
        assert any(any(root.glob(path)) for root in (ROOT, ROOT / "src/headrace")), path


def test_packages_of_the_structure_are_those_there_are():
    packages = {path.parent.name for path in (ROOT / "src/headrace").glob("*/__init__.py")}
    assert set(re.findall(r"^\| `(\w+)` \|", STRUCTURE, flags=re.MULTILINE)) == packages


def test_every_dependency_has_its_reason():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    wanted = [*project["build-system"]["requires"], *project["project"]["dependencies"]]
    for extra in project["project"]["optional-dependencies"].values():
        wanted += extra
    page = (ROOT / "docs/dependencies.md").read_text()
    for requirement in wanted:
        name = re.split(r"[<>=]", requirement)[0]
        assert re.search(rf"(?<![\w-]){re.escape(name)}(?![\w-])", page), name

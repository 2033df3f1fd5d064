"""The rules of the house, read from its imports: two layers, one direction, no circle, and the tree of its page is
what is there.
"""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROOMS = sorted(path for layer in ("shards", "trainer") for path in (ROOT / layer).rglob("*.py"))


def module(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module(path) for path in ROOMS}


def imports(path: Path) -> set[str]:
    """The project's modules that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{path}: imports are absolute"
            found |= {
                f"{node.module}.{alias.name}" if f"{node.module}.{alias.name}" in MODULES else node.module
                for alias in node.names
            }
    return (found & MODULES) - {module(path)}


ARROWS = {module(path): imports(path) for path in ROOMS}


def test_shards_never_imports_trainer():
    assert not {
        (one, other)
        for one, others in ARROWS.items()
        for other in others
        if one.startswith("shards") and other.startswith("trainer")
    }


@pytest.mark.parametrize("layer", ["shards", "trainer"])
def test_no_circle(layer):
    arrows = {one: others for one, others in ARROWS.items() if one.startswith(layer)}
    while free := {one for one, others in arrows.items() if not others & arrows.keys()}:
        arrows = {one: others for one, others in arrows.items() if one not in free}
    assert not arrows, "each imports, directly or not, itself"


def test_the_page_of_the_house_draws_the_tree():
    tree = re.search(r"^## The tree\n\n(.*?)\n\n", (ROOT / "docs/house.md").read_text(), re.MULTILINE | re.DOTALL)[1]
    folders, drawn = [], set()
    for line in tree.splitlines():
        depth, name = (len(line) - len(line.lstrip()) - 4) // 2, line.split()[0]
        folders[depth:] = [name]
        drawn.add("".join(folders))
        assert (ROOT / "".join(folders).rstrip("/")).exists(), line
    missing = {path.relative_to(ROOT).as_posix() for path in ROOMS if path.name != "__init__.py"} - drawn
    assert not missing


PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_links_lead_somewhere(page):
    text = page.read_text()
    for link in re.findall(r"\]\(([^)#]+)\)", text):
        assert link.startswith("http") or (page.parent / link).exists(), link
    for name in re.findall(r"`((?:bench|trainer|shards|launch)/[\w./]+)`", text):
        assert (ROOT / name).exists(), name


def test_the_readme_is_read_to_its_end():
    assert len((ROOT / "README.md").read_text().splitlines()) < 200
    linked = set(re.findall(r"\]\((docs/[^)]+\.md)\)", (ROOT / "README.md").read_text()))
    assert linked == {f"docs/{page.name}" for page in PAGES[1:]}


def test_rooms_are_no_halls():
    """A file of more than 400 lines holds two rooms; one of one long thing is known."""
    long = {module(path) for path in ROOMS if len(path.read_text().splitlines()) > 400}
    assert long == {"trainer.lungs.paint"}

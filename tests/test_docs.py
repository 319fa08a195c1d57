"""The documentation as a site: its links, what is read off the code, and that it asks nobody else for anything."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

from sparse_fcmae import PUBLIC
from sparse_fcmae.cli import COMMANDS

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The folder of the site, built without a warning: links, headings that are linked to, and names are all there."""
    folder = tmp_path_factory.mktemp("docs")
    spec = importlib.util.spec_from_file_location("assemble", ROOT / "docs" / "assemble.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.assemble(folder / "build" / "docs")
    settings = (ROOT / "zensical.toml").read_text().replace('paths = ["."]', f'paths = ["{ROOT}"]')
    (folder / "zensical.toml").write_text(settings)
    zensical = Path(sys.executable).parent / "zensical"
    built = subprocess.run([zensical, "build", "--strict"], cwd=folder, capture_output=True, text=True)
    assert built.returncode == 0, built.stdout + built.stderr
    return folder / "build" / "site"


def test_every_page_is_in_the_navigation(site):
    named = set(re.findall(r'= "([^"]+\.md)"', (ROOT / "zensical.toml").read_text()))
    written = {f"docs/{page.name}" for page in (ROOT / "docs").glob("*.md")}
    others = {"index.md", "commands.md", "python.md", "errors.md", "benchmarks/README.md", "CHANGELOG.md"}
    assert named == written | others | {"CONTRIBUTING.md"}
    assert all((site / page).with_suffix(".html").exists() for page in named - {"benchmarks/README.md"})


def test_commands_and_names_are_those_of_the_code(site):
    commands, names = ((site / f"{page}.html").read_text() for page in ("commands", "python"))
    for name in COMMANDS:
        assert re.search(rf"<h2[^>]*>{name}<", commands), name
    assert "--stem-stride" in commands
    for name in PUBLIC:
        assert re.search(rf'id="sparse_fcmae\.[\w.]*{name}"', names), name


def test_errors_are_those_of_the_code(site):
    page = re.sub("<[^>]+>", "", (site / "errors.html").read_text())
    for line in (
        "out PATH holds a run: give resume=True to go on or overwrite=True to delete it",
        "TOML needs Python 3.11: write it as JSON",
        "no readable image found in many tries: NAME: REASON; check data",
    ):
        assert line in page, line
    assert page.count("\n") > 300


def test_pages_ask_nobody_else(site):
    for page in site.rglob("*.html"):
        asked = re.findall(r'<(?:script|img|link)[^>]+(?:src|href)="(https?:)?//', page.read_text())
        assert not asked, page

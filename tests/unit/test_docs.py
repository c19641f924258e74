"""The documentation is true: links lead somewhere, commands and keys exist, code compiles, the site builds."""

import ast
import importlib
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from hydra import compose, initialize_config_dir

from nemo_mtbi.cli import COMMANDS, named
from nemo_mtbi.examples._generate_arguments import to_overrides
from nemo_mtbi.examples._launcher import CONF

pytestmark = pytest.mark.unit
ROOT = Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])
BLOCK = re.compile(r"^( *)```(\w*)\n(.*?)^ *```", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")


def blocks(language):
    for page in PAGES:
        for number, match in enumerate(BLOCK.finditer(page.read_text())):
            if match[2] == language:
                yield pytest.param(match[3], id=f"{page.relative_to(ROOT)}-{number}")


def anchors(page: Path) -> set[str]:
    """Heading anchors as GitHub and MkDocs make them."""
    text = BLOCK.sub("", page.read_text())
    titles = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", t.lower()).strip().replace(" ", "-") for t in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    for link in LINK.findall(BLOCK.sub("", page.read_text())):
        if link.startswith(("http://", "https://", "mailto:")):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{page}: {link}"
        assert not anchor or anchor in anchors(target), f"{page}: {link}"


def launches(text):
    """(YAML name, launcher module, overrides) of every launch of ours in a shell block."""
    modules = {module: config for module, config, _ in COMMANDS.values()}
    variables: dict[str, str] = {}
    for line in text.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        words = [re.sub(r"\$\{?(\w+)\}?", lambda m: variables.get(m[1], m[0]), w) for w in words]
        if len(words) == 1 and re.fullmatch(r"\w+=\S+", words[0]):
            name, _, variables[name] = words[0].partition("=")
        for place, word in enumerate(words):
            if place and words[place - 1] == "-m" and word.startswith("nemo_mtbi.examples."):
                module = word.rpartition(".")[2]
                yield modules[module], module, words[place + 1 :]
            elif word == "mtbi" and place + 1 < len(words) and words[place + 1] in COMMANDS:
                module, config, _ = COMMANDS[words[place + 1]]
                yield config, module, named(words[place + 1], words[place + 2 :])


@pytest.mark.parametrize("text", blocks("bash"))
def test_commands_have_keys_that_exist(text):
    for config, module, overrides in launches(text):
        if any(o.startswith("-") or o == "..." or o.endswith("=...") for o in overrides):
            continue
        overrides = to_overrides(overrides) if module == "generate" else overrides
        importlib.import_module(f"nemo_mtbi.examples.{module}")  # registers the schema of its YAML
        with initialize_config_dir(str(CONF.resolve()), version_base="1.3"):
            compose(config, overrides)


def test_shell_blocks_hold_many_launches():
    assert sum(len(list(launches(p.values[0]))) for p in blocks("bash")) > 25


@pytest.mark.parametrize("text", blocks("python"))
def test_python_compiles_and_its_imports_exist(text):
    tree = ast.parse(text)
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("nemo_mtbi"):
            module = importlib.import_module(node.module)
            assert all(hasattr(module, n.name) for n in node.names)


@pytest.mark.parametrize("text", blocks("yaml"))
def test_yaml_loads(text):
    assert yaml.safe_load(text)


def test_the_site_builds_without_a_warning(tmp_path):
    run = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
    )
    assert run.returncode == 0, run.stderr[-3000:]
    api = (tmp_path / "site" / "api" / "index.html").read_text()
    assert "restore_from" in api and "InterleavingPolicy" in api

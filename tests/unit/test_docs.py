"""The documentation is true: links lead somewhere, commands and keys exist, code compiles, the site builds."""

import ast
import importlib
import os
import re
import shlex
import subprocess
import sys
from itertools import takewhile
from pathlib import Path

import pytest
import yaml
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from nemo_mtbi.cli import COMMANDS, named
from nemo_mtbi.examples._generate_arguments import to_overrides
from nemo_mtbi.examples._launcher import CONF
from nemo_mtbi.modules.perception import DECODER_TARGETS, DENSE_TARGETS

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


def stories():
    """Whole shell scripts, and the launch commands that YAML files open with."""
    for file in sorted([*ROOT.glob("examples/*.sh"), *ROOT.glob("examples/*.sbatch")]):
        yield pytest.param(re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", file.read_text()), id=file.name)
    for file in sorted(CONF.rglob("*.yaml")):
        lines = takewhile(lambda line: line.startswith("#"), file.read_text().splitlines())
        first = re.split(r"(?<!\\)\n|  +\(", "\n".join(line.removeprefix("# ") for line in lines))[0]
        if first.startswith(("python -m nemo_mtbi.", "mtbi ")):
            yield pytest.param(first, id=str(file.relative_to(CONF)))


def composed(text):
    """(launcher module, configuration) of each launch that is written out."""
    for config, module, overrides in launches(text):
        if any(o.startswith("-") or o == "..." or o.endswith("=...") for o in overrides):
            continue
        overrides = to_overrides(overrides) if module == "generate" else overrides
        importlib.import_module(f"nemo_mtbi.examples.{module}")  # registers the schema of its YAML
        with initialize_config_dir(str(CONF.resolve()), version_base="1.3"):
            yield module, compose(config, overrides)


@pytest.mark.parametrize("text", [*blocks("bash"), *stories()])
def test_commands_have_keys_that_exist_and_values_that_fit(text):
    for module, cfg in composed(text):
        if module == "train":
            adapter, asr = cfg.model.perception.modality_adapter, cfg.model.pretrained_asr
            multilingual = "whisper" in asr and not asr.endswith(".en")
            if multilingual and adapter._target_.endswith(DECODER_TARGETS):
                assert adapter.language, f"{asr} is multilingual"
            if adapter._target_.endswith(DENSE_TARGETS):
                assert not cfg.alignment_stage.enabled and cfg.model.imitation.w_ctc == 0


@pytest.mark.parametrize("page", [*PAGES, *sorted(ROOT.glob("examples/*.sh"))], ids=lambda p: str(p.relative_to(ROOT)))
def test_training_takes_the_targets_of_the_same_page(page):
    """Those of one output_dir: the LLM and prompt format that gave them, and the teacher that their top-k is for."""
    text = re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", page.read_text())
    found = [text] if page.suffix == ".sh" else [m[3] for m in BLOCK.finditer(text) if m[2] == "bash"]
    given = {}
    for module, cfg in composed("\n".join(found)):
        if module == "generate_targets":
            given[cfg.output_dir] = cfg
        elif module == "cache_features":  # targets are copies of the cuts: features that come later are not in them
            for name in given:
                assert not set(given[name].cuts.values()) & set(cfg.manifests), f"{name} was made before the features"
        elif module == "train":
            targets = given.get(str(Path(cfg.data.train_ds.input_cfg[0].get("cuts_path", "")).parent))
            if targets is not None:
                assert (targets.llm, targets.prompt_format) == (cfg.model.pretrained_llm, cfg.model.prompt_format)
                control = cfg.model.imitation.w_kl == 0  # the same steps without a teacher
                assert not targets.top_k or control or cfg.model.imitation.teacher == "cached", "nobody reads the top-k"


def test_overrides_in_the_text_have_keys_that_exist():
    """`key.of.something=value` without a plus is a key of some YAML."""
    configs = [cfg for config in dict.fromkeys(config for _, config, _ in COMMANDS.values()) for cfg in whole(config)]
    written = re.compile(r"`([a-z_]+(?:\.\w+)+)=[^`]*`")
    known = {"openai", "vllm", "train"}  # of a dataclass; of the step that a launcher runs
    unknown = []
    for page in PAGES:
        for key in written.findall(BLOCK.sub("", page.read_text())):
            parent, _, leaf = key.rpartition(".")
            sections = (OmegaConf.select(cfg, parent) for cfg in configs)
            if key.split(".")[0] not in known and not any(_holds(section, leaf) for section in sections):
                unknown.append(f"{page.name}: {key}")
    assert not unknown


def _holds(section, leaf):
    if OmegaConf.is_list(section):
        return leaf.isdigit() and int(leaf) < len(section)
    return OmegaConf.is_dict(section) and leaf in section


def whole(config):
    """A launcher's configuration with each model section that has keys of its own."""
    module = next(module for module, own, _ in COMMANDS.values() if own == config)
    importlib.import_module(f"nemo_mtbi.examples.{module}")
    with initialize_config_dir(str(CONF.resolve()), version_base="1.3"):
        yield compose(config)
        if config == "train":
            for model in ("offline_two_channel", "research_voice", "offline"):
                yield compose(config, [f"speech_llm@model={model}"])


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

import ast
from pathlib import Path

import pytest

import agents
import envs
import experiments

ROOT = Path(__file__).parent.parent
ALLOWED = {"envs": {"envs"}, "agents": {"agents", "envs"}, "experiments": {"experiments", "agents", "envs"}}
SOURCES = [path for package in ALLOWED for path in sorted((ROOT / package).rglob("*.py"))]


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: imports are absolute"
            yield node.lineno, node.module
        elif isinstance(node, ast.Import):
            for name in node.names:
                yield node.lineno, name.name


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_down(path):
    package = path.relative_to(ROOT).parts[0]
    wrong = [
        f"{path.relative_to(ROOT)}:{line} imports {module}"
        for line, module in imports(path)
        if module.split(".")[0] in ALLOWED and module.split(".")[0] not in ALLOWED[package]
    ]
    assert not wrong


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_unpickles_or_trusts_remote_code(path):
    text = path.read_text()
    for forbidden in ("pickle", "torch.load(", "trust_remote_code=True"):
        assert forbidden not in text


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_stay_short(path):
    assert len(path.read_text().splitlines()) <= 400


def test_conf_holds_no_code():
    assert not list((ROOT / "conf").rglob("*.py"))


def test_the_packages_tested_are_those_of_this_repository():
    for package in (envs, agents, experiments):
        assert Path(package.__file__).parent.parent == ROOT

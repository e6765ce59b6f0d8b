"""What the layout promises: imports point one way, between packages and between the rooms of one; files stay small."""

import ast
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

import agents
import envs
import experiments

ROOT = Path(__file__).parent.parent
TOP = "*"
"""Every other file of a package: its algorithms, its commands, and its own `__init__`."""
ORDER = {
    "envs": [
        {"arrays", "storage", "progress", "costs"},  # files, the others are rooms
        {"tasks"},
        {"models"},
        {"decoding"},
        {"prefix_tree"},
        {"environments"},
        {TOP},
    ],
    "agents": [{"common"}, {"router"}, {"preferences"}, {"rl", "query_routing", "checking"}, {TOP}],
    "experiments": [
        {"common"},
        {"reporting", "traces", "measures"},
        {"evaluation"},
        {"training", "query_routing", "speed_suites", "pretraining", "verification"},
        {"published"},
        {TOP},
    ],
}
"""The packages from the lowest to the highest, and so the rooms of each; rooms in one set do not know each other."""
LINES, FILES = 400, 12


@dataclass(frozen=True)
class Import:
    """One import of a module of the house.

    Attributes:
        path: of the file that imports, from the root.
        line: where.
        source: the module it is in.
        target: the module it names.
        eager: it runs when the file is imported: not inside a function, nor for type checkers alone.
    """

    path: Path
    line: int
    source: str
    target: str
    eager: bool

    def __str__(self):
        return f"{self.path}:{self.line} imports {self.target}"


def faults(root):
    """Everything in the packages below `root` that breaks a rule of the house, each with its file and line."""
    paths = [path for package in ORDER for path in sorted((root / package).rglob("*.py"))]
    sources = {path.relative_to(root): path.read_text() for path in paths}
    trees = {path: ast.parse(text) for path, text in sources.items()}
    modules = {module_of(path) for path in trees}
    imports = [one for path, tree in trees.items() for one in imports_of(path, tree, modules)]
    return [
        *relative_imports(trees),
        *rooms_without_a_place(sources),
        *(fault for one in imports if (fault := wrong_way(one))),
        *circles(imports),
        *long_files(sources),
        *crowded_folders(sources),
    ]


def module_of(path):
    parts = path.with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports_of(path, tree, modules):
    """The imports of one file that name modules of the house."""
    late = {
        inner
        for node in ast.walk(tree)
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)) or is_for_type_checkers(node)
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            targets = [name.name for name in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            # what is imported from a package may be one of its modules
            inside = [f"{node.module}.{name.name}" for name in node.names]
            targets = list(dict.fromkeys(name if name in modules else node.module for name in inside))
        else:
            continue
        for target in targets:
            if target.split(".")[0] in ORDER:
                yield Import(path, node.lineno, module_of(path), target, node not in late)


def is_for_type_checkers(node):
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)


def relative_imports(trees):
    for path, tree in trees.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.level:
                yield f"{path}:{node.lineno} imports relatively; imports are absolute"


def room_of(module):
    """The room a module of a package is in."""
    package, *inside = module.split(".")
    known = set().union(*ORDER[package])
    return inside[0] if inside and inside[0] in known else TOP


def rooms_without_a_place(sources):
    for path in sources:
        if path.name == "__init__.py" and len(path.parts) == 3 and room_of(module_of(path)) == TOP:
            yield f"{path}:1 makes a room that has no place in the order; give it one in {Path(__file__).name}"


def wrong_way(one):
    """What is wrong with an import, or None."""
    packages = list(ORDER)
    here, there = one.source.split(".")[0], one.target.split(".")[0]
    if packages.index(there) > packages.index(here):
        return f"{one}: {there} lies above {here}"
    if there != here:
        return None
    if one.path.name == "__init__.py" and one.eager:
        return f"{one}: an __init__ imports what lies below it lazily, or for type checkers"
    room, other = room_of(one.source), room_of(one.target)
    levels = {name: level for level, names in enumerate(ORDER[here]) for name in names}
    if levels[other] > levels[room]:
        return f"{one}: {f'a file of {here} itself' if other == TOP else other} lies above {room}"
    files = room in {"arrays", "storage", "progress", "costs"}
    if levels[other] == levels[room] and other != room and not files:
        return f"{one}: {other} lies beside {room}"
    return None


def circles(imports):
    """One fault for every circle that a search from each file comes upon."""
    edges = {}
    for one in imports:
        edges.setdefault(one.source, []).append(one)
    done = set()

    def visit(module, way):
        for one in edges.get(module, []):
            modules = [step.source for step in way] + [module]
            if one.target in modules:
                circle = [*way, one][modules.index(one.target) :]
                yield f"a circle: {'; '.join(map(str, circle))}"
            elif one.target not in done:
                yield from visit(one.target, [*way, one])
        done.add(module)

    for module in edges:
        if module not in done:
            yield from visit(module, [])


def long_files(sources):
    for path, text in sources.items():
        count = len(text.splitlines())
        if count > LINES:
            yield f"{path}:{LINES + 1} is beyond the {LINES} lines a file may have; it has {count}"


def crowded_folders(sources):
    folders = {}
    for path in sources:
        if path.name != "__init__.py":
            folders.setdefault(path.parent, []).append(path)
    for folder, paths in folders.items():
        if len(paths) > FILES:
            yield f"{folder} has {len(paths)} code files, at most {FILES} may stand side by side: {paths[FILES]}:1"


def test_the_house_keeps_its_rules():
    assert faults(ROOT) == []


CLEAN = {
    "envs/__init__.py": (
        "from typing import TYPE_CHECKING\n"
        "if TYPE_CHECKING:\n    from envs.models.pool import Pool\n"
        "def __getattr__(name):\n    from envs.environments import routing\n    return routing\n"
    ),
    "envs/arrays.py": "import numpy\n",
    "envs/costs.py": "from envs.arrays import IntArray\n",
    "envs/models/__init__.py": "",
    "envs/models/pool.py": "from envs import arrays\nfrom envs.costs import Price\n",
    "envs/environments/__init__.py": "",
    "envs/environments/routing.py": "import envs.models.pool\n",
    "agents/common/policy.py": "from envs.models.pool import Pool\n",
    "agents/rl/bridge.py": "from agents.common.policy import Policy\n",
    "agents/query_routing/knn.py": "",
    "agents/heuristics.py": "from agents.common.policy import Policy\n",
    "agents/ppo.py": "from agents.heuristics import Always\nfrom agents.rl.bridge import Bridge\n",
    "experiments/train.py": "from agents.ppo import Ppo\n",
}
"""Files of a small house that keeps the rules."""


@pytest.fixture
def house(tmp_path):
    """Builds the clean house with other contents of some files, and tells its faults."""

    def build(**changed):
        for path, text in {**CLEAN, **changed}.items():
            (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / path).write_text(text)
        return faults(tmp_path)

    return build


def test_a_clean_house_has_no_faults(house):
    assert house() == []


@pytest.mark.parametrize(
    ("path", "text", "fault"),
    [
        (
            "envs/costs.py",
            "import os\nimport agents.ppo\n",
            "envs/costs.py:2 imports agents.ppo: agents lies above envs",
        ),
        (
            "agents/ppo.py",
            "def fit():\n    from experiments.train import train\n",
            "agents/ppo.py:2 imports experiments.train: experiments lies above agents",
        ),
    ],
)
def test_an_arrow_up_between_packages_is_a_fault(house, path, text, fault):
    assert fault in house(**{path: text})


@pytest.mark.parametrize(
    ("path", "text", "fault"),
    [
        (
            "envs/models/loading.py",
            "\nfrom envs.environments.routing import Env\n",
            "envs/models/loading.py:2 imports envs.environments.routing: environments lies above models",
        ),
        (
            "envs/arrays.py",
            "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from envs.models import pool\n",
            "envs/arrays.py:3 imports envs.models.pool: models lies above arrays",
        ),
        (
            "agents/common/rollout.py",
            "def decode():\n    import agents.heuristics\n",
            "agents/common/rollout.py:2 imports agents.heuristics: a file of agents itself lies above common",
        ),
        (
            "envs/environments/routing.py",
            "from envs import load_pool\n",
            "envs/environments/routing.py:1 imports envs: a file of envs itself lies above environments",
        ),
        (
            "agents/rl/bridge.py",
            "from agents.query_routing.knn import Knn\n",
            "agents/rl/bridge.py:1 imports agents.query_routing.knn: query_routing lies beside rl",
        ),
        (
            "envs/__init__.py",
            "from envs.models.pool import Pool\n",
            "envs/__init__.py:1 imports envs.models.pool: an __init__ imports what lies below it lazily, or for type "
            "checkers",
        ),
    ],
)
def test_an_arrow_up_between_rooms_is_a_fault(house, path, text, fault):
    assert fault in house(**{path: text})


def test_a_room_that_has_no_place_in_the_order_is_a_fault(house):
    (fault,) = house(**{"envs/cellar/__init__.py": ""})
    assert fault.startswith("envs/cellar/__init__.py:1 makes a room")


def test_a_circle_is_a_fault_inside_functions_and_for_type_checkers_too(house):
    found = house(
        **{
            "envs/models/cache.py": "def f():\n    from envs.models.attention import A\n",
            "envs/models/attention.py": "from envs.models.masks import M\n",
            "envs/models/masks.py": "if TYPE_CHECKING:\n    from envs.models import cache\n",
            "envs/models/outside.py": "from envs.models.cache import C\n",
        }
    )
    assert found == [
        "a circle: envs/models/attention.py:1 imports envs.models.masks; envs/models/masks.py:2 imports "
        "envs.models.cache; envs/models/cache.py:2 imports envs.models.attention"
    ]


def test_a_long_file_is_a_fault(house):
    assert house(**{"agents/ppo.py": "x = 1\n" * LINES}) == []
    (fault,) = house(**{"agents/ppo.py": "x = 1\n" * (LINES + 1)})
    assert fault.startswith("agents/ppo.py:401 is beyond")


def test_a_crowded_folder_is_a_fault(house):
    rooms = {f"agents/rl/file_{number:02d}.py": "" for number in range(FILES - 1)}  # and bridge.py
    assert house(**rooms, **{"agents/rl/__init__.py": ""}) == []
    (fault,) = house(**rooms, **{"agents/rl/last.py": ""})
    assert fault == "agents/rl has 13 code files, at most 12 may stand side by side: agents/rl/last.py:1"


def test_a_relative_import_is_a_fault(house):
    relative = {
        "envs/models/loading.py": "import os\nfrom .pool import Pool\n",
        "agents/ppo.py": "from . import heuristics\n",
    }
    assert house(**relative) == [
        "envs/models/loading.py:2 imports relatively; imports are absolute",
        "agents/ppo.py:1 imports relatively; imports are absolute",
    ]


SOURCES = [path for package in ORDER for path in sorted((ROOT / package).rglob("*.py"))]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_unpickles_or_trusts_remote_code(path):
    text = path.read_text()
    for forbidden in ("pickle", "torch.load(", "trust_remote_code=True"):
        assert forbidden not in text


def test_conf_holds_no_code():
    assert not list((ROOT / "conf").rglob("*.py"))


def test_the_packages_tested_are_those_of_this_repository():
    for package in (envs, agents, experiments):
        assert Path(package.__file__).parent.parent == ROOT


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="the files lie outside a repository")
def test_a_checkout_and_its_history_stay_small():
    """At most 60 MB of files, and 100 MB of history, results and weights included."""

    def git(*words):
        return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=True).stdout

    files = [ROOT / name for name in git("ls-files", "-z").split("\0") if name]
    assert sum(path.lstat().st_size for path in files if path.is_file() or path.is_symlink()) <= 60e6
    # Each object once: a copied repository may hold a commit's objects in two packs at the same time.
    assert int(git("rev-list", "--disk-usage", "--objects", "HEAD")) <= 100e6


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="the files lie outside a repository")
def test_no_file_holds_what_a_merge_left():
    marks = ["-e", "^<<<<<<< ", "-e", "^>>>>>>> "]
    found = subprocess.run(["git", "grep", "-nI", *marks], cwd=ROOT, capture_output=True, text=True, check=False)
    assert found.returncode in (0, 1), found.stderr
    assert not found.stdout

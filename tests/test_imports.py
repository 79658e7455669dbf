"""What importing costs and needs, and that layers import downwards only."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest
from forked import forked

ROOT = Path(__file__).resolve().parents[1]
# Lowest first; a file may import from its own rank and below.
RANKS = {
    "kernels": 0,
    "fastbert/memory.py": 1,
    "fastbert/packing.py": 1,
    "fastbert/ops": 2,
    "fastbert/testing.py": 2,
    "fastbert/weights.py": 2,
    "fastbert/encoder.py": 3,
    "fastbert/frozen.py": 3,
    "fastbert/graphs.py": 3,
    "fastbert/families": 4,
    "fastbert/models.py": 5,
    "fastbert/acceleration.py": 5,
    "fastbert/tasks": 6,
    "fastbert/training": 7,
    "fastbert/finetuning": 7,
    "fastbert/generation": 7,
    "fastbert/demo": 7,
    "benchmarks": 7,
    "fastbert/workbench": 8,
    "fastbert/cli": 9,
    "fastbert/__main__.py": 9,
}
MAPPED = ("kernels", "benchmarks")  # top-level folders that are sub-packages of fastbert


def python(program: str, **environment: str) -> subprocess.CompletedProcess:
    import os

    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | environment
    return subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT, env=env, capture_output=True, text=True,
    )  # fmt: skip


def rank_of(path: str) -> int | None:
    return next((r for prefix, r in RANKS.items() if (path + "/").startswith(prefix + "/")
                 or path == prefix), None)  # fmt: skip


def module_path(dotted: str) -> str:
    """``fastbert.kernels.x`` -> ``kernels/x.py``, ``fastbert.ops`` -> ``fastbert/ops``."""
    parts = dotted.split(".")
    if parts[0] == "fastbert" and parts[1:2] and parts[1] in MAPPED:
        parts = parts[1:]
    path = "/".join(parts)
    return f"{path}.py" if (ROOT / f"{path}.py").exists() else path


def imports_of(path: Path):
    """Absolute dotted names of everything that a file imports."""
    relative = path.relative_to(ROOT).with_suffix("")
    package = list(relative.parts[:-1])
    if package[0] in MAPPED:
        package = ["fastbert", *package]
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            name = ".".join([*base, *([node.module] if node.module else [])])
            yield name
            yield from (f"{name}.{alias.name}" for alias in node.names)


def sources() -> list[Path]:
    return [
        *(path for folder in MAPPED for path in (ROOT / folder).glob("*.py")),
        *(ROOT / "fastbert").rglob("*.py"),
    ]


def test_layers_import_downwards_only():
    upwards, seen = [], 0
    for path in sources():
        own = rank_of(path.relative_to(ROOT).as_posix())
        if path == ROOT / "fastbert/__init__.py":
            continue
        assert own is not None, f"{path} has no rank: give it one"
        for name in imports_of(path):
            other = rank_of(module_path(name)) if name.startswith("fastbert.") else None
            seen += other is not None
            if other is not None and other > own:
                upwards.append(f"{path.relative_to(ROOT)} imports {name}")
    assert not upwards
    assert seen > 50  # the parser still finds imports


def test_transformers_stays_above_the_encoder_and_triton_inside_the_kernels():
    for path in sources():
        relative = path.relative_to(ROOT).as_posix()
        rank = rank_of(relative)
        roots = {name.partition(".")[0] for name in imports_of(path)}
        assert "kernels" not in roots, f"{relative}: the kernels are fastbert.kernels"
        if rank is not None and rank < 4:
            assert "transformers" not in roots, relative
        if rank != 0:
            assert "triton" not in roots, relative
    assert not (ROOT / "kernels/__init__.py").exists()
    assert not (ROOT / "tests/kernels/__init__.py").exists()


@pytest.mark.slow
def test_import_brings_in_nothing_but_itself():
    """So that it takes no time: torch and all else is imported by who uses it."""
    result = python(
        "import sys; before = set(sys.modules); import fastbert\n"
        "roots = {m.partition('.')[0] for m in set(sys.modules) - before}\n"
        "print(sorted(roots - set(sys.stdlib_module_names)))"
    )
    assert result.stdout == "['fastbert']\n", result.stdout + result.stderr


BLOCK = """
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "{blocked}":
            raise ModuleNotFoundError("No module named " + repr(name), name=name)
sys.meta_path.insert(0, Blocked())
"""


@pytest.mark.slow
def test_processes_that_tests_fork_begin_with_everything_imported():
    """A server that cannot import it says nothing, and every process would do it again."""
    assert forked("import sys; print('warm' in sys.modules)").stdout == "True\n"


@pytest.mark.slow
def test_everything_but_the_kernels_works_without_triton():
    program = BLOCK.format(blocked="triton") + (
        "import importlib.util\n"
        "find = importlib.util.find_spec\n"
        "importlib.util.find_spec = lambda n, *a: None if n == 'triton' else find(n, *a)\n"
        "import torch, fastbert\n"
        "from transformers import BertConfig\n"
        "model = fastbert.BertModel(BertConfig(hidden_size=32, num_hidden_layers=1,\n"
        "    num_attention_heads=2, intermediate_size=64, vocab_size=30)).eval()\n"
        "print(model(torch.tensor([[1, 2, 3]]))[0].shape)\n"
        "try:\n"
        "    with fastbert.backend('triton'): fastbert.ops.softmax(torch.zeros(2, 2))\n"
        "except RuntimeError as error: print(error)\n"
    )
    result = python(program)
    assert "torch.Size([1, 3, 32])" in result.stdout, result.stderr
    assert "triton is not installed" in result.stdout


@pytest.mark.slow
def test_ops_and_packing_work_without_transformers():
    program = BLOCK.format(blocked="transformers") + (
        "import torch, fastbert\n"
        "mask = torch.tensor([[1, 1, 0], [1, 1, 1]])\n"
        "rows, batch = fastbert.packing.pack(torch.randn(2, 3, 8), mask)\n"
        "q = rows.unflatten(-1, (2, 4))\n"
        "print(fastbert.ops.attention_varlen(q, q, q, batch).shape)\n"
    )
    assert "torch.Size([5, 2, 4])" in python(program).stdout


def test_every_public_name_is_there():
    import fastbert

    assert len(fastbert.__all__) > 100 and dir(fastbert) == fastbert.__all__
    assert all(getattr(fastbert, name) is not None for name in fastbert.__all__)


@pytest.mark.parametrize("name", ["nonsense", "kernel"])
def test_unknown_names_are_attribute_errors(name):
    import fastbert

    with pytest.raises(AttributeError, match=name):
        getattr(fastbert, name)


NEEDS = {
    "evaluate x --model z": "sklearn",
    "finetune x -o y --model z": "accelerate",
    "pretrain x -o y": "psutil",
}


@pytest.mark.slow
def test_commands_name_the_extra_that_they_need():
    done = python(f"""
import sys
from fastbert.cli import main
for command, package in {NEEDS}.items():
    found = sys.modules.get(package)
    sys.modules[package] = None
    sys.argv = ["fastbert", *command.split()]
    try:
        main()
    except SystemExit as end:
        print(package, end.code)
    del sys.modules[package]
    if found is not None:
        sys.modules[package] = found
""")
    ends = [f"{package} 4" for package in NEEDS.values()]
    assert done.stdout.splitlines() == ends, done.stderr[-2000:]
    said = done.stderr.splitlines()
    assert len(said) == len(NEEDS), said
    assert all("pip install 'fastbert-triton[train]'" in line for line in said), said


@pytest.mark.slow
def test_interpreted_kernels_are_right_in_bf16_for_everybody():
    """Triton's interpreter is not, as it comes."""
    pytest.importorskip("triton")
    done = python(
        "import torch, fastbert\n"
        "x = torch.randn(4, 3, 2, 16, generator=torch.Generator().manual_seed(0)).bfloat16()\n"
        "for backend in ('torch', 'triton'):\n"
        "    with fastbert.backend(backend):\n"
        "        print(fastbert.ops.attention(x, x, x).float().abs().sum().item())\n",
        TRITON_INTERPRET="1",
    )
    assert done.returncode == 0, done.stderr
    plain, interpreted = map(float, done.stdout.split())
    assert interpreted == pytest.approx(plain, rel=1e-2)

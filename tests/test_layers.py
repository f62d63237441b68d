"""The import graph of the package equals the table of the design, and the size limits hold."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
# Each row may import only rows above it; within a row only where the second column says so.
LAYERS = [
    ({"types", "config", "checks", "phases"}, True),
    ({"reference", "testing"}, True),
    ({"kernels"}, True),
    ({"ops"}, True),
    ({"functional"}, True),
    ({"models", "attention"}, True),
    ({"rollout", "packing", "scoring", "rewards", "objectives", "replay"}, False),
    ({"checkpoint", "distributed", "evaluate", "log_z", "passes"}, False),
    ({"behavior", "failures"}, False),
    ({"durable", "train"}, True),
    ({"baselines", "lab", "tasks", "throughput"}, True),
    ({"integrations", "cli"}, True),
]
ROW = {name: i for i, (names, _) in enumerate(LAYERS) for name in names}
STANDARD = sys.stdlib_module_names
EXTERNAL = {
    "kernels": {"torch", "triton"},
    "transformers": {"models", "attention"},
    "peft": {"models", "attention", "checkpoint"},
}


def _sources():
    for path in sorted([*(ROOT / "fastgfn").rglob("*.py"), *(ROOT / "kernels").rglob("*.py")]):
        parts = path.relative_to(ROOT).with_suffix("").parts
        module = parts[0] if parts[0] == "kernels" else parts[1]
        yield path, module, ast.parse(path.read_text())


def _imports(tree):
    """(module, line) of every import, function-level ones included."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"relative import at line {node.lineno}"
            if node.module == "fastgfn":
                yield from ((f"fastgfn.{alias.name}", node.lineno) for alias in node.names)
            else:
                yield node.module, node.lineno


def _violations(sources):
    found = []
    for path, module, tree in sources:
        if module == "__init__":
            continue
        for name, line in _imports(tree):
            parts = name.split(".")
            where = f"{path.name}:{line}: {module} imports {name}"
            if parts[0] == "fastgfn" and len(parts) > 1:
                other = parts[1]
                if other == "_C":
                    if module != "ops":
                        found.append(where)
                elif other not in ROW:
                    if module != "cli":
                        found.append(where)
                elif other == "kernels" and module not in ("ops", "kernels"):
                    found.append(where)
                elif ROW[other] > ROW[module] or (
                    ROW[other] == ROW[module] and other != module and not LAYERS[ROW[module]][1]
                ):
                    found.append(where)
            elif parts[0] == "fastgfn":
                if module != "cli":
                    found.append(where)
            elif module == "kernels" and parts[0] not in EXTERNAL["kernels"] | {"math", "typing"}:
                found.append(where)
            elif parts[0] in ("transformers", "peft") and module not in EXTERNAL[parts[0]]:
                found.append(where)
    return found


def test_imports_go_upwards_only():
    assert _violations(_sources()) == []


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("objectives", "from fastgfn.train import Trainer"),
        ("rollout", "from fastgfn.packing import pack"),
        ("scoring", "import fastgfn._C"),
        ("models", "from fastgfn import kernels"),
        ("types", "from fastgfn.ops import tree"),
        ("kernels", "import numpy"),
        ("train", "def f():\n    import transformers"),
    ],
)
def test_the_layer_test_can_fail(module, line):
    assert len(_violations([(Path(f"{module}.py"), module, ast.parse(line))])) == 1


def test_size_limits():
    found = []
    folders = ("fastgfn", "kernels", "csrc", "tests", "bench")
    for path in (
        p for f in folders for p in (ROOT / f).rglob("*") if p.suffix in (".py", ".cpp", ".cu", ".h")
    ):
        text = path.read_text()
        if text.count("\n") > 400:
            found.append(f"{path.name}: {text.count(chr(10))} lines")
        if path.suffix != ".py":
            continue
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef):
                size = node.end_lineno - node.lineno + 1
                jit = any("jit" in ast.unparse(d) for d in node.decorator_list)
                if size > (150 if jit else 60):
                    found.append(f"{path.name}:{node.lineno} {node.name}: {size} lines")
    assert found == []


CORE = {"torch", "triton", "transformers", "peft", "safetensors", "numpy", "fastgfn"}


def _import_time_violations(sources):
    """Imports that run when a module is imported and are neither core nor of the standard library."""
    found = []
    for path, module, tree in sources:
        if module == "cli":
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef):
                node.body = []  # what a function imports is imported when it is called
        names = {name.split(".")[0]: line for name, line in _imports(tree)}
        found += [
            f"{path.name}:{line}: {name}" for name, line in names.items() if name not in CORE | STANDARD
        ]
    return found


def test_import_fastgfn_needs_the_core_packages_only():
    assert _import_time_violations(_sources()) == []
    code = "import sys, fastgfn; sys.exit('fastgfn.cli' in sys.modules)"
    assert subprocess.run([sys.executable, "-P", "-c", code], cwd="/").returncode == 0
    late = "def f():\n    import rapidfuzz"
    for source, count in (("import rapidfuzz", 1), ("if True:\n    from rich import print", 1), (late, 0)):
        assert len(_import_time_violations([(Path("replay.py"), "replay", ast.parse(source))])) == count

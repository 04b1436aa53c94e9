"""Who may import whom: the table of CONTRIBUTING.md, read off the sources."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest
from tests.support.launch import ROOT

OWN = "boreal_megatron"
STANDARD = {"numpy", "tqdm", "packaging", "psutil"}
CONFIG = {f"{OWN}.config", f"{OWN}.errors"}
FILES = {f"{OWN}.durable"}
DATA_WITH_TORCH = {"batch"}
# Package or file -> everything outside the standard library that it may import.
RULES = {
    "config": {"pydantic", "yaml"} | CONFIG,
    "plan": {"pydantic", "yaml"} | CONFIG | {f"{OWN}.plan"},
    "platform": {"torch", "megatron", f"{OWN}.platform"},
    "durable.py": set(),
    "errors.py": set(),
    "log.py": {"torch", "tqdm"},
    "page.py": {"matplotlib", f"{OWN}.errors"},
    "safe.py": {"torch", f"{OWN}.errors"},
    "compat.py": {"torch", "megatron", "transformer_engine", "packaging", f"{OWN}.errors", f"{OWN}.safe"},
    "parallel.py": {"torch", "megatron", f"{OWN}.compat", f"{OWN}.platform"} | CONFIG,
    "model": {"torch", "megatron", "transformer_engine", "flash_attn", "boreal_kernels", f"{OWN}.model", f"{OWN}.platform", f"{OWN}.parallel", f"{OWN}.compat"} | CONFIG,
    "data": {"numpy", "torch", "megatron", "tokenizers", "gigatoken", "sentencepiece", "orjson", "pyarrow", "zstandard", "fsspec", "tqdm", f"{OWN}.data", f"{OWN}.page", f"{OWN}.parallel"} | FILES | CONFIG,
    "train": {"torch", "megatron", "nvidia_resiliency_ext", "yaml", "matplotlib", f"{OWN}.safe", f"{OWN}.train", f"{OWN}.model", f"{OWN}.data", f"{OWN}.platform", f"{OWN}.parallel", f"{OWN}.log", f"{OWN}.plan", f"{OWN}.profile.rates", f"{OWN}.profile.timers"} | FILES | CONFIG,
    "doctor.py": {"torch", "boreal_kernels", "packaging"},
    "preflight": {"torch", "megatron", "boreal_kernels", "psutil", f"{OWN}.preflight", f"{OWN}.doctor", f"{OWN}.plan", f"{OWN}.platform", f"{OWN}.parallel", f"{OWN}.model"} | CONFIG,
    "acceptance": {"torch", "numpy", f"{OWN}.acceptance", f"{OWN}.preflight", f"{OWN}.doctor", f"{OWN}.plan", f"{OWN}.profile", f"{OWN}.parallel", f"{OWN}.platform", f"{OWN}.data", f"{OWN}.model", f"{OWN}.train"} | CONFIG,
    "dry_run.py": {"torch", "megatron", f"{OWN}.plan", f"{OWN}.platform", f"{OWN}.parallel", f"{OWN}.model", f"{OWN}.train"} | CONFIG,
    "profile": {"torch", "matplotlib", f"{OWN}.cli", f"{OWN}.profile", f"{OWN}.page", f"{OWN}.train", f"{OWN}.data", f"{OWN}.platform", f"{OWN}.parallel", f"{OWN}.log", f"{OWN}.plan"} | FILES | CONFIG,
    "convert": {"torch", "safetensors", f"{OWN}.safe", "transformers", "numpy", f"{OWN}.convert", f"{OWN}.train", f"{OWN}.data", f"{OWN}.model", f"{OWN}.parallel"} | FILES | CONFIG,
}  # fmt: skip
SOURCES = sorted((ROOT / OWN).rglob("*.py"))


def imports(path):
    """(module, line, at top level) of every absolute import."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names = [node.module] if node.module != OWN else [f"{OWN}.{alias.name}" for alias in node.names]
        for name in names:
            yield name, node.lineno, node in tree.body


def allowed(name, permitted):
    top = name.split(".")[0]
    if top in sys.stdlib_module_names:
        return True
    return any(name == p or name.startswith(p + ".") for p in permitted)


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_follow_the_table(path):
    part = path.relative_to(ROOT / OWN).parts[0]
    assert not any(name.startswith("megatron.training") for name, _, _ in imports(path))
    if part in RULES:
        wrong = [f"{path.name}:{line} imports {name}" for name, line, _ in imports(path) if not allowed(name, RULES[part])]
        assert not wrong


def test_data_tools_start_without_torch():
    for path in (ROOT / OWN / "data").glob("*.py"):
        if path.stem not in DATA_WITH_TORCH:
            heavy = [name for name, _, top in imports(path) if top and name.split(".")[0] in ("torch", "megatron")]
            assert not heavy, path


def test_a_run_on_a_cpu_starts_without_torchs_compiler():
    """Importing it takes as long as everything else together."""
    code = (
        "import sys; from boreal_megatron.train import loop; from boreal_megatron import dry_run, generate; "
        "from boreal_megatron.convert import export, importer; "
        "assert 'megatron.core' in sys.modules and not {'torch._dynamo', 'torch._inductor'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_kernels_know_torch_and_themselves_only():
    for path in (ROOT / "kernels" / "boreal_kernels").rglob("*.py"):
        permitted = {"torch", "triton", "boreal_kernels"} | ({"numpy"} if path.name == "testing.py" else set())
        assert all(allowed(name, permitted) for name, _, _ in imports(path)), path


def test_only_two_places_change_foreign_modules():
    """Assignments to an attribute of an imported megatron or torch module, found by name."""
    for path in SOURCES:
        if path.name == "compat.py" or path.parent.name == "platform":
            continue
        tree = ast.parse(path.read_text())
        bound = {
            alias.asname or alias.name.split(".")[0]
            for node in ast.walk(tree)
            if isinstance(node, (ast.Import, ast.ImportFrom))
            for alias in node.names
            if (getattr(node, "module", None) or alias.name).split(".")[0] in ("torch", "megatron")
        }
        for node in ast.walk(tree):
            if isinstance(node, ast.Assign):
                for target in node.targets:
                    root = target
                    while isinstance(root, ast.Attribute):
                        root = root.value
                    changed = isinstance(target, ast.Attribute) and isinstance(root, ast.Name) and root.id in bound
                    assert not changed, f"{path}:{node.lineno}"


def test_every_module_says_what_it_is_for():
    for path in [*SOURCES, *(ROOT / "kernels").rglob("*.py"), *Path(ROOT / "tools").glob("*.py")]:
        text = path.read_text()
        assert not text.strip() or ast.get_docstring(ast.parse(text)), path

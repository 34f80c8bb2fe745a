"""Which file may import what: frameworks at the edge, two sides that know only `shared`."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("shared", "sender", "receiver_plugin")
MAY_IMPORT_SGLANG = {
    "receiver_plugin/entry.py",
    "receiver_plugin/cpu_older.py",
    "receiver_plugin/cpu_platform.py",
    "receiver_plugin/sglang_adapter.py",
    "receiver_plugin/sglang_derived.py",
    "receiver_plugin/sglang_engine.py",
    "receiver_plugin/sglang_http.py",
    "receiver_plugin/sglang_keep.py",
    "receiver_plugin/sglang_memory.py",
    "receiver_plugin/sglang_messages.py",
    "receiver_plugin/sglang_requests.py",
}
MAY_IMPORT_RAY = {"shared/ray_cluster.py", "sender/ray_trainer.py", "receiver_plugin/ray_engine.py"}
FILES = sorted(str(path.relative_to(ROOT)) for package in PACKAGES for path in (ROOT / package).rglob("*.py"))


def imported(source: str) -> set[str]:
    """Top-level names of all that `source` imports, anywhere in it, also by `importlib.import_module("...")`."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "a relative import: this test would not see where it leads"
            found.add(node.module or "")
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if called in ("import_module", "__import__", "find_spec", "resolve_name"):
                found.add(str(node.args[0].value))
    return {name.split(".")[0].split(":")[0] for name in found}


def imports_of(file: str) -> set[str]:
    return imported((ROOT / file).read_text(encoding="utf-8"))


def test_this_test_sees_imports() -> None:
    source = """
import os.path as path, ray
def late():
    from sglang.srt import plugins
    importlib.import_module("transformers.models")
    __import__("megatron")
"""
    assert imported(source) == {"os", "ray", "sglang", "transformers", "megatron"}
    assert {"shared/protocol.py", "sender/sender.py", "receiver_plugin/sglang_adapter.py"} <= set(FILES)
    assert "sglang" in imports_of("receiver_plugin/sglang_adapter.py")


@pytest.mark.parametrize("file", FILES)
def test_imports(file: str) -> None:
    found = imports_of(file)
    assert file in MAY_IMPORT_SGLANG or "sglang" not in found
    assert file in MAY_IMPORT_RAY or "ray" not in found
    assert not found & {"transformers", "megatron", "vllm", "tests", "examples"}
    package = file.split("/")[0]
    others = {"shared": {"sender", "receiver_plugin"}, "sender": {"receiver_plugin"}, "receiver_plugin": {"sender"}}
    assert not found & others[package]


NOTHING_FOREIGN = """
import sys
loaded = {name.split(".")[0] for name in sys.modules}
foreign = {"sglang", "ray", "transformers", "starlette", "receiver_plugin"} & loaded
assert not foreign, foreign
"""


def run(code: str) -> None:
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_a_trainer_loads_no_framework_of_the_server() -> None:
    run("import sender" + NOTHING_FOREIGN)


def test_a_launcher_pays_for_neither_frameworks_nor_torch() -> None:
    run("import shared.protocol, shared.errors, shared.launch" + NOTHING_FOREIGN + "assert 'torch' not in loaded")

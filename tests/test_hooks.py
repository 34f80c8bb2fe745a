"""A SGLang that changed under fp8sync ends the start and names what is missing: every hook, every name, every field."""

from __future__ import annotations

import ast
import pkgutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from sglang.srt.plugins.hook_registry import HookRegistry
from sglang.srt.server_args import ServerArgs
from sglang.version import __version__ as SGLANG_VERSION

from receiver_plugin import entry, sglang_adapter, sglang_surface
from receiver_plugin.sglang_refusals import OPTIONS
from receiver_plugin.sglang_surface import (
    ENGINE,
    MANAGER,
    NAMES,
    RUNNER,
    SCHEDULER,
    SERVER_ARGS,
    SINCE,
    missing_names,
    missing_of,
)

ROOT = Path(__file__).resolve().parent.parent
HOOKED = sorted({target for target, _, _ in (*sglang_adapter._HOOKS, *sglang_adapter._PROBE_HOOKS)})
NAMED = [name for name in NAMES if sglang_surface._expected(name, SGLANG_VERSION)]
FIELDS = [name for name in SERVER_ARGS if sglang_surface._expected(name, SGLANG_VERSION)]


@pytest.fixture
def untouched(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hooks are registered, but SGLang itself stays as it is for the tests that follow."""
    monkeypatch.setattr(HookRegistry, "_hooks", type(HookRegistry._hooks)(list))
    monkeypatch.setattr(HookRegistry, "_patched", set())
    monkeypatch.setattr(sglang_adapter, "_installed", False, raising=False)
    monkeypatch.setattr(HookRegistry, "apply_hooks", _take_all_hooks)


def _take_all_hooks() -> None:
    HookRegistry._patched.update(HookRegistry._hooks)


SCHEDULER_CLASS = "sglang.srt.managers.scheduler.Scheduler"


def remove(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Take the dotted `name` away from the module or class that defines it."""
    holder_name, _, attribute = name.rpartition(".")
    holder = pkgutil.resolve_name(holder_name)
    owners = [base for base in getattr(holder, "__mro__", (holder,)) if attribute in vars(base)]
    monkeypatch.delattr(owners[0], attribute)
    assert not hasattr(holder, attribute)


ENUM_MEMBERS = {
    "sglang.srt.managers.tokenizer_manager.ServerStatus.Up",
    "sglang.srt.utils.auth.AuthLevel.ADMIN_OPTIONAL",
}


def without(name: str) -> Any:
    """`pkgutil.resolve_name` of an SGLang that lacks `name`."""
    stock = pkgutil.resolve_name

    def resolve(wanted: str) -> Any:
        if wanted == name:
            raise AttributeError(name)
        return stock(wanted)

    return resolve


# Whole starts


@pytest.mark.usefixtures("untouched")
def test_an_unchanged_sglang_is_taken() -> None:
    assert missing_names(SGLANG_VERSION) == []
    entry._arm()
    assert set(HOOKED) == HookRegistry._patched


@pytest.mark.usefixtures("untouched")
@pytest.mark.parametrize("target", HOOKED)
def test_a_missing_hook_target_ends_the_start(target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    remove(monkeypatch, target)
    with pytest.raises(SystemExit, match=rf"fp8sync cannot be loaded: .*SGLang {SGLANG_VERSION} has no .*{target}"):
        entry._arm()


@pytest.mark.usefixtures("untouched")
@pytest.mark.parametrize("name", NAMED)
def test_a_missing_name_ends_the_start(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if name in ENUM_MEMBERS:  # they cannot be deleted
        monkeypatch.setattr(pkgutil, "resolve_name", without(name))
    else:
        remove(monkeypatch, name)
    with pytest.raises(SystemExit, match=rf"fp8sync cannot be loaded: .*SGLang {SGLANG_VERSION} has no .*{name}"):
        entry._arm()


@pytest.mark.usefixtures("untouched")
@pytest.mark.parametrize("field", FIELDS)
def test_a_renamed_server_argument_ends_the_start(field: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Read with a default, an option that was renamed would no longer be refused."""
    kept = {name: None for name in FIELDS if name != field}
    monkeypatch.setattr("sglang.srt.server_args.ServerArgs", type("ServerArgs", (), kept))
    with pytest.raises(SystemExit, match=rf"SGLang {SGLANG_VERSION} has no .*ServerArgs\.{field}$"):
        entry._arm()


@pytest.mark.usefixtures("untouched")
def test_all_that_is_missing_is_named_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    gone = [HOOKED[0], "sglang.srt.utils.auth.auth_level", "sglang.srt.managers.io_struct.hook_custom_types"]
    for name in gone:
        remove(monkeypatch, name)
    with pytest.raises(SystemExit) as ended:
        entry._arm()
    assert all(name in str(ended.value) for name in gone)


@pytest.mark.usefixtures("untouched")
def test_a_hook_that_is_not_taken_ends_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(HookRegistry, "apply_hooks", lambda: None)  # SGLang logs such failures and goes on
    with pytest.raises(SystemExit, match=r"did not take the hooks on .*_setup_and_run_http_server"):
        entry._arm()


@pytest.mark.usefixtures("untouched")
@pytest.mark.parametrize("target", HOOKED)
def test_a_target_that_another_plugin_has_hooked_ends_the_start(target: str) -> None:
    """SGLang leaves hooks out, without a word, that come after it has applied others to the same target."""
    HookRegistry._patched.add(target)
    with pytest.raises(SystemExit, match=rf"another plugin has hooked .*{target}"):
        entry._arm()


@pytest.mark.usefixtures("untouched")
def test_arming_twice_is_arming_once() -> None:
    entry._arm()
    before = {target: list(hooks) for target, hooks in HookRegistry._hooks.items()}
    entry._arm()
    assert {target: list(hooks) for target, hooks in HookRegistry._hooks.items()} == before


BROKEN_LAUNCHER = """
import runpy, sys
from sglang.srt.managers.scheduler import Scheduler
del Scheduler.init_request_dispatcher
sys.argv = ["launch_server", "--model-path", "none", "--load-plugin", "fp8sync"]
runpy.run_module("sglang.launch_server", run_name="__main__")
"""


@pytest.mark.server
def test_a_launcher_on_a_changed_sglang_ends() -> None:
    done = subprocess.run(
        [sys.executable, "-c", BROKEN_LAUNCHER], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode not in (0, None)
    assert f"SGLang {SGLANG_VERSION} has no" in done.stderr and "Scheduler.init_request_dispatcher" in done.stderr


# The pieces


def test_parameters_are_looked_up(monkeypatch: pytest.MonkeyPatch) -> None:
    def flush_cache(self: object, empty: bool = True) -> None: ...

    monkeypatch.setattr("sglang.srt.managers.scheduler.Scheduler.flush_cache", flush_cache)
    assert missing_names(SGLANG_VERSION) == ["sglang.srt.managers.scheduler.Scheduler.flush_cache(empty_cache=)"]


def test_older_releases_are_not_asked_for_newer_names(monkeypatch: pytest.MonkeyPatch) -> None:
    name = "sglang.srt.managers.scheduler.Scheduler.record_weight_version_change"
    methods = {known.rpartition(".")[2] for known in NAMES if known.startswith(f"{SCHEDULER_CLASS}.")}
    older = type("Scheduler", (), dict.fromkeys(methods - {"record_weight_version_change"}, flush))
    monkeypatch.setattr("sglang.srt.managers.scheduler.Scheduler", older)
    assert missing_names("0.5.16") == []
    assert name in missing_names("0.5.19") and name in missing_names("0.6.0")


def flush(self: object, batch: object = None, result: object = None, empty_cache: bool = True) -> None:
    """With the parameters of all of SGLang's."""


def test_objects_are_looked_through() -> None:
    scheduler = SimpleNamespace(tp_group=SimpleNamespace(world_size=2), server_args=None)
    assert missing_of(scheduler, ["tp_group.world_size", "server_args"]) == []
    assert missing_of(scheduler, ["tp_group.size", "weight_updater.offload_tags"]) == [
        "tp_group.size",
        "weight_updater.offload_tags",
    ]


# The lists against the code

ALIASES = {  # how the adapter modules call SGLang's objects
    "scheduler": "scheduler",
    "self._scheduler": "scheduler",
    "manager": "manager",
    "self._manager": "manager",
    "tokenizer_manager": "manager",
    "sgl_engine": "engine",
    "runner": "runner",
    "lock": "manager.model_update_lock",
    "args": "args",
    "server_args": "args",
}
# Looked for and done without: older releases keep the replica's number elsewhere; no queue without overlap scheduling.
OPTIONAL = {"scheduler.ps", "scheduler.ps.dp_rank", "scheduler.result_queue", "scheduler.split_prefill_batch"}
MODULES = sorted({*(ROOT / "receiver_plugin").glob("sglang_*.py")} - {Path(sglang_surface.__file__)})


def chain(node: ast.AST) -> str | None:
    """`a.b.c` of an attribute access, None if it does not begin with a name."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        before = chain(node.value)
        return None if before is None else f"{before}.{node.attr}"
    return None


def accesses(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            yield chain(node) or ""
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            words = [arg.value for arg in node.args if isinstance(arg, ast.Constant) and isinstance(arg.value, str)]
            if node.func.id in ("getattr", "hasattr") and words:
                yield f"{chain(node.args[0])}.{words[0]}"


def used() -> set[str]:
    """What the adapter modules use of SGLang's objects: "scheduler.tp_group.world_size", "args.pp_size", ..."""
    found = {f"args.{option.field}" for option in OPTIONS}
    for module in MODULES:
        for access in accesses(ast.parse(module.read_text(encoding="utf-8"))):
            for alias, holder in ALIASES.items():
                if access.startswith(f"{alias}."):
                    path = holder + access.removeprefix(alias)
                    for owner in ("scheduler", "manager"):
                        path = path.replace(f"{owner}.server_args.", "args.")
                    found.add(path)
    return found


def listed() -> set[str]:
    classes = {"Scheduler": "scheduler", "TokenizerManager": "manager"}
    names = [name.split(".") for name in NAMES]
    methods = {f"{classes[name[-2]]}.{name[-1]}" for name in names if name[-2] in classes}
    paths = {f"scheduler.{path}" for path in SCHEDULER} | {f"manager.{path}" for path in MANAGER}
    paths |= {f"engine.{path}" for path in ENGINE} | {f"runner.{path}" for path in RUNNER}
    return methods | paths | {f"args.{name}" for name in SERVER_ARGS}


def test_every_attribute_that_is_used_is_listed() -> None:
    known = listed() | OPTIONAL
    inner = {path.rsplit(".", n)[0] for path in known for n in range(1, path.count(".") + 1)}
    below = tuple(f"{path}." for path in known - {"scheduler.server_args", "manager.server_args"})
    assert {"scheduler.tp_group.world_size", "args.pp_size", "args.grpc_port", "manager.is_pause"} <= used()
    assert [path for path in sorted(used() - known - inner) if not path.startswith(below)] == []


def test_every_attribute_that_is_listed_is_used() -> None:
    assert sorted(listed() - used()) == []
    assert set(SINCE) <= {*NAMES, *SERVER_ARGS}


def test_the_fields_are_those_of_a_real_class() -> None:
    """Old releases have a dataclass, whose fields without a plain default are no class attributes."""
    assert all(hasattr(ServerArgs, name) or name in fields_of(ServerArgs) for name in FIELDS)


def fields_of(kind: Any) -> set[str]:
    return {*getattr(kind, "__dataclass_fields__", ()), *getattr(kind, "__struct_fields__", ())}

"""The entry point that SGLang calls in every process. It adds `--load-plugin` and, without it, does nothing more.

    launcher process   register() adds the flag; when it is parsed, it is noted in the environment and the plugin armed
    its children       register() sees the environment and arms at once

SGLang logs and swallows whatever a plugin raises, so a failure here is a `SystemExit`: a server that was asked to load
fp8sync either has it or does not start.

Environment, read here only: `FP8SYNC_LOAD` and `FP8SYNC_STAGING` (set by the flags for the server's own processes),
`FP8SYNC_PROBE=1` (adds the read-only fingerprint route to a server without the flag; used by proofs).
"""

from __future__ import annotations

import argparse
import os
from typing import Any

PLUGIN_NAME = "fp8sync"
_LOAD, _STAGING, _PROBE = "FP8SYNC_LOAD", "FP8SYNC_STAGING", "FP8SYNC_PROBE"
_AUTO = "auto"
_SERVER_ARGS = "sglang.srt.server_args.ServerArgs"


def register() -> None:
    """Called by `sglang.srt.plugins.load_plugins`."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    HookRegistry.register(f"{_SERVER_ARGS}.add_cli_args", _add_flag, HookType.AFTER)
    HookRegistry.register(f"{_SERVER_ARGS}.from_cli_args", _parse_flag, HookType.AROUND)
    if os.environ.get(_LOAD) == PLUGIN_NAME:
        _arm()
    elif os.environ.get(_PROBE) == "1":
        _arm(probe_only=True)


def load(staging: str = _AUTO) -> None:
    """Load the plugin in this process and in those that it starts, where no command line says so.

    `staging`: as `--fp8sync-staging`. Raises: ConfigError: it is none of its values.
    """
    from receiver_plugin.reserve import wish

    wish(staging)
    os.environ |= {_LOAD: PLUGIN_NAME, _STAGING: staging}
    _arm()


def _add_flag(result: Any, parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--load-plugin",
        dest="fp8sync_load_plugin",
        metavar="NAME",
        action="append",
        default=[],
        help="Load this plugin or do not start. Known: fp8sync (receive FP8 weights from a trainer).",
    )
    parser.add_argument(
        "--fp8sync-staging",
        dest="fp8sync_staging",
        metavar="auto|GB|0",
        default=None,
        help="Memory to reserve on every rank, so that the server serves while weights arrive: so many GB, none (0), "
        "or what its weights need if that leaves at least as much for the KV cache (auto, the default).",
    )


def _parse_flag(original: Any, cls: Any, args: argparse.Namespace) -> Any:
    wanted = set(getattr(args, "fp8sync_load_plugin", []))
    if unknown := wanted - {PLUGIN_NAME}:
        raise SystemExit(f"--load-plugin {sorted(unknown)[0]}: unknown plugin; known is {PLUGIN_NAME}")
    staging = getattr(args, "fp8sync_staging", None)
    if staging is not None and not wanted:
        raise SystemExit(f"--fp8sync-staging {staging} needs --load-plugin {PLUGIN_NAME}")
    server_args = original(cls, args)
    if wanted:
        os.environ |= {_LOAD: PLUGIN_NAME, _STAGING: staging or _AUTO}
        _arm(server_args)
    return server_args


def _arm(server_args: Any = None, probe_only: bool = False) -> None:
    try:
        from receiver_plugin import sglang_adapter

        if server_args is not None:
            sglang_adapter.check_server_args(server_args)
        sglang_adapter.install(probe_only, os.environ.get(_STAGING, _AUTO))
    except Exception as error:
        raise SystemExit(f"fp8sync cannot be loaded: {type(error).__name__}: {error}") from error

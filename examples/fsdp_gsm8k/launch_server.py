"""Print the command that starts an SGLang server for a configuration file, or become it (`--exec`).

    python -m examples.fsdp_gsm8k.launch_server [--exec] CONFIG [SGLang's own arguments, such as --port 30001]

With FP8 on, `sglang_fp8_args` merges them, and the file's `server_args`, with what FP8 needs.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from collections.abc import Sequence

from examples.fsdp_gsm8k.settings import Settings, load_settings
from shared.errors import ConfigError
from shared.launch import sglang_fp8_args


def server_args(settings: Settings, user_args: Sequence[str] = ()) -> list[str]:
    """The arguments of `sglang.launch_server`. Raises: ConfigError: `user_args` contradict the configuration."""
    user_args = [*settings.rollout.server_args, *user_args]
    if settings.tokenizer is not None:
        user_args = ["--tokenizer-path", settings.tokenizer, *user_args]
    config = settings.rollout.quantization.block_config()
    if config is None:
        return ["--model-path", settings.model, *user_args]
    return sglang_fp8_args(settings.model, config, user_args=user_args)


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--exec", action="store_true", help="run the command instead of printing it")
    parser.add_argument("config")
    parser.add_argument("server_args", nargs=argparse.REMAINDER)
    args = parser.parse_args(words)
    try:
        found = server_args(load_settings(args.config), args.server_args)
    except ConfigError as error:
        parser.error(str(error))
    command = [sys.executable, "-m", "sglang.launch_server", *found]
    if args.exec:
        os.execvp(command[0], command)
    print(shlex.join(command))


if __name__ == "__main__":
    main()

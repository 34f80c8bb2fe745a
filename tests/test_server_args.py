"""Options of a server with which a push would be wrong are refused by name, with the reason and the way out."""

from __future__ import annotations

import argparse
from types import SimpleNamespace
from typing import Any

import pytest

from receiver_plugin.sglang_refusals import OPTIONS, Option, check_server_args
from shared.errors import IncompatibleServerError

REFUSED = [
    ({"pp_size": 2}, "--pp-size > 1", "pipeline stages answer no control request: use --tp-size"),
    ({"dp_size": 2, "tp_size": 2, "enable_dp_attention": True}, "--enable-dp-attention", "leave it out"),
    ({"attn_dp_size": 2, "tp_size": 2}, "--attn-dp-size > 1", "DP attention is not proved: --dp-size is"),
    ({"speculative_algorithm": "EAGLE3"}, "--speculative-algorithm", "old weights: start without it"),
    ({"tokenizer_worker_num": 2}, "--tokenizer-worker-num > 1", "its workers load no plugins"),
]


def server_args(**changes: Any) -> SimpleNamespace:
    stock = {"pp_size": 1, "dp_size": 1, "tp_size": 1, "tokenizer_worker_num": 1, "speculative_algorithm": None}
    return SimpleNamespace(**{**stock, **changes})


@pytest.mark.parametrize(("changes", "flag", "why"), REFUSED)
def test_refused_with_the_reason(changes: dict[str, Any], flag: str, why: str) -> None:
    with pytest.raises(IncompatibleServerError) as raised:
        check_server_args(server_args(**changes))
    assert f"cannot be combined with {flag} (" in str(raised.value) and why in str(raised.value)


@pytest.mark.parametrize("changes", [{}, {"tp_size": 4}, {"dp_size": 2}, {"dp_size": 2, "tp_size": 2}])
def test_layouts_that_are_taken(changes: dict[str, Any]) -> None:
    check_server_args(server_args(**changes))


@pytest.mark.parametrize("option", OPTIONS, ids=lambda option: option.field)
def test_every_option_is_refused_where_it_is_set_and_only_there(option: Option) -> None:
    value: Any = True if option.limit is None else option.limit + 1
    with pytest.raises(IncompatibleServerError) as raised:
        check_server_args(server_args(**{option.field: value}))
    assert str(raised.value) == f"cannot be combined with {option.flag} ({option.why}: {option.way_out})"
    offs = (None, False, "off", "none", 0) if option.limit is None else (None, option.limit, option.limit - 1)
    for off in offs:
        check_server_args(server_args(**{option.field: off}))


def test_nothing_is_refused_that_sglang_sets_by_itself() -> None:
    from sglang.srt.server_args import ServerArgs

    parser = argparse.ArgumentParser()
    ServerArgs.add_cli_args(parser)
    defaults = parser.parse_args(["--model-path", "none"])
    assert [option.field for option in OPTIONS if not hasattr(defaults, option.field)] == []
    check_server_args(defaults)


def test_all_reasons_are_named_at_once() -> None:
    with pytest.raises(IncompatibleServerError, match=r"--pp-size > 1 .*, --enable-lora "):
        check_server_args(server_args(pp_size=2, enable_lora=True))

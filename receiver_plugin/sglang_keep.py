"""Requests that go on across a commit, in a scheduler of SGLang (0.5.16 to 0.5.23), and those that must not.

A commit comes between two batches, in the scheduler's event loop. With `keep` it finds requests in four places:

    running, or prefilled in part    they keep their KV cache and their key in SGLang's prefix cache, which no later
                                     request has: what they leave there, of old and new weights, is found by nobody
    waiting, or put back before      they hold no KV cache and get the new key
    still to come                    get the new key where they enter the queue, as those do that are put back later
    the batch in flight              in overlap scheduling its tokens are the old weights', and not yet processed when
                                     the commit runs; the label changes after them

The key is SGLang's own `extra_key`, by which it separates cache entries of users, with a salt before it. Before the
first such commit keys are as users gave them. What is in the cache and not in use is evicted at once.

A copy that fails leaves weights of two versions. Requests are then ended before any batch runs, and whatever comes
later is ended as it comes, until the next full push.
"""

from __future__ import annotations

import logging
from typing import Any

from sglang.srt.managers.io_struct import AbortReq, ContinueGenerationReqInput, PauseGenerationReqInput
from sglang.srt.mem_cache.base_prefix_cache import EvictParams

logger = logging.getLogger(__name__)

# Prefix caches that separate entries by `extra_key`, or keep none. That of the C++ radix tree drops the key.
_KEYED = (
    *("RadixCache", "SWARadixCache", "PureSWARadixCache", "MambaRadixCache", "UnifiedRadixCache"),
    *("ChunkCache", "SWAChunkCache", "PureSWAChunkCache"),
)
_OWN_KEY = "fp8sync_own_key"  # of a request: the `extra_key` that it came with


class RunningRequests:
    """Those of one scheduler. Used on its thread only, between two batches or where a request enters its queue."""

    def __init__(self, scheduler: Any) -> None:
        self._scheduler = scheduler
        self._salt = ""
        self._labels: list[tuple[int, str]] = []  # batches in flight that come before, and the label after them

    # Keys of the prefix cache

    def cannot_keep(self) -> list[str]:
        """Why requests cannot go on across a commit; empty if they can. Asked at every commit: some can be attached."""
        scheduler = self._scheduler
        args, cache = scheduler.server_args, scheduler.tree_cache
        kind = type(cache)
        known = kind.__name__ in _KEYED and kind.__module__.startswith("sglang.srt.mem_cache.")
        linked = getattr(cache, "linker", None) is not None
        on_host = args.enable_hierarchical_cache or getattr(cache, "cache_controller", None) is not None
        wrong = {
            f"its prefix cache {kind.__name__} has no keys that are known to separate versions": not known,
            "a cache outside of this process keeps KV cache of old weights": linked,
            "--enable-hierarchical-cache keeps KV cache of old weights in host memory": on_host,
            "--enable-streaming-session hands KV cache to the next turn": args.enable_streaming_session,
            "--enable-session-radix-cache keeps KV cache for the next turn": args.enable_session_radix_cache,
            "--enable-hisparse is not proved": args.enable_hisparse,
            "--dllm-algorithm is not proved": args.dllm_algorithm is not None,
        }
        return [reason for reason, applies in wrong.items() if applies]

    def renew_cache(self, name: str) -> None:
        """From here on requests begin under keys with `name` in them, never used before and unknown to users."""
        scheduler = self._scheduler
        self._salt = f"fp8sync {name} "
        for request in scheduler.waiting_queue:
            self._give_key(request)
        scheduler.tree_cache.evict(EvictParams(num_tokens=scheduler.max_total_num_tokens))

    def enter(self, request: Any) -> None:
        """`request` enters the queue of this scheduler, anew or because it was put back."""
        setattr(request, _OWN_KEY, getattr(request, _OWN_KEY, request.extra_key))
        self._give_key(request)

    def _give_key(self, request: Any) -> None:
        own = getattr(request, _OWN_KEY)
        request.extra_key = f"{self._salt}{own or ''}" if self._salt else own

    # Labels of tokens

    def label(self, name: str) -> None:
        """Tokens of batches that are launched from here on carry `name`; from 0.5.19 on SGLang labels them."""
        record = getattr(self._scheduler, "record_weight_version_change", None)
        if record is None:
            return
        num_in_flight = len(getattr(self._scheduler, "result_queue", ()))  # overlap scheduling only
        if num_in_flight == 0:
            record(new_version=name)
            return
        if not self._labels:
            self._watch_results(record)
        self._labels.append((num_in_flight, name))

    def _watch_results(self, record: Any) -> None:
        """Until the labels are given, for one or two batches, `process_batch_result` is this wrapper around it."""
        scheduler = self._scheduler
        process = scheduler.process_batch_result

        def process_and_label(batch: Any, result: Any) -> None:
            process(batch, result)
            self._labels = [(num_left - 1, name) for num_left, name in self._labels]
            while self._labels and self._labels[0][0] <= 0:
                record(new_version=self._labels.pop(0)[1])
            if not self._labels:
                del scheduler.process_batch_result

        scheduler.process_batch_result = process_and_label

    # Weights that must not be served

    def end_all(self) -> None:
        """End all requests with what they have; no batch runs before. A scheduler that cannot ends itself."""
        scheduler = self._scheduler
        try:
            was_paused = scheduler._engine_paused
            scheduler.pause_generation(PauseGenerationReqInput(mode="retract"))  # takes in what is in flight
            scheduler.abort_request(AbortReq(abort_all=True))
            if not was_paused:
                scheduler.continue_generation(ContinueGenerationReqInput(torch_empty_cache=False))
        except Exception as error:
            logger.exception("fp8sync: requests could not be ended")
            raise SystemExit("fp8sync: requests would go on with weights of two versions") from error

    def end(self, request: Any) -> None:
        """End `request`, which has just entered the queue."""
        self._scheduler.abort_request(AbortReq(rid=request.rid))

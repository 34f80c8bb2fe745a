"""Who sends: the bytes on the busiest link of every choice, and which is taken."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.scale_links import NIC_BYTES_PER_S, NVLINK_BYTES_PER_S
from sender import links_plan
from sender.links_plan import BusiestLink, Links
from sender.rows_plan import held_bytes, plan_rows
from shared.errors import ConfigError
from shared.place import place_of
from shared.protocol import Place, PlaneName
from tests.test_rows import Model, normal

GB = 10**9


def gpus(host: str, *numbers: int) -> list[Place]:
    return [Place(host=host, gpu=f"{host}/{number}") for number in numbers]


def links(plane: PlaneName, trainers: Sequence[Place], servers: Sequence[Place], held: int | None = None) -> Links:
    """8 GB in 64 buckets; `held`: by each trainer rank, an even share if None."""
    buckets = [GB // 8] * 64
    share = 8 * GB // len(trainers) if held is None else held
    return Links(plane, trainers, servers, [share] * len(trainers), buckets, [1 / len(servers)] * len(servers))


def test_rates_are_those_of_the_model() -> None:
    assert (links_plan.NIC_BYTES_PER_S, links_plan.NVLINK_BYTES_PER_S) == (NIC_BYTES_PER_S, NVLINK_BYTES_PER_S)


def test_two_gpus_the_server_on_the_second() -> None:
    """FSDP2 on GPUs 0 and 1, the server on 1: from rank 1 half of the bytes cross NVLink, from rank 0 all."""
    found = links("same_host", gpus("a", 0, 1), gpus("a", 1))
    assert found.choose() == (1,)
    assert found.busiest((1,)) == BusiestLink(name="NVLink out of a/0", num_bytes=4 * GB, seconds=4 / 370)
    assert found.busiest((0,)) == BusiestLink(name="NVLink out of a/0", num_bytes=8 * GB, seconds=8 / 370)
    assert found.busiest((0, 1)).num_bytes == 6 * GB  # its own half of the buckets, and its rows of the other half
    assert links("same_host", gpus("a", 0, 1), gpus("a", 0)).choose() == (0,)


def test_holders_are_taken_where_that_is_fewer_bytes_on_a_link() -> None:
    others = links("same_host", gpus("a", 0, 1), gpus("a", 2, 3))  # a server of two ranks, on GPUs of its own
    assert others.of_holders().num_bytes == 4 * GB and others.busiest(others.choose()).num_bytes == 10 * GB
    assert others.holders_are_quicker
    same = links("same_host", gpus("a", 0, 1), gpus("a", 0, 1))  # half of what each holds stays
    assert same.of_holders().num_bytes == 2 * GB and same.holders_are_quicker
    on_one = links("same_host", gpus("a", 0, 1), gpus("a", 1))  # as rank 1 alone
    assert on_one.of_holders() == on_one.busiest((1,)) and not on_one.holders_are_quicker
    assert not links("same_host", gpus("a", 0), gpus("a", 1)).holders_are_quicker


def test_replicas_of_a_server_need_everything_each() -> None:
    """Of a server of `--dp-size 2`, one replica beside trainer rank 1: from there all goes to the other one, too."""
    trainers, servers = gpus("a", 0, 1), gpus("a", 1, 2)
    found = Links("same_host", trainers, servers, [4 * GB] * 2, [GB // 8] * 64, [1.0, 1.0])
    assert found.of_holders().num_bytes == 8 * GB == found.busiest(found.choose()).num_bytes
    assert not found.holders_are_quicker


@pytest.mark.parametrize("left", range(7))
def test_a_few_bytes_are_no_reason(left: int) -> None:
    """What is gathered whole need not divide by the ranks."""
    share = (8 * GB - left) // 3
    held = [share, share, 8 * GB - left - 2 * share]
    assert not Links("same_host", gpus("a", 0, 1, 2), gpus("a", 3), held, [8 * GB], [1.0]).holders_are_quicker


@pytest.mark.parametrize("plane", ["tcp", "gloo", "nccl"])
def test_holders_write_to_memory_of_their_host_only(plane: PlaneName) -> None:
    assert not links(plane, gpus("a", 0, 1), gpus("a", 2, 3)).holders_are_quicker
    assert not links("same_host", gpus("a", 0, 1), gpus("b", 2, 3)).holders_are_quicker


def test_on_cpus_pieces_cost_more_than_they_save() -> None:
    assert not links("same_host", [Place(host="a")] * 2, [Place(host="a")] * 2).holders_are_quicker


def test_every_rank_of_a_host_sends_an_eighth() -> None:
    found = links(
        "nccl", [*gpus("a", *range(8)), *gpus("b", *range(8))], [*gpus("s", *range(8)), *gpus("t", *range(8))]
    )
    assert found.choose() == tuple(range(8))
    assert found.busiest((0,)).num_bytes == 8 * GB and found.busiest((0,)).name.startswith("NIC out of a/0")
    assert found.busiest(range(8)).num_bytes == GB and found.busiest(range(8)).name.startswith("NIC")
    assert found.sent_bytes(range(8)) == dict.fromkeys(range(8), GB)


def test_what_is_not_gathered_costs_nothing() -> None:
    """A model that every rank has whole: eight ranks of several hosts are as good, those of one are named first."""
    trainers = [*gpus("a", 0, 1), *gpus("b", 0, 1)]
    assert links("nccl", trainers, gpus("s", *range(8)), held=0).choose() == (0, 1, 2, 3)
    assert links("tcp", gpus("a", 0), gpus("s", 0), held=0).choose() == (0,)


def test_a_tie_is_rank_0() -> None:
    """The way into the server is as full whoever sends."""
    assert links("tcp", gpus("a", 0, 1), gpus("s", 0), held=0).choose() == (0,)
    free = links("same_host", gpus("a", 0), gpus("a", 0), held=0)
    assert free.choose() == (0,) and free.busiest((0,)) == BusiestLink()


def test_who_cannot_send_is_not_chosen() -> None:
    shared = links("nccl", gpus("a", 0, 1), gpus("a", 1))
    assert shared.choose() == (0,) and shared.obstacles((0, 1)) == (
        "trainer rank 1 is on the GPU of a server, which NCCL refuses"
    )
    assert links("same_host", [*gpus("a", 0), *gpus("b", 1)], gpus("b", 1)).choose() == (1,)
    with pytest.raises(ConfigError, match="rank 0 is on another host than a server"):
        links("same_host", gpus("a", 0), gpus("b", 0)).choose()
    with pytest.raises(ConfigError, match="has no GPU to send from"):
        links("nccl", [Place(host="a")], gpus("b", 0)).choose()


def test_hosts_that_say_nothing_are_different_ones() -> None:
    assert links("same_host", [Place(host="")], [Place(host="")]).obstacles((0,)) != ""
    assert links("tcp", [Place(host=""), Place(host="")], [Place(host="")]).busiest((1,)).name.startswith("NIC")


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(["tcp", "nccl", "same_host", "gloo"]),
    st.lists(st.tuples(st.sampled_from("ab"), st.integers(0, 3)), min_size=1, max_size=6),
    st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 3)), min_size=1, max_size=6),
    st.lists(st.integers(1, 1 << 20), min_size=1, max_size=9),
    st.integers(0, 1 << 20),
)
def test_no_choice_is_better_than_the_one_that_is_taken(
    plane: PlaneName, trainers: list[tuple[str, int]], servers: list[tuple[str, int]], buckets: list[int], held: int
) -> None:
    places = [[Place(host=host, gpu=f"{host}/{gpu}") for host, gpu in side] for side in (trainers, servers)]
    found = Links(plane, places[0], places[1], [held] * len(trainers), buckets)
    single = [(rank,) for rank in range(len(trainers)) if not found.obstacles((rank,))]
    if not single:
        with pytest.raises(ConfigError):
            found.choose()
        return
    chosen = found.choose()
    assert not found.obstacles(chosen) and sum(found.sent_bytes(chosen).values()) == sum(buckets)
    seconds = found.busiest(chosen).seconds
    assert all(seconds <= found.busiest(other).seconds for other in single)
    if single[0] == (0,) and seconds == found.busiest((0,)).seconds:
        assert chosen == (0,)


def test_held_bytes_are_those_of_the_plan() -> None:
    """But for alignment and flags, which chunks have besides."""
    parameters = {"a": normal(700, 77), "b": normal(384, 128), "experts": normal(5, 160, 96), "plain": normal(30, 64)}
    model = Model(parameters, ("plain",), bucket_bytes=30_000)
    for num_ranks in (1, 2, 3, 8):
        sharding = model.sharding(0, num_ranks)
        held = held_bytes(model.layout, sharding, model.cuts, num_ranks)
        plan = plan_rows(model.layout, sharding, model.cuts, 0, num_ranks)
        assert sum(held) == plan.num_bytes + 2 * parameters["plain"].numel()
        for rank in range(num_ranks):
            mine = plan_rows(model.layout, model.sharding(rank, num_ranks), model.cuts, rank, num_ranks)
            rows = {(p.codes_at, p.num_rows * p.num_cols) for b in mine.buckets if b for p in b.parts}
            codes = sum(
                p.num_rows * p.num_cols * (p.copied_as or torch.uint8).itemsize
                for b in mine.buckets
                if b
                for p in b.parts
            )
            assert codes <= held[rank] <= codes * 1.02 + 4 * len(rows)


def test_this_place() -> None:
    here = place_of(torch.device("cpu"))
    assert here.gpu == "" and here == place_of(torch.device("cpu")) and len(here.host) == 32

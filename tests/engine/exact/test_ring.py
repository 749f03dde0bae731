"""Ring Attention: as exact as one device, every block seen once, and no process left behind whatever happens."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.exact.rank import merge, partial
from engine.exact.ring import ring_attention
from engine.exact.schedule import blocks, cells, idle_share, inverse, permutation, schedule
from engine.exact.workers import Pool, RankDied
from engine.recording import record

ROOT = Path(__file__).parents[3]
layouts = st.sampled_from(["contiguous", "zigzag"])


def qkv(T: int, *, D: int = 4, H: int = 2, dtype: torch.dtype = torch.float64):
    generator = torch.Generator().manual_seed(0)
    return [2 * torch.randn(1, H, T, D, dtype=dtype, generator=generator) for _ in range(3)]


def gone(pids: list[int], *, seconds: float = 8.0) -> bool:
    """Whether none of them lives, or is a zombie of this process."""
    end = time.monotonic() + seconds
    while any(Path(f"/proc/{pid}/stat").exists() for pid in pids):
        if time.monotonic() > end:
            return False
        time.sleep(0.05)
    return True


@pytest.fixture(scope="module")
def pool():
    with Pool() as pool:
        yield pool
        pids = pool.pids
    assert gone(pids)


# --- the schedule, nothing run


@settings(max_examples=60)
@given(T=st.integers(8, 60), ranks=st.integers(1, 4), layout=layouts, causal=st.booleans())
def test_every_cell_is_computed_once_and_each_block_visits_each_rank_once(T, ranks, layout, causal):
    plan = schedule(T, ranks=ranks, layout=layout, causal=causal)
    times = np.zeros((T, T), int)
    for turns in plan:
        assert sorted(turn.block for turn in turns) == list(range(ranks))
        for turn in turns:
            assert turn.block == (turn.rank - turn.step) % ranks
            for (a, b), (c, d) in turn.computed:
                times[a:b, c:d] += 1
            for (a, b), (c, d) in turn.skipped:
                assert causal
                assert c >= b
                times[a:b, c:d] += 1
    assert (times == 1).all()
    total = sum(turn.cells for turns in plan for turn in turns)
    assert total == (T * (T + 1) // 2 if causal else T * T)


@given(T=st.integers(8, 60), ranks=st.integers(1, 4), layout=layouts)
def test_the_permutation_inverts(T, ranks, layout):
    order = permutation(T, ranks=ranks, layout=layout)
    assert torch.equal(order[inverse(order)], torch.arange(T))
    assert torch.equal(inverse(order)[order], torch.arange(T))
    sizes = [b - a for block in blocks(T, ranks=ranks, layout=layout) for a, b in block]
    assert max(sizes) - min(sizes) <= 1


def test_zigzag_by_hand():
    assert blocks(8, ranks=2, layout="zigzag") == [[(0, 2), (6, 8)], [(2, 4), (4, 6)]]
    assert permutation(8, ranks=2, layout="zigzag").tolist() == [0, 1, 6, 7, 2, 3, 4, 5]
    assert cells((2, 4), (2, 4), causal=True) == 3


@pytest.mark.parametrize("ranks", [2, 3, 4, 8])
def test_a_causal_mask_starves_the_first_rank_and_zigzag_feeds_all_alike(ranks):
    T = 16 * ranks
    plain = schedule(T, ranks=ranks)
    assert [sum(len(turn.computed) for turn in turns) for turns in plain] == list(range(1, ranks + 1))
    assert [sum(turn.idle for turn in turns) for turns in plain] == list(range(ranks - 1, -1, -1))
    share = idle_share(plain)
    assert share == sorted(share, reverse=True)
    assert share[0] > 0.4
    zigzag = schedule(T, ranks=ranks, layout="zigzag")
    assert {sum(len(turn.computed) for turn in turns) for turns in zigzag} == {2 * ranks + 1}
    assert len({sum(turn.cells for turn in turns) for turns in zigzag}) == 1
    for step in range(ranks):
        assert len({turns[step].cells for turns in zigzag}) == 1
    assert idle_share(zigzag) == [0.0] * ranks


def test_what_cannot_be_laid_out_is_refused():
    with pytest.raises(ValueError, match="length must be 4 tokens at least"):
        blocks(3, ranks=4)
    with pytest.raises(ValueError, match="length must be 8 tokens at least"):
        blocks(7, ranks=4, layout="zigzag")
    with pytest.raises(ValueError, match="layout"):
        blocks(8, ranks=2, layout="stripes")
    with pytest.raises(ValueError, match="ranks"):
        blocks(8, ranks=0)
    q, k, v = qkv(8)
    unused = Pool()
    for how in ({"ranks": 9}, {"ranks": 0}, {"ranks": 2, "link": 0.0}, {"ranks": 2, "link": float("nan")}):
        with pytest.raises(ValueError, match="must be"):
            ring_attention(q, k, v, pool=unused, **how)
    with pytest.raises(ValueError, match="same sizes"):
        ring_attention(q, k[:, :, :3], v, ranks=2, pool=unused)
    with pytest.raises(ValueError, match="ranks must be from 1 to 16"):
        ring_attention(*qkv(40), ranks=17, pool=unused)
    with pytest.raises(ValueError, match="timeout"):
        Pool(timeout=0)
    assert unused.pids == []


@given(cut=st.integers(1, 11))
def test_merging_two_parts_is_the_whole(cut):
    q, k, v = qkv(12)
    whole = partial(q, k, v, offset=None)
    nothing = torch.zeros_like(q), q.new_full(q.shape[:-1], -torch.inf)
    found = merge(*nothing, *partial(q, k[:, :, cut:], v[:, :, cut:], offset=None))
    found = merge(*found, *partial(q, k[:, :, :cut], v[:, :, :cut], offset=None))
    for ours, theirs in zip(found, whole, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-13)


# --- real processes


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_the_ring_is_exact_and_the_processes_did_what_the_schedule_says(pool, ranks):
    T = 29
    q, k, v = qkv(T)
    for layout in ("contiguous", "zigzag"):
        for causal in (True, False):
            ring = ring_attention(q, k, v, ranks=ranks, layout=layout, causal=causal, pool=pool)
            exact = F.scaled_dot_product_attention(q, k, v, is_causal=causal)
            torch.testing.assert_close(ring.output, exact, rtol=0, atol=1e-12)
            scores = q @ k.mT / 2
            scores = scores + torch.full_like(scores, -torch.inf).triu(1) if causal else scores
            torch.testing.assert_close(ring.lse, scores.logsumexp(-1), rtol=0, atol=1e-12)
            kept = blocks(T, ranks=ranks, layout=layout)
            sizes = [sum(b - a for a, b in block) for block in kept]
            plan = schedule(T, ranks=ranks, layout=layout, causal=causal)
            for i, (rank, turns) in enumerate(zip(ring.ranks, plan, strict=True)):
                assert rank.computed == sum(len(turn.computed) for turn in turns)
                assert rank.skipped == sum(len(turn.skipped) for turn in turns)
                assert [s.block for s in rank.spans if s.kind == "compute"] == [turn.block for turn in turns]
                assert rank.sent == sum(2 * 2 * 4 * 8 * sizes[turn.block] for turn in turns[:-1])
                assert all(s.begin <= s.end for s in rank.spans)
                received = [s.block for s in rank.spans if s.kind == "recv"]
                assert sorted([i, *received]) == list(range(ranks))
                # q, output and log-sum-exp of its own tokens; two blocks of keys and values: O(T / n)
                assert rank.memory <= 8 * 2 * (9 * max(sizes) + (16 * max(sizes) if ranks > 1 else 8 * sizes[0]))


@pytest.mark.slow
def test_the_pool_is_reused_and_float32_stays_float32(pool):
    q, k, v = qkv(16, dtype=torch.float32)
    ring_attention(q, k, v, ranks=2, pool=pool)
    before = pool.pids
    stages = []
    ring = ring_attention(q, k, v, ranks=2, pool=pool, progress=lambda *now: stages.append(now))
    assert pool.pids == before
    assert ring.output.dtype == torch.float32
    torch.testing.assert_close(ring.output, F.scaled_dot_product_attention(q, k, v, is_causal=True), rtol=0, atol=2e-6)
    assert stages[-1] == ("running", 2, 2)
    assert "starting" not in [stage for stage, done, total in stages if done < total]
    for pid in before:
        loaded = Path(f"/proc/{pid}/maps").read_text()
        assert "torch" in loaded
        assert "bokeh" not in loaded
        assert "panel" not in loaded


@pytest.mark.slow
def test_a_slow_link_is_hidden_or_not_and_said_to_be_simulated(pool):
    q, k, v = qkv(16)
    link = 2 * 2 * 8 * 4 * 8 / 0.15  # a block in 0.15 s
    with record() as recorder:
        ring = ring_attention(q, k, v, ranks=2, link=link, pool=pool)
    assert ring.simulated
    assert ring.seconds > 0.15
    recv = [span for rank in ring.ranks for span in rank.spans if span.kind == "recv"]
    assert all(span.seconds >= 0.149 for span in recv)
    for rank in ring.ranks:
        first, second = (span for span in rank.spans if span.kind == "compute")
        arrived = next(span for span in rank.spans if span.kind == "recv")
        assert first.end < arrived.end <= second.begin, "the first block is computed while the second is on its way"
    one_by_one = ring_attention(q, k, v, ranks=2, link=link, overlap=False, pool=pool)
    for rank in one_by_one.ranks:
        arrived = next(span for span in rank.spans if span.kind == "recv")
        assert all(span.begin >= arrived.end for span in rank.spans if span.kind == "compute")
    recording = recorder.freeze()
    assert recording.steps == 2
    assert recording.meta["simulated"]
    assert recording.stack("ring.holds").tolist() == [[0, 1], [1, 0]]
    assert recording.stack("ring.matrix")[-1].tolist() == [[0, -2], [1, 1]]
    assert recording.stack("ring.matrix")[0].tolist() == [[0, -2], [-1, 1]]
    assert recording.stack("ring.cells").tolist() == [[36, 36], [0, 64]]
    assert (recording.stack("ring.exposed")[0] <= recording.stack("ring.transfer")[0]).all()
    assert len(recording.happened("ring.recv")) == 2


@pytest.mark.slow
def test_a_killed_rank_ends_the_ring_with_its_name_and_the_next_call_works():
    q, k, v = qkv(16)
    with Pool(timeout=30) as pool:
        ring_attention(q, k, v, ranks=3, pool=pool)
        pids = pool.pids
        began = time.monotonic()

        def kill(stage: str, done: int, total: int) -> None:
            if stage == "running" and time.monotonic() - began > 0.3 and Path(f"/proc/{pids[1]}").exists():
                os.kill(pids[1], signal.SIGKILL)

        with pytest.raises(RankDied, match=r"rank 1 died \(signal 9\)"):
            ring_attention(q, k, v, ranks=3, link=100.0, pool=pool, progress=kill)
        assert time.monotonic() - began < 10
        assert gone(pids)
        assert pool.pids == []
        # A run that its caller stops, and a rank that falls silent, leave nothing either.
        ring_attention(q, k, v, ranks=2, pool=pool)
        pids = pool.pids

        def stop(stage: str, done: int, total: int) -> None:
            if stage == "running":
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            ring_attention(q, k, v, ranks=2, link=100.0, pool=pool, progress=stop)
        assert gone(pids)
        ring_attention(q, k, v, ranks=2, pool=pool)
        pids = pool.pids
        pool.timeout = 1.0
        os.kill(pids[0], signal.SIGSTOP)
        with pytest.raises(RankDied, match="rank 0"):
            ring_attention(q, k, v, ranks=2, pool=pool)
        assert gone(pids)
        assert threading.active_count() < 8


@pytest.mark.slow
@pytest.mark.parametrize("how", ["killed", "ended", "idle"])
def test_the_processes_go_when_their_parent_does(how, tmp_path):
    code = f"""
import time, torch
from engine.exact.ring import Pool, ring_attention
pool = Pool(idle={0.5 if how == "idle" else 300})
q = torch.ones(1, 1, 4, 2)
ring_attention(q, q, q, ranks=2, pool=pool)
print(*pool.pids, pool._folder, flush=True)
{"time.sleep(60)" if how != "ended" else ""}
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": str(tmp_path)}
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=environment) as parent:
        assert parent.stdout is not None
        *pids, folder = parent.stdout.readline().split()
        if how == "killed":
            parent.kill()
        if how == "ended":
            assert parent.wait(20) == 0
        assert gone([int(pid) for pid in pids])
        if how != "killed":
            assert not Path(folder).exists()
        parent.kill()

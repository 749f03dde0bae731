"""K-means codebooks: the lecture's, scikit-learn's from the same start, and distortion that never rises."""

import warnings
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from engine.quant.affine import GRANULARITIES, Grid, quantise
from engine.quant.kmeans import kmeans, means, nearest, recipe
from engine.recording import record
from tests.engine.quant.test_affine import LECTURE


def test_the_lecture_s_codebook_to_the_digit():
    done = kmeans(LECTURE, bits=2)
    assert torch.allclose(done.centroids, torch.tensor([[-1.0, 0.0, 1.5, 2.0]], dtype=torch.float64), atol=1e-12)
    assert done.codes.tolist() == [[3, 0, 2, 1], [1, 1, 0, 3], [0, 3, 1, 0], [3, 1, 2, 2]]
    assert done.converged
    assert len(done.history) == 2  # one step from the linear start, and nothing moves after it
    assert done.storage_bits == 16 * 2 + 4 * 64
    assert kmeans(LECTURE.float(), bits=2).storage_bits == 32 + 4 * 32  # the lecture: 512 bits become 160
    assert done.distortion < float((quantise(LECTURE, Grid(2, symmetric=False)).reconstruct() - LECTURE).square().sum())


@pytest.mark.parametrize("start", ["linear", "k-means++"])
@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_equals_scikit_learn_from_the_same_start(bits, start):
    cluster = pytest.importorskip("sklearn.cluster")
    x = torch.randn(400, dtype=torch.float64, generator=torch.Generator().manual_seed(bits)).clamp(-2.5, 2.5)
    done = kmeans(x, bits=bits, start=start, seed=5, most_steps=500)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = cluster.KMeans(
            2**bits, init=done.history[0][0].view(-1, 1).numpy(), n_init=1, max_iter=500, tol=0, algorithm="lloyd"
        ).fit(x.view(-1, 1).numpy())
    assert done.converged
    assert np.allclose(np.sort(theirs.cluster_centers_[:, 0]), done.centroids[0].numpy(), rtol=0, atol=1e-12)
    assert (theirs.labels_ == done.codes.numpy()).all()
    assert theirs.inertia_ == pytest.approx(done.distortion, rel=1e-12)


@given(
    st.integers(0, 2**31), st.integers(1, 4), st.sampled_from(GRANULARITIES), st.sampled_from(["linear", "k-means++"])
)
def test_distortion_never_rises_and_centroids_stay_in_order(seed, bits, granularity, start):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(4, 16, dtype=torch.float64, generator=generator) ** 3  # heavy tails leave centroids empty
    x[0, :4] = x[0, 0]  # and ties
    done = kmeans(x, bits=bits, granularity=granularity, group=16 if granularity == "group" else None, start=start)
    losses = [loss for _, loss in done.history]
    assert all(after <= before * (1 + 1e-12) for before, after in pairwise(losses))
    for centroids, _ in done.history:
        assert (centroids.diff(dim=1) >= -1e-12).all()
    assert float((done.reconstruct() - x).square().sum()) == pytest.approx(done.distortion, rel=1e-9, abs=1e-15)


@given(st.integers(0, 2**31))
def test_a_step_is_assignment_to_the_nearest_and_then_the_mean(seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2, 30, dtype=torch.float64, generator=generator)
    centroids = torch.randn(2, 5, dtype=torch.float64, generator=generator).sort(1).values
    codes = nearest(x, centroids)
    assert torch.equal(codes, (x[..., None] - centroids[:, None]).abs().argmin(-1))
    moved = means(x, codes, centroids)
    for block in range(2):
        for k in range(5):
            mine = x[block][codes[block] == k]
            expected = mine.mean() if len(mine) else centroids[block, k]
            assert float(moved[block, k]) == pytest.approx(float(expected), abs=1e-12)


def test_finer_codebooks_fit_channels_of_unequal_variance_better():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(8, 64, dtype=torch.float64, generator=generator) * 4.0 ** torch.arange(8)[:, None]
    error = {g: (kmeans(x, bits=3, granularity=g, group=32 if g == "group" else None).reconstruct() - x)
             for g in GRANULARITIES}  # fmt: skip
    relative = {g: float((e.norm(dim=1) / x.norm(dim=1)).mean()) for g, e in error.items()}
    assert relative["channel"] < relative["tensor"] / 2
    assert relative["token"] == relative["channel"]  # the rows of a matrix are both
    assert kmeans(x, bits=3, granularity="channel").storage_bits == 512 * 3 + 8 * 8 * 64


def test_a_given_start_and_as_many_centroids_as_values():
    done = kmeans(LECTURE, bits=4, start="k-means++", seed=1)
    assert done.distortion == pytest.approx(0, abs=1e-25)  # 14 different values, 16 centroids
    start = torch.tensor([2.0, -1.0, 0.0, 1.5])
    assert torch.equal(kmeans(LECTURE, bits=2, start=start).history[0][0], start.sort().values.double()[None])
    assert torch.equal(kmeans(LECTURE, bits=2, start="k-means++", seed=3).codes,
                       kmeans(LECTURE, bits=2, start="k-means++", seed=3).codes)  # fmt: skip


def test_a_constant_block_is_exact():
    for start in ("linear", "k-means++"):
        assert torch.equal(kmeans(torch.full((2, 8), 0.7), bits=2, start=start).reconstruct(), torch.full((2, 8), 0.7))


@pytest.mark.parametrize("sample", [40, 10_000])
def test_a_layer_snaps_to_a_codebook_found_on_a_sample(sample):
    torch.manual_seed(0)
    linear = torch.nn.Linear(24, 16)
    snapped = recipe(bits=3, sample=sample)("any", linear)
    own, weight = linear.weight.detach(), snapped.weight
    book = kmeans(own.flatten()[:: 1 if sample > 384 else 10], bits=3, most_steps=20).centroids
    assert torch.equal(weight.unique(), book[0].unique())
    distance = (own[..., None] - book[0]).abs()
    assert torch.equal((own - weight).abs(), distance.min(-1).values)
    assert snapped.bias is linear.bias
    with pytest.raises(ValueError, match="sample must be at least the 8 centroids of 3 bits, not 7"):
        recipe(bits=3, sample=7)


def test_each_step_is_tapped():
    with record() as recorder:
        done = kmeans(torch.linspace(-1, 1, 50) ** 3, bits=2)
    recording = recorder.freeze()
    assert recording.stack("kmeans.centroids").shape == (len(done.history), 1, 4)
    assert recording.stack("kmeans.distortion")[:, 0].tolist() == pytest.approx([loss for _, loss in done.history])
    assert recording.happened("kmeans.end")[0].fields == {"steps": len(done.history) - 1, "converged": True}


def test_bad_input_is_named():
    for call, words in [
        (lambda: kmeans(LECTURE, bits=5), "no more centroids than the 16 values of a block; 5 bits are 32"),
        (lambda: kmeans(LECTURE, bits=0), "bits must be a whole number from 1 to 16, not 0"),
        (lambda: kmeans(LECTURE, bits=2, start="best"), 'start must be "linear", "k-means.." or centroids, not .best'),
        (lambda: kmeans(LECTURE, bits=2, start=torch.ones(3)), r"start must have shape \[4\] or \[1, 4\]"),
        (lambda: kmeans(LECTURE, bits=2, granularity="row"), "granularity must be one of"),
        (lambda: kmeans(LECTURE, bits=1, granularity="group", group=3), "group must divide the 4 values"),
        (lambda: kmeans(LECTURE, bits=1, most_steps=0), "most_steps must be a number above 0, not 0"),
        (lambda: kmeans(torch.ones(0), bits=1), "x must hold a value"),
        (lambda: kmeans(torch.tensor([1.0, torch.nan]), bits=1), "x must be finite"),
    ]:
        with pytest.raises(ValueError, match=words):
            call()

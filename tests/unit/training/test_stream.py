"""Batches: every token once in each round, a function of seed and step, one read for all SAEs."""

from __future__ import annotations

import pytest
import torch
from helpers.activations import SparseMixtures
from sae_lens import TopKSAE, TopKSAEConfig

from sae_afa_plugin.activations.base import Site
from sae_afa_plugin.activations.tensors import TensorActivations
from sae_afa_plugin.training.stream import Blocks, Stream, default_block


def numbered(n):
    """Activations that say which token they are of."""
    return TensorActivations({"hook": torch.arange(float(n))[:, None]})


def stream(source, block, batch, seed=0, hook="hook", **options):
    return Stream(Blocks(source, block), Site(hook), batch, seed, **options)


@pytest.mark.parametrize(
    ("n", "block"), [(12, 6), (10, 6), (6, 6), (5, 6), (1, 6), (17, 6), (7, 6)]
)
def test_a_block_holds_the_next_tokens_of_the_repeated_row(n, block):
    batches = stream(numbered(n), block, 3)
    for number in range(7):
        seen = torch.cat([batches.batch(2 * number), batches.batch(2 * number + 1)]).flatten()
        expected = [(number * block + i) % n for i in range(block)]
        assert sorted(seen.int().tolist()) == sorted(expected)


def test_starting_at_a_step_gives_what_running_there_gives():
    source = SparseMixtures(100)
    running = stream(source, 24, 8)
    batches = [running.batch(step) for step in range(20)]
    for step in (19, 0, 7, 8, 13):
        assert torch.equal(stream(SparseMixtures(100), 24, 8).batch(step), batches[step])


def test_order_differs_between_seeds_and_between_blocks_and_rounds():
    def orders(seed):
        batches = stream(numbered(64), 64, 64, seed)
        return [tuple(batches.batch(step).flatten().tolist()) for step in range(4)]

    assert len(set(orders(0)) | set(orders(1))) == 8
    assert orders(0) == orders(0)
    # no trace of the row's order: neighbours are as far apart as chance has it, 64 / 3
    places = torch.tensor(orders(0)[0]).argsort().float()
    assert 14 < places.diff().abs().mean() < 29


def test_the_order_is_fixed_for_all_time():
    """Interrupted trainings could not be taken up by a later version otherwise."""
    batches = stream(numbered(8), 8, 8, seed=42)
    assert [batches.batch(step).flatten().int().tolist() for step in range(2)] == [
        [4, 1, 0, 6, 2, 3, 5, 7],
        [4, 7, 6, 5, 0, 2, 1, 3],
    ]


def test_one_read_serves_all_saes_on_all_hooks():
    source = SparseMixtures(50, a=(4,), b=(2, 3))
    blocks = Blocks(source, 20)
    all_of_them = [
        Stream(blocks, Site("a"), 5, seed=0),
        Stream(blocks, Site("a"), 10, seed=1),
        Stream(blocks, Site("b"), 5, seed=0),
        Stream(blocks, Site("b", head=1), 4, seed=2),
    ]
    for number in range(4):
        blocks.load(number, ["b", "a", "a"])
        for one in all_of_them:
            for step in range(one.steps_per_block):
                one.batch(number * one.steps_per_block + step)
    # the third block reaches around the end of the row
    ranges = [(0, 20), (20, 40), (40, 50), (0, 10), (10, 30)]
    assert source.reads == [(("a", "b"), *r) for r in ranges]


def test_a_row_that_fits_into_a_block_is_read_once():
    source = SparseMixtures(30)
    batches = stream(source, 40, 8)
    for step in range(50):
        batches.batch(step)
    assert source.reads == [(("hook",), 0, 30)]


@pytest.mark.parametrize("normalize", ["layer_norm", "constant_norm_rescale", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_tokens_are_normalised_as_the_sae_would_do_it(normalize, dtype):
    source = SparseMixtures(64)
    raw = stream(source, 64, 64, dtype=dtype).batch(0)
    found = stream(source, 64, 64, normalize=normalize, dtype=dtype).batch(0)
    assert found.dtype == dtype
    sae = TopKSAE(TopKSAEConfig(16, 32, k=4, normalize_activations=normalize, dtype=str(dtype)[6:]))
    assert torch.equal(found, sae.process_sae_in(raw).detach())
    x = raw.double()
    by_hand = {
        "none": x,
        "layer_norm": (x - x.mean(1, keepdim=True)) / (x.var(1, keepdim=True).sqrt() + 1e-5),
        "constant_norm_rescale": 4 * x / x.square().sum(1, keepdim=True).sqrt(),
    }[normalize]
    torch.testing.assert_close(found.double(), by_hand, rtol=1e-5, atol=1e-5)


def test_normalising_draws_no_random_numbers():
    before = torch.get_rng_state()
    stream(SparseMixtures(8), 8, 8, normalize="layer_norm").batch(0)
    assert torch.equal(torch.get_rng_state(), before)


def test_heads_are_flattened_or_one_of_them_is_taken():
    source = SparseMixtures(8, z=(3, 4))
    blocks = Blocks(source, 8)
    flat = Stream(blocks, Site("z"), 8, 0).batch(0)
    one = Stream(blocks, Site("z", head=2), 8, 0).batch(0)
    assert flat.shape == (8, 12)
    assert torch.equal(one, flat.view(8, 3, 4)[:, 2])
    normal = Stream(blocks, Site("z", head=2), 8, 0, "layer_norm").batch(0)
    torch.testing.assert_close(normal.norm(dim=1), torch.full((8,), 3**0.5), rtol=1e-3, atol=0)


def test_a_block_that_is_no_multiple_of_the_batch_is_refused():
    with pytest.raises(
        ValueError,
        match="a block of 100 tokens holds no whole number of batches of 48: pass "
        "block_tokens=65520 or",
    ):
        stream(numbered(5), 100, 48)
    for batch in (1, 7, 1024, 4096, 65536, 65537, 10**6):
        assert default_block(batch) % batch == 0
        assert default_block(batch) <= max(65536, batch)

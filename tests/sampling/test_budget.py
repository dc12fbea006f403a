"""The budget of a sample: sizes that follow the error, their limits, and their state."""

from math import inf, nan

import pytest

from hf_dis import DISArguments, SamplerSpec, make_sampler
from hf_dis.sampling.budget import BATCHES, Budget, Sizes, Variances, make_budget, powers_of_two


def budget(accepted=0.2, sampled=(32, 64), shared=(128, 256, 512, 1024, 2048), start=(32, 512), num_ranks=64):
    return Budget(accepted, sampled, {size: max(16, size // 32) for size in shared}, Sizes(*start), num_ranks)


class World:
    """Measurements of a gradient whose squared error falls as 1/K and 1/K_t; with all ranks the first is zero."""

    def __init__(self, own, shared, length=1.0):
        self.own, self.shared, self.length = own, shared, length

    def at(self, sizes):
        own = 0.0 if sizes.num_sampled == 64 else self.own / sizes.num_sampled
        return Variances(own, self.shared / max(1, sizes.num_shared), self.length)

    def settles(self, made, measurements=20):
        for _ in range(measurements):
            made.observe(self.at(made.sizes))
        return made.sizes


@pytest.mark.parametrize(
    ("own", "shared", "expected"),
    [
        (0.0, 0.04 * 512, (32, 512)),  # exactly the accepted error
        (0.0, 0.04 * 1024, (32, 1024)),
        (0.0, 0.04 * 1100, (32, 2048)),
        (32.0, 0.03 * 512, (64, 512)),  # 32 more classes of each item are cheaper than 512 more of a tail
        (0.0, 0.64 * 0.04 * 256, (32, 256)),  # a smaller sample has to do better than the accepted error
        (0.0, 0.70 * 0.04 * 256, (32, 512)),
        (0.0, 0.0, (32, 128)),
    ],
)
def test_the_fewest_classes_that_keep_the_error(own, shared, expected):
    made = budget()
    assert World(own, shared).settles(made) == expected
    assert not made.wants_all_classes and made.num_updated == max(16, expected[1] // 32)


def test_a_sample_that_is_too_large_shrinks_and_grows_again():
    made = budget()
    assert World(0.0, 0.01 * 128).settles(made) == (32, 128)
    assert World(0.0, 0.04 * 2048).settles(made) == (32, 2048)


def test_all_classes_where_no_sample_will_do_and_sampling_later():
    made, hopeless = budget(), World(0.0, 0.06 * 2048)
    hopeless.settles(made)
    assert made.wants_all_classes and made.sizes == (64, 2048)  # the largest sample measures on
    World(0.0, 0.03 * 2048).settles(made)
    assert made.wants_all_classes  # within the accepted error by less than the margin
    World(0.0, 0.02 * 2048).settles(made)
    assert not made.wants_all_classes and made.sizes == (32, 2048)


def test_the_sizes_rest_under_noise():
    made, seen = budget(), set()
    for number in range(200):
        noisy = 1 + 0.2 * (-1) ** number
        made.observe(
            Variances(0.0, noisy * 0.033, 1.0) if made.sizes.num_shared == 512 else World(0, 16.9).at(made.sizes)
        )
        seen.add(made.sizes)
    assert seen == {(32, 512)}


def test_a_lost_gradient_asks_for_more_and_nan_for_nothing():
    made = budget()
    for bad in (nan, inf):
        made.observe(Variances(bad, 1.0, 1.0))
    assert made.sizes == (32, 512)
    made.observe(Variances(0.0, 1.0, -0.5))
    assert made.sizes == (64, 1024)


def test_the_error_is_measured_at_the_first_and_every_tenth_batch():
    made = budget()
    assert [number for number in range(3 * BATCHES) if made.is_due()] == [0, 10, 20]


def test_a_state_goes_on_where_it_was():
    made, other = budget(), budget()
    for shared in (30.0, 60.0, 90.0):
        made.is_due()
        made.observe(World(1.0, shared).at(made.sizes))
    other.load_state_dict(made.state_dict())
    for shared in (90.0, 10.0, 5.0, 3.0):
        assert made.is_due() == other.is_due()
        for one in (made, other):
            one.observe(World(1.0, shared).at(one.sizes))
        assert made.sizes == other.sizes and made.wants_all_classes == other.wants_all_classes
    fresh = budget()
    fresh.load_state_dict(budget().state_dict())
    assert fresh.sizes == (32, 512)
    assert World(0.0, 0.04 * 1024).settles(fresh) == (32, 1024)


def test_the_sizes_of_a_sampler():
    made = make_budget(DISArguments(gradient_error=0.2), make_sampler(10_000, SamplerSpec(num_updated_classes=16)))
    assert (made.sampled, made.shared) == ((96,), (104, 208, 416, 832, 1664, 3328))
    assert [made._updated[size] for size in made.shared] == [16, 16, 16, 26, 52, 104]
    per_item = SamplerSpec(num_shared_classes=0)
    made = make_budget(DISArguments(gradient_error=0.2, num_shared_classes=0), make_sampler(10_000, per_item))
    assert (made.sampled, made.shared) == ((32, 64, 128, 256, 512, 1024, 2048, 4096), (0,))


def test_sizes_that_were_given_are_kept():
    given = {"gradient_error": 0.2, "num_shared_classes": 256, "num_updated_classes": 20, "rank_depth": 192}
    sampler = make_sampler(10_000, SamplerSpec(num_shared_classes=256, num_updated_classes=20, rank_depth=192))
    made = make_budget(DISArguments(**given), sampler)
    assert (made.sampled, made.shared, made.num_updated) == ((96, 192), (256,), 20)
    with pytest.warns(UserWarning, match=r"gradient_error is 0.2, and has no effect.*given by hand: leave"):
        assert make_budget(DISArguments(**given, num_sampled_classes=96), sampler) is None


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ((512, 128, 2100), (128, 256, 512, 1024, 2048)),
        ((32, 32, 32), (32,)),
        ((3, 0.75, 9), (1, 3, 6)),
        ((8, 9, 7), (8,)),
    ],
)
def test_powers_of_two(given, expected):
    assert powers_of_two(*given) == expected

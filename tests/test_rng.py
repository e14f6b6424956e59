"""Numbers keyed by (seed, purpose, step, id), against SplitMix64 in Python's own integers."""

import hashlib

import numpy as np
import pytest
import torch
from scipy import stats

from fulllora_dist.core.rng import base_key, numpy_rng, sample_rng

MASK = 2**64 - 1
GOLDEN = 0x9E3779B97F4A7C15


def mix(z: int) -> int:
    """Steele, Lea and Flood's finaliser, variant 13 of Stafford."""
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
    return z ^ (z >> 31)


def splitmix(seed: int, purpose: str, step: int, sample: int, count: int) -> list[float]:
    base = int.from_bytes(hashlib.sha256(f"{seed}/{purpose}/{step}".encode()).digest()[:8], "little")
    state = mix(((sample + 1) * GOLDEN & MASK) ^ base)
    numbers = []
    for _ in range(count):
        state = (state + GOLDEN) & MASK
        numbers.append((mix(state) >> 40) / 2**24)
    return numbers


def test_splitmix_itself_is_the_published_one() -> None:
    """The first outputs of seed 1234567, as java.util.SplittableRandom and Rosetta Code have them."""
    outputs = [mix((1234567 + i * GOLDEN) & MASK) for i in (1, 2, 3)]
    assert outputs == [6457827717110365317, 3203168211198807973, 9817491932198370423]


@pytest.mark.parametrize("step", [0, 3, 10**9])
@pytest.mark.parametrize(("seed", "purpose"), [(0, "pgd/start/0"), (2**40, "x"), (-1, "train/n_fgsm/start/0")])
def test_equals_splitmix64_in_python_integers(seed: int, purpose: str, step: int) -> None:
    ids = [0, 1, 2, 41, 10**6, 2**31, 2**62, 2**63 - 2, -1]
    rng = sample_rng(seed, purpose, step, torch.tensor(ids))
    drawn = torch.cat([rng.uniform((2, 3)).flatten(1), rng.uniform((4,)), rng.uniform((1,))], dim=1)
    assert drawn.dtype == torch.float32
    assert drawn.double().tolist() == [splitmix(seed, purpose, step, i, 11) for i in ids]


def test_a_sample_draws_the_same_alone_and_in_any_batch() -> None:
    ids = torch.tensor([9, 2, 5, 2**50])
    together = sample_rng(1, "p", 2, ids).uniform((3, 4, 4))
    for i in range(4):
        assert torch.equal(sample_rng(1, "p", 2, ids[i : i + 1]).uniform((3, 4, 4))[0], together[i])
    assert torch.equal(sample_rng(1, "p", 2, ids.flip(0)).uniform((3, 4, 4)), together.flip(0))


def test_numbers_are_uniform_and_unrelated() -> None:
    """Over draws, over neighbouring ids, steps, seeds and purposes: what a batch, an epoch and two runs differ in."""
    ids = torch.arange(400)
    draws = sample_rng(0, "p", 0, ids).uniform((500,)).double().numpy()
    assert draws.min() >= 0
    assert draws.max() < 1
    neighbours = {
        "over samples": draws[:, 0],
        "over steps": np.array([sample_rng(0, "p", s, ids[:1]).uniform((1,)).item() for s in range(400)]),
        "over seeds": np.array([sample_rng(s, "p", 0, ids[:1]).uniform((1,)).item() for s in range(400)]),
        "all": draws.ravel(),
    }
    for what, numbers in neighbours.items():
        assert stats.kstest(numbers, "uniform").pvalue > 1e-3, what
    others = {
        "next draw": draws[:, 1:],
        "next sample": draws[1:],
        "next step": sample_rng(0, "p", 1, ids).uniform((500,)).double().numpy(),
        "next seed": sample_rng(1, "p", 0, ids).uniform((500,)).double().numpy(),
        "next purpose": sample_rng(0, "q", 0, ids).uniform((500,)).double().numpy(),
    }
    for what, other in others.items():
        same = draws[: len(other), : other.shape[1]].ravel()
        assert abs(stats.pearsonr(same, other.ravel()).statistic) < 4.5 / len(same) ** 0.5, what


def test_the_hosts_generator_has_the_same_keys() -> None:
    def draw(*key: int | str) -> list[float]:
        return numpy_rng(*key).random(4).tolist()

    keys = [(0, "p", 0, 0), (1, "p", 0, 0), (0, "q", 0, 0), (0, "p", 1, 0), (0, "p", 0, 1), (0, "p", 0, 2**40)]
    assert draw(0, "p", 0) == draw(*keys[0])
    assert len({tuple(draw(*key)) for key in keys}) == len(keys)
    # sha256 gives keys with the highest bit set as often as not: those must not be rounded or refused
    assert len({tuple(draw(0, "p", step)) for step in range(64)}) == 64


def test_the_hosts_numbers_stay_what_they_were() -> None:
    """As numpy 2.4 gave them for a list of a key and an id: trained runs have their orders from them."""
    small, large = base_key(0, "order", 0), base_key(0, "order", 3)
    assert (small, large) == (7983451878373509741, 10345768136545442123)
    found = [numpy_rng(0, "order", step, 7) for step in (0, 3)]
    words = [generator.bit_generator.state["state"]["key"].tolist() for generator in found]
    assert words == [[small, 7], [10345768136545441792, 7]], "a key above 2**63 is rounded to a float64"
    assert [generator.permutation(10).tolist() for generator in found] == [
        [3, 0, 9, 6, 8, 4, 2, 7, 5, 1],
        [8, 4, 1, 5, 9, 2, 6, 3, 7, 0],
    ]

"""Mixed images: what is drawn, that it belongs to the sample, and that ranks change nothing."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from scipy.stats import beta, kstest
from torch import Tensor

from fulllora_dist.data.batch import Batch
from fulllora_dist.methods.targets import Mixer, TargetSettings

SIDE, CLASSES = 32, 4


def batch(n: int, first: int = 0) -> Batch:
    """Each image of one grey of its own, with labels that differ within a pair."""
    ids = torch.arange(first, first + n)
    greys = (ids.double() + 1) / 10_000
    return Batch(
        greys.view(-1, 1, 1, 1).expand(n, 3, SIDE, SIDE).clone(), ids % CLASSES, ids, torch.ones(n, dtype=torch.bool)
    )


def shares(of: Batch, pixels: Tensor) -> Tensor:
    """Share of each image's own pixels, read off the greys of a pair."""
    own = of.images[:, 0, 0, 0]
    other = own.view(-1, 2).flip(1).flatten()
    return ((pixels.mean(dim=(1, 2, 3)) - other) / (own - other)).clamp(0, 1)


def test_nothing_is_done_unless_asked() -> None:
    for settings in ({}, {"label_smoothing": 0.1}, {"mixup": 1.0, "mix_probability": 0.0}):
        given = batch(7)
        x, y = Mixer(TargetSettings(**settings), 0)(given, 3, CLASSES)
        assert torch.equal(x, given.images)
        assert y is given.labels


@pytest.mark.parametrize("alpha", [0.2, 1.0, 4.0])
def test_mixup_is_of_beta_and_labels_follow_the_pixels(alpha: float) -> None:
    given = batch(4000)
    x, y = Mixer(TargetSettings(mixup=alpha), 5)(given, 3, CLASSES)
    own = shares(given, x)
    assert kstest(own.numpy(), beta(alpha, alpha).cdf).pvalue > 0.01
    flat = x.flatten(1)
    torch.testing.assert_close(flat.min(dim=1).values, flat.max(dim=1).values, rtol=0, atol=1e-12)  # averaged, not cut
    torch.testing.assert_close(y[torch.arange(4000), given.labels], own, rtol=0, atol=1e-9)
    torch.testing.assert_close(y.sum(dim=1), torch.ones(4000, dtype=torch.float64))
    partner = given.labels.view(-1, 2).flip(1).flatten()
    torch.testing.assert_close(y[torch.arange(4000), partner], 1 - own, rtol=0, atol=1e-9)


def test_cutmix_puts_in_a_rectangle_and_labels_follow_its_area() -> None:
    given = batch(4000)
    x, y = Mixer(TargetSettings(cutmix=1.0), 5)(given, 3, CLASSES)
    taken = x[:, 0] != given.images[:, 0]
    rows, columns = taken.any(dim=2), taken.any(dim=1)
    assert torch.equal(taken, rows[:, :, None] & columns[:, None, :])
    for edge in (rows, columns):  # one stretch of rows, one of columns
        assert ((edge[:, 1:] & ~edge[:, :-1]).sum(dim=1) + edge[:, 0] <= 1).all()
    other = given.images.view(-1, 2, 3, SIDE, SIDE).flip(1).flatten(0, 1)
    assert torch.equal(torch.where(taken[:, None], other, given.images), x)
    own = 1 - taken.double().mean(dim=(1, 2))
    torch.testing.assert_close(y[torch.arange(4000), given.labels], own, rtol=0, atol=1e-12)
    # a rectangle that no edge cuts is as high as wide
    whole = ~(rows[:, 0] | rows[:, -1] | columns[:, 0] | columns[:, -1])
    sides = rows.sum(dim=1)[whole]
    assert torch.equal(sides, columns.sum(dim=1)[whole])
    # a side s covers s - s^2 / 4 on average over centres; the square of that over s^2 uniform is 1/2 - 1/5 + 1/48
    assert float((1 - own).mean()) == pytest.approx(1 / 2 - 1 / 5 + 1 / 48, abs=0.015)


def test_both_share_the_mixed_images() -> None:
    given = batch(4000)
    x, _ = Mixer(TargetSettings(mixup=1.0, cutmix=1.0, mix_probability=0.6), 1)(given, 0, CLASSES)
    changed = (x != given.images).flatten(1)
    cut = changed.any(dim=1) & ~changed.all(dim=1)
    blended = changed.all(dim=1)
    assert float(cut.double().mean()) == pytest.approx(0.3, abs=0.04)
    assert float(blended.double().mean()) == pytest.approx(0.3, abs=0.04)


@pytest.mark.parametrize("parts", [1, 2, 4, 8])
def test_ranks_and_micro_batches_change_nothing(parts: int) -> None:
    given = batch(16, first=100)
    mixer = Mixer(TargetSettings(mixup=0.4, cutmix=1.0, mix_probability=0.8), 7)
    whole = mixer(given, 5, CLASSES)
    split = [mixer(part, 5, CLASSES) for part in given.split(parts)]
    for i in (0, 1):
        assert torch.equal(torch.cat([one[i] for one in split]), whole[i])
    assert not torch.equal(mixer(given, 6, CLASSES)[0], whole[0])
    assert not torch.equal(Mixer(mixer.settings, 8)(given, 5, CLASSES)[0], whole[0])


def test_uint8_images_are_mixed_in_pixels() -> None:
    given = batch(4)
    grey = Batch((given.images * 255 * 1000).to(torch.uint8), given.labels, given.ids, given.mask)
    x, y = Mixer(TargetSettings(mixup=1.0), 0)(grey, 0, CLASSES)
    assert x.dtype == y.dtype == torch.float32
    assert x.max() <= 1
    pixels = (grey.images.double() / 255).numpy()
    own = y.double().numpy()[np.arange(4), given.labels.numpy()].reshape(-1, 1, 1, 1)
    expected: Callable[[np.ndarray], np.ndarray] = lambda p: own * p + (1 - own) * p[[1, 0, 3, 2]]  # noqa: E731
    np.testing.assert_allclose(x.numpy(), expected(pixels), atol=1e-6)

"""A training stream whose images change their size on the way, as phases ask for."""

from pathlib import Path

import pytest
import torch

from fulllora_dist.core.errors import UserError
from fulllora_dist.data.loader import TrainStream
from fulllora_dist.data.transforms import TrainTransform


def test_stream_gives_each_size_from_where_it_stands(shards: Path) -> None:
    """The same images in the same order as a stream that has the size from the start."""

    def stream(size: int, workers: int = 0) -> TrainStream:
        return TrainStream(shards, batch_size=8, transform=TrainTransform(size), seed=3, workers=workers)

    changing, small, large = stream(24, workers=1), stream(8), stream(16)
    changing.resize(8)
    first = next(iter(changing))
    changing.commit(1)
    changing.resize(16)
    second = next(iter(changing))
    assert torch.equal(first.images, next(iter(small)).images)
    large.commit(1)
    expected = next(iter(large))
    assert torch.equal(second.images, expected.images)
    assert torch.equal(second.ids, expected.ids)
    assert not torch.equal(first.ids, second.ids)
    with pytest.raises(UserError, match="image size must be >= 1, got 0"):
        changing.resize(0)

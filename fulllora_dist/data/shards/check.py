"""Which images of a source cannot be decoded: all of them, in one pass, before anything is written."""

from collections.abc import Sequence

from tqdm import tqdm

from fulllora_dist.core.errors import UserError
from fulllora_dist.data.decode import decode
from fulllora_dist.data.shards.pool import run_jobs
from fulllora_dist.data.shards.source import SourceImage

_JOB = 200  # images


def unreadable_images(images: Sequence[SourceImage], workers: int, progress: bool) -> dict[str, str]:
    """Name -> what is wrong with it, over `workers` processes. UserError where a file cannot be read at all."""
    jobs = [tuple(images[start : start + _JOB]) for start in range(0, len(images), _JOB)]
    with tqdm(total=len(images), desc="check", unit="img", delay=1, disable=not progress) as bar:
        found = run_jobs(check_images, jobs, workers, lambda job: bar.update(len(job)))
    return dict(sorted(pair for pairs in found for pair in pairs))


def check_images(images: Sequence[SourceImage]) -> list[tuple[str, str]]:
    """(name, what is wrong with it) of those that cannot be decoded."""
    found = []
    for image in images:
        data = image.read()
        try:
            decode(data)
        except UserError as error:
            found.append((image.name, str(error)))
    return found

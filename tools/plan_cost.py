"""What index, plan and position of ImageNet cost one machine; prints one JSON object. Called by benchmark_data.py.

1,281,167 samples in 1,024 shards, global batch 4,096 on 64 ranks of 8 workers: one machine holds 8 ranks, so 72
processes that need the plan. Each is forked here in turn, from a process that has all imports and nothing else; what
counts is the anonymous memory that it then has more, copies of the parent's pages included. The index file
is mapped by all and counted once.
"""

import gc
import json
import os
import pickle
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np

from fulllora_dist.data.index import INDEX_NAME, Index, content_hash
from fulllora_dist.data.position import StreamPosition
from fulllora_dist.data.shards.scan import Shard

SAMPLES, SHARDS, CLASSES = 1_281_167, 1024, 1000
BATCH, WORLD, RANKS, WORKERS = 4096, 64, 8, 8


def imagenet(folder: Path) -> Path:
    """An index of ImageNet's size, without shards."""
    rng = np.random.default_rng(0)
    sizes = rng.integers(50_000, 170_000, SAMPLES)
    rows = np.sort(np.arange(SAMPLES) % SHARDS).astype(np.int32)
    counts = np.bincount(rows)
    offsets = np.concatenate([np.cumsum(part) - part for part in np.split(sizes + 2048, np.cumsum(counts)[:-1])])
    keys = b"".join(b"n%08d/n%08d_%05d" % (i % CLASSES, i % CLASSES, i % 99_999) for i in range(SAMPLES))
    columns = {
        "label": rng.integers(0, CLASSES, SAMPLES),
        "offset": offsets,
        "size": sizes,
        "key_end": np.arange(1, SAMPLES + 1) * (len(keys) // SAMPLES),
        "crc32": rng.integers(0, 1 << 32, SAMPLES, dtype=np.uint32),
        "ext": np.zeros(SAMPLES, dtype=np.uint8),
        "keys": np.frombuffer(keys, dtype=np.uint8),
        "shard": rows,
    }
    shards = tuple(
        Shard(f"train-{i:06d}.tar", int(offsets[rows == i].max() + 200_000), f'"{i:032x}"', f"{i:064x}", int(counts[i]))
        for i in range(SHARDS)
    )
    classes = tuple(f"n{i:08d}" for i in range(CLASSES))
    Index(str(folder), classes, shards, columns, content_hash(classes, columns)).save()
    return folder / INDEX_NAME


def own_memory() -> float:
    """MB that are this process's alone and no file's."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("RssAnon:")[2].split()[0]) / 1000


def in_a_fork(work: Callable[[], object]) -> tuple[float, float]:
    """(seconds, MB of memory that became the process's own) of `work` in a process that keeps its result."""
    reader, writer = os.pipe()
    if (child := os.fork()) == 0:
        gc.collect()
        gc.freeze()
        before, start = own_memory(), time.perf_counter()
        kept = work()
        seconds = time.perf_counter() - start
        os.write(writer, json.dumps([seconds, own_memory() - before, kept is None]).encode())
        os._exit(0)
    os.close(writer)
    with open(reader) as file:
        seconds, mb, _ = json.loads(file.read())
    os.waitpid(child, 0)
    return seconds, mb


def rank_process(folder: str, rank: int) -> tuple[object, ...]:
    index = Index.load(folder)
    position = StreamPosition(index, 0, BATCH)
    return index, position, position.works(WORLD, rank)


def worker_process(sent: bytes, worker: int) -> tuple[object, ...]:
    index, works = pickle.loads(sent)
    stream = works(worker, WORKERS)
    return index, stream, next(stream), next(stream)


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        size = imagenet(Path(folder)).stat().st_size / 1e6
        costs, slowest = [], 0.0
        for rank in range(RANKS):
            costs.append(in_a_fork(partial(rank_process, folder, rank)))
            index, _, works = rank_process(folder, rank)
            sent = pickle.dumps((index, works))
            workers = [in_a_fork(partial(worker_process, sent, worker)) for worker in range(WORKERS)]
            slowest = max(slowest, costs[-1][0] + max(seconds for seconds, _ in workers))
            costs += workers
    result = {
        "seconds": slowest,  # from a rank's start to its slowest worker's second batch
        "seconds_of_all_processes": sum(seconds for seconds, _ in costs),
        "mb": size + sum(mb for _, mb in costs),
        "mb_of_a_process": max(mb for _, mb in costs),
        "index_mb": size,
        "processes": len(costs),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()

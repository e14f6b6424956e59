"""Pictures from shards to batches.

The way of a picture, one room each:

`write` turns an image folder, or a tar of one (`source` lists either), into WebDataset shards. `scan` is the strict
pass that re-reads each finished shard and finds its samples; `index` joins them and owns the index file: one row a
sample, and a sample's id is its row. `plan` is a pure function: which ids form global batch b of an epoch, and which
of them a rank holds. `reader` fetches the bytes of one row and checks length and crc32. `decode` makes a uint8 tensor
of them; every random decision of an augmentation comes from a generator keyed by (seed, epoch, sample id). `loader`
drives plan, reader and decode, in processes that `workers` keeps in order, and yields `batch.Batch`; it never counts:
the trainer commits how many steps it has taken.

Only `reader` and `scan` know that shards are local files.
"""

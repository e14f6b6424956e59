"""Images from shards to batches.

The way of an image, one room each:

`write` turns images (`source` lists them, `labels` knows classes that no folder tells) into WebDataset shards,
`indexing` reads shards that are there already. `scan` is the strict pass of both over one shard, on `tar`; `index`
joins what it found: one row a sample, and a sample's id is its row. `index_file` is how that lies on disk to be
mapped, `index_cache` fetches it.

`plan` and `progress` are pure: which ids form global batch b of an epoch, what a rank and worker read of them, and
how far a run has come. `reader` gives the bytes of a row, checked; from a store by `ranges`, kept by `cache`.
`images` makes RGB of them and `decode` a uint8 tensor; every random decision (`randaugment` too) comes from a
generator keyed by (seed, epoch, sample id). `parts` does all this in processes that `workers` keeps in order; `loader`
joins what they made and yields `batch.Batch`, `shard_stream` yields webdataset's dicts instead. Neither counts: the
trainer commits how many steps it has taken.

`urls` and `store` alone know where files lie.
"""

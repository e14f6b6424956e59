"""Images from shards to batches.

`shards/` turns images and tars into data that training can address: `make` writes WebDataset shards (`source` lists the
images, `labels` knows the classes that no folder tells, `classes` orders them, `selection` chooses and holds out,
`check` finds what cannot be decoded, `write` makes one shard); `indexing` reads existing shards. Both rest on `scan`,
the strict pass over one shard (`members` makes samples of what `tar` reads, `fields` knows image and label); `pool`
runs them in processes, `leftovers` knows the names that tools leave.

`index` joins the scans: one row a sample, and a sample's id is its row. `index_file` is its layout on disk, mapped and
shared by processes; `index_cache` fetches a remote one.

`plan` and `position` are pure: which ids form global batch b of an epoch, what a rank and worker read of them, and how
far a run has come. `subset` says which samples an evaluation takes. `reader` gives the bytes of a sample, checked
(remote ones by `storage.ranges`). `decode` makes an RGB image of them and `transforms` the uint8 tensor of training or
evaluation; every random decision (torchvision's too) comes from a generator keyed by (seed, epoch, sample id).

`worker_dataset` does this in worker processes, which `workers` starts and ends; `loader` joins their parts and yields
`batch.Batch`, `shard_stream` yields webdataset's dicts instead. Neither counts: the trainer commits its steps.
"""

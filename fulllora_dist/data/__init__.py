"""Images from shards to batches.

docs/architecture.md follows an image through these modules; docs/data.md is for users. An index has one row a sample,
and a sample's id is its row. Which ids form batch b of an epoch, what a rank and worker read of them and how far a run
has come are pure functions of numbers. Every random decision comes from a generator keyed by (seed, epoch, sample id).
The streams do not count: the trainer commits how many batches it has trained on.
"""

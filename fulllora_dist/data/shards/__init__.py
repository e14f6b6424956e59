"""Images and tars to shards, and shards to an index; the map is in `fulllora_dist/data/__init__.py`."""

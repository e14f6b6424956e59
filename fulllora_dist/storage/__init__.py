"""Files and byte ranges on disks, in buckets and over HTTP; retries and a local cache."""

"""One YAML file and key=value overrides, checked into a `Config`."""

"""Reference PyTorch modules and sampler (needs the `export` extra)."""

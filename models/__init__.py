"""Pure PyTorch: networks, losses, samplers, codecs. Knows nothing of Ray, Parquet or ranks."""

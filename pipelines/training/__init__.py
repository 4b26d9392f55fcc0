"""The one training loop (Ray Train + DeepSpeed) and its objectives."""

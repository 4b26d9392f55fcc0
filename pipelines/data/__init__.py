"""Contracts, store, manifests, media decoding and the features pipeline."""

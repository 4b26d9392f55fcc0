"""Mutated media files against the whole of preprocess: `python -m tests.fuzz.media --files 10000 --seed 0`."""

"""What moves data: contracts, store, stages, Ray Data pipelines, the training loop, rounds, evaluation."""

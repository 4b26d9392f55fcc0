"""Metrics, evaluation of a model and the listening page."""

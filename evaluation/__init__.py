"""Metrics of samples and models, and the report of evaluate.py."""

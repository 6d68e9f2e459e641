"""Metrics, tables and figures of a model's predictions."""

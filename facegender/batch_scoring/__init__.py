"""Millions of images on Spark."""

"""The results on one page."""

"""Scripts that `make` runs."""

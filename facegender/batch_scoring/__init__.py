"""Label millions of images on Spark."""

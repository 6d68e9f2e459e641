"""From a source of images to arrays."""

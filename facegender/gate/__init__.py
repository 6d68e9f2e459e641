"""Is the new model worse than the one before it?"""

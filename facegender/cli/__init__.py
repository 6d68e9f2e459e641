"""The command `facegender`."""

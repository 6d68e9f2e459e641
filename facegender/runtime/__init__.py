"""What every command and stage does."""

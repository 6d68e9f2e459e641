"""Tasks that commands and stages share."""

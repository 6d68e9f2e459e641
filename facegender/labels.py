"""The two labels, by name and by number; imports nothing."""

LABELS = {"female": 0, "male": 1}
NAMES = {label: name for name, label in LABELS.items()}

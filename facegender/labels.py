"""The two labels, by name and by number, for modules that must be light to import."""

LABELS = {"female": 0, "male": 1}
NAMES = {label: name for name, label in LABELS.items()}

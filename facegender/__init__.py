"""Train and judge a MobileNet that labels face photos by perceived gender, reproducibly."""

# Models logged before the package had folders import facegender.images, facegender.litert and
# facegender.prediction (docs/decisions.md). Look for these names here last.
__path__.append(f"{__path__[0]}/old_names")

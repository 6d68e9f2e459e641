"""Train and judge a MobileNet that labels face photos by perceived gender, reproducibly."""

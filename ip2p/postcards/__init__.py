"""The drawn world: scenes whose every edit has a known right answer, and the model family trained on them."""

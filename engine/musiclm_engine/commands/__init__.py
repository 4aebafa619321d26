"""The commands of `musiclm`. Heavy imports stand inside them, so that `--help` is quick."""

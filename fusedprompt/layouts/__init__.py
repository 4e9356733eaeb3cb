"""Where prompt rows, tokens and padding stand in a batch: index arithmetic, which knows no model."""

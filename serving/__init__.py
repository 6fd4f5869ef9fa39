"""From Redis to a ranking request."""

"""Data, losses, loop and metrics: used from a checkout, not shipped in the wheel."""

"""What a stranger can do to a farm."""

"""What a step costs, and how many there are a second."""

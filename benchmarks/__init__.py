"""What this project costs and what others cost, measured in the same run; README.md says what is where."""

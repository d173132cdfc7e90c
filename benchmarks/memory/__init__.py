"""What a farm, a pool and a replay hold."""

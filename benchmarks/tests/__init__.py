"""The benchmarks count what they say."""

"""The scheduler's half of the cache: it answers requests from the directory and writes plans. Start with cache.py."""

"""The worker's half of the cache, one for each rank: it owns memory and tiers and carries out plans. Start with worker.py."""

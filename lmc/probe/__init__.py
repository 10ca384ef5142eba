"""Instruments that look at the cache from outside: transfer rates, the live statistics table, chunk files."""

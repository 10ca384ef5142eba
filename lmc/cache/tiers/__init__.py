"""Stores of chunk bytes below the host. A tier puts, gets, deletes and scans; it takes no decision."""

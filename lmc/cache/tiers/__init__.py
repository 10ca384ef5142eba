"""Where chunk bytes live. A tier puts, gets, deletes and scans; it takes no decision."""

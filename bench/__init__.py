"""Side-by-side measurements: each prints a table and writes JSON (and a figure where people would rather look)."""

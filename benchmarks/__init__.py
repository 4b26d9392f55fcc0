"""Speed as a ratio to a stated baseline, measured in the same run: each script prints a table and can write JSON."""

"""Which clips of a features dataset are worth learning from: measures, predicates over them, and a page to look at."""

"""The doors: one file a job, each a frozen dataclass of options and a main that composes."""

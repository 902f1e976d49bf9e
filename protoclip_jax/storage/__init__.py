"""Files that last: atomic writes, locks, paths local or remote."""

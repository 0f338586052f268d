"""Speed and memory beside peers and ceilings, one subject a module; each has `run`, and most a tiny `check`."""

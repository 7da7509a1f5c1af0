"""Training: what (recipe), one step (step), the whole way (loop), and what is left behind (checkpoint, report)."""

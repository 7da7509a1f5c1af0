"""A bundle behind HTTP: TorchServe in front, batching, label cache, probes and metrics behind it."""

"""A trained CLIP as a bundle: written by `build`, opened by `bundle`.

Opening needs torch, pydantic and tokenizers alone, so that a serving worker starts in seconds; what writes bundles
(`build`, `formats`, `shipped`, `command`) is imported by its own name.
"""

import os

# ONNX Runtime sends usage data to its maker unless this is set before it is imported; "0" from outside allows it again
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

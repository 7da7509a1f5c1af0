"""A trained CLIP as a bundle: written by `build`, opened by `bundle`.

Opening needs torch, pydantic and tokenizers alone, so that a serving worker starts in seconds; what writes bundles
(`build`, `formats`, `shipped`, `command`) is imported by its own name.
"""

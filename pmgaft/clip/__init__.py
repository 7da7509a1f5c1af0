"""A CLIP as this project sees it: pixels in [0, 1] or strings in, unit features out. Import the modules you need."""

"""One file per model family: where it keeps its weights, and its drop-in classes."""

"""The classifier: from a conversation to calibrated scores."""

"""From many waiting callers to full batches of the model, and back to each caller."""

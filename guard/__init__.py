"""Guard: a safety moderation service for conversations, with its model embedded."""

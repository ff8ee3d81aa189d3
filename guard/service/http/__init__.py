"""The HTTP port: what machines watch, and the moderation APIs that other software speaks already."""

"""Policies: from YAML as its owner writes it to a verdict on scores."""

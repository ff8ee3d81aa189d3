"""What a filter in front of a generation backend must know: its APIs, their events, and how a reply is held back."""

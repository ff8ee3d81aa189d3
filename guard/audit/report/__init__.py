"""The report of an audit: its numbers, as a page to look at, in Markdown and as JSON."""

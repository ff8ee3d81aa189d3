"""Months of logs through a policy: read, judged, written down, and told in a report. Needs the extra `audit`."""

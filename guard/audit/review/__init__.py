"""What people say of an audit: a sample for them to judge, and what their labels tell of the policy."""

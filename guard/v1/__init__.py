"""The wire, generated from protos/guard/v1 by `make protos`."""

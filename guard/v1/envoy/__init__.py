"""Generated from protos/guard/v1/envoy by `make protos`."""

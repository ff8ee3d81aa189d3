"""The shell around the engine: gRPC in front of it, metrics and health beside it."""

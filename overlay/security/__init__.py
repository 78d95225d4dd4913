"""Certificates: who a process or a caller is, and how it gets to be that. Knows no gRPC."""

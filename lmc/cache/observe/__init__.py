"""Observation of a running cache: metrics, spans of requests, the lookup trace and log lines."""

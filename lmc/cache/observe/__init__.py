"""What a running cache says of itself: metrics, spans of requests, the lookup trace and log lines."""

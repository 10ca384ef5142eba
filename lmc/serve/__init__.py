"""Run an inference engine with the cache on, as a child process."""

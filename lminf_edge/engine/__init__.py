"""Requests and the scheduler that serves them, in a thread of its own (engine) or in the caller's."""

"""Requests to steps: KV blocks and the prefix tree, the scheduler, the step loop, events, metrics. No model, no bytes."""

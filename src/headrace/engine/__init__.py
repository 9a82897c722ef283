"""Requests to steps: KV blocks and the prefix tree, scheduler, step loop, events, metrics. No model, no bytes."""

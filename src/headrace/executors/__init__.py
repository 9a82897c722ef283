"""What runs the engine's steps: native, torch, simulated; the KV pool's bytes; the sampler."""

"""What a machine can do at best: its calibration, and the limits that follow for a model."""

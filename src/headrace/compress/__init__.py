"""Making a model smaller, and saying what that did to it: rounding with and without calibration, a gate, a card."""

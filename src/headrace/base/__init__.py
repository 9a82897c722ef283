"""What every layer may import: errors with remedies, settings from the environment, time, small types."""

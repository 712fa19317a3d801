"""Watching a running cache: sampled checks against 16-bit attention, limits with hysteresis, responses, metrics.

Knows no engine: `integrations` feeds it, `cli` runs the sidecar.
"""

"""Calibration: observe a model, estimate what each part of its cache costs at fewer bits, allocate, verify."""

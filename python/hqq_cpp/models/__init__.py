"""Functions for whole models of torch: quantize, make dense again, report, save and load.

No library of models is imported here. Those that keep records of quantized models listen
(listeners.py).
"""

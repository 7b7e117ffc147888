"""Live sessions over gRPC: what runs inside Triton Inference Server, and what starts it.

Nothing here needs torch, or the packages that build and calibrate.
"""

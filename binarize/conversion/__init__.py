"""Conversion: check, rewire, swap and attach; what comes out of a converted model; packing; accounting."""

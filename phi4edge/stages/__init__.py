"""The stations of the flow that touch disk and clocks: calibrate, quantize, export, verify."""

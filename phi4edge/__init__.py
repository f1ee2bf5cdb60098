"""phi4edge: Phi-4 on a machine of your own, with every figure measured."""

__version__ = "0.1.0"

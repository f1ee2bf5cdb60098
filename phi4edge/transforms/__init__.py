"""Transforms of weights that leave the function as it is (AWQ scaling, rotation): one file each."""

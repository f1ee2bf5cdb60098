"""Corpora, the streamed forward pass, Hessians and the imatrix."""

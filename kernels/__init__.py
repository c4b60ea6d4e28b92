"""The seam to fast operations: one a file, each with its formula, a reference in torch, and behind the same name the
implementation of a well-kept library where there is one. Callers never branch."""

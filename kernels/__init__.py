"""Fast operations, one per file: the formula, a reference in torch and, under the same name, the implementation of a
well-kept library where there is one.  Callers never branch."""

"""Numerical checks of theorems, in float64: what each one predicts, beside what is computed."""

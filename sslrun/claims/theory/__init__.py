"""Statements with a proof, run: what a theorem predicts beside what the numbers give, in float64."""

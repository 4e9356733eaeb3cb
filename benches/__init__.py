"""Benchmarks of fusedprompt against PEFT; see README.md."""

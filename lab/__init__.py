"""What is done with the method: toy world, bench, memory plan, pictures, best-of-N. `python -m lab.NAME` runs one."""

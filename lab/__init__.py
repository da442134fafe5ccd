"""What is done with the method: the toy world, the bench, the memory plan, pictures, best-of-N. Run with `python -m lab.NAME`."""

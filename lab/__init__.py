"""A shelf: what is done with the method. Each folder has a README.md; `python -m lab.NAME` runs one."""

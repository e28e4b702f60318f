"""Moving handwritten digits: the data, the trained teacher and the script that trained it."""

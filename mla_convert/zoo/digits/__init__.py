"""Moving handwritten digits: the data, the trained teacher, the script that trained it, and a frame classifier."""

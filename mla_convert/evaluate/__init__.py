"""Evidence about a converted model: fidelity, memory and the report."""

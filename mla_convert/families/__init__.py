"""One file a model family; each exports `FAMILY` and is found by `mla_convert.registry`."""

"""One file a model family; each exports `FAMILY` and is found by `mla_convert.registry`.

Importing this package makes the families' classes attributes of `diffusers` (see `base.Family`), so that
an entry `["diffusers", "MLAWanTransformer3DModel"]` of a pipeline's model_index.json loads.
"""

from .. import registry

# Other packages' families are looked for later: they import this package themselves.
registry.own(__name__, "FAMILY")

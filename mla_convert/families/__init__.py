"""Holds one file per model family; each exports `FAMILY`, which `mla_convert.registry` finds.

Importing this package makes the families' classes attributes of `diffusers` (see `base.Family`), so an entry
`["diffusers", "MLAWanTransformer3DModel"]` of a pipeline's model_index.json loads.
"""

from .. import registry

# Families of other packages are found later, because those packages import this one.
registry.own(__name__, "FAMILY")

"""One file a model family; each exports `FAMILY` and is found by `mla_convert.registry`.

Importing this package makes the families' classes attributes of `diffusers`, so that an entry
`["diffusers", "MLAWanTransformer3DModel"]` of a pipeline's model_index.json loads.
"""

from __future__ import annotations

import sys

import diffusers

from .. import registry

for _family in registry.families().values():
    for _class in (_family.dense_class, _family.mla_class):
        setattr(diffusers, _class.__name__, _class)
        # A pipeline that is saved names the class by its module, in which diffusers then looks for the base class.
        vars(sys.modules[_class.__module__])["ModelMixin"] = diffusers.ModelMixin

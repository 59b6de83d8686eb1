"""Every registered method and variant, and the form that its paper and released code give its layers."""

from dataclasses import dataclass, field, replace
from typing import Any

from closed_forms import Form

import binarize
from binarize.methods import Method, get_method


@dataclass(frozen=True)
class Case:
    """A method with options, and what its layers compute: ``first`` until ``switch`` of the training, then ``form``."""

    name: str
    form: Form
    options: dict[str, Any] = field(default_factory=dict)
    first: Form | None = None
    switch: float = 0.0

    @property
    def method(self) -> Method:
        return get_method(self.name, **self.options)

    def __str__(self) -> str:
        return self.name + "".join(f"-{key}={value}" for key, value in self.options.items())

    def at(self, progress: float) -> Form:
        return self.first if self.first is not None and progress < self.switch else self.form


REACTNET = {"pre": "shift", "norm": True, "post": "rprelu", "shortcut": "identity", "post_last": True}
BIDIFFSR = Form("approx", "scaled", pre="shift", post="rprelu", shortcut="identity")
TWO_STAGE = [Form("approx", weight, **REACTNET) for weight in ("real", "scaled")]
TAU = {"tau_min": 0.6, "tau_max": 0.9}
IRNET = {"norm": True, "post": "hardtanh", "shortcut": "identity", "post_last": True}

DEFAULTS = [
    Case("custom", Form("ste", "scaled")),
    Case("bnn", Form("ste", "sign", norm=True, post="hardtanh")),
    Case("xnor", Form("ste", "xnor", norm=True)),
    Case("xnor++", Form("ste", "sign", scale="channel", norm=True)),
    Case("dorefa", Form("round", "tensor", norm=True)),
    Case("bireal", Form("approx", "scaled", norm=True, shortcut="identity")),
    Case("irnet", Form("ede", "libra", **IRNET)),
    Case("reactnet", Form("approx", "scaled", **REACTNET)),
    Case("recu", Form("recu", "recu", scale="channel", **IRNET)),
    Case("bbcu", BIDIFFSR),
    Case("bidiffsr", BIDIFFSR),
    Case("bidm", Form("approx", "scaled", pre="shift", scale="k_map", shortcut="factor")),
    Case("binarydm", Form("ste", "two_basis", shortcut="magnitude")),
    Case("bimacosr", Form("approx", "scaled", scale="k_box", post="rprelu", branch=True)),
]

VARIANTS = [
    Case("bnn", Form("identity", "sign_identity", norm=True, post="hardtanh"), {"variant": "original"}),
    Case("xnor", Form("mean", "scaled", norm=True), {"variant": "bibench"}),
    Case("xnor", Form("ste", "xnor", pre="batch_norm"), {"norm_position": "before"}),
    Case("xnor", Form("ste", "xnor", norm=True, options=(("sgd", 1),)), {"sgd": True}),
    Case("xnor", Form("ste", "xnor", scale="k_map", norm=True), {"scale": "k_map"}),
    Case("xnor++", Form("ste", "sign", scale="channel", norm=True), {"size": (8, 9)}),
    Case("dorefa", Form("ste", "scaled", norm=True), {"variant": "bibench"}),
    Case("bireal", Form("approx", "scaled", norm=True, shortcut="identity"), {"shortcut": True}),
    Case("irnet", Form("ede", "libra", options=(("t_min", 1e-3),), **IRNET), {"t_min": 1e-3}),
    Case("reactnet", TWO_STAGE[1], {"two_stage": 0.5}, first=TWO_STAGE[0], switch=0.5),
    Case("recu", Form("recu", "recu", scale="channel", options=tuple(TAU.items()), **IRNET), TAU),
    Case("bidiffsr", BIDIFFSR, {"groups": 2}),
    Case("bidiffsr", BIDIFFSR, {"tar": False}),
    Case("bidiffsr", BIDIFFSR, {"taa": False}),
    Case("bidiffsr", Form("approx", "scaled", pre="shift", post="rprelu"), {"shortcut": False}),
    Case("binarydm", Form("ste", "two_basis", shortcut="identity"), {"shortcut": True}),
]

# More bits than one: BWN, BinaryDM's W1A32 and W1A4, W1A8, DoReFa's W1A2; ternary weights with each kind of activation.
LSQ4, LSQ8 = ({"name": "lsq", "bits": bits} for bits in (4, 8))
UNIT2 = {"name": "unit_round", "bits": 2}
BITS = [
    Case("xnor", Form("none", "xnor", norm=True), {"activation": "none"}),
    Case("binarydm", Form("none", "two_basis", shortcut="magnitude"), {"activation": "none"}),
    Case("binarydm", Form("lsq", "two_basis", shortcut="magnitude", options=(("bits", 4),)), {"activation": LSQ4}),
    Case("bidiffsr", replace(BIDIFFSR, activation="lsq"), {"activation": LSQ8}),
    Case("dorefa", Form("round", "tensor", norm=True, options=(("bits", 2),)), {"activation": UNIT2}),
    Case("custom", Form("ste", "twn"), {"weight": "twn"}),
    Case("custom", Form("none", "twn_filter"), {"weight": {"name": "twn", "per_filter": True}, "activation": "none"}),
    Case("custom", Form("lsq", "absmean"), {"weight": "absmean", "activation": LSQ8}),
]

CASES = DEFAULTS + VARIANTS + BITS
# What the toolkit registers; other tests register methods of their own.
METHODS = [name for name in binarize.list_methods() if type(get_method(name)).__module__.startswith("binarize.")]

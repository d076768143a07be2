"""What options choose from. The library has the same lists beside its code, which needs torch; a test compares them."""

ENGINES = ("auto", "replay", "plain")
ENGINE_MEMORY = 2048
"""MiB that the replay engine may use by default."""
ENGINE_CHECKS = 2
"""Cells that an engine checks by default."""
KINDS = ("hidden", "mlp", "attention")
"""Kinds of sites that a trace restores by default."""
SITES = (*KINDS, "heads", "vision", "projector")
METRICS = ("probability", "log_probability", "logit_difference")
DIRECTIONS = ("restore", "corrupt")
EFFECTS = ("total", "direct")
SPELLINGS = (
    "swap:other.jpg, replace:Paris city, text-noise:3, image-noise:3, pixel-noise:3, blank, blur:10, "
    "boxes:0,0,50,50;60,0,99,50, zero:image or mean:one.jpg,two.jpg; a noise of :auto is calibrated"
)
"""One example of each corruption."""
PROJECTIONS = ("mlp", "attention")
MOMENT_KINDS = ("all", "image", "question", "template", "text")
EDITORS = ("multedit", "rome", "memit", "emmet", "alphaedit")
"""Closed-form editors."""
BASELINES = ("ft", "ft-l", "lora", "in-context")
SEQUENCE_LENGTHS = (1, 10, 20, 30, 100, 200, 300, 500, 1000)
"""Numbers of edits after which a sequence is measured by default."""
SPLITS = ("outdated", "long_tail")
"""Edits of the built-in world."""
SHAPES = ("base", "small", "llava-7b")
"""Sizes of the random models that benchmarks run on."""
SOLVE_WIDTH = 11008
"""Width of the weight that the benchmark of the solve uses by default."""
DATA_FORMATS = (
    "lines",
    "vqa-constraints",
    "mmedit",
    "vlkeb",
    "mmke",
    "cckeb",
    "counterfact",
    "zsre",
    "okvqa",
    "gqa-flow",
)
"""Formats of data files that are read."""
DATA_FORMS = ("lines", "mmedit", "counterfact", "zsre")
"""Forms in which data files are written."""
